"""CUDA through `pycuda`, for Jetson images that have it and nothing else.

pycuda wraps the same driver API in objects, so this keeps the objects alive and hands out their addresses. It has no CUDA graphs: the
runtime then enqueues the stages one by one, which costs some launch time and changes no number.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from bundle.errors import DeviceError
from runtime.cuda_errors import cuda_error
from runtime.gpu import Device, Handle, HostBuffer

# In what cuGetErrorString says of the errors after which the process cannot use the GPU (pycuda hands on the text, not the code).
_STICKY_WORDS = (
    "illegal",
    "launch failure",
    "launch timed out",
    "ECC",
    "misaligned",
    "address space",
    "program counter",
    "hardware stack",
    "assert",
    "unknown error",
)


class PyCuda:
    """See runtime.gpu.Cuda.

    Args:
        driver: the module pycuda.driver.
    """

    name = "pycuda"
    has_graphs = False

    def __init__(self, driver: Any) -> None:
        self._cuda = driver
        self._allocations: dict[int, Any] = {}
        with self._errors("opening the GPU"):
            driver.init()
            self._device = driver.Device(0)
            # TensorRT works in the primary context; a context of our own could not share memory with it.
            self._context = self._device.retain_primary_context()
        self._attached = threading.local()
        self.attach()

    def attach(self) -> None:
        if not hasattr(self._attached, "place"):
            with self._errors("opening the GPU"):
                self._context.push()
            # pycuda aborts the process when a thread, or the program, ends inside a context. The place ends with the thread; what the
            # thread made later ends before it.
            self._attached.place = place = _Place()
            weakref.finalize(place, _leave, self._cuda, self._context, threading.get_ident())

    def device(self) -> Device:
        with self._errors("reading the GPU's properties"):
            major, minor = self._device.compute_capability()
            attributes = self._device.get_attributes()
            return Device(
                name=str(self._device.name()),
                sm=10 * int(major) + int(minor),
                multiprocessors=int(attributes[self._cuda.device_attribute.MULTIPROCESSOR_COUNT]),
                memory_bytes=int(self._device.total_memory()),
                integrated=bool(attributes[self._cuda.device_attribute.INTEGRATED]),
                driver=int(self._cuda.get_driver_version()),
            )

    def free_bytes(self) -> int:
        with self._errors("reading the free memory"):
            return int(self._cuda.mem_get_info()[0])

    def allocate(self, size: int) -> int:
        with self._errors(f"allocating {size} bytes"):
            allocation = self._cuda.mem_alloc(size)
        pointer = int(allocation)
        self._allocations[pointer] = allocation
        return pointer

    def release(self, pointer: int) -> None:
        with self._errors("freeing memory"):
            self._allocations.pop(pointer).free()

    def allocate_host(self, size: int, *, mapped: bool) -> HostBuffer:
        flags = self._cuda.host_alloc_flags.DEVICEMAP if mapped else 0
        with self._errors(f"allocating {size} bytes of page-locked memory"):
            array = self._cuda.pagelocked_empty(size, np.uint8, mem_flags=flags)
            seen = int(array.base.get_device_pointer()) if mapped else 0
        return HostBuffer(array, seen, array)

    def release_host(self, buffer: HostBuffer) -> None:
        """pycuda frees page-locked memory with the array."""

    def stream(self) -> Handle:
        with self._errors("making a stream"):
            return self._cuda.Stream()

    def stream_pointer(self, stream: Handle) -> int:
        return int(stream.handle)

    def release_stream(self, stream: Handle) -> None:
        """pycuda destroys a stream with its object."""

    def synchronize(self, stream: Handle) -> None:
        with self._errors("waiting for the GPU"):
            stream.synchronize()

    def to_device(self, pointer: int, source: HostBuffer, stream: Handle) -> None:
        with self._errors("copying to the GPU"):
            self._cuda.memcpy_htod_async(pointer, source.array, stream)

    def to_host(self, target: HostBuffer, pointer: int, stream: Handle) -> None:
        with self._errors("copying from the GPU"):
            self._cuda.memcpy_dtoh_async(target.array, pointer, stream)

    def on_device(self, target: int, source: int, size: int, stream: Handle) -> None:
        with self._errors("copying on the GPU"):
            self._cuda.memcpy_dtod_async(target, source, size, stream)

    def zero(self, pointer: int, size: int, stream: Handle) -> None:
        with self._errors("clearing memory"):
            self._cuda.memset_d8_async(pointer, 0, size, stream)

    def event(self) -> Handle:
        with self._errors("making an event"):
            return self._cuda.Event()

    def record(self, event: Handle, stream: Handle, *, captured: bool = False) -> None:
        with self._errors("recording an event"):
            event.record(stream)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        with self._errors("reading events"):
            return float(start.time_till(end))

    def release_event(self, event: Handle) -> None:
        """pycuda destroys an event with its object."""

    def begin_capture(self, stream: Handle) -> None:
        raise _no_graphs()

    def end_capture(self, stream: Handle) -> Handle:
        raise _no_graphs()

    def abandon_capture(self, stream: Handle) -> None:
        """There is never one."""

    def launch(self, graph: Handle, stream: Handle) -> None:
        raise _no_graphs()

    def release_graph(self, graph: Handle) -> None:
        raise _no_graphs()

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """pycuda's exceptions carry what the driver said in their text, and a code in newer versions."""
        try:
            yield
        except self._cuda.Error as error:
            text, code = str(error), int(getattr(error, "code", 0) or 0)
            if isinstance(error, self._cuda.MemoryError):
                code = 2
            elif "no CUDA-capable device" in text:
                code = 100
            elif not code and any(word in text for word in _STICKY_WORDS):
                code = 719
            raise cuda_error(action, code, type(error).__name__, text) from error


class _Place:
    """A thread's place in the context; something to hang a finalizer on."""


def _leave(driver: Any, context: Any, thread: int) -> None:
    if threading.get_ident() == thread:  # contexts are stacked by thread
        with suppress(driver.Error):
            context.pop()


def _no_graphs() -> DeviceError:
    return DeviceError("pycuda has no CUDA graphs", hint="pip install cuda-bindings, which has them.")
