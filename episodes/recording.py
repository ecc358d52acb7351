"""Opens a flight recording as an `Episode`, so that what reads episodes reads a robot's own runs: replay, calibration, training.

    open_recording("000042-robot-20260715-173157.mcap")        # also episodes.reader.open_episode
    open_recording("....mcap#1", actions="decided")

Frames are the pictures that the policy decided on, as JPEG. A recording that is several episodes (another instruction, a reset, a pause;
see episodes/recording_segments.py) is opened piece by piece: NAME.mcap#0, NAME.mcap#1. One that a crash left without its end is read up
to there, with an EpisodeWarning.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError, PictureError, RecordingError
from episodes.instruction import EpisodeWarning
from episodes.pictures import decode_picture
from episodes.pixel_budget import PixelBudget
from episodes.recording_events import RecordedRun, read_run
from episodes.recording_messages import IMAGE, decode
from episodes.recording_scan import COPY_AGAIN, ChunkPlace, MessagePlace, read_records
from episodes.recording_segments import ActionSource, Segment, actions_of, cut

if TYPE_CHECKING:
    from episodes.reader import Episode

SUFFIX = ".mcap"
_FORMAT = "jpeg"  # of all pictures that the flight recorder writes
_NAME = re.compile(r"(?s)(.+\.mcap)#(\d+)", re.IGNORECASE)


def split_recording(path: Path) -> tuple[Path, int | None] | None:
    """The file and index of NAME.mcap#INDEX, (path, None) of NAME.mcap, or None for any other name."""
    match = _NAME.fullmatch(str(path))
    if match is not None and not path.exists():
        return Path(match[1]), int(match[2])
    return (path, None) if path.suffix.lower() == SUFFIX else None


def recording_names(path: Path) -> list[Path]:
    """NAME.mcap#0, NAME.mcap#1, ...: one for each piece.

    Raises:
        RecordingError: see read_run.
    """
    return [Path(f"{path}#{segment.index}") for segment in cut(read_run(path))]


def open_recording(path: str | Path, *, actions: ActionSource = "published", stacklevel: int = 1) -> Episode:
    """Open a recording, or one piece of it.

    Args:
        path: NAME.mcap where it is one episode, else NAME.mcap#INDEX.
        actions: "published" is what was sent to the robot until the next decision, "decided" the first step of what the policy said;
            both in the policy's units and axes.
        stacklevel: as for warnings.warn.

    Raises:
        RecordingError: no recording, damaged, empty, several pieces and none named, no such piece, or actions that cannot be told.
    """
    file, index = split_recording(Path(path)) or (Path(path), None)
    run = read_run(file)
    if run.unfinished:
        message = f"{file}: the recording has no end: the recorder was killed, or is still writing"
        torn = f"; the last {run.torn} bytes are left out" if run.torn else ""
        warnings.warn(message + torn, EpisodeWarning, stacklevel=stacklevel + 1)
    return open_segment(run, choose(run, cut(run), index), actions=actions)


def choose(run: RecordedRun, segments: tuple[Segment, ...], index: int | None) -> Segment:
    """The piece of that index, or the only one.

    Raises:
        RecordingError: there is none, or there are several and none is named.
    """
    if not segments:
        raise RecordingError(
            f"{run.path} is empty: it holds no decision with its picture",
            got=f"{len(run.decisions)} decisions, {len(run.commands)} commands",
            expected="at least one",
            hint="the run ended before the policy decided anything: leave the recording out.",
        )
    if index is None and len(segments) > 1:
        shown = "; ".join(f"#{s.index} {s.instruction!r}, {len(s.decisions)} frames" for s in segments[:4])
        raise RecordingError(
            f"{run.path} holds {len(segments)} episodes",
            got=shown + ("; ..." if len(segments) > 4 else ""),
            expected="one",
            hint=f"name one: '{run.path}#0' to '{run.path}#{len(segments) - 1}' (with the quotes).",
        )
    if index is not None and index >= len(segments):
        raise RecordingError(
            f"{run.path} has no episode {index}",
            got=f"{len(segments)} episodes",
            expected=f"an index from 0 to {len(segments) - 1}",
            hint="count from 0.",
        )
    return segments[index or 0]


