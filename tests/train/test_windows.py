"""Windows and chunks are those that upstream's data gives, and nothing beyond the end of an episode is made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bundle.errors import ConfigError
from tests.training_data import episode
from train.run_config import DataConfig, SourceConfig
from train.windows import action_chunks, normalize_actions, resolve_action_range, window_starts

SOURCES = (SourceConfig(files=("*.h5",)),)


@given(length=st.integers(1, 60), window=st.integers(1, 12))
def test_every_full_window_and_one_of_a_short_episode(length: int, window: int) -> None:
    starts = list(window_starts(length, window))
    full = [start for start in range(length) if start + window <= length]
    assert starts == (full or [0])


@pytest.mark.parametrize(("length", "window"), [(0, 3), (3, 0)])
def test_nothing_to_window(length: int, window: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        window_starts(length, window)


@given(data=st.data(), length=st.integers(1, 30), window=st.integers(1, 8), chunk=st.integers(1, 10))
def test_chunks_element_by_element(data: st.DataObject, length: int, window: int, chunk: int) -> None:
    start = data.draw(st.integers(0, length - 1))
    actions = np.arange(1, 2 * length + 1, dtype=np.float32).reshape(length, 2)

    targets, mask = action_chunks(actions, start, window, chunk)

    assert targets.shape == (window, chunk, 2)
    assert targets.dtype == np.float32
    assert mask.shape == (window, chunk)
    for w in range(window):
        for k in range(chunk):
            exists = start + w + k < length
            assert mask[w, k] == exists
            assert_array_equal(targets[w, k], actions[start + w + k] if exists else 0)


@given(window=st.integers(1, 8), chunk=st.integers(1, 10), extra=st.integers(0, 5))
def test_where_all_actions_exist_chunks_are_upstreams(window: int, chunk: int, extra: int) -> None:
    # Upstream takes W + n - 1 actions from the start of a window and unfolds them in n.
    length = window + chunk - 1 + extra
    actions = np.random.default_rng(length).normal(size=(length, 3)).astype(np.float32)

    targets, mask = action_chunks(actions, extra, window, chunk)

    taken = actions[extra : extra + window + chunk - 1]
    unfolded = np.lib.stride_tricks.sliding_window_view(taken, chunk, axis=0).transpose(0, 2, 1)
    assert mask.all()
    assert_array_equal(targets, unfolded)


@pytest.mark.parametrize("start", [-1, 4])
def test_a_window_starts_in_its_episode(start: int) -> None:
    with pytest.raises(ValueError, match=r"4 frames"):
        action_chunks(np.zeros((4, 2), np.float32), start, 2, 2)


def test_full_speed_of_the_recordings_is_clipped_to_one() -> None:
    recorded = np.array([-1.15, -1.0, -0.25, 0.0, 0.1, 1.15], np.float32)
    normalized = normalize_actions(recorded, -1.0, 1.0)
    assert normalized.dtype == np.float32
    assert_array_equal(normalized, np.array([-1, -1, -0.25, 0, 0.1, 1], np.float32))


def test_a_range_that_is_not_symmetric() -> None:
    normalized = normalize_actions(np.array([-1, 0, 1, 2, 9], np.float32), 0.0, 2.0)
    assert_array_equal(normalized, np.array([-1, -1, 0, 1, 1], np.float32))


def test_auto_takes_the_largest_absolute_action() -> None:
    small = episode("a.h5", actions=np.array([[0.5, -0.2], [0.1, 0.0]], np.float32))
    fast = episode("b.h5", actions=np.array([[0.5, -1.25], [0.1, 0.0]], np.float32))
    data = DataConfig(sources=SOURCES, action_range="auto")
    assert resolve_action_range(data, [small, fast]) == (-1.25, 1.25)
    assert resolve_action_range(data, [small]) == (-0.5, 0.5)


def test_a_given_range_is_taken() -> None:
    data = DataConfig(sources=SOURCES, action_range=(-1.0, 2.0))
    assert resolve_action_range(data, []) == (-1.0, 2.0)


def test_auto_needs_a_robot_that_moves() -> None:
    still = episode("a.h5", actions=np.zeros((4, 2), np.float32))
    with pytest.raises(ConfigError, match=r"only zeros in linear_x, linear_y of 1 training episodes") as error:
        resolve_action_range(DataConfig(sources=SOURCES), [still])
    assert "data.actions" in error.value.hint
