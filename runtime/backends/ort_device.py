"""ONNX Runtime on a GPU: tensors stay there from stage to stage and from tick to tick.

One value a tensor is allocated once and bound to every session that uses it, so a tick copies a frame in, and image tokens, feature and
action out: INT8 hides what is not finite, so it is looked for between the stages. The recurrent
states have two sets of values: a tick reads one and writes the other, and which is which changes only when the numbers were finite.
With fixed addresses the CUDA provider may replay its launches as CUDA graphs, one for each binding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError
from bundle.manifest import Graph, Manifest, Tensor
from runtime.backends.base import checked_feed
from runtime.chain import SECTIONS, Floats, Tick, all_finite, no_prompt
from runtime.prompt import PromptTensors

_STATES = ("h", "c")


class OrtDeviceChain:
    """See runtime.chain.Chain.

    Args:
        runtime: the module onnxruntime.
        open_session: makes a session of one graph.
        device: where values live, as OrtValue names it: `cuda`; `cpu` runs the same code without a GPU.
    """

    def __init__(self, runtime: Any, open_session: Callable[[Graph], Any], manifest: Manifest, device: str) -> None:
        self.buckets = manifest.prompt.buckets
        self._runtime, self._open, self._manifest, self._device = runtime, open_session, manifest, device
        self._values: dict[str, Any] = {}
        self._graphs: dict[str, Graph] = {}
        self._sessions: dict[str, Any] = {}
        self._bindings: dict[str, Any] = {}
        self._has_prompt = False
        self._turn = 0
        self._engine_s = 0.0
        for stage in ("vision", "action_head"):
            self._load(stage, manifest.graph(stage))

    def set_prompt(self, prompt: PromptTensors) -> None:
        self._has_prompt = False
        graph = self._graphs.get("language")
        if graph is None or graph.sequence != prompt.bucket:
            self._drop("language")
            self._load("language", self._manifest.graph("language", prompt.bucket))
        for name in ("prompt", "image_index", "action_index"):
            self._write(name, getattr(prompt, name))
        self._forget()
        self._has_prompt = True

    def clear(self) -> None:
        self._has_prompt = False
        self._forget()

    def tick(self, frames: NDArray[np.uint8]) -> Tick:
        clock = [time.perf_counter()]
        if not self._has_prompt:
            raise no_prompt()
        self._engine_s = 0.0
        self._write("frames", frames)
        self._run("vision")
        finite = all_finite(self._read("image_tokens"))
        clock.append(time.perf_counter())
        self._run("language")
        feature = self._read("feature")
        finite = finite and all_finite(feature)
        clock.append(time.perf_counter())
        action = self._head(finite=finite)
        clock.append(time.perf_counter())
        spent = np.diff(clock) * 1e3
        sections = {name: float(value) for name, value in zip(SECTIONS, spent, strict=True)}
        return Tick(feature, action, sections, self._engine_s * 1e3)

    def run_vision(self, frames: NDArray[np.uint8]) -> Floats:
        self._write("frames", frames)
        self._run("vision")
        return self._read("image_tokens")

    def run_language(self, image_tokens: Floats) -> Floats:
        if not self._has_prompt:
            raise no_prompt()
        self._write("image_tokens", image_tokens)
        self._run("language")
        feature = self._read("feature")
        return feature if all_finite(image_tokens) else np.full_like(feature, np.nan)

    def run_action_head(self, feature: Floats) -> Floats:
        self._write("feature", feature)
        return self._head(finite=all_finite(feature))

    def close(self) -> None:
        self._has_prompt = False
        for stage in tuple(self._graphs):
            self._drop(stage)
        self._values.clear()

    def _head(self, *, finite: bool) -> Floats:
        """Action of the feature on the device; NaN if what the stages were fed is not `finite`."""
        self._run("action_head")
        action = self._read("action")
        if not finite:
            return np.full_like(action, np.nan)
        following = 1 - self._turn
        if all(np.isfinite(array).all() for array in (action, *(self._read(f"{name}{following}") for name in _STATES))):
            self._turn = following
        return action

    def _load(self, stage: str, graph: Graph) -> None:
        session = self._open(graph)
        self._sessions[stage], self._graphs[stage] = session, graph
        # The action head is bound twice: from the first set of states to the second, and back.
        for turn in range(2 if stage == "action_head" else 1):
            binding = session.io_binding()
            for tensor in graph.inputs:
                name = f"{tensor.name}{turn}" if tensor.name in _STATES else tensor.name
                binding.bind_ortvalue_input(tensor.name, self._value(name, tensor))
            for tensor in graph.outputs:
                name = f"{tensor.name[-1]}{1 - turn}" if tensor.name in ("next_h", "next_c") else tensor.name
                binding.bind_ortvalue_output(tensor.name, self._value(name, tensor))
            self._bindings[f"{stage}{turn}"] = binding

    def _value(self, name: str, tensor: Tensor) -> Any:
        if name not in self._values:
            array = np.zeros(tensor.shape, tensor.dtype)
            self._values[name] = self._runtime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        return self._values[name]

    def _drop(self, stage: str) -> None:
        graph = self._graphs.pop(stage, None)
        for turn in range(2):
            self._bindings.pop(f"{stage}{turn}", None)
        self._sessions.pop(stage, None)
        if graph is not None and stage == "language":
            for name in ("prompt", "image_index", "action_index"):  # the next graph's are of another length
                self._values.pop(name, None)

    def _run(self, stage: str) -> None:
        turn = self._turn if stage == "action_head" else 0
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(turn))  # a CUDA graph holds addresses: one a binding
        binding = self._bindings[f"{stage}{turn}"]
        start = time.perf_counter()
        try:
            self._sessions[stage].run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's own exception types share no public base
            raise BackendError(
                f"{self._graphs[stage].file} failed while running",
                got=f"{type(error).__name__}: {error}",
                hint="replay the golden step with runtime/run_robot.py BUNDLE --check; if it fails too, rebuild the bundle.",
            ) from error
        self._engine_s += time.perf_counter() - start

    def _write(self, name: str, array: NDArray[np.generic]) -> None:
        value = self._values[name]
        shape = tuple(value.shape())
        tensor = next(t for graph in self._graphs.values() for t in graph.inputs if t.name == name)
        value.update_inplace(
            np.ascontiguousarray(checked_feed("the chain", name, array, shape, np.dtype(tensor.dtype)))
        )

    def _read(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._values[name].numpy()
        return array

    def _forget(self) -> None:
        for name in _STATES:
            value = self._values[f"{name}{self._turn}"]
            value.update_inplace(np.zeros(value.shape(), np.float32))
