"""The dozen things that the runtime asks of CUDA, behind which either `cuda-bindings` or `pycuda` stands.

`cuda-bindings` has wheels for x86-64 and aarch64 and is what jetvla installs; `pycuda` is accepted because some Jetson images have nothing
else. Memory is addressed by plain integers, as TensorRT wants it. Every failure becomes a DeviceError that says what to do; a sticky one
says that this process has lost its GPU. Knows nothing about engines.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import DeviceError
from runtime.cuda_errors import cuda_error

Handle = Any
"""A stream, event or graph of one implementation; opaque to the caller."""

_UNKNOWN_CODE = re.compile(r"(\d+) is not a valid CUresult")


@dataclass(frozen=True)
class Device:
    """The GPU that is used: number 0 of those that CUDA_VISIBLE_DEVICES leaves.

    Attributes:
        name: as the driver gives it.
        sm: compute capability, 87 for Orin.
        multiprocessors: how many; what tells Orins apart, which share a name: 16 in the largest, 8 or 4 in the small.
        memory_bytes: all of it.
        integrated: it shares the host's memory, as on a Jetson.
        driver: version of CUDA that the driver speaks, 12060 for 12.6.
    """

    name: str
    sm: int
    multiprocessors: int
    memory_bytes: int
    integrated: bool
    driver: int

    @property
    def slug(self) -> str:
        """The name for folders: `orin`, `geforce-rtx-4090`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return words.removeprefix("nvidia-") or "gpu"


@dataclass(frozen=True)
class HostBuffer:
    """Page-locked host memory that copies run from and to without waiting.

    Attributes:
        array: uint8 [n], the memory itself.
        device_pointer: where the GPU sees the same memory, if it was allocated as mapped; else 0.
    """

    array: NDArray[np.uint8]
    device_pointer: int
    owner: object = None


class Cuda(Protocol):
    """What the runtime asks of CUDA. All methods raise DeviceError."""

    name: str
    has_graphs: bool

    def device(self) -> Device: ...

    def attach(self) -> None:
        """Make the GPU usable from the calling thread; cheap, and needed once a thread."""
        ...

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory; its address."""
        ...

    def release(self, pointer: int) -> None: ...

    def allocate_host(self, size: int, *, mapped: bool) -> HostBuffer: ...

    def release_host(self, buffer: HostBuffer) -> None: ...

    def stream(self) -> Handle: ...

    def stream_pointer(self, stream: Handle) -> int:
        """The stream as TensorRT takes it."""
        ...

    def release_stream(self, stream: Handle) -> None: ...

    def synchronize(self, stream: Handle) -> None:
        """Wait until all of the stream's work is done; errors of that work surface here."""
        ...

    def to_device(self, pointer: int, source: HostBuffer, stream: Handle) -> None:
        """Copy a whole host buffer, asynchronously."""
        ...

    def to_host(self, target: HostBuffer, pointer: int, stream: Handle) -> None: ...

    def on_device(self, target: int, source: int, size: int, stream: Handle) -> None: ...

    def zero(self, pointer: int, size: int, stream: Handle) -> None: ...

    def event(self) -> Handle: ...

    def record(self, event: Handle, stream: Handle, *, captured: bool = False) -> None:
        """Mark a moment of the stream; `captured` inside begin_capture, where the moment recurs at every launch."""
        ...

    def elapsed_ms(self, start: Handle, end: Handle) -> float: ...

    def release_event(self, event: Handle) -> None: ...

    def begin_capture(self, stream: Handle) -> None:
        """From here the stream's work is written down instead of done."""
        ...

    def end_capture(self, stream: Handle) -> Handle:
        """The work since begin_capture as a graph, ready to launch."""
        ...

    def abandon_capture(self, stream: Handle) -> None:
        """Leave capture mode after an error; never raises."""
        ...

    def launch(self, graph: Handle, stream: Handle) -> None: ...

    def release_graph(self, graph: Handle) -> None: ...


