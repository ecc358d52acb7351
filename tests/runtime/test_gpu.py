"""The dozen CUDA calls: against the real package's names, a fake driver, and a fake pycuda."""

from __future__ import annotations

import builtins
import ctypes
import enum
import gc
import inspect
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bundle.errors import DeviceError
from runtime import gpu
from runtime.cuda_errors import cuda_error
from runtime.gpu import CudaBindings, Device, open_cuda
from runtime.gpu_pycuda import PyCuda

ARGUMENTS = {
    "cuInit": 1, "cuDeviceGet": 1, "cuDevicePrimaryCtxRetain": 1, "cuCtxSetCurrent": 1, "cuDeviceGetName": 2, "cuDeviceTotalMem": 1,
    "cuDriverGetVersion": 0, "cuDeviceGetAttribute": 2, "cuMemGetInfo": 0, "cuMemAlloc": 1, "cuMemFree": 1, "cuMemHostAlloc": 2,
    "cuMemHostGetDevicePointer": 2, "cuMemFreeHost": 1, "cuStreamCreate": 1, "cuStreamDestroy": 1, "cuStreamSynchronize": 1,
    "cuMemcpyHtoDAsync": 4, "cuMemcpyDtoHAsync": 4, "cuMemcpyDtoDAsync": 4, "cuMemsetD8Async": 4, "cuEventCreate": 1,
    "cuEventRecordWithFlags": 3, "cuEventElapsedTime": 2, "cuEventDestroy": 1, "cuStreamBeginCapture": 2, "cuStreamEndCapture": 1,
    "cuGraphInstantiate": 2, "cuGraphDestroy": 1, "cuGraphLaunch": 2, "cuGraphExecDestroy": 1, "cuGetErrorName": 1, "cuGetErrorString": 1,
}  # fmt: skip


def test_the_real_package_has_what_is_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    source = inspect.getsource(CudaBindings)
    called = set(re.findall(r"\.(cu[A-Z]\w+)\b", source))
    assert called == set(ARGUMENTS)
    for name, count in ARGUMENTS.items():
        signature = getattr(driver, name).__doc__.split("\n")[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        assert len([word for word in inside.split(",") if word.strip()]) == count, signature
    for name in set(re.findall(r"\bCU_\w+", source)):
        assert any(hasattr(holder, name) for holder in (driver, *_enums(driver))), name
    assert hasattr(driver, "CU_MEMHOSTALLOC_DEVICEMAP")


def _enums(driver: Any) -> tuple[Any, ...]:
    names = ("CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUevent_record_flags", "CUstreamCaptureMode")
    return tuple(getattr(driver, name) for name in names)


def test_a_machine_without_a_driver() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvhost-gpu").exists():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(DeviceError, match="no NVIDIA driver") as caught:
        open_cuda()
    assert caught.value.absent
    assert "ort:cpu" in caught.value.hint


def test_neither_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] in ("cuda", "pycuda"):
            raise ImportError(f"no {name}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DeviceError, match="Python cannot talk to CUDA") as caught:
        open_cuda()
    assert caught.value.absent
    assert "cuda-bindings" in caught.value.hint


def test_pycuda_is_taken_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("no cuda-bindings")

    driver = fake_pycuda()
    monkeypatch.setattr(gpu, "_import_driver", missing)
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    assert open_cuda().name == "pycuda"


@pytest.mark.parametrize(
    ("code", "text", "sticky", "absent"),
    [
        (2, "out of GPU memory", False, False),
        (35, "too old", False, False),
        (803, "too old", False, False),
        (36, "too old", False, False),
        (46, "CUDA failed", False, False),  # another process has the GPU for itself; this one may go on without
        (100, "no NVIDIA GPU", False, True),
        (226, "the GPU failed", True, False),
        (700, "the GPU failed", True, False),
        (719, "the GPU failed", True, False),
        (999, "the GPU failed", True, False),
        (1, "CUDA failed", False, False),
    ],
)
def test_errors_by_code(code: int, text: str, sticky: bool, absent: bool) -> None:
    error = cuda_error("launching", code, "CUDA_ERROR_X", "words")
    assert text in error.what
    assert (error.sticky, error.absent) == (sticky, absent)
    assert f"CUDA_ERROR_X ({code}): words" in str(error)


def test_the_errors_after_which_a_process_must_end() -> None:
    """CUDA's documentation says of each whether the process must be relaunched."""
    driver = pytest.importorskip("cuda.bindings.driver")
    lost = {int(code) for code in driver.CUresult if "relaunched" in (code.__doc__ or "")}
    if not lost:
        pytest.skip("this cuda-bindings does not document its error codes")
    assert lost >= {700, 719}
    assert {code for code in lost if not cuda_error("working", code, "", "").sticky} == set()


# --- cuda-bindings on a fake driver -------------------------------------------------------------------------------------------


class FakeDriver:
    """Answers as cuda-bindings does: a tuple that begins with the error."""

    CU_MEMHOSTALLOC_DEVICEMAP = 2

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers
        self._memory: list[Any] = []
        for name in (
            "CUdevice_attribute",
            "CUstream_flags",
            "CUevent_flags",
            "CUevent_record_flags",
            "CUstreamCaptureMode",
        ):
            setattr(self, name, _Names())

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == ARGUMENTS[name], name
            self.calls.append((name, arguments))
            answer = self._answers.get(name)
            if callable(answer):
                return answer(*arguments)  # type: ignore[no-any-return]
            if answer is not None:
                return answer  # type: ignore[no-any-return]
            if name == "cuMemHostAlloc":
                self._memory.append((ctypes.c_uint8 * arguments[0])())
                return (0, ctypes.addressof(self._memory[-1]))
            return (0, 7) if name not in ("cuMemGetInfo",) else (0, 5, 9)

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


def test_the_device() -> None:
    values = {
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 8,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 7,
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 8,
        "CU_DEVICE_ATTRIBUTE_INTEGRATED": 1,
    }
    driver = FakeDriver(
        cuDeviceGetName=(0, b"Orin\0\0\0"),
        cuDeviceGetAttribute=lambda attribute, device: (0, values[attribute]),
        cuDeviceTotalMem=(0, 16 << 30),
        cuDriverGetVersion=(0, 12060),
    )
    cuda = CudaBindings(driver)
    assert driver.names == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert cuda.device() == Device("Orin", 87, 8, 16 << 30, True, 12060)
    assert cuda.free_bytes() == 5


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Orin", "orin"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"), ("NVIDIA H200", "h200"), ("...", "gpu")],
)
def test_slugs(name: str, slug: str) -> None:
    assert Device(name, 87, 8, 1, False, 12060).slug == slug


