from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.optimization import learning_rate
from train.run_config import OptimizerConfig


def test_cosine_rises_and_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, min_lr_scale=0.1)
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 19 / 20)))
    assert all(second <= first for first, second in pairwise(rates[4:]))


def test_constant_stays() -> None:
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=2)
    assert [learning_rate(config, step, 5) for step in range(5)] == [0.25, 0.5, 0.5, 0.5, 0.5]


@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 400), st.sampled_from(["cosine", "constant"]))
def test_rates_stay_within_bounds(warmup: int, steps: int, step: int, schedule: str) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup, schedule=schedule, min_lr_scale=0.05)  # type: ignore[arg-type]
    assert 0 < learning_rate(config, step, steps) <= 2.0
    if step >= warmup:
        assert learning_rate(config, step, steps) >= 0.1 - 1e-12
