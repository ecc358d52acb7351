"""The loop on a clock that is moved by hand: what is late, what is left out, how old the picture was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.clocks import JumpWatch
from bench.feed import Feed
from bench.pacing import loop_samples, looped, run_loop
from bench.results import Loop
from tests.bench.hand_clock import HandClock

FRAMES = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1).repeat(3, axis=3)
FEED = Feed(FRAMES, "go", "frames")


class Taking:
    """A policy whose steps take the listed seconds, in turn."""

    def __init__(self, clock: HandClock, *seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self.seen: list[int] = []

    def step(self, frame: np.ndarray) -> Any:
        self._clock.pass_(self._seconds[len(self.seen) % len(self._seconds)])
        self.seen.append(int(frame[0, 0, 0]))
        return SimpleNamespace(values=np.zeros((10, 2), np.float32))


def loop(*seconds: float, ticks: int = 10, camera_fps: float = 30.0) -> tuple[Loop, Taking]:
    clock = HandClock()
    policy = Taking(clock, *seconds)
    found = run_loop(
        policy, FEED, ticks, rate_hz=5.0, deadline_ms=200.0, camera_fps=camera_fps, watch=JumpWatch(clock), clock=clock
    )
    return found, policy


def test_a_fast_policy_keeps_the_rate() -> None:
    found, policy = loop(0.05)
    assert (found.ticks, found.misses, found.skipped, found.miss_rate) == (10, 0, 0, 0.0)
    assert found.period is not None
    assert found.period.p50 == pytest.approx(200)
    assert found.decision.max == pytest.approx(50)
    assert np.diff(policy.seen).tolist() == [6] * 9  # of 30 frames a second, every sixth: the newest


def test_the_reaction_includes_the_age_of_the_picture() -> None:
    """The newest frame is half a camera period old at a tick."""
    found, _ = loop(0.05)
    assert found.reaction.p50 == pytest.approx(50 + 1000 / 30 / 2, abs=0.01)
    slow, _ = loop(0.05, camera_fps=5.0)
    assert slow.reaction.p50 == pytest.approx(50 + 100, abs=0.01)


def test_a_slow_policy_leaves_ticks_out_and_does_not_fall_behind() -> None:
    found, policy = loop(0.45)
    assert found.misses == 10
    assert found.skipped == 18  # two ticks in each pause between ten decisions
    assert found.miss_rate == 1.0
    assert found.decision.max == pytest.approx(450)  # not growing
    assert np.diff(policy.seen).tolist() == [18] * 9


def test_a_decision_just_over_the_deadline() -> None:
    found, _ = loop(0.19, 0.201)
    assert found.misses == 5
    assert found.skipped == 4  # the last decision's tick was not due yet
    assert found.miss_rate == pytest.approx(9 / 14)


def test_one_tick_has_no_period() -> None:
    found, _ = loop(0.05, ticks=1)
    assert found.period is None
    assert found.ticks == 1


def test_an_interrupted_loop_is_summarized_too() -> None:
    clock, samples = HandClock(), loop_samples()

    class Stopped(Taking):
        def step(self, frame: np.ndarray) -> Any:
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().step(frame)

    with pytest.raises(KeyboardInterrupt):
        run_loop(
            Stopped(clock, 0.01), FEED, 10, rate_hz=5, deadline_ms=200, camera_fps=30, watch=JumpWatch(clock), clock=clock,
            samples=samples,
        )  # fmt: skip
    assert looped(samples, 200.0).ticks == 3