def open_cuda() -> Cuda:
    """CUDA through what is installed, with a GPU behind it.

    Raises:
        DeviceError: neither package is installed, or there is no usable GPU.
    """
    try:
        return CudaBindings(_import_driver())
    except ImportError as error:
        missing = error
    try:
        import pycuda.driver as driver
    except ImportError:
        raise DeviceError(
            "Python cannot talk to CUDA",
            got=missing,
            expected="cuda-bindings, or pycuda",
            hint="pip install 'cuda-bindings>=12.8,<13' for CUDA 12 (JetPack 6), 'cuda-bindings>=13' for CUDA 13.",
            absent=True,
        ) from None
    from runtime.gpu_pycuda import PyCuda

    return PyCuda(driver)


def _import_driver() -> Any:
    """The driver API is the system's own libcuda; the package's runtime API brings a CUDA runtime along that need not fit a Jetson."""
    try:
        from cuda.bindings import driver
    except ImportError:
        from cuda import cuda as driver  # cuda-python before 12.6
    return driver


class CudaBindings:
    """CUDA through NVIDIA's `cuda-bindings` (driver API), in the device's primary context, which TensorRT uses too."""

    name = "cuda-bindings"
    has_graphs = True

    def __init__(self, driver: Any) -> None:
        self._cuda = driver
        try:
            self._do("starting CUDA", driver.cuInit, 0)
        except DeviceError:
            raise
        except Exception as error:  # the package's own loader errors: libcuda is not there
            raise DeviceError(
                "there is no NVIDIA driver",
                got=f"{type(error).__name__}: {error}",
                expected="libcuda.so.1",
                hint="install the driver, or start the container with --gpus all or --runtime nvidia; --backend ort:cpu needs no GPU.",
                absent=True,
            ) from None
        self._device = self._do("choosing the GPU", driver.cuDeviceGet, 0)
        self._context = self._do("opening the GPU", driver.cuDevicePrimaryCtxRetain, self._device)
        self.attach()

    def attach(self) -> None:
        self._do("opening the GPU", self._cuda.cuCtxSetCurrent, self._context)

    def device(self) -> Device:
        name = self._do("reading the GPU's name", self._cuda.cuDeviceGetName, 256, self._device)
        attribute = self._cuda.CUdevice_attribute
        return Device(
            name=name.split(b"\0")[0].decode(errors="replace"),
            sm=10 * self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
            + self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            multiprocessors=self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            memory_bytes=int(self._do("reading the memory's size", self._cuda.cuDeviceTotalMem, self._device)),
            integrated=bool(self._attribute(attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED)),
            driver=int(self._do("reading the driver's version", self._cuda.cuDriverGetVersion)),
        )

    def free_bytes(self) -> int:
        free, _ = self._do("reading the free memory", self._cuda.cuMemGetInfo)
        return int(free)

    def allocate(self, size: int) -> int:
        return int(self._do(f"allocating {size} bytes", self._cuda.cuMemAlloc, size))

    def release(self, pointer: int) -> None:
        self._do("freeing memory", self._cuda.cuMemFree, pointer)

    def allocate_host(self, size: int, *, mapped: bool) -> HostBuffer:
        flags = self._cuda.CU_MEMHOSTALLOC_DEVICEMAP if mapped else 0
        pointer = int(
            self._do(f"allocating {size} bytes of page-locked memory", self._cuda.cuMemHostAlloc, size, flags)
        )
        seen = int(self._do("mapping host memory", self._cuda.cuMemHostGetDevicePointer, pointer, 0)) if mapped else 0
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        return HostBuffer(array, seen, pointer)

    def release_host(self, buffer: HostBuffer) -> None:
        self._do("freeing page-locked memory", self._cuda.cuMemFreeHost, buffer.owner)

    def stream(self) -> Handle:
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._do("making a stream", self._cuda.cuStreamCreate, flags)

    def stream_pointer(self, stream: Handle) -> int:
        return int(stream)

    def release_stream(self, stream: Handle) -> None:
        self._do("destroying a stream", self._cuda.cuStreamDestroy, stream)

    def synchronize(self, stream: Handle) -> None:
        self._do("waiting for the GPU", self._cuda.cuStreamSynchronize, stream)

    def to_device(self, pointer: int, source: HostBuffer, stream: Handle) -> None:
        size = source.array.nbytes
        self._do("copying to the GPU", self._cuda.cuMemcpyHtoDAsync, pointer, source.owner, size, stream)

    def to_host(self, target: HostBuffer, pointer: int, stream: Handle) -> None:
        size = target.array.nbytes
        self._do("copying from the GPU", self._cuda.cuMemcpyDtoHAsync, target.owner, pointer, size, stream)

    def on_device(self, target: int, source: int, size: int, stream: Handle) -> None:
        self._do("copying on the GPU", self._cuda.cuMemcpyDtoDAsync, target, source, size, stream)

    def zero(self, pointer: int, size: int, stream: Handle) -> None:
        self._do("clearing memory", self._cuda.cuMemsetD8Async, pointer, 0, size, stream)

    def event(self) -> Handle:
        return self._do("making an event", self._cuda.cuEventCreate, self._cuda.CUevent_flags.CU_EVENT_DEFAULT)

    def record(self, event: Handle, stream: Handle, *, captured: bool = False) -> None:
        # In a capture a plain record would become an edge of the graph; an external one becomes a node with a time of its own.
        kinds = self._cuda.CUevent_record_flags
        flags = kinds.CU_EVENT_RECORD_EXTERNAL if captured else kinds.CU_EVENT_RECORD_DEFAULT
        self._do("recording an event", self._cuda.cuEventRecordWithFlags, event, stream, flags)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self._do("reading events", self._cuda.cuEventElapsedTime, start, end))

    def release_event(self, event: Handle) -> None:
        self._do("destroying an event", self._cuda.cuEventDestroy, event)

    def begin_capture(self, stream: Handle) -> None:
        # Thread-local: what other threads of the process do with CUDA meanwhile is none of this capture's business.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("beginning a capture", self._cuda.cuStreamBeginCapture, stream, mode)

    def end_capture(self, stream: Handle) -> Handle:
        graph = self._do("ending a capture", self._cuda.cuStreamEndCapture, stream)
        try:
            return self._do("instantiating a graph", self._cuda.cuGraphInstantiate, graph, 0)
        finally:
            self._do("destroying a graph", self._cuda.cuGraphDestroy, graph)

    def abandon_capture(self, stream: Handle) -> None:
        with suppress(DeviceError):
            graph = self._do("ending a capture", self._cuda.cuStreamEndCapture, stream)
            if int(graph):
                self._do("destroying a graph", self._cuda.cuGraphDestroy, graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._do("launching a graph", self._cuda.cuGraphLaunch, graph, stream)

    def release_graph(self, graph: Handle) -> None:
        self._do("destroying a graph", self._cuda.cuGraphExecDestroy, graph)

    def _attribute(self, attribute: object) -> int:
        return int(self._do("reading the GPU's properties", self._cuda.cuDeviceGetAttribute, attribute, self._device))

    def _do(self, action: str, call: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
        """Call and unpack (error, value...)."""
        try:
            error, *values = call(*arguments)
        except ValueError as unknown:
            # A driver that is newer than the package has codes that its enumeration lacks.
            code = _UNKNOWN_CODE.match(str(unknown))
            if code is None:
                raise
            raise cuda_error(action, int(code[1]), "unknown error", str(unknown)) from None
        if int(error):
            _, name = self._cuda.cuGetErrorName(error)
            _, text = self._cuda.cuGetErrorString(error)
            words = [word.decode() if isinstance(word, bytes) else str(word) for word in (name, text)]
            raise cuda_error(action, int(error), *words)
        return values[0] if len(values) == 1 else tuple(values) or None
