"""Writes the pieces of a flight recording as HDF5 episodes, V5 or V6, so that what a robot did can be trained on.

V5 keeps everything: the recorded JPEG files as they are, the instruction, a time for each frame. V6 is what older training code wants: raw
BGR frames, no instruction but the side in the file's name, no times. What a piece loses on the way is told, and what would make it wrong is
refused. A file appears complete or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from episodes.actions import ACTION_NAMES, classify_actions, default_event_types
from episodes.atomic_hdf5 import atomic_hdf5
from episodes.instruction import sentence, sides_in_text
from episodes.layout import ACTION_CLASSES, ACTIONS, EVENT_TYPES, IMAGES
from episodes.reader import Episode
from episodes.recording import open_segment
from episodes.recording_events import RecordedRun
from episodes.recording_segments import ActionSource, Segment
from episodes.writer import check_frame, write_raw_frames
from episodes.writer_v5 import write_episode_v5

Layout = Literal["v5", "v6"]
_V6_FPS = (5.0, 7.0)


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        layout: of the files.
        actions: what was sent to the robot, or what the policy decided.
        min_frames: shorter pieces are left out.
        stop_frames: the last picture so many times more, with a zero action: for runs that ended where the robot should stop.
    """

    layout: Layout = "v5"
    actions: ActionSource = "published"
    min_frames: int = 18
    stop_frames: int = 0


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece of a recording and what becomes of it.

    Attributes:
        target: the file; None where it is left out.
        remark: why it is left out, or what is lost.
    """

    run: RecordedRun
    segment: Segment
    target: Path | None
    remark: str

    @property
    def name(self) -> str:
        """FILE#INDEX, without the folder."""
        return f"{self.run.path.name}#{self.segment.index}"

    @property
    def fps(self) -> float | None:
        """Decisions per second."""
        return None if self.segment.period_s is None else 1.0 / self.segment.period_s


def plan_pieces(
    runs: Sequence[tuple[RecordedRun, Sequence[Segment]]], folder: Path, options: ConversionOptions, *, force: bool
) -> tuple[Piece, ...]:
    """What becomes of each piece; made before the first is written, so that none is written in vain.

    Args:
        runs: recordings and which of their pieces are wanted.

    Raises:
        EpisodeError: a file exists and `force` is not set.
    """
    taken: set[Path] = set()
    pieces = []
    for run, segments in runs:
        for segment in segments:
            reason, remark = _judge(segment, options)
            target = None if reason else _target(segment, folder, taken)
            if target is not None:
                taken.add(target)
                if target.exists() and not force:
                    raise EpisodeError(
                        f"{target} exists",
                        expected="a new file",
                        hint="choose another --out, or replace it with --force.",
                    )
            pieces.append(Piece(run, segment, target, reason or remark))
    return tuple(pieces)


def write_piece(piece: Piece, options: ConversionOptions, *, advance: Callable[[], None] = lambda: None) -> None:
    """Write one piece; `advance` is called after each frame.

    Raises:
        EpisodeError: its actions do not fit the layout, or a picture is damaged or of another size.
        StorageError: the disk refuses.
    """
    assert piece.target is not None
    with open_segment(piece.run, piece.segment, actions=options.actions) as episode:
        actions = np.concatenate([_columns(episode), np.zeros((options.stop_frames, len(ACTION_NAMES)), np.float32)])
        if options.layout == "v5":
            write_episode_v5(
                piece.target,
                (jpeg for _, jpeg in _pictures(episode, options.stop_frames, advance)),
                actions,
                instruction=episode.instruction,
                timestamps=_timestamps(piece, len(actions)),
                event_types=default_event_types(actions),
                attributes=_attributes(piece, options, len(actions)),
            )
        else:
            _write_v6(piece, (frame for frame, _ in _pictures(episode, options.stop_frames, advance)), actions, options)


