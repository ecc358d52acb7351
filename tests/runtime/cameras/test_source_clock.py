from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.cameras.source_clock import SourceClock

STEP_S = 1 / 30
delays = st.lists(st.floats(0, 3), min_size=1, max_size=60)


def test_without_stamps_the_arrival_counts() -> None:
    assert SourceClock().captured_s(None, 7.5) == 7.5


def test_a_queue_that_builds_up_shows_in_the_age() -> None:
    clock = SourceClock()
    queue_s = [min(2.0, index / 30) for index in range(900)]  # grows to two seconds, and stays

    ages = [
        index * STEP_S + delay - clock.captured_s(1000 + index * STEP_S, index * STEP_S + delay)
        for index, delay in enumerate(queue_s)
    ]

    assert ages[0] == 0
    assert abs(ages[30] - 1.0) < 0.01
    assert min(ages[100:]) > 1.99


def test_clocks_that_drift_apart_are_no_delay() -> None:
    clock = SourceClock()
    ages = [second - clock.captured_s(5.0 + second * (1 - 1e-4), second) for second in range(7200)]
    assert max(ages) < 0.001


def test_a_source_that_sets_its_clock_back_is_learned_anew() -> None:
    clock = SourceClock()
    clock.captured_s(1000.0, 1.0)

    assert clock.captured_s(400.0, 2.0) == 2.0
    assert abs(clock.captured_s(400.5, 3.0) - 2.5) < 0.001


@given(delays, st.floats(-1e6, 1e6))
def test_a_picture_looks_no_older_than_it_is_and_no_newer_than_its_arrival(late: list[float], offset: float) -> None:
    clock, arrival_s = SourceClock(), 0.0
    for index, delay in enumerate(late):
        taken = index * STEP_S
        arrival_s = max(arrival_s, taken + delay)
        assert taken - 1e-6 <= clock.captured_s(taken + offset, arrival_s) <= arrival_s
