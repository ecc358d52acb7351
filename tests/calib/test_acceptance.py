"""calib/acceptance.py: planted errors are found, counted and judged; intervals cover; nothing depends on signs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundle.manifest import Action
from calib.acceptance import Acceptance, Streamed, judge
from calib.resampling import bootstrap_interval

VELOCITIES = Action(
    head="velocities", names=("linear_x", "linear_y"), units=("m/s", "m/s"), normalized=True, minimum=-1.15, maximum=1.15, mu=None,
    class_names=(), class_values=(),
)  # fmt: skip
GRIPPER = msgspec.structs.replace(
    VELOCITIES, head="actions_gripper", names=("linear_x", "gripper"), units=("m/s", "-1 or 1")
)
CLASSES = msgspec.structs.replace(
    VELOCITIES, head="classes", class_names=("Stop", "F", "L"), class_values=((0.0, 0.0), (1.15, 0.0), (0.0, 1.15))
)
FRAMES, CHUNK = 200, 3


def steady(columns: int = 2, value: float = 0.5, frames: int = FRAMES) -> NDArray[np.float32]:
    return np.full((frames, CHUNK, columns), value, np.float32)


def stream(reference: NDArray[np.float32], candidate: NDArray[np.float32], **changes: Any) -> Streamed:
    given: dict[str, Any] = {"episode": "one.h5", "first_frame": 0, "instruction": "go left"}
    return Streamed(**(given | changes), reference=reference, candidate=candidate)


def judged(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], action: Action = VELOCITIES, budget: float = 0.01
) -> Acceptance:
    return judge([stream(reference, candidate)], action, budget=budget)


def test_equal_is_a_pass_without_errors() -> None:
    found = judged(steady(), steady())
    assert (found.verdict, found.reasons, found.frames, found.episodes) == ("PASS", (), FRAMES, 1)
    assert (found.action_error, found.action_error_p99, found.action_error_mean) == (0, 0, 0)
    for axis in found.axes:
        assert (axis.now.rmse, axis.chunk.max, axis.bias, axis.now.interval) == (0, 0, 0, (0, 0))
        assert axis.largest == pytest.approx(1.15)
    assert [(each.count, each.of) for each in found.direction_flips] == [(0, FRAMES)] * 2
    assert [(each.count, each.of) for each in found.starts] == [(0, 0)] * 2
    assert found.class_flips is None
    assert found.gripper_flips is None


def test_a_planted_error_is_found_where_it_is() -> None:
    candidate = steady()
    candidate[7, 2, 1] += 0.25
    found = judge(
        [stream(steady(), steady()), stream(steady(), candidate, episode="two.h5", first_frame=40)],
        VELOCITIES,
        budget=0.2,
    )
    assert found.verdict == "FAIL"
    assert found.reasons == ("action error 0.25, PASS up to 0.2",)
    worst = found.worst[0]
    assert (worst.episode, worst.frame, worst.step, worst.column) == ("two.h5", 47, 2, "linear_y")
    assert worst.error == pytest.approx(0.25)
    assert worst.reference == pytest.approx((0.575, 0.575))
    assert worst.candidate == pytest.approx((0.575, 0.8625))
    assert len(found.worst) == 6
    side = found.axes[1]
    assert (side.now.max, side.now.mean) == (0, 0)
    assert side.chunk.max == pytest.approx(0.25 * 1.15)
    assert side.chunk.mean == pytest.approx(0.25 * 1.15 / (2 * FRAMES * CHUNK))
    assert side.chunk.rmse == pytest.approx(0.25 * 1.15 / np.sqrt(2 * FRAMES * CHUNK))
    assert found.action_error_mean == pytest.approx(0.25 / (2 * FRAMES * CHUNK * 2))
    assert found.episodes == 2


def test_a_bias_keeps_its_sign() -> None:
    candidate = steady() - np.float32(0.004)
    axis = judged(steady(), candidate).axes[0]
    assert axis.bias == pytest.approx(-0.0046, rel=1e-3)
    assert axis.bias_interval == pytest.approx((-0.0046, -0.0046), rel=1e-3)
    assert axis.now.mean == pytest.approx(0.0046, rel=1e-3)


@pytest.mark.parametrize(("count", "verdict"), [(2, "PASS"), (3, "FAIL")])
def test_reversed_directions(count: int, verdict: str) -> None:
    candidate = steady()
    candidate[:count, 0, 0] = -0.5
    candidate[:2, 1, 0] *= -1  # later steps are no direction of now
    found = judged(steady(), candidate, budget=2)
    assert (found.direction_flips[0].count, found.direction_flips[1].count) == (count, 0)
    assert found.verdict == verdict
    if verdict == "FAIL":
        assert found.reasons == (
            "another decision in 3 of 200 frames, PASS up to 2 (direction of linear_x reversed in 3)",
        )


@pytest.mark.parametrize(
    ("frames", "count", "verdict"), [(12, 1, "PASS"), (12, 2, "FAIL"), (100, 1, "PASS"), (199, 2, "FAIL")]
)
def test_one_single_event_is_none(frames: int, count: int, verdict: str) -> None:
    """However few frames there are: at the edge between two commands any rounding decides."""
    turned, started = steady(frames=frames), steady(frames=frames)
    turned[:count, 0, 0] = -0.5
    standing = steady(value=0.0, frames=frames)
    started[count:] = 0
    gripper, classes = steady(frames=frames), steady(3, 0.0, frames)
    gripper[:count, 0, 1] = -0.5
    classes[:count, 0, 2] = 1
    assert judged(steady(frames=frames), turned, budget=2).verdict == verdict
    assert judged(standing, started, budget=2).verdict == verdict
    assert judged(steady(frames=frames), gripper, GRIPPER, budget=2).verdict == verdict
    found = judged(steady(3, 0.0, frames), classes, CLASSES, budget=2)
    assert found.verdict == verdict
    assert found.reasons == () or all(f"in 2 of {frames} frames, PASS up to 1" in reason for reason in found.reasons)


def test_a_sign_of_nearly_nothing_is_no_direction_and_a_start_is_one_from_a_tenth() -> None:
    reference, candidate = steady(value=0.049), steady(value=-0.099)
    found = judged(reference, candidate, budget=2)
    assert (found.verdict, found.direction_flips[0].of, found.starts[0].count) == ("PASS", 0, 0)
    candidate[:5, 0, 1] = -0.101
    found = judged(reference, candidate, budget=2)
    assert [(each.count, each.of) for each in found.starts] == [(0, FRAMES), (5, FRAMES)]
    assert found.reasons == (
        "another decision in 5 of 200 frames, PASS up to 2 (linear_y starts where the reference stands in 5)",
    )


@pytest.mark.parametrize(("value", "stops"), [(0.049, 5), (0.051, 0)])
def test_a_stop_where_the_reference_moves_is_another_decision(value: float, stops: int) -> None:
    """Not where it creeps: a command that hovers about the threshold is no event."""
    reference, candidate = steady(value=0.101), steady(value=0.101)
    reference[100:, 0, 1] = 0.09
    candidate[:5, 0, 0] = value
    candidate[100:, 0, 1] = 0
    found = judged(reference, candidate, budget=2)
    assert [(each.count, each.of) for each in found.stops] == [(stops, FRAMES), (0, FRAMES)]
    assert found.changed_frames == stops
    assert ("linear_x stops where the reference moves in 5" in " ".join(found.reasons)) == (stops == 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("action", [VELOCITIES, GRIPPER, CLASSES])
def test_what_is_not_finite_fails_any_budget(bad: float, action: Action) -> None:
    columns = 3 if action is CLASSES else 2
    candidate = steady(columns)
    candidate[3, 1, 0] = bad
    found = judged(steady(columns), candidate, action, budget=1e9)
    assert found.verdict == "FAIL"
    assert found.worst[0].frame == 3
    assert msgspec.json.encode(found)


def test_logits_are_judged_relative_to_their_size() -> None:
    reference = steady(value=0.5)
    reference[..., 1] = 8
    reference[4, 2, 1] = 40  # raises the size of its chunk alone
    candidate = reference.copy()
    candidate[4, 0, 1] += 0.4
    candidate[5, 0, 1] += 0.04
    found = judged(reference, candidate, GRIPPER)
    assert found.action_error == pytest.approx(0.01, rel=1e-4)
    assert [each.frame for each in found.worst[:2]] == [4, 5]
    assert found.worst[1].error == pytest.approx(0.005, rel=1e-4)


def test_the_gripper_has_flips_and_no_direction() -> None:
    reference, candidate = steady(), steady()
    candidate[:10, 0, 1] = -0.5
    candidate[50, 2, 1] = -0.5
    found = judged(reference, candidate, GRIPPER, budget=2)
    flips = found.gripper_flips
    assert flips is not None
    assert (flips.frames, flips.steps, flips.of_frames, flips.of_steps) == (10, 11, FRAMES, FRAMES * CHUNK)
    assert [(pair.reference, pair.candidate, pair.frames, pair.steps) for pair in flips.pairs] == [("+1", "-1", 10, 11)]
    assert [each.axis for each in found.direction_flips] == ["linear_x"]
    assert found.reasons == (
        "another decision in 10 of 200 frames, PASS up to 2 (gripper does the opposite in 10)",
        f"another decision in 11 of {FRAMES * CHUNK} steps of the chunks, PASS up to {2 * CHUNK}",
    )
    assert found.axes[1].now.max == 2
    assert found.axes[1].largest == 1


def test_decisions_count_together_whatever_axis_they_are_on() -> None:
    """Two reversed here, two started there: one robot that drives otherwise in four frames."""
    reference, candidate = steady(), steady()
    reference[100:, :, 1] = candidate[100:, :, 1] = 0
    candidate[:2, 0, 0] *= -1
    candidate[100:102, 0, 1] = 0.5
    candidate[1, 0, 1] *= -1  # on another axis of a frame that counts already
    found = judged(reference, candidate, budget=2)
    assert [each.count for each in (*found.direction_flips, *found.starts)] == [2, 1, 0, 2]
    assert (found.verdict, found.changed_frames, found.changed_steps) == ("FAIL", 4, 4)
    assert (
        judged(reference, np.where(np.arange(FRAMES)[:, None, None] < 100, candidate, reference), budget=2).verdict
        == "PASS"
    )


@pytest.mark.parametrize(("late", "verdict"), [(2 * CHUNK, "PASS"), (2 * CHUNK + 1, "FAIL")])
def test_later_steps_of_a_chunk_are_decisions_too(late: int, verdict: str) -> None:
    """A late decision drives them; the frames' own first steps are all the same."""
    reference, candidate = steady(3, 0.0), steady(3, 0.0)
    candidate[:late, 1, 2] = 1
    found = judged(reference, candidate, CLASSES, budget=2)
    assert (found.verdict, found.changed_frames, found.changed_steps) == (verdict, 0, late)


