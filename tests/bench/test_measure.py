"""Samples are what happened, layers add up, and what stops a measurement leaves what it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.clocks import JumpWatch
from bench.feed import Feed
from bench.measure import (
    SECTIONS,
    harness_ms,
    measure_memory,
    measure_steps,
    soak,
    soak_samples,
    soaked,
    step_samples,
    summarize,
    timings,
)  # fmt: skip
from bench.results import STORED, Timing
from tests.bench.hand_clock import HandClock

FEED = Feed(np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(3, axis=3), "go", "three frames")


class Scripted:
    """A policy whose steps take what a list says, in milliseconds: preprocess, vision, language, action_head, rest."""

    def __init__(self, clock: HandClock, steps: list[tuple[float, ...]], engine: float = 1.0) -> None:
        self._clock, self._steps, self._engine = clock, steps, engine
        self.seen: list[int] = []

    def step(self, frame: np.ndarray) -> Any:
        parts = self._steps[len(self.seen) % len(self._steps)]
        self.seen.append(int(frame[0, 0, 0]))
        self._clock.pass_(sum(parts) / 1e3)
        timing = dict(zip(SECTIONS[:-2], parts, strict=False)) | {"total": sum(parts[:4])}
        return SimpleNamespace(timing=timing, engine_ms=self._engine * sum(parts[1:4]))


def test_sections_and_layers_are_of_the_same_steps() -> None:
    clock = HandClock()
    policy = Scripted(clock, [(1, 20, 30, 4, 0.5), (2, 21, 31, 5, 0.25)], engine=0.9)
    found = measure_steps(policy, FEED, 4, warmup=2, watch=JumpWatch(clock), clock=clock)
    assert policy.seen == [0, 1, 0, 1, 2, 0]  # frames in turn, from the beginning after the warm-up
    assert found.count == 4
    assert list(found.sections) == list(SECTIONS)
    np.testing.assert_allclose(found.sections["vision"], [20, 21, 20, 21])
    np.testing.assert_allclose(found.sections["glue"], [0.5, 0.25, 0.5, 0.25], atol=1e-9)
    np.testing.assert_allclose(sum(found.sections[name] for name in SECTIONS[:-1]), found.sections["total"])
    np.testing.assert_allclose(found.layers["engine"], 0.9 * np.array([54, 57, 54, 57]))
    np.testing.assert_allclose(found.layers["io"], [54, 57, 54, 57])
    np.testing.assert_allclose(found.layers["step"], found.sections["total"])
    assert found.seconds == pytest.approx((55.5 + 59.25) * 2 / 1e3)


def test_what_a_chain_cannot_tell_is_missing_not_zero() -> None:
    clock = HandClock()

    class Coarse(Scripted):
        def step(self, frame: np.ndarray) -> Any:
            chunk = super().step(frame)
            return SimpleNamespace(timing={"preprocess": 1.0, "total": chunk.timing["total"]}, engine_ms=np.nan)

    found = measure_steps(Coarse(clock, [(1, 2, 3, 4, 0)]), FEED, 3, warmup=0, watch=JumpWatch(clock), clock=clock)
    assert set(found.sections) == {"preprocess", "glue", "total"}
    assert set(found.layers) == {"io", "step"}


def test_an_interrupted_measurement_leaves_its_steps() -> None:
    clock, samples = HandClock(), step_samples()

    class Stopped(Scripted):
        def step(self, frame: np.ndarray) -> Any:
            if len(self.seen) == 5:
                raise KeyboardInterrupt
            return super().step(frame)

    policy = Stopped(clock, [(1, 2, 3, 4, 0)])
    with pytest.raises(KeyboardInterrupt):
        measure_steps(policy, FEED, 100, warmup=2, watch=JumpWatch(clock), clock=clock, samples=samples)
    assert summarize(samples).count == len(samples) == 3


def test_a_clock_that_jumps_while_measuring() -> None:
    clock = HandClock()

    class Jumping(Scripted):
        def step(self, frame: np.ndarray) -> Any:
            if len(self.seen) == 2:
                clock.wall_offset += 7200
            return super().step(frame)

    watch = JumpWatch(clock)
    found = measure_steps(Jumping(clock, [(1, 2, 3, 4, 0)]), FEED, 5, warmup=0, watch=watch, clock=clock)
    assert watch.jumps == [pytest.approx(7200)]
    np.testing.assert_allclose(found.sections["total"], 10)


def test_a_soak_tells_whether_it_got_slower() -> None:
    clock = HandClock()
    policy = Scripted(clock, [(1, 2 + index / 100, 3, 4, 0) for index in range(10_000)])
    found = soak(policy, FEED, 1.0, watch=JumpWatch(clock), clock=clock)
    assert found.minutes == pytest.approx(1.0, abs=0.01)
    assert found.last > 1.5 * found.first
    assert found.step.count == len(policy.seen)


def test_an_interrupted_soak_is_summarized_too() -> None:
    samples = soak_samples()
    samples.add({"wall": 5.0, "rss": 100.0})
    assert soaked(samples, 0.1).step.count == 1


def test_the_harness_knows_its_own_share() -> None:
    """How small it is stands in docs/decisions/0010; here only that it is not milliseconds, on a machine however busy."""
    assert 0 < harness_ms() < 5


def test_what_a_step_allocates() -> None:
    clock = HandClock()

    class Hungry(Scripted):
        kept: list[Any] = []  # noqa: RUF012 - a leak is what this is about

        def step(self, frame: np.ndarray) -> Any:
            self.kept.append([object() for _ in range(50)])
            np.ones(100_000)
            return super().step(frame)

    policy = Hungry(clock, [(1, 2, 3, 4, 0)])
    measured = measure_steps(policy, FEED, 40, warmup=1, watch=JumpWatch(clock), clock=clock)
    memory = measure_memory(policy, FEED, measured, gpu_mb=None)
    assert 800 <= memory.python_kb_per_step < 1000
    assert 50 <= memory.blocks_per_step < 70
    assert memory.rss_peak_mb >= memory.rss_mb > 10


@given(st.lists(st.floats(0.001, 1e5), min_size=1, max_size=300))
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    found = timings({"total": np.array(samples)})["total"]
    ordered = (found.p50, found.p90, found.p95, found.p99, found.p99_9, found.max)
    assert list(ordered) == sorted(ordered)
    assert min(samples) <= found.p50 <= found.max == max(samples)
    assert found.count == len(found.samples) == len(samples)


def test_long_runs_are_thinned_but_their_percentiles_are_of_all() -> None:
    samples = list(np.random.default_rng(0).gamma(2, 10, 3 * STORED + 1))
    found = Timing.of(samples)
    assert found.count == len(samples)
    assert found.stride == 4
    assert len(found.samples) <= STORED
    assert found.p99 == pytest.approx(np.percentile(samples, 99))
    assert found.max == max(samples)
