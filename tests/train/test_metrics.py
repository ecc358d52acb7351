from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from train.metrics import episode_sums, left_right_confusion, measure

AXES = ("linear_x", "linear_y")
ACTIONS = arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(2)), elements=st.floats(-1, 1, width=32))


@given(st.lists(ACTIONS, min_size=1, max_size=5), st.integers(0, 99))
def test_errors_are_those_of_all_frames_together(recorded: list[np.ndarray], seed: int) -> None:
    random = np.random.default_rng(seed)
    predicted = [each + random.normal(size=each.shape).astype(np.float32) for each in recorded]
    found = measure([episode_sums(p, r, AXES) for p, r in zip(predicted, recorded, strict=True)], recorded)
    error = np.concatenate(predicted).astype(np.float64) - np.concatenate(recorded)
    np.testing.assert_allclose([each.value for each in found.rmse], np.sqrt((error**2).mean(axis=0)), rtol=1e-9)
    np.testing.assert_allclose([each.value for each in found.mae], np.abs(error).mean(axis=0), rtol=1e-9)
    assert found.frames == len(error)
    assert found.directions.sum() == found.sides.sum() == len(error)
    for estimate in (*found.rmse, *found.mae, found.direction_accuracy):
        assert (estimate.low is None) == (len(recorded) == 1)


def test_perfect_predictions_and_the_majority() -> None:
    recorded = np.array([[1.15, 0], [1.15, 0], [1.15, 1.15], [0, 0]], np.float32)
    found = measure([episode_sums(recorded, recorded, AXES)], [recorded])
    assert found.direction_accuracy.value == 1.0
    assert found.majority == ("forward", 0.5)
    assert [each.value for each in found.rmse] == [0.0, 0.0]
    np.testing.assert_allclose(found.constant_rmse, recorded.std(axis=0))


def test_intervals_are_over_episodes_not_frames() -> None:
    """Two kinds of episodes, each frame of one alike: the interval must be as wide as ten draws, not a thousand."""
    recorded = [np.zeros((100, 2), np.float32)] * 10
    predicted = [np.full((100, 2), float(index % 2), np.float32) for index in range(10)]
    found = measure([episode_sums(p, r, AXES) for p, r in zip(predicted, recorded, strict=True)], recorded)
    low, high = found.mae[0].low, found.mae[0].high
    assert low is not None
    assert high is not None
    assert found.mae[0].value == 0.5
    assert 0.5 < high - low < 0.7  # 2 * 1.96 * sqrt(0.25 / 10) = 0.62


def test_a_policy_that_only_turns_has_no_directions() -> None:
    """Counted as directions, all frames would be stops, and every prediction right."""
    recorded = np.array([[0.5], [-0.5], [0.0], [0.5]], np.float32)
    sums = [episode_sums(-recorded, recorded, ("angular_z",))]
    found = measure(sums, [recorded])
    assert not found.directions.any()
    assert math.isnan(found.direction_accuracy.value)
    assert math.isnan(found.majority[1])
    assert found.sign_accuracy[0].value == 0.25
    assert measure([episode_sums(recorded, recorded, ("angular_z",))], [recorded]).sign_accuracy[0].value == 1.0


def test_sides() -> None:
    recorded = np.array([1, 1, -1, 0, -1], np.float32)
    predicted = np.array([1, -1, -1, 1, 0.1], np.float32)
    assert left_right_confusion(predicted, recorded).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(("axes", "column"), [(("linear_y", "linear_x"), 0), (("angular_z", "linear_y"), 1)])
def test_axes_are_found_by_name(axes: tuple[str, ...], column: int) -> None:
    actions = np.zeros((3, 2), np.float32)
    actions[:, column] = 1.0
    sums = episode_sums(actions, actions, axes)
    assert sums.sides[0, 0] == 3
    assert sums.directions[3, 3] == 3  # left
