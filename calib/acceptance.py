"""Says whether an INT8 variant makes the robot do the same, in the robot's terms.

A cosine of features tells nobody whether the robot still turns left. So the commands of both are compared frame by frame on held-out
stretches: the largest error in the head's own range against a budget, errors per axis in physical units, and events that no average
shows: a changed direction, a start out of a stop, another class. Numbers only; reads and writes nothing, and runs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Action
from calib.resampling import bootstrap_interval
from runtime.actions import action_error, denormalize

# Shares of an axis' largest command. Below the first a robot of this class stands or creeps, so its sign says nothing; a stop and a start
# are one only across twice that, so that a command that hovers about the threshold is no event.
_MOVES = 0.05
_STARTS = 0.1
# Of the frames, and of all steps of their chunks: a late decision drives the later rows of the one before. At the edge between two
# commands any rounding decides, so a single frame must not judge; at six frames a second this is one in 17 s, a hand's breadth on the
# floor. More is another way of driving.
_EVENTS = 0.01
_WORST = 6


@dataclass(frozen=True)
class Streamed:
    """One held-out stretch of consecutive frames, streamed from a reset through both.

    Attributes:
        episode: name of where it is from.
        first_frame: index in the episode of row 0.
        instruction: as given to both.
        reference: float32 [T, n, A] as the head gives it (ActionChunk.normalized), of the floating-point bundle.
        candidate: float32 [T, n, A], the same of the INT8 variant.
    """

    episode: str
    first_frame: int
    instruction: str
    reference: NDArray[np.float32]
    candidate: NDArray[np.float32]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts: immutable, keyword-only, no unknown fields."""


class Deviation(_Strict, frozen=True):
    """Of the candidate from the reference, physical units; `mean` is of absolute values, `interval` its 95 % bootstrap interval."""

    rmse: float
    max: float
    mean: float
    interval: tuple[float, float]


class AxisAcceptance(_Strict, frozen=True):
    """One axis.

    `largest` is the largest command of the axis, `now` the deviation of chunk step 0, `chunk` of all steps. `bias` is the mean of
    candidate - reference of step 0: what adds up on the floor.
    """

    name: str
    unit: str
    largest: float
    now: Deviation
    chunk: Deviation
    bias: float
    bias_interval: tuple[float, float]


class Count(_Strict, frozen=True):
    """Events of one axis: in `count` of the `of` frames where they could happen."""

    axis: str
    count: int
    of: int


class Pair(_Strict, frozen=True):
    """What the reference chose and what the candidate: in so many frames at step 0, and in so many steps of all chunks."""

    reference: str
    candidate: str
    frames: int
    steps: int


class Flips(_Strict, frozen=True):
    """Other choices (class, gripper): frames where step 0 differs, chunk steps where any does, and which, the commonest first."""

    frames: int
    steps: int
    of_frames: int
    of_steps: int
    pairs: tuple[Pair, ...]


class Worst(_Strict, frozen=True):
    """A frame with a large error: chunk step and column of the head where it is largest, and all commands of that step.

    `column` is an axis, or for `classes` the class of the logit. `names`, `units`, `reference` and `candidate` run over axes, in physical
    units; `error` is in the head's range.
    """

    episode: str
    frame: int
    instruction: str
    step: int
    column: str
    error: float
    names: tuple[str, ...]
    units: tuple[str, ...]
    reference: tuple[float, ...]
    candidate: tuple[float, ...]


class Acceptance(_Strict, frozen=True):
    """The judgement, for JSON (where NaN becomes null).

    `action_error` is the largest error over frames, chunk steps and columns in the head's -1..1, `_p99` and `_mean` are over the same
    numbers. `class_flips` and `gripper_flips` are None for other heads. `changed_frames` are those whose step 0 is another decision on any
    axis - reversed, a start, a stop, another class, the gripper's opposite - and `changed_steps` counts steps of all chunks so.
    """

    verdict: Literal["PASS", "FAIL"]
    reasons: tuple[str, ...]
    budget: float
    frames: int
    episodes: int
    action_error: float
    action_error_p99: float
    action_error_mean: float
    axes: tuple[AxisAcceptance, ...]
    direction_flips: tuple[Count, ...]
    starts: tuple[Count, ...]
    stops: tuple[Count, ...]
    class_flips: Flips | None
    gripper_flips: Flips | None
    changed_frames: int
    changed_steps: int
    worst: tuple[Worst, ...]


def judge(streams: Sequence[Streamed], action: Action, *, budget: float, seed: int = 0) -> Acceptance:
    """Compare two variants over held-out streams; numbers that are not finite are part of the answer, not an error.

    Args:
        budget: of `action_error`; a NaN fails any.
        seed: of the bootstrap; same input, same answer.

    Raises:
        ValueError: no frames, or arrays whose shapes do not belong together.
    """
    _check(streams, action)
    with np.errstate(invalid="ignore", over="ignore"):
        return _judged(streams, action, budget, seed)


