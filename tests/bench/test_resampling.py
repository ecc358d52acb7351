"""bench/resampling.py: blocks as long as the series remembers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.resampling import block_length, resampled


def ar1(count: int, rho: float, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    values = np.zeros(count)
    for index in range(1, count):
        values[index] = rho * values[index - 1] + rng.normal()
    return values


def test_blocks_of_independent_samples_are_short() -> None:
    assert np.median([block_length(ar1(500, 0.0, seed)) for seed in range(15)]) <= 2


@pytest.mark.parametrize(("rho", "least", "most"), [(0.3, 3, 9), (0.6, 8, 18), (0.9, 25, 50)])
def test_blocks_grow_with_memory_as_theory_says(rho: float, least: int, most: int) -> None:
    # (sqrt(6) rho / (1 - rho^2))^(2/3) n^(1/3) is 7, 14 and 41.
    assert least <= np.median([block_length(ar1(500, rho, seed)) for seed in range(15)]) <= most


def test_a_spike_does_not_hide_the_memory() -> None:
    series = ar1(500, 0.9, 1)
    spiked = series.copy()
    spiked[250] = 1e9
    assert abs(block_length(spiked) - block_length(series)) <= 5


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_spread_of_a_median_is_that_of_repeated_series(rho: float) -> None:
    repeated = np.std([np.median(ar1(400, rho, seed)) for seed in range(100)])
    told = np.median([resampled(ar1(400, rho, seed), (50.0,), seed=0).std() for seed in range(100, 115)])
    assert 0.65 < told / repeated < 1.25


def test_drawing_one_by_one_would_tell_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    series = ar1(400, 0.9, 3)
    blocks = resampled(series, (50.0,), seed=0).std()
    monkeypatch.setattr("bench.resampling.block_length", lambda samples: 1)
    assert resampled(series, (50.0,), seed=0).std() < blocks / 2


def test_same_seed_same_draws() -> None:
    series = ar1(100, 0.5, 0)
    np.testing.assert_array_equal(resampled(series, (50, 95), seed=1), resampled(series, (50, 95), seed=1))
    assert resampled(series, (50, 95), seed=1).shape == (1000, 2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_series_has_blocks_and_draws_within_its_range(values: list[float]) -> None:
    series = np.array(values)
    assert 1 <= block_length(series) <= max(1, len(series))
    drawn = resampled(series, (50.0,), seed=0)
    assert series.min() <= drawn.min()
    assert drawn.max() <= series.max()


@pytest.mark.parametrize("count", [1, 9, 10, 11, 50, 4000])
def test_constant_series(count: int) -> None:
    series = np.full(count, 7.0)
    assert block_length(series) == 1
    if count < 4000:
        assert (resampled(series, (50.0, 95.0), seed=0) == 7.0).all()
