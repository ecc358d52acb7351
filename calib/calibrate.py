"""Calibration: the frames go through the floating-point stages, and out come smoothing factors and activation scales.

Stage by stage, so that only one stage's weights are in memory: the vision stage's tokens are kept for the language stage, its features
for the action head. Each finished stage can be saved and taken up again (see calib/workspace.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CalibrationError
from bundle.manifest import Manifest
from calib.observe import Distributions, Observe, Peaks, Tap
from calib.ranges import Method, activation_scale
from calib.smoothing import factors
from calib.stage_graph import STAGES, Site, StageGraph, read_stage
from runtime.instruction import load_embedding, prompt_tensors
from runtime.prompt import PromptTensors

Floats = NDArray[np.float32]
# Histograms need fewer frames than peaks: they are about the bulk of the values, and each frame has tens of millions of them.
_HISTOGRAM_FRAMES = 16


@dataclass(frozen=True)
class Seen:
    """One calibration frame: uint8 [cameras, s, s, 3], what the policy is told, and the episode that it is from."""

    frame: NDArray[np.uint8]
    instruction: str
    episode: str


@dataclass(frozen=True)
class StageCalibration:
    """What calibration found out about one stage.

    Attributes:
        scales: activation scale by site key.
        smoothing: factors [K] by LayerNorm.
        peaks: largest |x| by channel and site key, before smoothing.
        norms: the LayerNorm whose factors a site's activation takes, by site key.
        outputs: the stage's own output of every frame: image tokens or features, for the next stage.
    """

    scales: dict[str, float]
    smoothing: dict[str, Floats]
    peaks: dict[str, Floats]
    norms: dict[str, str]
    outputs: Floats

    def factors_of(self, site: str) -> Floats | None:
        """Smoothing factors of a site's activation, by its key."""
        return self.smoothing.get(self.norms.get(site, ""))


@dataclass(frozen=True)
class How:
    """How: see QuantizeConfig."""

    ranges: Method
    smoothing: float
    layers_per_block: int
    threads: int


def calibrate_stage(
    stage: str,
    folder: Path,
    manifest: Manifest,
    frames: Sequence[Seen],
    before: Floats | None,
    how: How,
    advance: Callable[[], None],
) -> StageCalibration:
    """Observe one stage on all frames.

    Args:
        folder: with the bundle's files; a temporary graph is written into it.
        before: outputs of the stage before, one row a frame; None for vision.
        advance: called after every run; there are `runs(len(frames))`.

    Raises:
        CalibrationError: the stage computes something that is not finite.
    """
    feeds = _Feeds(stage, folder, manifest, frames, before)
    peaks = Peaks({})
    graph, outputs = None, None
    some = set(np.linspace(0, len(frames) - 1, min(len(frames), _HISTOGRAM_FRAMES)).astype(int).tolist())
    for bucket, indices in feeds.by_bucket():
        graph = read_stage(folder, manifest, stage, sequence=bucket, layers_per_block=how.layers_per_block)
        tap = Tap(graph, threads=how.threads)
        for index, found in feeds.run(tap, indices, peaks.observe):
            outputs = np.zeros((len(frames), found.size), np.float32) if outputs is None else outputs
            outputs[index] = found.ravel()
            advance()
    assert graph is not None
    assert outputs is not None
    _check_finite(stage, peaks.found)
    smoothing = smoothing_factors(graph, peaks.found, how.smoothing)
    norms = {site.key: site.norm for site in graph.sites if site.norm is not None and site.norm in smoothing}
    of_sites = {key: smoothing[norm] for key, norm in norms.items()}
    distributions = Distributions(peaks.found, of_sites)
    for bucket, indices in feeds.by_bucket():
        chosen = [index for index in indices if index in some]
        if chosen:
            graph = read_stage(folder, manifest, stage, sequence=bucket, layers_per_block=how.layers_per_block)
            tap = Tap(graph, threads=how.threads)
            for _ in feeds.run(tap, chosen, distributions.observe):
                advance()
    scales = {key: activation_scale(histogram, how.ranges) for key, histogram in distributions.histograms.items()}
    return StageCalibration(scales, smoothing, peaks.found, norms, outputs)


