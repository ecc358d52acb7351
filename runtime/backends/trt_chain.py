"""The chain on the device: buffers, recurrent states, and one CUDA graph over copies and stages.

Buffers are allocated once, the states never leave the device, and a tick is one launch. The graph is captured after a warm run, again when
a prompt of another length needs another engine, and destroyed before the contexts that it captured.
"""

from __future__ import annotations

import logging
import math
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.engine_cache import EngineRecord
from bundle.errors import BackendError, DeviceError, EngineError
from bundle.manifest import Tensor
from runtime.backends.base import checked_feed
from runtime.backends.trt_engine import LoadedEngine
from runtime.chain import SECTIONS, Floats, Tick, all_finite, no_prompt
from runtime.gpu import Cuda, Device, Handle, HostBuffer
from runtime.prompt import PromptTensors
from runtime.tensorrt_flavour import TensorRT

log = logging.getLogger("jetvla")

# Copied to the device at every tick, and back. Image tokens are read by nobody, but an INT8 engine hides a NaN in them.
_IN, _OUT = ("frames",), ("image_tokens", "feature", "action", "next_h", "next_c")
_STATES = (("h", "next_h"), ("c", "next_c"))
_PROMPT = ("prompt", "image_index", "action_index")


class _Resources:
    """What must be given back, in the order that CUDA and TensorRT want."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.graph: Handle | None = None
        self.stages: dict[str, LoadedEngine] = {}
        self.device: list[int] = []
        self.host: list[HostBuffer] = []
        self.events: list[Handle] = []
        self.stream: Handle | None = None

    def release(self) -> None:
        """Give everything back; after a sticky error the driver refuses, and the process's end does it."""
        cuda = self.cuda
        with suppress(DeviceError):
            cuda.attach()
        if self.stream is not None:
            with suppress(DeviceError):
                cuda.synchronize(self.stream)
        self.drop_graph()
        for stage in self.stages.values():
            stage.close()
        self.stages.clear()
        while self.device:
            with suppress(DeviceError):
                cuda.release(self.device.pop())
        while self.host:
            with suppress(DeviceError):
                cuda.release_host(self.host.pop())
        while self.events:
            with suppress(DeviceError):
                cuda.release_event(self.events.pop())
        if self.stream is not None:
            with suppress(DeviceError):
                cuda.release_stream(self.stream)
            self.stream = None

    def drop_graph(self) -> None:
        if self.graph is not None:
            with suppress(DeviceError):
                self.cuda.release_graph(self.graph)
            self.graph = None


