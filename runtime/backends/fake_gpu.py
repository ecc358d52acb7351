"""A GPU of numpy arrays, for tests of everything that needs one, on machines that have none.

It is strict where a real one is treacherous: work is done only when its stream is synchronized, so a forgotten wait reads old numbers;
every address must lie in living memory; a graph must not outlive what it captured. It counts allocations and writes down the order of
calls. It says nothing about speed, nor about what a real driver accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bundle.errors import DeviceError
from runtime.cuda_errors import cuda_error
from runtime.gpu import Device, HostBuffer

ORIN = Device(name="Orin", sm=87, multiprocessors=8, memory_bytes=16 << 30, integrated=True, driver=12060)
DESKTOP = Device(
    name="NVIDIA GeForce RTX 3090", sm=86, multiprocessors=82, memory_bytes=24 << 30, integrated=False, driver=13000
)
_FIRST_ADDRESS = 1 << 40
_STICKY_CODE = 700


class MisuseError(AssertionError):
    """The program did what would be undefined behaviour on a GPU."""


@dataclass
class FakeStream:
    pointer: int
    work: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None


@dataclass
class FakeGraph:
    work: list[Callable[[], None]]
    alive: bool = True


@dataclass
class FakeEvent:
    at: float = -1.0


class FakeCuda:
    """See runtime.gpu.Cuda.

    Args:
        device: which GPU to be.
        fail: method name to (how many calls go well first, CUDA error code).
        has_graphs: False is what pycuda offers.

    Attributes:
        calls: names of the calls, in order.
        allocations: device and host allocations so far.
    """

    name = "fake"

    def __init__(
        self, device: Device = DESKTOP, *, fail: dict[str, tuple[int, int]] | None = None, has_graphs: bool = True
    ) -> None:
        self.has_graphs = has_graphs
        self.calls: list[str] = []
        self.allocations = 0
        self.fail = dict(fail or {})
        self._device = device
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._hosts: dict[int, HostBuffer] = {}
        self._streams: dict[int, FakeStream] = {}
        self._graphs: list[FakeGraph] = []
        self._events: list[FakeEvent] = []
        self._next = _FIRST_ADDRESS
        self._clock = 0.0
        self._lost = False

    # --- for tests and the fake TensorRT ---------------------------------------------------------------------------------------

    @property
    def live(self) -> dict[str, int]:
        """What has not been given back."""
        return {
            "device": len(self._memory),
            "host": len(self._hosts),
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": sum(graph.alive for graph in self._graphs),
        }

    def memory(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """The bytes at an address.

        Raises:
            MisuseError: they do not lie in one living allocation.
        """
        for start, array in self._memory.items():
            if start <= pointer and pointer + size <= start + array.nbytes:
                return array[pointer - start : pointer - start + size]
        for buffer in self._hosts.values():
            start = buffer.device_pointer
            if start and start <= pointer and pointer + size <= start + buffer.array.nbytes:
                return buffer.array[pointer - start : pointer - start + size]
        raise MisuseError(f"{size} bytes at {pointer:#x} are not allocated")

    def enqueue(self, stream_pointer: int, work: Callable[[], None]) -> None:
        """Add work to a stream, or to the graph that it captures."""
        stream = self._streams[stream_pointer]
        (stream.work if stream.captured is None else stream.captured).append(work)

    # --- the protocol ---------------------------------------------------------------------------------------------------------

    def device(self) -> Device:
        self._call("device")
        return self._device

    def attach(self) -> None:
        """Threads do not matter here."""

    def free_bytes(self) -> int:
        self._call("free_bytes")
        return self._device.memory_bytes - sum(array.nbytes for array in self._memory.values())

    def allocate(self, size: int) -> int:
        self._call("allocate")
        self.allocations += 1
        pointer = self._address(size)
        self._memory[pointer] = np.full(size, 0xAB, np.uint8)  # as arbitrary as a GPU's
        return pointer

    def release(self, pointer: int) -> None:
        self._call("release")
        if pointer not in self._memory:
            raise MisuseError(f"{pointer:#x} was released twice, or never allocated")
        del self._memory[pointer]

    def allocate_host(self, size: int, *, mapped: bool) -> HostBuffer:
        self._call("allocate_host")
        self.allocations += 1
        owner = self._address(size)
        buffer = HostBuffer(np.full(size, 0xCD, np.uint8), owner if mapped else 0, owner)
        self._hosts[owner] = buffer
        return buffer

    def release_host(self, buffer: HostBuffer) -> None:
        self._call("release_host")
        if self._hosts.pop(buffer.owner, None) is None:  # type: ignore[call-overload]
            raise MisuseError("a host buffer was released twice")

    def stream(self) -> FakeStream:
        self._call("stream")
        stream = FakeStream(self._address(1))
        self._streams[stream.pointer] = stream
        return stream

    def stream_pointer(self, stream: FakeStream) -> int:
        return stream.pointer

    def release_stream(self, stream: FakeStream) -> None:
        self._call("release_stream")
        del self._streams[stream.pointer]

    def synchronize(self, stream: FakeStream) -> None:
        self._call("synchronize")
        if stream.captured is not None:
            raise cuda_error("waiting for the GPU", 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "stream is capturing")
        while stream.work:
            self._clock += 1.0
            stream.work.pop(0)()

    def to_device(self, pointer: int, source: HostBuffer, stream: FakeStream) -> None:
        self._call("to_device")

        def copy() -> None:
            self.memory(pointer, source.array.nbytes)[:] = source.array

        self.enqueue(stream.pointer, copy)

    def to_host(self, target: HostBuffer, pointer: int, stream: FakeStream) -> None:
        self._call("to_host")

        def copy() -> None:
            target.array[:] = self.memory(pointer, target.array.nbytes)

        self.enqueue(stream.pointer, copy)

    def on_device(self, target: int, source: int, size: int, stream: FakeStream) -> None:
        self._call("on_device")

        def copy() -> None:
            self.memory(target, size)[:] = self.memory(source, size)

        self.enqueue(stream.pointer, copy)

    def zero(self, pointer: int, size: int, stream: FakeStream) -> None:
        self._call("zero")

        def clear() -> None:
            self.memory(pointer, size)[:] = 0

        self.enqueue(stream.pointer, clear)

    def event(self) -> FakeEvent:
        self._call("event")
        self._events.append(FakeEvent())
        return self._events[-1]

    def record(self, event: FakeEvent, stream: FakeStream, *, captured: bool = False) -> None:
        self._call("record")
        if captured != (stream.captured is not None):
            raise MisuseError("a captured event must be recorded as one, and only inside a capture")

        def mark() -> None:
            event.at = self._clock

        self.enqueue(stream.pointer, mark)

    def elapsed_ms(self, start: FakeEvent, end: FakeEvent) -> float:
        self._call("elapsed_ms")
        if start.at < 0 or end.at < 0:
            raise MisuseError("an event was read that has not happened")
        return end.at - start.at

    def release_event(self, event: FakeEvent) -> None:
        self._call("release_event")
        self._events.remove(event)

    def begin_capture(self, stream: FakeStream) -> None:
        self._call("begin_capture")
        stream.captured = []

    def end_capture(self, stream: FakeStream) -> FakeGraph:
        self._call("end_capture")
        if stream.captured is None:
            raise MisuseError("end_capture without begin_capture")
        graph = FakeGraph(stream.captured)
        stream.captured = None
        self._graphs.append(graph)
        return graph

    def abandon_capture(self, stream: FakeStream) -> None:
        self.calls.append("abandon_capture")
        stream.captured = None

    def launch(self, graph: FakeGraph, stream: FakeStream) -> None:
        self._call("launch")
        if not graph.alive:
            raise MisuseError("a released graph was launched")
        stream.work.extend(graph.work)

    def release_graph(self, graph: FakeGraph) -> None:
        self._call("release_graph")
        if not graph.alive:
            raise MisuseError("a graph was released twice")
        graph.alive = False
        graph.work.clear()

    def _address(self, size: int) -> int:
        pointer = self._next
        self._next += -(-size // 256) * 256 + 256  # a gap, so that running over the end is noticed
        return pointer

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self._lost:
            raise self._error(name, _STICKY_CODE)
        if name in self.fail:
            left, code = self.fail[name]
            if left == 0:
                del self.fail[name]
                error = self._error(name, code)
                self._lost = error.sticky
                raise error
            self.fail[name] = (left - 1, code)

    def _error(self, name: str, code: int) -> DeviceError:
        return cuda_error(name, code, f"CUDA_ERROR_{code}", "planned failure of the fake GPU")