def _check_finite(stage: str, peaks: Mapping[str, Floats]) -> None:
    """Raises CalibrationError if the floating-point policy itself computes something that is not a number."""
    bad = [key for key, peak in peaks.items() if not np.isfinite(peak).all()]
    if bad:
        raise CalibrationError(
            f"the floating-point {stage} stage gives numbers that are not finite",
            got=f"input of {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            expected="finite activations on every calibration frame",
            hint="an fp16 bundle may overflow where an fp32 one does not: build it with --precision fp32, or look at the checkpoint.",
        )


def runs(frames: int) -> int:
    """How often a stage is run for so many frames."""
    return frames + min(frames, _HISTOGRAM_FRAMES)


def smoothing_factors(graph: StageGraph, peaks: Mapping[str, Floats], strength: float) -> dict[str, Floats]:
    """Factors of every LayerNorm that feeds GEMMs only; none at strength 0."""
    by_norm: dict[str, list[Site]] = {}
    for site in graph.sites if strength > 0 else ():
        if site.norm is not None:
            by_norm.setdefault(site.norm, []).append(site)
    return {
        norm: factors(
            np.max([peaks[site.key] for site in sites], axis=0), [graph.array(site.weight) for site in sites], strength
        )
        for norm, sites in by_norm.items()
    }


class _Feeds:
    """The inputs of one stage for every frame."""

    def __init__(
        self, stage: str, folder: Path, manifest: Manifest, frames: Sequence[Seen], before: Floats | None
    ) -> None:
        assert stage in STAGES
        self._stage, self._manifest, self._frames, self._before = stage, manifest, frames, before
        self._prompts: dict[str, PromptTensors] = {}
        if stage == "language":
            embedding = load_embedding(folder)
            for told in {seen.instruction for seen in frames}:
                self._prompts[told] = prompt_tensors(
                    folder, manifest, embedding, manifest.prompt.buckets, instruction=told
                )

    def by_bucket(self) -> Iterator[tuple[int | None, list[int]]]:
        """Sequence length and indices of the frames that are run at it, in order."""
        if self._stage != "language":
            yield None, list(range(len(self._frames)))
            return
        for bucket in sorted({prompt.bucket for prompt in self._prompts.values()}):
            yield (
                bucket,
                [i for i, seen in enumerate(self._frames) if self._prompts[seen.instruction].bucket == bucket],
            )

    def run(self, tap: Tap, indices: Sequence[int], observe: Observe) -> Iterator[tuple[int, Floats]]:
        """Run these frames; yields each with the stage's first output."""
        dims = self._manifest.dimensions
        shape = (dims.window, dims.lstm_layers, dims.latent * dims.lstm_hidden)
        for index in indices:
            seen = self._frames[index]
            if self._stage == "vision":
                yield index, tap.run({"frames": seen.frame}, observe)["image_tokens"].astype(np.float32)
                continue
            assert self._before is not None
            if self._stage == "language":
                prompt = self._prompts[seen.instruction]
                tokens = self._before[index].reshape(1, -1, dims.embed_dim)
                found = tap.run(
                    {
                        "image_tokens": tokens,
                        "prompt": prompt.prompt,
                        "image_index": prompt.image_index,
                        "action_index": prompt.action_index,
                    },
                    observe,
                )
                yield index, found["feature"].astype(np.float32)
                continue
            # Frames drawn here and there are no stream: each is held until the memory is full of it.
            states = {name: np.zeros(shape, np.float32) for name in ("h", "c")}
            for _ in range(dims.window):
                found = tap.run({"feature": self._before[index][None], **states}, observe)
                states = {name: found[f"next_{name}"].astype(np.float32) for name in ("h", "c")}
            yield index, found["action"].astype(np.float32)