class DeviceChain:
    """A chain on the device; see runtime.chain.Chain. Made by TrtBackend.open.

    The states are double-buffered: a tick first makes the last tick's `next_h, next_c` the present `h, c`, then computes new ones. So the
    states before a tick are still there after it, and a tick whose numbers are not finite can be taken back.
    """

    def __init__(
        self,
        cuda: Cuda,
        tensorrt: TensorRT,
        device: Device,
        folder: Path,
        records: dict[tuple[str, int | None], EngineRecord],
        *,
        verify: bool,
    ) -> None:
        self._cuda, self._tensorrt, self._folder = cuda, tensorrt, folder
        self._verify = verify
        self._verified: set[str] = set()
        self._languages = {
            sequence: record
            for (stage, sequence), record in records.items()
            if stage == "language" and sequence is not None
        }
        self.buckets = tuple(sorted(self._languages))
        self._bucket = 0
        self._has_prompt = False
        self._timed = True
        self._warm = False
        self._own = own = _Resources(cuda)
        self._finalizer = weakref.finalize(self, own.release)
        try:
            cuda.attach()
            for stage in ("vision", "action_head"):
                own.stages[stage] = self._load(records[stage, None])
            self._stream: Handle = cuda.stream()
            own.stream = self._stream
            self._stream_pointer = cuda.stream_pointer(self._stream)
            for _ in range(len(SECTIONS) + 1):
                own.events.append(cuda.event())
            self._allocate(integrated=device.integrated)
            for stage in ("vision", "action_head"):
                self._bind(own.stages[stage])
            self._forget()
        except BaseException:
            own.release()
            raise

    # --- the chain ------------------------------------------------------------------------------------------------------------

    def set_prompt(self, prompt: PromptTensors) -> None:
        self._attach()
        self._has_prompt = False
        if prompt.bucket != self._bucket:
            self._load_language(prompt.bucket)
        for name in _PROMPT:
            array: NDArray[np.generic] = getattr(prompt, name)
            flat = self._views[name].reshape(-1)
            flat[: array.size] = array.reshape(-1)  # the buffer is as long as the longest prompt's
            self._copy_in(name)
        self._cuda.synchronize(self._stream)
        if not self._warm:
            self._warm_up()
            self._warm = True
        self._forget()
        self._has_prompt = True

    def clear(self) -> None:
        self._attach()
        self._has_prompt = False
        self._forget()

    def tick(self, frames: NDArray[np.uint8]) -> Tick:
        if not self._has_prompt:
            raise no_prompt()
        cuda, graph = self._cuda, self._own.graph
        cuda.attach()
        self._fill("frames", frames)
        if graph is None:
            self._enqueue_tick(captured=False)
        else:
            cuda.launch(graph, self._stream)
        cuda.synchronize(self._stream)
        self._keep_finite("image_tokens", "feature")
        sections = self._sections() if self._timed else {}
        return Tick(
            self._views["feature"], self._views["action"], sections, sum(sections.values()) if sections else math.nan
        )

    def run_vision(self, frames: NDArray[np.uint8]) -> Floats:
        self._attach()
        self._fill("frames", frames)
        self._copy_in("frames")
        self._run("vision")
        return self._fetch("image_tokens")

    def run_language(self, image_tokens: Floats) -> Floats:
        if not self._has_prompt:
            raise no_prompt()
        self._attach()
        self._fill("image_tokens", image_tokens)
        self._copy_in("image_tokens")
        self._run("language")
        feature = self._fetch("feature")
        return feature if all_finite(image_tokens) else np.full_like(feature, np.nan)

    def run_action_head(self, feature: Floats) -> Floats:
        self._attach()
        self._fill("feature", feature)
        self._copy_in("feature")
        self._advance_states()
        self._run("action_head")
        for name in ("next_h", "next_c"):
            self._copy_out(name)
        self._copy_out("action")
        self._cuda.synchronize(self._stream)
        self._keep_finite("feature")
        return self._views["action"].copy()

    def close(self) -> None:
        self._has_prompt = False
        self._finalizer()

    def _attach(self) -> None:
        assert self._finalizer.alive, "used after close"  # the host buffers are no memory any more
        self._cuda.attach()

    # --- engines --------------------------------------------------------------------------------------------------------------

    def _load(self, record: EngineRecord) -> LoadedEngine:
        """Load an engine; its gigabytes are hashed once."""
        verify = self._verify and record.file not in self._verified
        loaded = LoadedEngine(self._cuda, self._tensorrt, self._folder, record, verify=verify)
        self._verified.add(record.file)
        return loaded

    def _load_language(self, bucket: int) -> None:
        """Exchange the language engine: two of them would hold the decoder's weights twice."""
        self._cuda.synchronize(self._stream)  # a tick that failed halfway may still run
        self._own.drop_graph()
        old = self._own.stages.pop("language", None)
        self._bucket, self._warm = 0, False
        if old is not None:
            old.close()
        loaded = self._load(self._languages[bucket])
        self._own.stages["language"] = loaded
        self._bind(loaded)
        self._bucket = bucket

    def _bind(self, loaded: LoadedEngine) -> None:
        missing = sorted(set(loaded.tensors) - set(self._pointers))
        if missing:
            raise EngineError(
                f"{loaded.record.file} has tensors that the chain does not know",
                got=", ".join(missing),
                hint="build the engines again: export/build_engines.py --engines-only BUNDLE --force",
            )
        for name, tensor in loaded.tensors.items():
            room, needed = self._tensor_bytes[name], _bytes(tensor)
            if tensor.dtype != self._dtypes[name] or needed > room:
                raise EngineError(
                    f"{loaded.record.file} does not fit the other engines",
                    got=f"{name} {tensor.dtype}{list(tensor.shape)}, {needed} bytes",
                    expected=f"{self._dtypes[name]}, at most {room} bytes",
                    hint="build the engines again: export/build_engines.py --engines-only BUNDLE --force",
                )
        loaded.enqueue = self._tensorrt.bind(loaded.context, {name: self._pointers[name] for name in loaded.tensors})

    def _warm_up(self) -> None:
        """One run for lazy initialisation, then the capture; without graphs the stages are enqueued one by one."""
        cuda = self._cuda
        self._enqueue_tick(captured=False)
        cuda.synchronize(self._stream)
        for stage in self._own.stages.values():
            stage.keep_compiled()
        if not cuda.has_graphs or not self._capturable():
            log.warning("%s cannot be captured in a CUDA graph here; the stages are launched one by one", self._folder)
            return
        reason = ""
        for timed in (True, False):  # a driver may refuse to record events inside a capture
            try:
                cuda.begin_capture(self._stream)
                try:
                    self._enqueue_tick(captured=True, timed=timed)
                    self._own.graph = cuda.end_capture(self._stream)
                except BaseException:
                    cuda.abandon_capture(self._stream)
                    raise
            except BackendError as error:  # TensorRT refuses, too: what it cannot capture it may still run
                if isinstance(error, DeviceError) and error.sticky:
                    raise
                reason = str(error)  # the error itself would keep this frame, and so the engines, alive
            else:
                self._timed = timed
                return
        log.warning(
            "the CUDA graph of %s could not be captured (%s); the stages are launched one by one", self._folder, reason
        )
        self._timed = True

    def _capturable(self) -> bool:
        return all(
            self._tensorrt.capturable(stage.context, self._stream_pointer) for stage in self._own.stages.values()
        )

    # --- one tick on the stream -----------------------------------------------------------------------------------------------

    def _enqueue_tick(self, *, captured: bool, timed: bool = True) -> None:
        moments = iter(self._own.events)

        def mark() -> None:
            if timed:
                self._cuda.record(next(moments), self._stream, captured=captured)

        for name in _IN:
            self._copy_in(name)
        self._advance_states()
        mark()  # copies belong to no stage
        for stage in SECTIONS:
            self._run(stage)
            mark()
        for name in _OUT:
            self._copy_out(name)

    def _run(self, stage: str) -> None:
        loaded = self._own.stages[stage]
        if not loaded.enqueue(self._stream_pointer):
            raise BackendError(
                f"TensorRT could not run {loaded.record.label}",
                got=self._tensorrt.log.errors(),
                hint="replay the golden step with runtime/run_robot.py BUNDLE --check; if it fails too, build the engines again.",
            )

    def _advance_states(self) -> None:
        for present, following in _STATES:
            self._cuda.on_device(
                self._pointers[present], self._pointers[following], self._tensor_bytes[present], self._stream
            )

    def _sections(self) -> dict[str, float]:
        """Milliseconds between the events of the last tick. Not knowing them is no reason to stop a robot."""
        moments = self._own.events
        try:
            return {
                section: self._cuda.elapsed_ms(moments[index], moments[index + 1])
                for index, section in enumerate(SECTIONS)
            }
        except DeviceError as error:
            if error.sticky:
                raise
            log.warning("the sections of a step cannot be timed here: %s", error.what)
            self._timed = False
            return {}

    def _keep_finite(self, *fed: str) -> None:
        """Take the tick back if its states or action are not finite: a NaN in the states would stay for the rest of the episode. If what
        the stages were fed is not, the action is made NaN: INT8 engines would hide it.
        """
        hidden = not all_finite(*(self._views[name] for name in fed))
        if hidden:
            self._views["action"].fill(np.nan)
        if hidden or not all_finite(*(self._views[name] for name in ("action", "next_h", "next_c"))):
            for present, following in _STATES:
                self._cuda.on_device(
                    self._pointers[following], self._pointers[present], self._tensor_bytes[present], self._stream
                )
            self._cuda.synchronize(self._stream)

    def _forget(self) -> None:
        for _, following in _STATES:
            self._cuda.zero(self._pointers[following], self._tensor_bytes[following], self._stream)
        self._cuda.synchronize(self._stream)

    # --- buffers --------------------------------------------------------------------------------------------------------------

    def _allocate(self, *, integrated: bool) -> None:
        """One device buffer and one page-locked host buffer a tensor. Where the GPU shares the host's memory, what crosses at every tick is
        one buffer seen from both sides, and is not copied.
        """
        self._pointers: dict[str, int] = {}
        self._hosts: dict[str, HostBuffer] = {}
        self._views: dict[str, NDArray[Any]] = {}
        self._shared: set[str] = set()
        self._tensor_bytes: dict[str, int] = {}
        self._dtypes: dict[str, str] = {}
        for tensor in self._all_tensors():
            size = _bytes(tensor)
            shared = integrated and tensor.name in ("frames", "feature", "action")
            if tensor.name not in ("h", "c"):
                host = self._cuda.allocate_host(size, mapped=shared)
                self._own.host.append(host)
                self._hosts[tensor.name] = host
                self._views[tensor.name] = host.array.view(tensor.dtype).reshape(tensor.shape)
                host.array[:] = 0
            if shared:
                self._shared.add(tensor.name)
                self._pointers[tensor.name] = host.device_pointer
            else:
                pointer = self._cuda.allocate(size)
                self._own.device.append(pointer)
                self._pointers[tensor.name] = pointer
            self._tensor_bytes[tensor.name], self._dtypes[tensor.name] = size, tensor.dtype

    def _all_tensors(self) -> list[Tensor]:
        """Every tensor of the three stages once, as the engines have them; the prompt's at its longest."""
        longest = self._languages[self.buckets[-1]]
        records = [self._own.stages[stage].record for stage in ("vision", "action_head")] + [longest]
        tensors = {tensor.name: tensor for record in records for tensor in (*record.inputs, *record.outputs)}
        return list(tensors.values())

    def _fill(self, name: str, array: NDArray[np.generic]) -> None:
        view = self._views[name]
        np.copyto(view, checked_feed("the engine chain", name, array, view.shape, view.dtype))

    def _copy_in(self, name: str) -> None:
        if name not in self._shared:
            self._cuda.to_device(self._pointers[name], self._hosts[name], self._stream)

    def _copy_out(self, name: str) -> None:
        if name not in self._shared:
            self._cuda.to_host(self._hosts[name], self._pointers[name], self._stream)

    def _fetch(self, name: str) -> Floats:
        self._copy_out(name)
        self._cuda.synchronize(self._stream)
        return self._views[name].copy()  # page-locked memory ends with the chain, and the caller may outlive it


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
