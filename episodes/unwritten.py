"""Tells by their values that rows were allocated and never written, or were lost, where the file's structure cannot tell.

A recorder that reserves room for a thousand actions and is killed after six leaves zeros behind, and zeros mean "stop". Storage in one
piece does not say which of its rows were written. So a run of actions that equal the fill value is held against what else was recorded
in those moments: events, classes, and above all the pictures. A robot that stands sees the same picture again but for noise; if the
pictures go on as they do while it drives, nobody commanded these stops.

The same holds for pictures that end in nothing but the fill value, and for sectors of the disk that came back as zeros.

What it cannot tell: a stop of one or two frames at the end, and a robot that is carried while it is told to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d

from bundle.errors import EpisodeError

_SECTOR = 512  # bytes; a lost page of 4096 is eight of them
_FEWEST_ROWS = 3
_PAIRS = 6  # of frames to compare, of each kind
_STANDS = 4.0  # grey levels between two frames of a robot that stands: its camera's noise
_STRIDE = 4
_EDGE = 2  # bytes by which a run of zeros may miss the edge of a sector: values that were zero themselves


def shares_storage(dataset: h5py.Dataset) -> bool:
    """Whether rows were allocated together, so that one which was never written looks like any other."""
    return dataset.chunks is None or dataset.chunks[0] > 1


def require_recorded_actions(
    dataset: h5py.Dataset,
    actions: npt.NDArray[np.float32],
    frame: Callable[[int], npt.NDArray[np.uint8]],
    path: Path,
    *,
    event_types: Sequence[str] | None,
    action_classes: npt.NDArray[np.int64] | None,
) -> None:
    """Refuse actions that were never written or were lost.

    Args:
        dataset: from which `actions` come, [T, A].
        frame: gives frame i as uint8 [H, W, 3], or raises EpisodeError.

    Raises:
        EpisodeError: there are such rows.
    """
    if not shares_storage(dataset):
        return
    fill = np.float32(dataset.fillvalue)
    filled = np.all(actions == fill, axis=1)
    for first, last in _runs(filled):
        tail = last == len(actions)
        if fill != 0 and tail:
            raise _never_written(path, first, last, f"all of them are the fill value {fill:g}")
        if fill == 0 and (
            tail or (last - first >= _SECTOR // max(1, actions[0].nbytes) - 1 and not dataset.compression)
        ):
            reason = _contradicted(first, last, event_types, action_classes) or _moves(filled, first, last, frame)
            if reason is not None:
                raise _never_written(path, first, last, reason)


def lost_sectors(dataset: h5py.Dataset, index: int, stored: npt.NDArray[np.uint8]) -> str | None:
    """Why frame `index`, stored as the pixels `stored`, is not what was recorded, or None."""
    if stored.ndim != 3 or not shares_storage(dataset):
        return None
    fill = np.uint8(dataset.fillvalue)
    if (
        stored[0, 0, 0] == fill
        and bool((stored == fill).all())
        and bool((np.asarray(dataset[len(dataset) - 1]) == fill).all())
    ):
        rest = (np.asarray(dataset[later]) for later in range(index, min(len(dataset), index + _PAIRS)))
        if all(bool((later == fill).all()) for later in rest):
            return f"every value is {fill}, as in the last frame: they were never written"
    offset = dataset.id.get_offset() if dataset.chunks is None else None
    if offset is None or dataset.id.get_create_plist().get_layout() != h5d.CONTIGUOUS:
        return None
    runs = _sector_runs(stored.reshape(-1), offset + index * stored.nbytes)
    if not runs:
        return None
    others = [np.asarray(dataset[near]).reshape(-1) for near in (index - 1, index + 1) if 0 <= near < len(dataset)]
    for first, last in runs:
        # A part of the picture that is black stays black; one that is black in this frame alone, from sector to sector, was lost.
        if others and all(np.count_nonzero(other[first:last]) > (last - first) // 2 for other in others):
            return (
                f"{last - first} bytes are zero, from one disk sector to another, that are not in the frames beside it"
            )
    return None


def _sector_runs(values: npt.NDArray[np.uint8], start: int) -> list[tuple[int, int]]:
    """Runs of zeros, first and last + 1, that begin and end with sectors of the file; `values` begin at byte `start` of it."""
    first = -start % _SECTOR
    count = (len(values) - first) // _SECTOR
    if count < 1:
        return []
    zero: npt.NDArray[np.bool_] = ~np.any(values[first : first + count * _SECTOR].reshape(count, _SECTOR), axis=1)
    runs = []
    for low, high in _runs(zero):
        begin, end = first + low * _SECTOR, first + high * _SECTOR
        before, after = values[max(0, begin - _EDGE - 1) : begin], values[end : end + _EDGE + 1]
        if (begin == 0 or before.any()) and (end == len(values) or after.any()):
            runs.append((begin, end))
    return runs


def _contradicted(
    first: int, last: int, events: Sequence[str] | None, classes: npt.NDArray[np.int64] | None
) -> str | None:
    """What else the recorder wrote of rows `first` to `last` - 1 that is no stop."""
    if events is not None:
        if any(events[:first]) and not any(events[first:last]):
            return "their events are empty as well"
        if 2 * sum(event == "start_action" for event in events[first:last]) > last - first:
            return "most of their events start an action"
    if classes is not None and 2 * int(np.count_nonzero(classes[first:last])) > last - first:
        return "the recorder's class of most of them is no stop"
    return None


def _moves(
    filled: npt.NDArray[np.bool_], first: int, last: int, frame: Callable[[int], npt.NDArray[np.uint8]]
) -> str | None:
    """Whether the pictures go on through rows `first` to `last` - 1; they may for one frame, in which the robot comes to rest."""
    still = list(range(first + (first > 0), last - 1))
    if last - first < _FEWEST_ROWS or not still:
        return None
    driving = [index for index in np.flatnonzero(~filled[:-1]).tolist() if index + 1 < len(filled)]
    change, usual = _change(still, frame), _change(driving, frame)
    if change is None or change < max(_STANDS, 0.5 * (usual or 0.0)):
        return None
    beside = f", by {usual:.0f} where the robot drives" if usual is not None else ""
    return f"the pictures go on: from frame to frame they change by {change:.0f} grey levels{beside}"


def _change(indices: Sequence[int], frame: Callable[[int], npt.NDArray[np.uint8]]) -> float | None:
    """Median change, in grey levels, from frame i to i + 1, of some of `indices`; None where none can be read."""
    changes = []
    for place in np.unique(np.linspace(0, len(indices) - 1, min(_PAIRS, len(indices))).astype(int)).tolist():
        try:
            before, after = (frame(indices[place] + step)[::_STRIDE, ::_STRIDE].astype(np.int16) for step in (0, 1))
        except EpisodeError:
            continue  # said where frames are read
        if before.shape == after.shape:
            changes.append(float(np.abs(after - before).mean()))
    return float(np.median(changes)) if changes else None


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last + 1 of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _never_written(path: Path, first: int, last: int, reason: str) -> EpisodeError:
    return EpisodeError(
        f"{path}: actions {first} to {last - 1} were never written or were lost",
        got=reason,
        expected="the commanded velocities; what is left there reads as stops",
        hint="the recorder was killed, or the disk failed, when this episode was recorded: leave it out.",
    )