def test_host_memory_is_the_memory_itself() -> None:
    driver = FakeDriver(cuMemHostGetDevicePointer=(0, 0xBEEF))
    cuda = CudaBindings(driver)
    buffer = cuda.allocate_host(16, mapped=True)
    assert ("cuMemHostAlloc", (16, 2)) in driver.calls
    buffer.array[:] = 9
    assert bytes(driver._memory[0]) == b"\x09" * 16
    assert buffer.device_pointer == 0xBEEF
    assert cuda.allocate_host(16, mapped=False).device_pointer == 0
    cuda.release_host(buffer)
    assert driver.calls[-1] == ("cuMemFreeHost", (buffer.owner,))


def test_copies_and_events() -> None:
    driver = FakeDriver(cuEventElapsedTime=(0, 1.5))
    cuda = CudaBindings(driver)
    host = cuda.allocate_host(16, mapped=False)
    driver.calls.clear()
    cuda.to_device(100, host, 3)
    cuda.to_host(host, 100, 3)
    cuda.on_device(100, 200, 16, 3)
    cuda.zero(100, 16, 3)
    cuda.record(5, 3)
    cuda.record(5, 3, captured=True)
    assert cuda.elapsed_ms(5, 6) == 1.5
    assert driver.calls == [
        ("cuMemcpyHtoDAsync", (100, host.owner, 16, 3)),
        ("cuMemcpyDtoHAsync", (host.owner, 100, 16, 3)),
        ("cuMemcpyDtoDAsync", (100, 200, 16, 3)),
        ("cuMemsetD8Async", (100, 0, 16, 3)),
        ("cuEventRecordWithFlags", (5, 3, "CU_EVENT_RECORD_DEFAULT")),
        ("cuEventRecordWithFlags", (5, 3, "CU_EVENT_RECORD_EXTERNAL")),
        ("cuEventElapsedTime", (5, 6)),
    ]


