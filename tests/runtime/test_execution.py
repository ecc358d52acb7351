"""Executing chunks: which row is for now, and how old the answer is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.execution import Execution, PlayedChunk, RecedingHorizon, TemporalEnsemble, TimedChunk, make_execution
from runtime.robot_file import Loop

PERIOD = 0.1


def chunk(start: float, captured_s: float, steps: int = 4) -> TimedChunk:
    """Rows start, start + 1, ... in one column."""
    return TimedChunk(np.arange(start, start + steps, dtype=np.float32)[:, None], captured_s)


def value(execution: Execution, now_s: float) -> float:
    row, _ = execution.command(now_s)
    assert row is not None
    return float(row[0])


@pytest.mark.parametrize("execution", [RecedingHorizon(), PlayedChunk(PERIOD, 3), TemporalEnsemble(PERIOD, 3, 0.1)])
def test_without_a_chunk_there_is_no_command(execution: Execution) -> None:
    assert execution.command(5.0) == (None, math.inf)
    execution.add(chunk(0, 5.0))
    assert execution.command(5.0)[0] is not None
    execution.clear()
    assert execution.command(5.0) == (None, math.inf)


def test_receding_horizon_plays_step_0_and_ages() -> None:
    execution = RecedingHorizon()
    execution.add(chunk(7, 1.0))
    assert [value(execution, now) for now in (1.0, 1.15, 1.5)] == [7, 7, 7]
    assert execution.command(1.5)[1] == pytest.approx(0.5)


def test_a_chunk_is_played_by_time_and_not_by_count() -> None:
    execution = PlayedChunk(PERIOD, 3)
    execution.add(chunk(10, 2.0))
    assert [value(execution, now) for now in (2.0, 2.0, 2.05, 2.1, 2.19, 2.2, 2.3, 2.9)] == [
        10, 10, 10, 11, 11, 12, 12, 12,
    ]  # fmt: skip
    assert execution.command(2.25)[1] == pytest.approx(0.05)
    assert execution.command(2.9)[1] == pytest.approx(0.7)


def test_a_late_chunk_starts_where_it_should_be_by_now() -> None:
    execution = PlayedChunk(PERIOD, 4)
    execution.add(chunk(0, 0.0))
    execution.add(chunk(20, 0.1))
    assert value(execution, 0.3) == 22


@given(st.floats(0, 3), st.integers(1, 8), st.integers(1, 8))
def test_the_row_played_is_never_younger_than_its_time(now: float, steps: int, length: int) -> None:
    execution = PlayedChunk(PERIOD, steps)
    execution.add(chunk(0, 0.0, length))
    row, age = execution.command(now)
    assert row is not None
    assert age >= -1e-6
    assert row[0] <= min(steps, length) - 1
    if now < min(steps, length) * PERIOD - 1e-6:
        assert age <= PERIOD + 1e-6


def test_an_ensemble_is_the_weighted_mean_of_what_covers_now() -> None:
    execution = TemporalEnsemble(PERIOD, 4, 0.5)
    execution.add(chunk(100, -5.0))  # over long ago
    execution.add(chunk(0, 0.0))
    execution.add(chunk(10, 0.1))
    old, new = math.exp(-0.5 * 2), math.exp(-0.5 * 1)
    assert value(execution, 0.2) == pytest.approx((2 * old + 11 * new) / (old + new))


def test_an_ensemble_without_decay_of_equal_chunks_is_that_chunk() -> None:
    execution = TemporalEnsemble(PERIOD, 3, 0.0)
    for start in range(3):
        execution.add(chunk(start, start * PERIOD))
    assert value(execution, 0.2) == pytest.approx(2)


def test_an_ensemble_ages_like_a_played_chunk() -> None:
    ensemble, played = TemporalEnsemble(PERIOD, 2, 0.1), PlayedChunk(PERIOD, 2)
    for execution in (ensemble, played):
        execution.add(chunk(0, 0.0))
    for now in (0.0, 0.05, 0.15, 0.35, 3.0):
        assert ensemble.command(now)[1] == played.command(now)[1]


def test_the_robot_file_chooses() -> None:
    kinds = {"receding_horizon": RecedingHorizon, "chunk": PlayedChunk, "ensemble": TemporalEnsemble}
    for name, kind in kinds.items():
        assert type(make_execution(Loop(strategy=name), PERIOD)) is kind  # type: ignore[arg-type]


def test_an_ensemble_asks_no_chunk_beyond_its_steps() -> None:
    execution = TemporalEnsemble(PERIOD, 2, 0.0)
    for number, start in enumerate((0, 100, 200)):
        execution.add(chunk(start, number * PERIOD))
    # The first chunk has a row for now, but it is its third.
    assert value(execution, 0.2) == pytest.approx((101 + 200) / 2)


def test_the_steepest_decay_leaves_the_newest() -> None:
    execution = TemporalEnsemble(PERIOD, 4, 1e4)
    execution.add(chunk(0, 0.0))
    assert value(execution, 0.25) == 2
    execution.add(chunk(50, 0.2))
    assert value(execution, 0.25) == 50