def _judge(segment: Segment, options: ConversionOptions) -> tuple[str, str]:
    """Why a piece is left out (empty if it is not), and else what is to be said of it."""
    if len(segment.decisions) < options.min_frames:
        return f"left out: fewer than {options.min_frames} frames", ""
    if options.layout == "v5":
        return "", ""
    sides = sides_in_text(segment.instruction)
    if len(sides) != 1:
        return "left out: V6 keeps the side only, and the instruction names none; use v5", ""
    remarks = []
    assumed = sentence("v6", next(iter(sides)))
    if segment.instruction != assumed:
        remarks.append(f"will be read as {assumed!r}")
    fps = 1.0 / segment.period_s if segment.period_s else 0.0
    if not _V6_FPS[0] <= fps <= _V6_FPS[1]:
        remarks.append(f"{fps:.1f} frames a second, where V6 has 6")
    return "", "; ".join(remarks)


def _target(segment: Segment, folder: Path, taken: set[Path]) -> Path:
    """The name that the lab's recorder would have given: date, time, and the side where there is one."""
    started = datetime.fromtimestamp(segment.decisions[0].started_ns / 1e9)
    sides = sides_in_text(segment.instruction)
    side = next(iter(sides)) if len(sides) == 1 else "run"
    stem = f"episode_{started:%Y%m%d_%H%M%S}_recorded_{side}"
    names = (folder / f"{stem}{'' if count == 1 else f'_{count}'}.h5" for count in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _columns(episode: Episode) -> npt.NDArray[np.float32]:
    """The actions as float32 [T, 3] of ACTION_NAMES; an axis that the policy lacks is zero."""
    unknown = [name for name in episode.action_names if name not in ACTION_NAMES]
    if unknown:
        raise EpisodeError(
            f"{episode.path} has actions that HDF5 episodes do not hold",
            got=", ".join(unknown),
            expected=", ".join(ACTION_NAMES),
            hint="only velocities of a mobile base can be converted.",
        )
    columns = np.zeros((len(episode), len(ACTION_NAMES)), dtype=np.float32)
    columns[:, [ACTION_NAMES.index(name) for name in episode.action_names]] = episode.actions
    return columns


def _pictures(
    episode: Episode, stop_frames: int, advance: Callable[[], None]
) -> Iterator[tuple[npt.NDArray[np.uint8], bytes]]:
    """Each picture decoded, which finds damage, and as it is stored; the last one `stop_frames` times more."""
    size: tuple[int, ...] | None = None
    for index in range(len(episode)):
        frame, jpeg = check_frame(episode.frame(index), index, size, episode.path), episode.jpeg(index) or b""
        size = frame.shape
        last = frame, jpeg
        yield last
        advance()
    for _ in range(stop_frames):
        yield last


def _timestamps(piece: Piece, count: int) -> npt.NDArray[np.float64]:
    """Seconds since the first frame; stop frames follow at the usual pace."""
    times = piece.segment.times_s
    more = np.arange(1, count - len(times) + 1) * (piece.segment.period_s or 1.0)
    return np.concatenate([times, times[-1] + more])


def _attributes(piece: Piece, options: ConversionOptions, count: int) -> dict[str, str | int | float]:
    metadata = piece.run.metadata
    return {
        "episode_name": "" if piece.target is None else piece.target.stem,
        "num_frames": count,
        "total_duration": count * (piece.segment.period_s or 1.0),
        "collection_datetime": datetime.fromtimestamp(piece.segment.decisions[0].started_ns / 1e9).isoformat(
            timespec="seconds"
        ),
        "recorded_from": piece.name,
        "recorded_actions": options.actions,
        "recorded_run": metadata.get("run", ""),
        "recorded_robot": metadata.get("robot", ""),
        "recorded_manifest_sha256": metadata.get("manifest_sha256", ""),
        "stop_frames": options.stop_frames,
    }


def _write_v6(
    piece: Piece,
    frames: Iterator[npt.NDArray[np.uint8]],
    actions: npt.NDArray[np.float32],
    options: ConversionOptions,
) -> None:
    assert piece.target is not None
    with atomic_hdf5(piece.target) as draft:
        write_raw_frames(draft, IMAGES["v6"], (frame[..., ::-1] for frame in frames), len(actions))
        draft.file.create_dataset(ACTIONS, data=actions)
        draft.file.create_dataset(EVENT_TYPES, data=list(default_event_types(actions)), dtype=h5py.string_dtype())
        draft.file.create_dataset(ACTION_CLASSES, data=classify_actions(actions))
        draft.file.attrs.update(_attributes(piece, options, len(actions)))
        draft.file.attrs.update(action_chunk_size=10, scenario="recorded", control_mode="policy")