def test_classes_have_flips_with_names() -> None:
    reference = np.zeros((FRAMES, CHUNK, 3), np.float32)
    reference[..., 1] = 5  # forwards
    candidate = reference.copy()
    candidate[:4, 0, 2] = 6  # left
    candidate[:2, 1, 0] = 6  # stop, later
    found = judged(reference, candidate, CLASSES, budget=2)
    flips = found.class_flips
    assert flips is not None
    assert (flips.frames, flips.steps) == (4, 6)
    assert [(each.reference, each.candidate, each.frames, each.steps) for each in flips.pairs] == [
        ("F", "L", 4, 4),
        ("F", "Stop", 0, 2),
    ]
    assert any(
        reason.startswith("another decision in 4 of 200 frames, PASS up to 2") and "another class in 4" in reason
        for reason in found.reasons
    )
    assert found.worst[0].column == "L"
    assert found.worst[0].candidate == pytest.approx((0.0, 1.15))
    assert found.starts[1].count == 4
    nameless = msgspec.structs.replace(CLASSES, class_names=())
    flips = judged(reference, candidate, nameless, budget=2).class_flips
    assert flips is not None
    assert flips.pairs[0].candidate == "class 2"


def test_one_frame_is_enough() -> None:
    found = judged(steady(frames=1), steady(frames=1) + np.float32(0.001))
    assert (found.verdict, found.frames, len(found.worst)) == ("PASS", 1, 1)
    low, high = found.axes[0].now.interval
    assert low == high == pytest.approx(found.axes[0].now.mean)