def open_segment(run: RecordedRun, segment: Segment, *, actions: ActionSource = "published") -> Episode:
    """Open a piece of a recording that was read; its `path` is NAME.mcap#INDEX.

    Raises:
        RecordingError: the actions cannot be told, or the file cannot be opened any more.
    """
    from episodes.reader import Episode  # which imports this module

    values = actions_of(run, segment, actions)
    frames = RecordedFrames.open(run, segment)
    return Episode(
        path=Path(f"{run.path}#{segment.index}"),
        schema="recording",
        actions=values,
        action_names=run.action_names,
        instruction=segment.instruction.strip() or None,
        instruction_source="stored" if segment.instruction.strip() else "none",
        fps=None if segment.period_s is None else 1.0 / segment.period_s,
        attributes={**run.metadata, "actions": actions, "segment": segment.index, "ended_by": segment.ended_by},
        event_types=None,
        action_classes=None,
        _file=frames,
        _frames=frames,
    )


@dataclass(eq=False)
class RecordedFrames:
    """The pictures of a piece, read when asked for. Several threads may ask."""

    name: str
    places: tuple[MessagePlace, ...]
    chunks: tuple[ChunkPlace, ...]
    file: BinaryIO | None = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _budget: PixelBudget = field(default_factory=lambda: PixelBudget(0), repr=False)
    _cached: tuple[int, bytes] = field(default=(-1, b""), repr=False)

    @classmethod
    def open(cls, run: RecordedRun, segment: Segment) -> RecordedFrames:
        """Open the file for its pictures.

        Raises:
            RecordingError: it is gone, or may not be read.
        """
        places = tuple(decided.picture for decided in segment.decisions if decided.picture is not None)
        try:
            file = run.path.open("rb", buffering=0)
        except OSError as error:
            raise RecordingError(f"cannot read {run.path}", got=error.strerror, hint=COPY_AGAIN) from None
        budget = PixelBudget(run.found.size)
        return cls(f"{run.path}#{segment.index}", places, tuple(run.found.chunks), file, _budget=budget)

    def __bool__(self) -> bool:
        return self.file is not None

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Picture `index`, uint8 [H, W, 3] RGB.

        Raises:
            EpisodeError: it is damaged.
        """
        stored = self.read_jpeg(index)
        try:
            picture = decode_picture(stored, png=False)
        except PictureError as error:
            raise self._corrupt(index, f"{len(stored)} bytes that are no JPEG image ({error.got})") from error
        if reason := self._budget.exceeded(index, picture.nbytes):
            raise self._corrupt(index, reason)
        return picture

    def read_jpeg(self, index: int) -> bytes:
        """The stored bytes of picture `index`, unchecked.

        Raises:
            EpisodeError: they cannot be read.
        """
        try:
            with self._lock:
                data = self._message(self.places[index])
            message = decode(IMAGE, data)
        except RecordingError as error:
            raise self._corrupt(index, f"{error.what}: {error.got}") from None
        except OSError as error:
            raise self._corrupt(index, error.strerror or str(error)) from error
        if message["format"] != _FORMAT:  # a topic of somebody else's, whose red and blue may be exchanged
            raise self._corrupt(index, f"format {message['format']!r}")
        return bytes(message["data"])

    def _message(self, place: MessagePlace) -> bytes:
        assert self.file is not None
        start = place.offset
        if place.chunk >= 0:
            chunk = self.chunks[place.chunk]
            if chunk.compression:
                if self._cached[0] != place.chunk:
                    self._cached = (place.chunk, read_records(self.file, chunk))
                return self._cached[1][start : start + place.length]
            start += chunk.records_start
        return os.pread(self.file.fileno(), place.length, start)

    def _corrupt(self, index: int, got: str) -> EpisodeError:
        return EpisodeError(
            f"{self.name}: frame {index} of {len(self.places)} is corrupt",
            got=got,
            expected="a complete JPEG image",
            hint=COPY_AGAIN,
        )