def _judged(streams: Sequence[Streamed], action: Action, budget: float, seed: int) -> Acceptance:
    errors = np.concatenate([action_error(each.candidate, each.reference) for each in streams])
    reference = np.concatenate([_commands(each.reference, action) for each in streams])
    candidate = np.concatenate([_commands(each.candidate, action) for each in streams])
    lengths = [len(each.reference) for each in streams]
    heads = np.concatenate([each.reference for each in streams]), np.concatenate([each.candidate for each in streams])
    largest = _largest(action)
    moves, reversed_, started, stopped = _events(reference, candidate, largest, action)
    axes = action.names[: moves.shape[-1]]
    direction_flips, starts = _counts(axes, reversed_, moves), _counts(axes, started, ~moves)
    stops = _counts(axes, stopped, moves)
    changed = np.any(reversed_ | started | stopped, axis=-1)  # [frames, n]
    class_flips = gripper_flips = None
    if action.head == "classes":
        chosen = heads[0].argmax(axis=-1), heads[1].argmax(axis=-1)
        class_flips = _flips(*chosen, _columns(action))
        changed |= chosen[0] != chosen[1]
    if action.head == "actions_gripper":
        closed = (heads[0][..., -1] > 0).astype(int), (heads[1][..., -1] > 0).astype(int)
        gripper_flips = _flips(*closed, ("-1", "+1"))
        changed |= closed[0] != closed[1]
    most = float(errors.max())  # numpy's maximum keeps a NaN
    reasons = []
    if not most <= budget:
        reasons.append(f"action error {most:.4g}, PASS up to {budget:g}")
    counts = [(f"direction of {each.axis} reversed", each.count) for each in direction_flips]
    counts += [(f"{each.axis} starts where the reference stands", each.count) for each in starts]
    counts += [(f"{each.axis} stops where the reference moves", each.count) for each in stops]
    counts += [("another class", class_flips.frames)] if class_flips else []
    counts += [("gripper does the opposite", gripper_flips.frames)] if gripper_flips else []
    frames, chunk = changed.shape
    limit = max(1.0, _EVENTS * frames)
    if changed[:, 0].sum() > limit:
        kinds = ", ".join(f"{what} in {n}" for what, n in counts if n)
        reasons.append(
            f"another decision in {changed[:, 0].sum()} of {frames} frames, PASS up to {int(limit)} ({kinds})"
        )
    if changed.sum() > limit * chunk:
        reasons.append(
            f"another decision in {changed.sum()} of {changed.size} steps of the chunks, PASS up to {int(limit * chunk)}"
        )
    return Acceptance(
        verdict="FAIL" if reasons else "PASS",
        reasons=tuple(reasons),
        budget=budget,
        frames=len(errors),
        episodes=len({each.episode for each in streams}),
        action_error=most,
        action_error_p99=float(np.percentile(errors, 99)),
        action_error_mean=float(errors.mean()),
        axes=_axes(candidate - reference, lengths, largest, action, seed),
        direction_flips=direction_flips,
        starts=starts,
        stops=stops,
        class_flips=class_flips,
        gripper_flips=gripper_flips,
        changed_frames=int(changed[:, 0].sum()),
        changed_steps=int(changed.sum()),
        worst=_worst(streams, errors, reference, candidate, action),
    )


def _check(streams: Sequence[Streamed], action: Action) -> None:
    columns = len(_columns(action))
    if not streams:
        raise ValueError("nothing to judge: no streams")
    chunk = streams[0].reference.shape[1:]
    for each in streams:
        shape = each.reference.shape
        if len(shape) != 3 or 0 in shape or shape[1:] != chunk or shape[2] != columns or each.candidate.shape != shape:
            raise ValueError(f"{each.episode}: {shape} and {each.candidate.shape}, expected twice [T, n, {columns}]")


def _columns(action: Action) -> tuple[str, ...]:
    """Names of the head's columns."""
    if action.head != "classes":
        return action.names
    return action.class_names or tuple(f"class {index}" for index in range(len(action.class_values)))


def _commands(head: NDArray[np.float32], action: Action) -> NDArray[np.float64]:
    """Physical units, [T, n, axes]."""
    rows = denormalize(head.reshape(-1, head.shape[-1]), action)
    return rows.astype(np.float64).reshape(*head.shape[:2], -1)


