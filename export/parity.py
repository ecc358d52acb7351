"""Proof that the engines do what the checkpoint does.

The reference (torch, adapters unmerged, fp32, window re-run from zero) and the very code that drives the robot get the same frames in the
same order, two episodes with a reset between them. The reference is recorded when the bundle is built (export/reference.py); comparing
needs no torch, so that a robot can prove its own engines. Stages are also compared alone, on the reference's own inputs, to say
where an error comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Manifest, Parity, Precision, Verdict
from bundle.recording import Episode, ReferenceStep
from runtime.actions import action_error, denormalize
from runtime.golden import LEAST_COSINE, MOST_ERROR, cosine
from runtime.policy import Policy

_ORDER: tuple[Verdict, ...] = ("PASS", "WARN", "FAIL")


@dataclass(frozen=True)
class Limits:
    """Up to `*_pass` is PASS, up to `*_warn` WARN, beyond FAIL. Action errors are in the head's own range of -1..1."""

    feature_cosine_pass: float
    feature_cosine_warn: float
    action_error_pass: float
    action_error_warn: float


# The one table of thresholds. fp32 differs by summation order only; fp16 rounds weights and activations to 11 bits. INT8: see limits_of.
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(0.999999, 0.99999, 1e-4, 1e-3),
    "fp16": Limits(0.9995, 0.999, 2e-3, 1e-2),
}


class StageParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage alone, on the reference's inputs: worst over frames."""

    cosine: float
    max_error: float


class ColumnParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One action column end to end, in physical units."""

    name: str
    unit: str
    max_error: float
    mean_error: float


class Fp16Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest |x| that an fp16 stage holds in fp16, and what makes it; measured by export/fp16_range.py.

    `widened` are the operations that are computed in fp32 instead, since they were beyond `limit`, with the largest |x| of each.
    """

    largest: float
    limit: float
    operation: str
    widened: dict[str, float]


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """reports/parity.json. `spread` is the reference actions' standard deviation over frames: agreement on a constant proves little.

    `fp16` has the stages that a build made in fp16.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    precision: Precision
    backend: str
    frames: int
    episodes: int
    stages: dict[str, StageParity]
    feature_cosine: float
    feature_max_error: float
    action_max_error: float
    spread: float
    columns: tuple[ColumnParity, ...]
    fp16: dict[str, Fp16Range] = {}

    @property
    def comfortable(self) -> bool:
        """Passed with half of the action limit to spare: other frames than these will hardly cross it. Never said of INT8."""
        limits = LIMITS.get(self.precision)
        return self.verdict == "PASS" and limits is not None and self.action_max_error <= limits.action_error_pass / 2

    def summary(self) -> Parity:
        """What the manifest keeps."""
        return Parity(
            verdict=self.verdict,
            backend=self.backend,
            frames=self.frames,
            feature_cosine=self.feature_cosine,
            feature_max_error=self.feature_max_error,
            action_max_error=self.action_max_error,
        )


def limits_of(manifest: Manifest) -> Limits:
    """The thresholds of a manifest's precision.

    INT8 has no band of its own between PASS and FAIL: how far it may be off was decided when the bundle was quantized, and engines are held
    to what was recorded then - three times the golden step's deviation, or twice the largest action error on the held-out frames, since
    kernels round to different sides and the recorded frames are others. Never below LEAST_COSINE or above
    MOST_ERROR, as with the golden step.
    """
    if manifest.precision != "int8":
        return LIMITS[manifest.precision]
    quantized = manifest.quantized
    assert quantized is not None, "Manifest.int8 makes no view without it"
    least = max(LEAST_COSINE, 1 - 3 * (1 - quantized.golden_cosine) - 1e-4)
    most = min(MOST_ERROR, max(3 * quantized.golden_error, 2 * quantized.action_error) + 1e-2)
    return Limits(least, least, most, most)


def compare(
    policy: Policy,
    episodes: Sequence[Episode],
    reference: Sequence[Sequence[ReferenceStep]],
    advance: Callable[[], None],
) -> ParityReport:
    """Stream the episodes through the runtime and compare every step with the recorded reference."""
    stages: dict[str, list[StageParity]] = {"vision": [], "language": [], "action_head": []}
    features: list[StageParity] = []
    errors: list[NDArray[np.float64]] = []
    physical: list[NDArray[np.float64]] = []
    scale = policy.manifest.prompt.embed_scale
    for episode, steps in zip(episodes, reference, strict=True):
        policy.reset(token_ids=episode.token_ids, attention_mask=episode.mask)
        for frames, expected in zip(episode.frames, steps, strict=True):
            chunk = policy.step_resized(frames)
            features.append(_stage(chunk.feature, expected.feature))
            errors.append(action_error(chunk.normalized, expected.action))
            physical.append(np.abs(chunk.values - denormalize(expected.action, policy.manifest.action)).max(axis=0))
            advance()
        # Alone: the last frame of the episode is enough to tell which stage an error comes from.
        stages["vision"].append(_stage(policy.run_vision(episode.frames[-1])[0], steps[-1].image_tokens * scale))
        stages["language"].append(
            _stage(policy.run_language(steps[-1].image_tokens[None] * np.float32(scale))[0], steps[-1].feature)
        )
        policy.reset(token_ids=episode.token_ids, attention_mask=episode.mask)
        for expected in steps:
            alone = policy.run_action_head(expected.feature[None])[0]
            stages["action_head"].append(_stage(alone, expected.action))
    spread = float(np.std([step.action for steps in reference for step in steps], axis=0).max())
    cosine_min = float(np.min([item.cosine for item in features]))
    # numpy's maxima keep a NaN, Python's lose it.
    action_max = float(np.max(errors))
    full_window = max(len(episode.frames) for episode in episodes) > policy.window
    verdict, reasons = judge(
        limits_of(policy.manifest),
        feature_cosine=cosine_min,
        action_error=action_max,
        spread=spread,
        full_window=full_window,
    )
    action = policy.manifest.action
    return ParityReport(
        verdict=verdict,
        reasons=reasons,
        precision=policy.manifest.precision,
        backend=policy.backend,
        frames=len(features),
        episodes=len(episodes),
        stages={name: _worst(items) for name, items in stages.items()},
        feature_cosine=cosine_min,
        feature_max_error=float(np.max([item.max_error for item in features])),
        action_max_error=action_max,
        spread=spread,
        columns=tuple(
            ColumnParity(name, unit, float(np.max(column)), float(np.mean(column)))
            for name, unit, column in zip(action.names, action.units, np.array(physical).T, strict=True)
        ),
    )


def judge(
    limits: Limits, *, feature_cosine: float, action_error: float, spread: float, full_window: bool = True
) -> tuple[Verdict, tuple[str, ...]]:
    """Apply the limits; a NaN fails. Without more frames than a window in one episode (`full_window`), nothing passes."""
    reasons = []
    verdicts: list[Verdict] = ["PASS"]
    for name, good, fair, text in (
        (
            "feature cosine",
            feature_cosine >= limits.feature_cosine_pass,
            feature_cosine >= limits.feature_cosine_warn,
            f"{feature_cosine:.7f}, PASS from {limits.feature_cosine_pass:.7g}",
        ),
        (
            "action error",
            action_error <= limits.action_error_pass,
            action_error <= limits.action_error_warn,
            f"{action_error:.2e}, PASS up to {limits.action_error_pass:.0e}",
        ),
    ):
        if not good:
            verdicts.append("WARN" if fair else "FAIL")
            reasons.append(f"{name} {text}")
    if spread < 1e-5:
        verdicts.append("WARN")
        reasons.append(
            f"the reference's actions barely change over the frames ({spread:.1e}), so their agreement proves little"
        )
    if not full_window:
        verdicts.append("WARN")
        reasons.append("no episode was longer than the window, over which errors build up and after which it slides")
    return max(verdicts, key=_ORDER.index), tuple(reasons)


def random_frames(count: int, cameras: int, size: int, *, seed: int) -> NDArray[np.uint8]:
    """Pictures with structure at all scales, uint8 [count, cameras, size, size, 3]: coarse colour fields, edges and grain."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((count, cameras, size, size, 3), np.uint8)
    for frame in frames.reshape(-1, size, size, 3):
        picture = np.zeros((size, size, 3))
        for cells in (2, 7, 28):
            coarse = rng.uniform(0, 1, (cells, cells, 3))
            repeat = -(-size // cells)
            picture += np.kron(coarse, np.ones((repeat, repeat, 1)))[:size, :size] / 3
        frame[:] = np.clip(255 * picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    return frames


def _stage(got: NDArray[np.floating], expected: NDArray[np.floating]) -> StageParity:
    return StageParity(cosine(got, expected), float(np.abs(got.astype(np.float64) - expected).max()))


def _worst(items: Sequence[StageParity]) -> StageParity:
    return StageParity(
        float(np.min([item.cosine for item in items])), float(np.max([item.max_error for item in items]))
    )
