"""Statistics of a LeRobot dataset are numpy's, quantiles included, which LeRobot needs to record more into it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from episodes.lerobot_stats import QUANTILES, FrameStats, merge, stats_of

NAMES = {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}


@pytest.mark.parametrize("shape", [(1, 3), (7, 2), (40,)])
def test_columns(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = stats_of(values).as_dict()
    table = values.reshape(len(values), -1).astype(np.float64)

    assert found.keys() == NAMES
    assert_allclose(found["mean"], table.mean(0), atol=1e-9)
    assert_allclose(found["std"], table.std(0), atol=1e-6)
    for share in QUANTILES:
        assert_allclose(found[f"q{round(share * 100):02d}"], np.quantile(table, share, axis=0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 4), height=st.integers(1, 9), low=st.integers(0, 200))
def test_images_are_counted_by_channel(seed: int, frames: int, height: int, low: int) -> None:
    pictures = np.random.default_rng(seed).integers(low, 256, (frames, height, 6, 3), dtype=np.uint8)
    stats = FrameStats()
    for picture in pictures:
        stats.add(picture)
    found = stats.stats().as_dict()
    pixels = pictures.reshape(-1, 3) / 255

    assert found["count"] == [frames]
    for name, expected in (
        ("min", pixels.min(0)),
        ("max", pixels.max(0)),
        ("mean", pixels.mean(0)),
        ("std", pixels.std(0)),
    ):
        assert_allclose(found[name], expected.reshape(3, 1, 1), atol=1e-7)
    for share in QUANTILES:
        expected = np.quantile(pixels, share, axis=0).reshape(3, 1, 1)
        assert_allclose(found[f"q{round(share * 100):02d}"], expected, atol=1e-12)


def test_episodes_are_weighted_by_their_frames() -> None:
    short, long = stats_of(np.zeros((1, 2))), stats_of(np.ones((3, 2)))
    whole = merge([short, long]).as_dict()
    assert whole["q50"] == [0.75, 0.75]
    assert whole["count"] == [4]
    assert whole["max"] == [1, 1]