def _largest(action: Action) -> NDArray[np.float64]:
    """The largest command of each axis, [axes]; 1 for a gripper, and for a head whose numbers are commands."""
    if action.head == "classes":
        table: NDArray[np.float64] = np.abs(np.array(action.class_values, np.float64)).max(axis=0)
        return table
    most = max(abs(action.minimum), abs(action.maximum)) if action.normalized else 1.0
    gripper = action.head == "actions_gripper"
    return np.array([most] * (len(action.names) - gripper) + [1.0] * gripper)


def _axes(
    difference: NDArray[np.float64], lengths: Sequence[int], largest: NDArray[np.float64], action: Action, seed: int
) -> tuple[AxisAcceptance, ...]:
    """From differences [frames, n, axes] in physical units."""
    now, size = difference[:, 0], np.abs(difference)
    # All means over the same draws, so that they can be compared.
    per_frame = np.concatenate([size[:, 0], size.mean(axis=1), now], axis=1)
    low, high = bootstrap_interval(per_frame, lengths, seed=seed).reshape(2, 3, -1).tolist()

    def deviation(values: NDArray[np.float64], which: int, axis: int) -> Deviation:
        return Deviation(
            rmse=float(np.sqrt((values**2).mean())),
            max=float(values.max()),
            mean=float(values.mean()),
            interval=(low[which][axis], high[which][axis]),
        )

    return tuple(
        AxisAcceptance(
            name=name,
            unit=unit,
            largest=float(largest[axis]),
            now=deviation(size[:, 0, axis], 0, axis),
            chunk=deviation(size[:, :, axis], 1, axis),
            bias=float(now[:, axis].mean()),
            bias_interval=(low[2][axis], high[2][axis]),
        )
        for axis, (name, unit) in enumerate(zip(action.names, action.units, strict=True))
    )


def _events(
    reference: NDArray[np.float64], candidate: NDArray[np.float64], largest: NDArray[np.float64], action: Action
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the reference moves, and where the candidate reverses it, starts out of a stop, and stops: [frames, n, axes].

    A gripper has no direction, and is left out.
    """
    axes = slice(-1) if action.head == "actions_gripper" else slice(None)
    reference, candidate, largest = reference[..., axes], candidate[..., axes], largest[axes]
    before, after = np.abs(reference), np.abs(candidate)
    moves = before > _MOVES * largest
    stopped = (before > _STARTS * largest) & (after <= _MOVES * largest)
    return moves, moves & (reference * candidate < 0), ~moves & (after > _STARTS * largest), stopped


def _counts(axes: Sequence[str], events: NDArray[np.bool_], possible: NDArray[np.bool_]) -> tuple[Count, ...]:
    """Of step 0, by axis, from [frames, n, axes]."""
    return tuple(
        Count(axis=name, count=int(events[:, 0, at].sum()), of=int(possible[:, 0, at].sum()))
        for at, name in enumerate(axes)
    )


def _flips(reference: NDArray[np.int_], candidate: NDArray[np.int_], names: Sequence[str]) -> Flips:
    """From choices [frames, n]."""
    other = reference != candidate
    steps = Counter(zip(reference[other].tolist(), candidate[other].tolist(), strict=True))
    now = other[:, 0]
    frames = Counter(zip(reference[now, 0].tolist(), candidate[now, 0].tolist(), strict=True))
    order = sorted(steps, key=lambda pair: (-frames[pair], -steps[pair], pair))
    return Flips(
        frames=int(now.sum()),
        steps=int(other.sum()),
        of_frames=len(other),
        of_steps=other.size,
        pairs=tuple(
            Pair(reference=names[a], candidate=names[b], frames=frames[a, b], steps=steps[a, b]) for a, b in order
        ),
    )


def _worst(
    streams: Sequence[Streamed],
    errors: NDArray[np.float64],
    reference: NDArray[np.float64],
    candidate: NDArray[np.float64],
    action: Action,
) -> tuple[Worst, ...]:
    """The frames of the largest errors, not-a-number first, equal ones in order."""
    places = [
        (each, frame) for each in streams for frame in range(each.first_frame, each.first_frame + len(each.reference))
    ]
    columns = _columns(action)
    ranked = np.where(np.isnan(errors), np.inf, errors)
    found = []
    for row in np.argsort(-ranked.max(axis=(1, 2)), kind="stable")[:_WORST].tolist():
        step, column = (int(each) for each in np.unravel_index(ranked[row].argmax(), ranked[row].shape))
        stream, frame = places[row]
        found.append(
            Worst(
                episode=stream.episode,
                frame=frame,
                instruction=stream.instruction,
                step=step,
                column=columns[column],
                error=float(errors[row, step, column]),
                names=action.names,
                units=action.units,
                reference=tuple(reference[row, step].tolist()),
                candidate=tuple(candidate[row, step].tolist()),
            )
        )
    return tuple(found)
