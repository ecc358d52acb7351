"""What docs/safety.md promises, on random sequences of wishes, ages and times."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.limits import Limits
from runtime.robot_file import Safety
from runtime.safety import LEVELS, STILL, Request, State, step

PERIOD = 0.05
SAFETY = Safety(stale_frame_s=0.5, stale_action_s=0.4, stop_within_s=0.3, watchdog_s=0.3)
LIMITS = Limits((0.5, 0.4, 0.0, 0.0, 0.0, 1.2), (1.0, 0.8, 0.0, 0.0, 0.0, 3.0), SAFETY)
FULL = (0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
FRESH = Request(FULL, 0.01, 0.01)
STALE = Request(FULL, 9.0, 0.01)

anything = st.floats(allow_nan=True, allow_infinity=True)
finite = st.floats(-1e6, 1e6)
vectors = st.tuples(*[finite] * 6)
ages = st.one_of(st.floats(0, 1), anything)
times = st.one_of(st.floats(0.001, 0.2), anything)
requests = st.builds(
    Request,
    wanted=st.one_of(st.none(), vectors, st.tuples(*[anything] * 6)),
    frame_age_s=ages,
    action_age_s=ages,
    misses=st.integers(0, 3),
    hits=st.integers(0, 2),
    halt=st.sampled_from(["", "", "", "ordered"]),
)


def run(state: State, *requests: Request, dt: float = PERIOD, limits: Limits = LIMITS) -> State:
    for request in requests:
        state, _ = step(state, request, limits, dt, PERIOD)
    return state


def driving(request: Request = FRESH) -> State:
    """After long enough to reach what is wanted."""
    return run(State(), *[request] * 60)


def speed_share(state: State) -> float:
    return max(abs(v) / m for v, m in zip(state.published, LIMITS.max_speed, strict=True) if m > 0)


@given(st.lists(st.tuples(requests, times), min_size=1, max_size=30))
def test_no_speed_above_its_limit_and_nothing_that_is_not_a_number(sequence: list[tuple[Request, float]]) -> None:
    state = State()
    for request, dt in sequence:
        state, verdict = step(state, request, LIMITS, dt, PERIOD)
        assert verdict.twist.is_finite
        assert verdict.twist.values == state.published
        for value, most in zip(state.published, LIMITS.max_speed, strict=True):
            assert abs(value) <= most


@given(st.lists(st.tuples(requests, times), min_size=1, max_size=30))
def test_nothing_gets_faster_than_its_acceleration(sequence: list[tuple[Request, float]]) -> None:
    state = State()
    for request, dt in sequence:
        before = state.published
        state, _ = step(state, request, LIMITS, dt, PERIOD)
        seconds = min(dt, 2 * PERIOD) if math.isfinite(dt) and dt > 0 else 0.0
        for old, new, most in zip(before, state.published, LIMITS.max_acceleration, strict=True):
            if abs(new) > abs(old):
                assert abs(new - old) <= most * seconds + 1e-9


@given(st.lists(st.tuples(requests, st.floats(0.001, 0.2)), max_size=20), st.floats(0.001, 0.2), requests)
def test_whatever_is_stale_stops_in_time(before: list[tuple[Request, float]], dt: float, request: Request) -> None:
    state = State()
    for earlier, earlier_dt in before:
        state, _ = step(state, earlier, LIMITS, earlier_dt, PERIOD)
    for stale in (
        replace(request, frame_age_s=SAFETY.stale_frame_s + 0.01),
        replace(request, action_age_s=SAFETY.stale_action_s + 0.01),
        replace(request, wanted=None),
        replace(request, halt="ordered"),
        replace(request, frame_age_s=math.nan),
        replace(request, action_age_s=-1.0),
    ):
        stopping, spent = state, 0.0
        while spent < SAFETY.stop_within_s - 1e-9:
            previous = speed_share(stopping)
            stopping, verdict = step(stopping, stale, LIMITS, dt, PERIOD)
            assert speed_share(stopping) <= previous
            assert verdict.reasons
            spent += dt
        assert stopping.published == STILL
        assert run(stopping, *[stale] * 5, dt=dt).published == STILL


@given(st.integers(0, 5), st.sampled_from([math.nan, math.inf, -math.inf]), requests)
def test_what_is_not_finite_is_zero_at_once(axis: int, value: float, request: Request) -> None:
    wanted = tuple(value if index == axis else 0.1 for index in range(6))
    _, verdict = step(driving(), replace(request, wanted=wanted), LIMITS, PERIOD, PERIOD)
    assert verdict.twist.is_zero
    assert "not finite" in verdict.reasons


@given(vectors)
def test_a_limit_does_not_turn_the_robot(wanted: tuple[float, ...]) -> None:
    driven = tuple(v if m > 0 else 0.0 for v, m in zip(wanted, LIMITS.max_speed, strict=True))
    state, _ = step(State(), Request(driven, 0.0, 0.0), LIMITS, PERIOD, PERIOD)
    for a in range(6):
        for b in range(6):
            assert math.isclose(
                state.published[a] * driven[b], state.published[b] * driven[a], rel_tol=1e-6, abs_tol=1e-6
            )


def test_what_is_wanted_is_reached_and_then_nothing_is_said() -> None:
    state = driving()
    assert state.published == FULL
    _, verdict = step(state, FRESH, LIMITS, PERIOD, PERIOD)
    assert verdict.reasons == ()
    assert verdict.level == "drive"


def test_the_ramp_takes_the_stated_time_and_no_less() -> None:
    state = driving()
    ticks = 0
    while state.published != STILL:
        state = run(state, STALE)
        ticks += 1
    assert ticks == math.ceil(SAFETY.stop_within_s / PERIOD)


def test_after_a_stop_it_starts_from_nothing() -> None:
    stopped = run(driving(), *[STALE] * 10)
    again, verdict = step(stopped, FRESH, LIMITS, PERIOD, PERIOD)
    assert 0 < again.published[0] <= 1.0 * PERIOD + 1e-12
    assert verdict.reasons == ("acceleration limit",)


def test_a_process_that_slept_does_not_leap() -> None:
    state, _ = step(State(), FRESH, LIMITS, 30.0, PERIOD)
    assert state.published[0] <= 2 * PERIOD * 1.0 + 1e-12


@pytest.mark.parametrize("dt", [0.0, -5.0, math.nan, math.inf])
def test_a_senseless_time_gives_no_speed_but_still_stops(dt: float) -> None:
    assert run(State(), FRESH, dt=dt).published == STILL
    assert run(driving(), *[STALE] * 6, dt=dt).published == STILL


def test_late_decisions_degrade_in_order() -> None:
    state, seen = driving(), []
    for _ in range(SAFETY.misses_to_stop):
        state = run(state, replace(FRESH, misses=1))
        seen.append(state.level)
    assert seen == ["hold", "slow", "slow", "stop"]
    state = run(state, *[FRESH] * 10)
    assert state.published == STILL


def test_recovery_takes_a_row_of_punctual_decisions_for_each_stage() -> None:
    state = run(driving(), replace(FRESH, misses=SAFETY.misses_to_stop))
    levels = []
    for _ in range(3 * SAFETY.hits_to_recover):
        state = run(state, replace(FRESH, hits=1))
        levels.append(state.level)
    assert levels == ["stop"] * 2 + ["slow"] * 3 + ["hold"] * 3 + ["drive"]


def test_one_late_decision_among_punctual_ones_never_drives_at_full_speed_again_too_soon() -> None:
    state = run(driving(), replace(FRESH, misses=2))
    for _ in range(20):
        state = run(state, replace(FRESH, hits=2), replace(FRESH, misses=1))
        assert state.level == "slow"


def test_hold_goes_on_but_not_faster() -> None:
    half = driving(replace(FRESH, wanted=(0.25, 0.0, 0.0, 0.0, 0.0, 0.0)))
    held = run(half, replace(FRESH, misses=1), FRESH, FRESH)
    assert held.level == "hold"
    assert held.published == half.published
    assert run(half, replace(FRESH, misses=1), replace(FRESH, wanted=STILL)).published[0] < 0.25


def test_slow_is_slower_by_its_factor() -> None:
    slow = run(driving(), replace(FRESH, misses=2), *[FRESH] * 20)
    assert slow.published[0] == pytest.approx(0.25)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_levels_rise_with_misses_and_fall_one_at_a_time(events: list[tuple[int, int]]) -> None:
    state = State()
    for misses, hits in events:
        before = LEVELS.index(state.level)
        state = run(state, replace(FRESH, misses=misses, hits=hits))
        after = LEVELS.index(state.level)
        assert after >= before if misses else after >= before - 1


@given(vectors, st.sampled_from([SAFETY.misses_to_hold, SAFETY.misses_to_slow, SAFETY.misses_to_stop]))
def test_on_the_word_of_a_late_policy_nothing_gets_faster(wanted: tuple[float, ...], misses: int) -> None:
    for before in (State(), driving(), driving(replace(FRESH, wanted=(0.1, -0.2, 0.0, 0.0, 0.0, 0.5)))):
        after = run(before, Request(wanted, 0.0, 0.0, misses=misses), *[Request(wanted, 0.0, 0.0)] * 10)
        assert after.level != "drive"
        for old, new in zip(before.published, after.published, strict=True):
            assert abs(new) <= abs(old) + 1e-12
            assert new * old >= 0


def test_an_axis_that_the_policy_does_not_drive_stays_zero() -> None:
    state = run(State(), *[replace(FRESH, wanted=(0.1, 0.0, 5.0, 0.0, 0.0, 0.0))] * 20)
    assert state.published == (0.1, 0.0, 0.0, 0.0, 0.0, 0.0)
