"""Cuts a recording into pieces that are episodes: one instruction, no reset, no gap, every picture there.

A policy learns from the time between frames and from what it saw before. So a piece ends where that would be wrong: another instruction, a
reset, a decision or a picture that is not in the file, or a pause. Actions are given as the policy's numbers, whichever of the two is
wanted: what it decided, or what was sent to the robot after safety had its say, mapped back through the axes of the robot file.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bundle.errors import RecordingError
from episodes.recording_events import Command, Decided, RecordedRun

ActionSource = Literal["published", "decided"]
_PAUSE_S = 1.0
_PAUSE_PERIODS = 5.0


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a recording.

    Attributes:
        index: counts from 0.
        decisions: each with its picture, in order.
        period_s: the usual time between two decisions; None where there is only one.
        ended_by: why it ends here.
    """

    index: int
    decisions: tuple[Decided, ...]
    period_s: float | None
    ended_by: str

    @property
    def instruction(self) -> str:
        """What the policy was told."""
        return self.decisions[0].instruction

    @property
    def duration_s(self) -> float:
        """From the first to the last decision."""
        return (self.decisions[-1].started_ns - self.decisions[0].started_ns) / 1e9

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """When each decision began, float64 [T], seconds since the first."""
        started = np.array([decided.started_ns for decided in self.decisions], dtype=np.int64)
        times: npt.NDArray[np.float64] = (started - started[0]) / 1e9
        return times


def cut(run: RecordedRun) -> tuple[Segment, ...]:
    """The pieces of a recording, in order; none where no decision has its picture."""
    period = _period(run.decisions)
    pause_s = max(_PAUSE_S, _PAUSE_PERIODS * (period or 0.0))
    segments: list[Segment] = []
    piece: list[Decided] = []

    def end(why: str) -> None:
        if piece:
            segments.append(Segment(len(segments), tuple(piece), _period(tuple(piece)) or period, why))
            piece.clear()

    previous: Decided | None = None
    for decided in run.decisions:
        if previous is not None and (why := _break(previous, decided, pause_s)):
            end(why)
        if decided.picture is None:
            end("picture not recorded")
        else:
            piece.append(decided)
        previous = decided
    end("end of the file")
    return tuple(segments)


def actions_of(run: RecordedRun, segment: Segment, source: ActionSource) -> npt.NDArray[np.float32]:
    """float32 [T, A]: for each frame what was decided on it (the first step of the chunk), or what was then sent.

    Of several commands sent before the next decision was made the last counts: limits on acceleration let it come nearest to what was
    wanted, and it is surely made from this decision.

    Raises:
        RecordingError: not finite; or what was sent cannot be mapped back.
    """
    if source == "decided":
        actions = np.array([decided.values[0] for decided in segment.decisions], dtype=np.float32)
    else:
        actions = _published(run, segment)
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise RecordingError(
            f"{run.path}#{segment.index}: action {row} is not finite",
            got=f"{run.action_names[column]} = {actions[row, column]}",
            expected="finite velocities",
            hint="find out why the policy decided so; leave this piece out of training.",
        )
    return actions


def _break(previous: Decided, decided: Decided, pause_s: float) -> str:
    """Why `decided` does not belong to the piece of `previous`; empty where it does."""
    if decided.instruction != previous.instruction:
        return "another instruction"
    if decided.anew or decided.number <= previous.number:
        return decided.anew or "reset"
    if decided.number != previous.number + 1:
        return "decision not recorded"
    return "pause" if (decided.started_ns - previous.started_ns) / 1e9 > pause_s else ""


def _period(decisions: tuple[Decided, ...]) -> float | None:
    if len(decisions) < 2:
        return None
    steps = np.diff(np.array([decided.started_ns for decided in decisions], dtype=np.int64))
    period = float(np.median(steps)) / 1e9
    return period if period > 0 else None


def _published(run: RecordedRun, segment: Segment) -> npt.NDArray[np.float32]:
    columns = [_axis(run, name) for name in run.action_names]
    times = [command.time_ns for command in run.commands]
    ends = [decided.finished_ns for decided in segment.decisions[1:]]
    sent = [run.commands[place - 1] if (place := bisect_left(times, end)) else None for end in ends]
    sent.append(_last_sent(run, segment, times))
    actions = np.zeros((len(sent), len(columns)), dtype=np.float32)
    for row, command in enumerate(sent):
        if command is not None:  # before the first command the robot stood still
            actions[row] = [command.values[field] / scale for field, scale in columns]
    return actions + np.float32(0)  # no negative zeros


def _last_sent(run: RecordedRun, segment: Segment, times: list[int]) -> Command | None:
    """What was sent after the last decision of a piece. The zero that ends a run, or bridges two instructions, does not come from it."""
    final = segment.decisions[-1].finished_ns
    end = final + round((segment.period_s or _PAUSE_S) * 1e9)
    end = min([end, *(decided.finished_ns for decided in run.decisions if decided.finished_ns > final)])
    first, stop = bisect_left(times, final), bisect_left(times, end)
    wanted = [command for command in run.commands[first:stop] if command.wanted]
    if wanted:
        return wanted[-1]
    return run.commands[stop - 1] if stop else None


def _axis(run: RecordedRun, name: str) -> tuple[str, float]:
    """The Twist field of an action, and what the action is multiplied by on its way there."""
    robot = run.settings.get("robot")
    axes: Any = robot.get("axes") if isinstance(robot, dict) else None
    try:
        axis = axes[name]
        field, gain, invert = axis["field"], float(axis["gain"]), axis["invert"]
        shared = sum(1 for other in axes.values() if other["field"] == field) > 1
        usable = gain > 0 and isinstance(invert, bool) and field in _FIELDS and not shared
    except (TypeError, KeyError, ValueError, AttributeError):
        axis, usable = None, False
    if not usable:
        raise RecordingError(
            f"{run.path} does not tell how {name} became a velocity",
            got=f"axis {axis}",
            expected="field, gain and invert in the recorded robot file, and a Twist field of its own",
            hint='take what the policy decided instead: actions="decided", or --actions decided.',
        )
    return field, -gain if invert else gain


_FIELDS = frozenset(f"{part}_{axis}" for part in ("linear", "angular") for axis in "xyz")
