"""Ranges of activations: known histograms, and the true error of quantizing what was counted."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from calib.ranges import BINS, LEVELS, Histogram, Method, activation_scale

Floats = NDArray[np.float32]
METHODS: tuple[Method, ...] = get_args(Method)


def counted(sample: Floats) -> Histogram:
    histogram = Histogram.empty(float(np.abs(sample).max()))
    histogram.add(np.abs(sample))
    return histogram


def square_error(sample: Floats, scale: float) -> float:
    """What quantizing the sample itself costs."""
    restored = np.clip(np.rint(sample / np.float64(scale)), -LEVELS, LEVELS) * scale
    return float(((restored - sample) ** 2).sum())


def unit_bins(**counts: int) -> Histogram:
    """A histogram with bins of width 1; `b9=5` counts five values into bin 9."""
    histogram = Histogram.empty(float(BINS))
    for name, count in counts.items():
        histogram.counts[int(name[1:])] = count
    return histogram


def test_minmax_covers_the_largest_value() -> None:
    assert activation_scale(unit_bins(b0=10, b3=1), "minmax") == pytest.approx(BINS / LEVELS)


@pytest.mark.parametrize(("above", "clip"), [(0, 10), (10, 10), (11, 2001)])
def test_percentile_leaves_one_in_ten_thousand_out(above: int, clip: int) -> None:
    histogram = unit_bins(b9=100_000 - above, b2000=above)
    assert activation_scale(histogram, "percentile") == pytest.approx(clip / LEVELS)


def test_percentile_of_values_in_the_last_bin_is_the_whole_range() -> None:
    assert activation_scale(unit_bins(b2047=7), "percentile") == pytest.approx(BINS / LEVELS)


def test_mse_of_a_flat_histogram_clips_nothing() -> None:
    flat = Histogram(1.0, np.full(BINS, 50, np.int64))
    assert activation_scale(flat, "mse") == pytest.approx(1 / LEVELS, rel=0.02)


def test_mse_takes_the_best_of_its_candidates() -> None:
    """Against the same sum with an error that is taken as uniform, where nearly all values are beyond a step."""
    rng = np.random.default_rng(0)
    histogram = Histogram(4.0, np.bincount(rng.geometric(0.004, 20_000).clip(1, BINS) - 1, minlength=BINS))
    centres = (np.arange(BINS) + 0.5) * 4.0 / BINS

    def cost(clip: float) -> float:
        step = clip / LEVELS
        return sum(
            int(count) * (step**2 / 12 if value <= clip else (value - clip) ** 2)
            for value, count in zip(centres.tolist(), histogram.counts, strict=True)
            if count
        )

    best = min(cost(4.0 * share / 100) for share in range(20, 101))
    assert cost(activation_scale(histogram, "mse") * LEVELS) == pytest.approx(best, rel=0.01)
    assert best < 0.99 * cost(4.0)


def test_an_outlier_does_not_take_the_steps_of_all_others() -> None:
    rng = np.random.default_rng(0)
    sample = np.append(rng.normal(0, 1, 200_000), 30.0).astype(np.float32)
    histogram = counted(sample)
    scales = {method: activation_scale(histogram, method) for method in METHODS}

    assert scales["minmax"] * LEVELS == pytest.approx(30)
    assert scales["percentile"] * LEVELS == pytest.approx(np.quantile(np.abs(sample), 0.9999), abs=30 / BINS)
    errors = {method: square_error(sample, scale) for method, scale in scales.items()}
    assert errors["mse"] < 0.5 * errors["minmax"]
    assert errors["mse"] <= errors["percentile"]


@given(
    kind=st.sampled_from(["normal", "laplace", "uniform", "heavy", "relu", "outlier"]),
    size=st.integers(2_000, 20_000),
    spread=st.floats(1e-4, 1e4),
    seed=st.integers(0, 99),
)
def test_mse_is_never_worse_than_minmax_on_what_was_seen(kind: str, size: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws = {
        "normal": rng.normal(0, 1, size),
        "laplace": rng.laplace(0, 1, size),
        "uniform": rng.uniform(-1, 1, size),
        "heavy": rng.standard_t(2, size),
        "relu": rng.normal(0, 1, size).clip(0),
        "outlier": np.append(rng.normal(0, 1, size), 1000),
    }
    sample = (spread * draws[kind]).astype(np.float32)
    histogram = counted(sample)
    mse, minmax = (square_error(sample, activation_scale(histogram, method)) for method in ("mse", "minmax"))
    assert mse <= minmax * 1.02  # bins are a sixteenth of a step


@given(
    sample=arrays(
        np.float32,
        st.integers(1, 200),
        elements=st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-20 else 0),
    )
)
def test_any_values_at_all(sample: Floats) -> None:
    """No method leaves the range; mse is at worst what half a step of minmax for every value is."""
    histogram = counted(sample)
    top = float(np.abs(sample).max())
    if top == 0:
        return
    scales = {method: activation_scale(histogram, method) for method in METHODS}
    assert all(0 < scale * LEVELS <= top * (1 + 1e-6) for scale in scales.values())
    half_a_step = (0.5 * top / LEVELS) ** 2
    assert square_error(sample, scales["mse"]) <= 1.2 * len(sample) * half_a_step


@given(cuts=st.lists(st.integers(0, 500), max_size=5))
def test_a_sample_may_come_in_pieces(cuts: list[int]) -> None:
    sample = np.random.default_rng(1).normal(0, 2, 500).astype(np.float32)
    whole, pieces = counted(sample), Histogram.empty(float(np.abs(sample).max()))
    for part in np.split(sample, sorted(cuts)):
        pieces.add(np.abs(part))
    assert np.array_equal(whole.counts, pieces.counts)
    assert whole.counts.sum() == 500
    assert whole.counts[-1] >= 1  # the largest value itself


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros(method: Method) -> None:
    zeros = counted(np.zeros((3, 4), np.float32))
    assert activation_scale(zeros, method) == 1.0
    assert activation_scale(Histogram.empty(2.0), method) == 1.0
