"""The three stages as one tick: frames in, feature and action out, with the prompt and the recurrent states in between.

A `Chain` owns what lives from tick to tick. `HostChain` keeps it in numpy arrays and serves every backend that runs a stage at a time;
backends with a device keep it there (runtime/backends/trt.py, ort_device.py). QuantizeLinear makes a number of a NaN, so what goes from
stage to stage is looked at: a stage that is fed something not finite answers NaN, as floating point would, and the states stay. Knows
nothing about pictures, texts or units: see runtime/policy.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import PromptError
from bundle.manifest import Graph, Manifest
from runtime.backends.base import Feeds, Outputs, Stage
from runtime.prompt import PromptTensors

SECTIONS = ("vision", "language", "action_head")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tick:
    """What one tick gives; the arrays are the chain's own buffers, valid until its next run.

    Attributes:
        feature: float32 [1, latent * D].
        action: float32 [1, n, A] as the head gives it.
        milliseconds: per section (SECTIONS); a chain that cannot tell the sections apart leaves them out.
        engine_ms: inside the engines alone: no copies, no states, no checks; NaN where it cannot be told.
    """

    feature: Floats
    action: Floats
    milliseconds: dict[str, float]
    engine_ms: float


class Chain(Protocol):
    """A loaded policy's engines with their state. Every method may raise BackendError."""

    buckets: tuple[int, ...]
    """Sequence lengths that `set_prompt` takes, ascending."""

    def set_prompt(self, prompt: PromptTensors) -> None:
        """Take the tensors of an instruction and forget all history. If this fails, the chain has no prompt."""
        ...

    def clear(self) -> None:
        """Forget instruction and history."""
        ...

    def tick(self, frames: NDArray[np.uint8]) -> Tick:
        """Run all stages on frames [cameras, s, s, 3] and advance the states. If image tokens, feature, action or states are not
        finite, neither is the action, and the states are what they were.
        """
        ...

    def run_vision(self, frames: NDArray[np.uint8]) -> Floats:
        """Image tokens [1, N, D]; a buffer, valid until the next run."""
        ...

    def run_language(self, image_tokens: Floats) -> Floats:
        """Feature [1, latent * D] of image tokens [1, N, D]; NaN if those are not finite. A buffer, valid until the next run."""
        ...

    def run_action_head(self, feature: Floats) -> Floats:
        """Action [1, n, A] of a feature [1, latent * D]; advances the states unless something is not finite; NaN if the feature is not."""
        ...

    def close(self) -> None:
        """Release engines and buffers; safe to call twice."""
        ...


def no_prompt() -> PromptError:
    """The error of a run before `set_prompt`."""
    return PromptError("step before reset", hint="call policy.reset('...') once per episode.")


def all_finite(*arrays: NDArray[np.floating]) -> bool:
    """No NaN, no infinity: to numpy a NaN is both the smallest and the largest number. No memory; 64 x 2048 take 50 microseconds."""
    with np.errstate(invalid="ignore"):
        return all(bool(np.isfinite(array.min()) and np.isfinite(array.max())) for array in arrays)


class StageLoader(Protocol):
    """The part of a backend that HostChain needs."""

    def load(self, folder: Path, graph: Graph) -> Stage:
        """See Backend.load."""
        ...


class HostChain:
    """A chain whose states are numpy arrays; stages run one after the other."""

    def __init__(self, loader: StageLoader, folder: Path, manifest: Manifest) -> None:
        self.buckets = manifest.prompt.buckets
        self._loader, self._folder, self._manifest = loader, folder, manifest
        self._vision: Stage | None = loader.load(folder, manifest.graph("vision"))
        self._action_head: Stage | None = loader.load(folder, manifest.graph("action_head"))
        self._language: Stage | None = None
        self._bucket = 0
        self._prompt: PromptTensors | None = None
        self._engine_s = 0.0
        dims = manifest.dimensions
        shape = (dims.window, dims.lstm_layers, dims.latent * dims.lstm_hidden)
        self._states = {name: np.zeros(shape, np.float32) for name in ("h", "c")}

    def set_prompt(self, prompt: PromptTensors) -> None:
        bucket = prompt.bucket
        if bucket != self._bucket:
            # Two buckets' engines would hold the decoder's weights twice. Until the new one is there, the chain has none.
            self._language, self._bucket, self._prompt = None, 0, None
            self._language = self._loader.load(self._folder, self._manifest.graph("language", bucket))
            self._bucket = bucket
        self._prompt = prompt
        self._forget()

    def clear(self) -> None:
        self._prompt = None
        self._forget()

    def tick(self, frames: NDArray[np.uint8]) -> Tick:
        self._engine_s = 0.0
        clock = [time.perf_counter()]
        image_tokens = self.run_vision(frames)
        clock.append(time.perf_counter())
        feature = self.run_language(image_tokens)
        clock.append(time.perf_counter())
        action = self.run_action_head(feature)
        clock.append(time.perf_counter())
        spent = np.diff(clock) * 1e3
        sections = {name: float(value) for name, value in zip(SECTIONS, spent, strict=True)}
        return Tick(feature, action, sections, self._engine_s * 1e3)

    def run_vision(self, frames: NDArray[np.uint8]) -> Floats:
        assert self._vision is not None, "used after close"
        return self._run(self._vision, {"frames": frames})["image_tokens"].astype(np.float32, copy=False)

    def run_language(self, image_tokens: Floats) -> Floats:
        if self._language is None or self._prompt is None:
            raise no_prompt()
        feeds: dict[str, NDArray[np.generic]] = {
            "image_tokens": image_tokens,
            "prompt": self._prompt.prompt,
            "image_index": self._prompt.image_index,
            "action_index": self._prompt.action_index,
        }
        feature = self._run(self._language, feeds)["feature"].astype(np.float32, copy=False)
        return feature if all_finite(image_tokens) else np.full_like(feature, np.nan)

    def run_action_head(self, feature: Floats) -> Floats:
        assert self._action_head is not None, "used after close"
        outputs = self._run(self._action_head, {"feature": feature, **self._states})
        action = outputs["action"].astype(np.float32, copy=False)
        if not all_finite(feature):
            return np.full_like(action, np.nan)
        # A NaN in the states would stay for the rest of the episode.
        if all(np.isfinite(outputs[name]).all() for name in ("action", "next_h", "next_c")):
            for name, state in self._states.items():
                state[:] = outputs[f"next_{name}"]
        return action

    def close(self) -> None:
        self._vision = self._language = self._action_head = None
        self._bucket, self._prompt = 0, None

    def _run(self, stage: Stage, feeds: Feeds) -> Outputs:
        start = time.perf_counter()
        outputs = stage.run(feeds)
        self._engine_s += time.perf_counter() - start
        return outputs

    def _forget(self) -> None:
        for state in self._states.values():
            state.fill(0)