def test_a_graph_is_made_and_its_draft_destroyed() -> None:
    driver = FakeDriver(cuStreamEndCapture=(0, 11), cuGraphInstantiate=(0, 12))
    cuda = CudaBindings(driver)
    driver.calls.clear()
    cuda.begin_capture(3)
    assert cuda.end_capture(3) == 12
    cuda.launch(12, 3)
    cuda.release_graph(12)
    assert driver.calls == [
        ("cuStreamBeginCapture", (3, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")),
        ("cuStreamEndCapture", (3,)),
        ("cuGraphInstantiate", (11, 0)),
        ("cuGraphDestroy", (11,)),
        ("cuGraphLaunch", (12, 3)),
        ("cuGraphExecDestroy", (12,)),
    ]


def test_a_graph_that_cannot_be_instantiated_is_destroyed() -> None:
    driver = FakeDriver(
        cuStreamEndCapture=(0, 11),
        cuGraphInstantiate=(801, None),
        cuGetErrorName=(0, b"CUDA_ERROR_NOT_SUPPORTED"),
        cuGetErrorString=(0, b"operation not supported"),
    )
    cuda = CudaBindings(driver)
    with pytest.raises(DeviceError, match=r"instantiating a graph(?s:.*)CUDA_ERROR_NOT_SUPPORTED \(801\)"):
        cuda.end_capture(3)
    assert ("cuGraphDestroy", (11,)) in driver.calls


@pytest.mark.parametrize("answer", [(901, None), (0, 11), (0, 0)])
def test_a_capture_is_abandoned_without_an_error(answer: Any) -> None:
    driver = FakeDriver(cuStreamEndCapture=answer)
    CudaBindings(driver).abandon_capture(3)
    assert ("cuGraphDestroy" in driver.names) == (answer == (0, 11))


@pytest.mark.parametrize(("code", "sticky"), [(12345, False), (911, True)])
def test_a_code_that_the_package_does_not_know(code: int, sticky: bool) -> None:
    """cuda-bindings makes an enumeration's member of what the driver says, and a newer driver has codes that the package has not."""

    def answer(*_: Any) -> Any:
        raise ValueError(f"{code} is not a valid CUresult")

    cuda = CudaBindings(FakeDriver(cuStreamSynchronize=answer, cuStreamEndCapture=answer))
    with pytest.raises(DeviceError, match=rf"waiting for the GPU(?s:.*)unknown error \({code}\)") as caught:
        cuda.synchronize(3)
    assert caught.value.sticky == sticky
    cuda.abandon_capture(3)
    with pytest.raises(DeviceError, match="starting CUDA") as caught:
        CudaBindings(FakeDriver(cuInit=answer))
    assert not caught.value.absent


def test_the_real_package_raises_what_is_understood() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(ValueError, match=gpu._UNKNOWN_CODE.pattern):
        driver.CUresult(12345)


def test_a_wrong_argument_stays_what_it_is() -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("negative size")

    with pytest.raises(ValueError, match="negative size"):
        CudaBindings(FakeDriver(cuMemAlloc=refuse)).allocate(-1)


# --- pycuda -------------------------------------------------------------------------------------------------------------------


def fake_pycuda(**failing: Exception) -> Any:
    """The part of pycuda.driver that is used, by its documentation."""
    calls: list[tuple[Any, ...]] = []

    class Error(Exception):
        pass

    class LogicError(Error):
        pass

    class MemoryError(Error):  # pycuda's own, of this name
        pass

    def note(name: str, result: Any = None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, *arguments))
            if name in failing:
                raise failing[name]
            return result() if callable(result) else result

        return call

    class Allocation:
        def __int__(self) -> int:
            return 4096

        def free(self) -> None:
            calls.append(("free",))

    class Base:
        def get_device_pointer(self) -> int:
            return 0xBEEF

    class Pinned(np.ndarray):
        pass

    def pagelocked_empty(size: int, dtype: Any, mem_flags: int = 0) -> Any:
        calls.append(("pagelocked_empty", size, mem_flags))
        return SimpleNamespace(base=Base(), nbytes=size)

    attributes = enum.Enum("device_attribute", "INTEGRATED MULTIPROCESSOR_COUNT")
    device = SimpleNamespace(
        retain_primary_context=lambda: SimpleNamespace(push=note("push"), pop=note("pop")),
        name=lambda: "Orin",
        compute_capability=lambda: (8, 7),
        total_memory=lambda: 16 << 30,
        get_attributes=lambda: {attributes.INTEGRATED: 1, attributes.MULTIPROCESSOR_COUNT: 8},
    )
    return SimpleNamespace(
        Error=Error,
        LogicError=LogicError,
        MemoryError=MemoryError,
        init=note("init"),
        Device=lambda number: device,
        device_attribute=attributes,
        get_driver_version=lambda: 12020,
        mem_get_info=lambda: (5, 9),
        mem_alloc=note("mem_alloc", Allocation),
        pagelocked_empty=pagelocked_empty,
        host_alloc_flags=SimpleNamespace(DEVICEMAP=2),
        Stream=lambda: SimpleNamespace(handle=77, synchronize=note("synchronize")),
        Event=lambda: SimpleNamespace(record=note("record"), time_till=lambda other: 1.5),
        memcpy_htod_async=note("htod"),
        memcpy_dtoh_async=note("dtoh"),
        memcpy_dtod_async=note("dtod"),
        memset_d8_async=note("memset"),
        calls=calls,
    )


def test_pycuda() -> None:
    driver = fake_pycuda()
    cuda = PyCuda(driver)
    assert cuda.device() == Device("Orin", 87, 8, 16 << 30, True, 12020)
    assert cuda.free_bytes() == 5
    pointer = cuda.allocate(64)
    stream, host = cuda.stream(), cuda.allocate_host(64, mapped=True)
    assert (pointer, cuda.stream_pointer(stream), host.device_pointer) == (4096, 77, 0xBEEF)
    cuda.to_device(pointer, host, stream)
    cuda.to_host(host, pointer, stream)
    cuda.on_device(1, 2, 3, stream)
    cuda.zero(1, 3, stream)
    cuda.record(cuda.event(), stream)
    cuda.synchronize(stream)
    cuda.release(pointer)
    names = [call[0] for call in driver.calls]
    assert names[-7:] == ["htod", "dtoh", "dtod", "memset", "record", "synchronize", "free"]
    assert not cuda.has_graphs
    with pytest.raises(DeviceError, match="no CUDA graphs"):
        cuda.begin_capture(stream)


def test_pycuda_enters_its_context_once_a_thread() -> None:
    driver = fake_pycuda()
    held = [PyCuda(driver)]
    held[0].attach()
    assert driver.calls.count(("push",)) == 1
    thread = threading.Thread(target=lambda: (held[0].attach(), held[0].attach()))
    thread.start()
    thread.join()
    assert driver.calls.count(("push",)) == 2
    assert driver.calls.count(("pop",)) == 1  # pycuda aborts the process when a thread ends inside a context
    held.clear()
    gc.collect()
    assert driver.calls.count(("pop",)) == 2


def test_pycuda_leaves_its_context_in_the_thread_that_entered_it() -> None:
    driver = fake_pycuda()
    made: list[PyCuda] = []
    hold, done = threading.Event(), threading.Event()

    def work() -> None:
        made.append(PyCuda(driver))
        done.set()
        hold.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    done.wait(10)
    made.clear()
    gc.collect()
    assert ("pop",) not in driver.calls  # contexts are stacked by thread: a pop here would be of this thread's
    hold.set()
    thread.join()


def test_the_program_leaves_pycudas_context_after_what_was_made_in_it() -> None:
    code = """
import weakref
from types import SimpleNamespace as Namespace
from runtime.gpu_pycuda import PyCuda

class Chain: pass
weakref.finalize(Chain, print, "somebody else's")  # so that finalizers run before what atexit was told later
context = Namespace(push=lambda: None, pop=lambda: print("left"))
device = Namespace(retain_primary_context=lambda: context)
driver = Namespace(init=lambda: None, Device=lambda number: device, Error=RuntimeError)
cuda, chain = PyCuda(driver), Chain()
weakref.finalize(chain, print, "chain released")
"""
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines() == ["chain released", "left", "somebody else's"], said.stderr


def test_pycudas_errors() -> None:
    driver = fake_pycuda()
    cuda = PyCuda(driver)
    for error, text, sticky in (
        (driver.MemoryError("cuMemAlloc failed: out of memory"), "out of GPU memory", False),
        (driver.LogicError("an illegal memory access was encountered"), "the GPU failed", True),
        (driver.Error("cuStreamSynchronize failed: unspecified launch failure"), "the GPU failed", True),
        (driver.Error("something"), "CUDA failed", False),
    ):
        with pytest.raises(DeviceError, match=text) as caught, cuda._errors("working"):
            raise error
        assert caught.value.sticky == sticky
