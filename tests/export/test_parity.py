"""The judge: its limits to the last digit, and the mistakes that it must see - stale state, other packing, swapped cameras."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bundle.manifest import Graph, Manifest, Precision
from bundle.recording import Episode, ReferenceStep
from export import parity
from export.parity import LIMITS, ParityReport, judge, limits_of, random_frames
from export.reference import record_reference
from runtime.actions import action_error
from runtime.backends.base import Feeds, Outputs, Stage
from runtime.backends.ort import OrtBackend
from runtime.policy import Policy
from tests.bundles import add_int8, make_bundle
from tests.export.conftest import Built, MakeSynthetic
from train.checkpoint import load
from train.policy import CLIP_MEAN, CLIP_STD, Conventions, KosmosPolicy
from train.synthetic import SyntheticOptions

UPSTREAM = SyntheticOptions()
IDS = (0, 7, 30, 31, 32, 33, 2)
OTHER_IDS = (0, 7, 34, 31, 35, 33, 36, 2)
GOOD = {"feature_cosine": 1.0, "action_error": 0.0, "spread": 0.1}


# --- the table of limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verdicts_change_exactly_at_the_limits(precision: Precision) -> None:
    limits = LIMITS[precision]
    for name, good, fair, worse in (
        ("feature_cosine", limits.feature_cosine_pass, limits.feature_cosine_warn, -math.inf),
        ("action_error", limits.action_error_pass, limits.action_error_warn, math.inf),
    ):
        values = (good, math.nextafter(good, worse), fair, math.nextafter(fair, worse))
        verdicts = [judge(limits, **{**GOOD, name: value})[0] for value in values]
        assert verdicts == ["PASS", "WARN", "WARN", "FAIL"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_verdict_gives_its_reasons(precision: Precision) -> None:
    limits = LIMITS[precision]
    assert judge(limits, **GOOD) == ("PASS", ())
    verdict, reasons = judge(limits, feature_cosine=0.5, action_error=limits.action_error_warn, spread=0.1)
    assert verdict == "FAIL"
    assert reasons == (
        f"feature cosine 0.5000000, PASS from {limits.feature_cosine_pass}",
        f"action error {limits.action_error_warn:.2e}, PASS up to {limits.action_error_pass:.0e}",
    )


@pytest.mark.parametrize("name", ["feature_cosine", "action_error"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_what_is_not_a_number_fails(name: str, value: float) -> None:
    verdict, reasons = judge(LIMITS["fp16"], **{**GOOD, name: value})
    impossible = (name, value) in (("feature_cosine", math.inf), ("action_error", -math.inf))
    assert verdict == ("PASS" if impossible else "FAIL")
    assert len(reasons) == (not impossible)


@pytest.mark.parametrize(("spread", "verdict"), [(0.0, "WARN"), (9.9e-6, "WARN"), (1e-5, "PASS"), (1.0, "PASS")])
def test_agreement_on_a_constant_is_a_warning(spread: float, verdict: str) -> None:
    assert judge(LIMITS["fp32"], **{**GOOD, "spread": spread})[0] == verdict
    if verdict == "WARN":
        _, (reason,) = judge(LIMITS["fp32"], **{**GOOD, "spread": spread})
        assert "barely change over the frames" in reason
        assert "proves little" in reason
        # It does not hide what is worse.
        assert judge(LIMITS["fp32"], feature_cosine=0.0, action_error=0.0, spread=spread)[0] == "FAIL"


def test_int8_is_held_to_its_own_acceptance(tmp_path: Path) -> None:
    """Recorded: golden cosine 0.999, golden error 0.003, action error 0.01 on the held-out frames."""
    folder = make_bundle(tmp_path / "tiny.bundle")
    assert limits_of(Manifest.load(folder)) == LIMITS["fp32"]
    limits = limits_of(add_int8(folder).int8())
    least, most = limits.feature_cosine_pass, limits.action_error_pass
    assert (least, most) == pytest.approx((1 - 3e-3 - 1e-4, 2 * 0.01 + 0.01))
    for values, verdict in (
        ({"feature_cosine": least, "action_error": most}, "PASS"),
        ({"feature_cosine": math.nextafter(least, 0)}, "FAIL"),
        ({"action_error": math.nextafter(most, 1)}, "FAIL"),
    ):
        assert judge(limits, **{**GOOD, **values})[0] == verdict
    worse = limits_of(add_int8(folder, golden_error=0.02).int8())
    assert worse.action_error_pass == pytest.approx(3 * 0.02 + 0.01)
    for far in ({"golden_error": 0.7}, {"action_error": 0.4}):
        limits = limits_of(add_int8(folder, golden_cosine=0.6, **far).int8())
        assert (limits.feature_cosine_warn, limits.feature_cosine_pass) == (0.9, 0.9)
        assert (limits.action_error_warn, limits.action_error_pass) == (0.3, 0.3)


def test_limits_are_ordered_and_stricter_for_fp32() -> None:
    for limits in LIMITS.values():
        assert limits.feature_cosine_warn < limits.feature_cosine_pass < 1
        assert 0 < limits.action_error_pass < limits.action_error_warn
    assert LIMITS["fp32"].action_error_warn < LIMITS["fp16"].action_error_pass
    assert LIMITS["fp32"].feature_cosine_warn > LIMITS["fp16"].feature_cosine_pass


# --- the pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_the_same_for_the_same_seed_and_only_then() -> None:
    first = random_frames(3, 2, 56, seed=4)
    np.testing.assert_array_equal(first, random_frames(3, 2, 56, seed=4))
    assert first.shape == (3, 2, 56, 56, 3)
    assert first.dtype == np.uint8
    views = [*first.reshape(-1, 56, 56, 3), random_frames(1, 1, 56, seed=5)[0, 0]]
    for index, view in enumerate(views):
        for other in views[:index]:
            assert np.abs(view.astype(int) - other).mean() > 10


@pytest.mark.parametrize("size", [56, 224, 225])
def test_pictures_have_structure_at_all_scales(size: int) -> None:
    """Neither noise nor a plain colour: neighbours are alike, corners are not, and there is grain on top."""
    frames = random_frames(4, 1, size, seed=0)[:, 0].astype(float)
    total = frames.std(axis=(1, 2)).mean()
    neighbours = np.abs(np.diff(frames, axis=1)).mean()
    halves = np.abs(frames[:, : size // 2].mean((1, 2)) - frames[:, size // 2 :].mean((1, 2))).mean()
    assert total > 20
    assert 1 < neighbours < total
    assert halves > 5
    assert frames.min() < 60
    assert frames.max() > 195


# --- what a comparison sees -------------------------------------------------------------------------------------------------


def ignore() -> None:
    pass


def episodes(policy: KosmosPolicy, count: int = 9) -> list[Episode]:
    cameras = 2 if policy.spec.hand_camera else 1
    return [
        Episode(random_frames(count, cameras, 224, seed=seed), ids, (1,) * len(ids))
        for seed, ids in enumerate((IDS, OTHER_IDS))
    ]


def reference(policy: KosmosPolicy, frames: list[Episode]) -> list[list[ReferenceStep]]:
    return record_reference(policy, frames, mean=CLIP_MEAN, std=CLIP_STD, advance=ignore)


@dataclasses.dataclass(frozen=True)
class Case:
    """A bundle, the checkpoint that it was built from, and what both are shown."""

    bundle: Path
    policy: KosmosPolicy
    episodes: list[Episode]

    def compare(
        self,
        *,
        backend: OrtBackend | None = None,
        steps: list[list[ReferenceStep]] | None = None,
        runtime: type[Policy] = Policy,
    ) -> ParityReport:
        manifest = Manifest.load(self.bundle)
        engines = runtime(self.bundle, manifest, backend or OrtBackend(threads=1))
        expected = reference(self.policy, self.episodes) if steps is None else steps
        return parity.compare(engines, self.episodes, expected, ignore)


@pytest.fixture
def case(built: Built, synthetic: MakeSynthetic) -> Callable[..., Case]:
    def make(options: SyntheticOptions = UPSTREAM, **config: Any) -> Case:
        loaded = load(synthetic(options).checkpoint, packing=config.get("packing", "auto"))
        return Case(built(options, **config), loaded.policy, episodes(loaded.policy))

    return make


def test_a_right_bundle_passes_with_everything_in_the_report(case: Callable[..., Case]) -> None:
    right = case()
    advanced: list[int] = []
    steps = record_reference(
        right.policy, right.episodes, mean=CLIP_MEAN, std=CLIP_STD, advance=lambda: advanced.append(1)
    )
    report = right.compare(steps=steps)
    assert report.verdict == "PASS"
    assert report.reasons == ()
    assert report.comfortable
    assert (report.frames, report.episodes, len(advanced)) == (18, 2, 18)
    assert report.feature_cosine > 0.9999999
    assert report.action_max_error < 2e-5
    assert report.spread == pytest.approx(np.std([step.action for run in steps for step in run], axis=0).max())
    assert report.spread > 1e-2
    assert set(report.stages) == {"vision", "language", "action_head"}
    assert all(stage.max_error < 1e-4 for stage in report.stages.values())
    assert [column.name for column in report.columns] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    summary = report.summary()
    for name in ("verdict", "backend", "frames", "feature_cosine", "feature_max_error", "action_max_error"):
        assert getattr(summary, name) == getattr(report, name)


def test_half_of_the_limit_is_comfortable() -> None:
    report = ParityReport(
        verdict="PASS",
        reasons=(),
        precision="fp16",
        backend="ort:cpu",
        frames=1,
        episodes=1,
        stages={},
        feature_cosine=1.0,
        feature_max_error=0.0,
        action_max_error=LIMITS["fp16"].action_error_pass / 2,
        spread=1.0,
        columns=(),
    )
    assert report.comfortable
    more = math.nextafter(report.action_max_error, 1)
    assert not ParityReport(**{**as_dict(report), "action_max_error": more}).comfortable
    assert not ParityReport(**{**as_dict(report), "verdict": "WARN"}).comfortable


def as_dict(report: ParityReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


class Forgetful(Policy):
    """A runtime whose reset keeps the recurrent states."""

    def reset(self, *arguments: Any, **options: Any) -> None:
        states = self._chain._states
        kept = {name: state.copy() for name, state in states.items()}
        super().reset(*arguments, **options)
        for name, state in kept.items():
            states[name][:] = state


def test_a_state_that_survives_the_reset_fails(case: Callable[..., Case]) -> None:
    report = case().compare(runtime=Forgetful)
    assert report.verdict == "FAIL"
    assert any("action error" in reason for reason in report.reasons)
    # Vision and language have no state: they are not to blame.
    assert report.feature_cosine > 0.9999999


def test_another_packing_fails(case: Callable[..., Case]) -> None:
    fork = SyntheticOptions(layout="fork", head="velocities")
    right = case(fork, packing="fork_overwrite")
    assert right.compare().verdict == "PASS"
    right.policy.conventions = dataclasses.replace(right.policy.conventions, packing="upstream")
    report = right.compare()
    assert report.verdict == "FAIL"
    assert report.stages["vision"].max_error < 1e-4
    assert report.stages["language"].max_error > 1e-2
    assert report.stages["action_head"].max_error < 1e-4


def test_another_resampler_mask_fails(case: Callable[..., Case]) -> None:
    wrong = case()
    conventions: Conventions = wrong.policy.conventions
    wrong.policy.conventions = dataclasses.replace(conventions, x_attn_causal=True)
    report = wrong.compare()
    assert report.verdict == "FAIL"
    assert report.stages["vision"].max_error > 1e-2
    assert report.stages["language"].max_error < 1e-4


def test_swapped_cameras_fail(case: Callable[..., Case]) -> None:
    right = case(SyntheticOptions(hand_camera=True))
    assert right.compare().verdict == "PASS"
    swapped = [dataclasses.replace(item, frames=item.frames[:, ::-1].copy()) for item in right.episodes]
    report = right.compare(steps=reference(right.policy, swapped))
    assert report.verdict == "FAIL"
    assert report.stages["vision"].max_error > 1e-2


@pytest.mark.parametrize("wrong", ["mean", "order", "frames", "prompt"])
def test_other_inputs_fail(case: Callable[..., Case], wrong: str) -> None:
    right = case()
    changed = {
        "mean": right.episodes,
        "order": [dataclasses.replace(item, frames=item.frames[..., ::-1].copy()) for item in right.episodes],
        "frames": [dataclasses.replace(item, frames=item.frames[::-1].copy()) for item in right.episodes],
        "prompt": [dataclasses.replace(item, token_ids=(0, 9, *item.token_ids[2:])) for item in right.episodes],
    }[wrong]
    mean = (0.5, 0.5, 0.5) if wrong == "mean" else CLIP_MEAN
    steps = record_reference(right.policy, changed, mean=mean, std=CLIP_STD, advance=ignore)
    assert right.compare(steps=steps).verdict == "FAIL"


def test_a_small_error_in_the_actions_is_a_warning(case: Callable[..., Case]) -> None:
    right = case()
    steps = reference(right.policy, right.episodes)
    off = np.zeros_like(steps[0][0].action)
    off[3, 2] = 5e-4
    steps[1][2] = dataclasses.replace(steps[1][2], action=steps[1][2].action + off)
    report = right.compare(steps=steps)
    assert report.verdict == "WARN"
    assert report.action_max_error == pytest.approx(5e-4, rel=0.1)
    # Columns are in physical units: -0.65 to 0.65 here.
    assert report.columns[2].max_error == pytest.approx(5e-4 * 0.65, rel=0.1)
    assert report.columns[2].mean_error < report.columns[2].max_error / 4
    assert report.columns[0].max_error < 2e-5


def test_logits_are_judged_relative_to_their_size(case: Callable[..., Case]) -> None:
    """A gripper logit of 1000 may be off by more than a tanh can."""
    right = case()
    steps = reference(right.policy, right.episodes)

    def scaled(step: ReferenceStep, by: float) -> ReferenceStep:
        action = step.action.copy()
        action[:, -1] = by
        return dataclasses.replace(step, action=action)

    loud = [[scaled(step, 1000.0) for step in run] for run in steps]
    errors = action_error(steps[0][0].action, loud[0][0].action)
    assert errors[:, -1].max() == pytest.approx(1.0, rel=0.1)
    assert errors[:, :-1].max() == 0


class Broken(OrtBackend):
    """ONNX Runtime, but one stage answers NaN at its n-th run."""

    def __init__(self, stage: str, at: int) -> None:
        super().__init__(threads=1)
        self._stage = stage
        self._at = at

    def load(self, folder: Path, graph: Graph) -> Stage:  # type: ignore[override]
        stage = super().load(folder, graph)
        return NanAt(stage, self._at) if graph.file.startswith(self._stage) else stage


class NanAt:
    """A stage whose n-th answer is not a number."""

    def __init__(self, stage: Stage, at: int) -> None:
        self._stage = stage
        self._left = at

    def run(self, feeds: Feeds) -> Outputs:
        outputs = self._stage.run(feeds)
        self._left -= 1
        if self._left == 0:
            return {name: np.full_like(array, np.nan) for name, array in outputs.items()}
        return outputs


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("vision", 1),
        ("vision", 3),
        ("language", 1),
        ("language", 3),
        ("action_head", 1),
        ("action_head", 3),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_anywhere_fails(case: Callable[..., Case], stage: str, at: int) -> None:
    report = case().compare(backend=Broken(stage, at))
    assert report.verdict == "FAIL"
    assert not report.comfortable


# --- the reference ----------------------------------------------------------------------------------------------------------


def test_the_reference_forgets_between_episodes(case: Callable[..., Case]) -> None:
    """The second episode gives the same whether or not there was a first."""
    right = case()
    both, alone = reference(right.policy, right.episodes), reference(right.policy, right.episodes[1:])
    assert [len(run) for run in both] == [9, 9]
    for step, other in zip(both[1], alone[0], strict=True):
        np.testing.assert_array_equal(step.action, other.action)
    assert np.abs(both[0][0].feature - both[1][0].feature).max() > 1e-2


def test_the_references_arrays_are_its_own(case: Callable[..., Case]) -> None:
    """Recorded steps outlive the checkpoint's tensors, which are dropped before the engines are loaded."""
    right = case()
    steps = reference(right.policy, right.episodes)
    kept: list[NDArray[np.float32]] = [step.feature.copy() for run in steps for step in run]
    with torch.inference_mode():
        right.policy.to_empty(device="meta")
    for before, step in zip(kept, (step for run in steps for step in run), strict=True):
        np.testing.assert_array_equal(before, step.feature)
