"""Safety: from what the policy wants to what the robot is told, as a pure function of wishes, ages and limits.

`step` has no clock, no thread and no memory but the state that it returns, so every promise in the table of docs/safety.md is a property
that tests check on random sequences. Vectors are scaled as a whole rather than cut axis by axis, so that a limit makes the robot slower and
does not turn it. What cannot be trusted (a NaN, an age below zero, a step of time that is none) counts as the worst that it could mean.

Knows nothing about chunks (runtime/execution.py) or about who sends the result (runtime/control_loop.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from runtime.commands.base import TWIST_FIELDS, Twist
from runtime.limits import Limits
from runtime.robot_file import Safety

Level = Literal["drive", "hold", "slow", "stop"]
LEVELS: tuple[Level, ...] = ("drive", "hold", "slow", "stop")
Vector = tuple[float, ...]
STILL: Vector = (0.0,) * len(TWIST_FIELDS)
# Two clocks' roundings apart; more than that below zero is no age.
_EARLY_S = 0.01


@dataclass(frozen=True)
class Request:
    """What is known at one tick.

    Attributes:
        wanted: m/s and rad/s in the order of TWIST_FIELDS; None where nobody wants anything.
        frame_age_s: of the newest good frame; infinite where there is none.
        action_age_s: of what is wanted.
        misses, hits: late and punctual decisions since the last tick.
        halt: somebody ordered a stop; the reason, or empty.
    """

    wanted: Vector | None
    frame_age_s: float
    action_age_s: float
    misses: int = 0
    hits: int = 0
    halt: str = ""


@dataclass(frozen=True)
class State:
    """What one tick leaves to the next.

    Attributes:
        published: the last command, in the order of TWIST_FIELDS.
        level: how far driving is degraded.
        misses, hits: decisions in a row that were late, or punctual.
    """

    published: Vector = STILL
    level: Level = "drive"
    misses: int = 0
    hits: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the robot is told, and why that is not what was wanted (empty if it is)."""

    twist: Twist
    level: Level
    reasons: tuple[str, ...]


def step(state: State, request: Request, limits: Limits, dt_s: float, period_s: float) -> tuple[State, Verdict]:
    """One tick.

    Args:
        dt_s: seconds since the last command. More than two periods give no more acceleration than two, but a stop uses all of it.
        period_s: of publishing.
    """
    safety = limits.safety
    level, misses, hits = _degrade(state, request, safety)
    reasons = [] if level == "drive" else [f"late decisions: {level}"]
    if request.wanted is not None and not all(map(math.isfinite, request.wanted)):
        # Whatever computed this is broken, so nothing that it said before is worth a smooth stop.
        return State(STILL, level, misses, hits), Verdict(Twist(), level, ("not finite", *reasons))

    stops = [request.halt] if request.halt else []
    if request.wanted is None:
        stops.append("no action")
    elif not -_EARLY_S <= request.action_age_s <= safety.stale_action_s:
        stops.append("stale action")
    if not -_EARLY_S <= request.frame_age_s <= safety.stale_frame_s:
        stops.append("stale frame")
    sane = math.isfinite(dt_s) and dt_s > 0
    if stops or level == "stop":
        published = _ramp_down(state.published, limits, dt_s if sane else period_s)
        reasons = stops + reasons
    else:
        assert request.wanted is not None
        published, clamps = _follow(
            state.published, request.wanted, level, limits, min(dt_s, 2 * period_s) if sane else 0.0
        )
        reasons += clamps
    return State(published, level, misses, hits), Verdict(Twist(*published), level, tuple(reasons))


def _degrade(state: State, request: Request, safety: Safety) -> tuple[Level, int, int]:
    """The level after the decisions of this tick; one stage back at a time, and only after a row of punctual ones."""
    rank, misses, hits = LEVELS.index(state.level), state.misses, state.hits
    if request.misses > 0:
        misses, hits = misses + request.misses, 0
        bounds = (safety.misses_to_hold, safety.misses_to_slow, safety.misses_to_stop)
        rank = max(rank, sum(misses >= bound for bound in bounds))
    elif request.hits > 0:
        misses, hits = 0, hits + request.hits
        if rank and hits >= safety.hits_to_recover:
            rank, hits = rank - 1, 0
    return LEVELS[rank], misses, hits


def _ramp_down(published: Vector, limits: Limits, dt_s: float) -> Vector:
    """The same direction, slower, so that full speed takes stop_within_s to nothing."""
    share = max((abs(v) / most for v, most in zip(published, limits.max_speed, strict=True) if most > 0), default=0.0)
    left = share - dt_s / limits.safety.stop_within_s
    # Below a thousandth of full speed there is nothing to ramp; a remainder of rounding would take a tick more.
    if left <= 1e-3:
        return STILL
    return tuple(v * left / share for v in published)


def _follow(published: Vector, wanted: Vector, level: Level, limits: Limits, dt_s: float) -> tuple[Vector, list[str]]:
    reasons: list[str] = []
    target = tuple(v if most > 0 else 0.0 for v, most in zip(wanted, limits.max_speed, strict=True))
    scale = _scale(target, limits.max_speed)
    if scale < 1 or target != wanted:
        reasons.append("speed limit")
    if level == "slow":
        scale *= limits.safety.slow_factor
    target = _times(target, scale, limits.max_speed)
    change = tuple(t - p for t, p in zip(target, published, strict=True))
    scale = _scale(change, tuple(a * dt_s for a in limits.max_acceleration))
    if scale < 1:
        reasons.append("acceleration limit")
        target = tuple(p + scale * c for p, c in zip(published, change, strict=True))
    if level != "drive":
        # What was decided goes on, but on the word of a late policy nothing gets faster.
        target = tuple(
            math.copysign(min(abs(t), abs(p)), t) if t * p > 0 else 0.0 for t, p in zip(target, published, strict=True)
        )
    return _times(target, 1.0, limits.max_speed), reasons


def _scale(vector: Vector, most: Vector) -> float:
    """The largest factor up to 1 by which a vector stays within `most` on all axes."""
    return min((m / abs(v) for v, m in zip(vector, most, strict=True) if abs(v) > m), default=1.0)


def _times(vector: Vector, factor: float, most: Vector) -> Vector:
    """Scaled, and held to `most` against the last bit of rounding."""
    return tuple(min(max(v * factor, -m), m) for v, m in zip(vector, most, strict=True))