def test_it_goes_to_json_and_back_and_is_the_same_twice() -> None:
    rng = np.random.default_rng(0)
    noisy = (steady() + rng.normal(0, 0.001, steady().shape)).astype(np.float32)
    one, two = judged(steady(), noisy), judged(steady(), noisy)
    assert one == two
    assert msgspec.json.decode(msgspec.json.encode(one), type=Acceptance) == one


@pytest.mark.parametrize(
    "streams",
    [
        [],
        [stream(steady(frames=0), steady(frames=0))],
        [stream(steady(), steady(frames=3))],
        [stream(steady(3), steady(3))],
        [stream(steady(), steady()), stream(steady()[:, :1], steady()[:, :1])],
        [stream(steady()[0], steady()[0])],
    ],
)
def test_what_does_not_belong_together_is_refused(streams: list[Streamed]) -> None:
    with pytest.raises(ValueError, match=r"expected|nothing"):
        judge(streams, VELOCITIES, budget=1)


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 12), streams=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_mirrored_and_exchanged_give_the_same_sizes(seed: int, frames: int, streams: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [np.tanh(rng.normal(0, 1, (2, frames, CHUNK, 2))).astype(np.float32) for _ in range(streams)]
    found = judge([stream(*pair) for pair in pairs], VELOCITIES, budget=1)
    mirrored = judge([stream(*-pair) for pair in pairs], VELOCITIES, budget=1)
    exchanged = judge([stream(*pair[::-1]) for pair in pairs], VELOCITIES, budget=1)
    assert mirrored.direction_flips == found.direction_flips
    assert mirrored.starts == found.starts
    for other in (mirrored, exchanged):
        assert other.action_error == pytest.approx(found.action_error)
        for axis, same in zip(other.axes, found.axes, strict=True):
            assert (axis.now.mean, axis.chunk.max) == pytest.approx((same.now.mean, same.chunk.max), abs=1e-6)
            assert axis.now.interval == pytest.approx(same.now.interval, abs=1e-6)
            assert axis.bias == pytest.approx(-same.bias, abs=1e-6)


@pytest.mark.parametrize(("streams", "least"), [(4, 0.85), (12, 0.88)])
def test_intervals_cover_the_true_mean(streams: int, least: float) -> None:
    """Frames of a stream resemble each other, and streams differ, so that frames drawn one by one would cover far too seldom."""
    rng = np.random.default_rng(5)
    # Columns are repetitions of the whole experiment.
    repeats, frames = 300, 16
    values = rng.normal(0, 0.6, (streams, 1, repeats)) + 3.0
    noise = rng.normal(0, 1, (streams, frames, repeats))
    for at in range(1, frames):
        noise[:, at] = 0.7 * noise[:, at - 1] + np.sqrt(1 - 0.49) * noise[:, at]
    low, high = bootstrap_interval((values + noise).reshape(-1, repeats), [frames] * streams)
    covered = float(((low <= 3) & (high >= 3)).mean())
    assert least <= covered <= 0.995
    naive = (values + noise).reshape(-1, repeats).std(axis=0) / np.sqrt(streams * frames)
    mean = (values + noise).mean(axis=(0, 1))
    assert float((abs(mean - 3) < 1.96 * naive).mean()) < covered - 0.15


def test_streams_of_different_length_count_by_their_frames() -> None:
    values = np.concatenate([np.zeros((30, 1)), np.ones((10, 1))])
    low, high = bootstrap_interval(values, [30, 10])
    assert low[0] == 0
    assert high[0] == 1


def test_numbers_need_nothing_to_draw_with() -> None:
    code = "import calib.acceptance, sys; sys.exit(bool({'matplotlib', 'jinja2', 'PIL', 'torch', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
