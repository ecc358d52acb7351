"""From events to the messages of a recording.

All times in a file are wall-clock times, but the clock is read once: a stamp is that reading plus the time that has passed by
time.monotonic(). So a clock that jumps, as one does when a robot without a battery-backed clock finds the network, neither folds nor
tears the recording. Knows nothing about files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from episodes.recording_messages import (
    COMMAND,
    DECISION,
    IMAGE,
    INFO,
    NOTE,
    SAFETY,
    TOPIC_OF,
    WARN,
    encode,
    stamp,
)
from runtime.cameras.base import Frame
from runtime.commands.base import TWIST_FIELDS
from runtime.events import Decision, Note, Published, RunInfo
from runtime.recorder.event_queue import Waiting
from runtime.recorder.jpeg import JpegEncoder

_WARNINGS = frozenset({"recorder", "fault", "error"})


@dataclass(frozen=True)
class Clock:
    """One reading of both clocks, in nanoseconds."""

    wall_ns: int
    monotonic_ns: int

    @classmethod
    def read(cls) -> Clock:
        """Now."""
        return cls(time.time_ns(), time.monotonic_ns())

    def stamp_ns(self, monotonic_s: float) -> int:
        """Wall-clock nanoseconds of a time by time.monotonic(); 0 for what would lie before 1970.

        Raises:
            ValueError, OverflowError: not a finite number.
        """
        return max(0, self.wall_ns + round(monotonic_s * 1e9) - self.monotonic_ns)


@dataclass(frozen=True)
class Message:
    """What goes into the file."""

    topic: str
    time_ns: int
    data: bytes


class MessageMaker:
    """Makes the messages of a run; used by one thread. Remembers the last picture, which several decisions may share."""

    def __init__(self, clock: Clock, info: RunInfo, jpeg: JpegEncoder) -> None:
        self._clock = clock
        self._info = info
        self._jpeg = jpeg
        self._frame: Frame | None = None
        self._frame_ns = 0
        self._in_file = False

    def new_file(self) -> None:
        """What comes next goes into another file: a picture that the last decision shares must go there too."""
        self._in_file = False

    def messages(self, waiting: Waiting) -> list[Message]:
        """Those of one event.

        Raises:
            TypeError, ValueError, OverflowError, KeyError, AttributeError, struct.error: the event is not what its type says.
        """
        event = waiting.event
        if isinstance(event, Decision):
            return self._decision(event, waiting.pictured)
        if isinstance(event, Published):
            return self._published(event)
        return [self.note(event)]

    def note(self, note: Note) -> Message:
        """A note as a log message."""
        at_ns = self._clock.stamp_ns(note.at_s)
        level = WARN if note.kind in _WARNINGS else INFO
        values = {"stamp": stamp(at_ns), "level": level, "name": note.kind, "msg": note.text}
        return _message(NOTE, at_ns, values | {"file": "", "function": "", "line": 0})

    def _decision(self, decision: Decision, pictured: bool) -> list[Message]:
        self._take_over(decision.frame)
        messages = [self._picture(decision.frame)] if pictured and not self._in_file else []
        self._in_file = self._in_file or bool(messages)
        finished_ns = self._clock.stamp_ns(decision.finished_s)
        steps = decision.values.reshape(-1, len(self._info.action_names))
        values = {
            "header": _header(finished_ns),
            "number": decision.number,
            "instruction": decision.instruction,
            "picture": stamp(self._frame_ns),
            "pictured": self._in_file,
            "started": stamp(self._clock.stamp_ns(decision.started_s)),
            "finished": stamp(finished_ns),
            "missed": decision.missed,
            "names": self._info.action_names,
            "units": self._info.action_units,
            "steps": len(steps),
            "values": steps.reshape(-1).tolist(),
            "timing_names": tuple(decision.timing),
            "timing_ms": tuple(decision.timing.values()),
        }
        return [*messages, _message(DECISION, finished_ns, values)]

    def _take_over(self, frame: Frame) -> None:
        """What is said of the picture is said of this frame from now on, also where it is not written."""
        if frame is not self._frame:
            # A stamp stands for one picture: decisions name theirs by it.
            self._frame_ns = max(self._clock.stamp_ns(frame.captured_s), self._frame_ns + 1)
            self._frame, self._in_file = frame, False

    def _picture(self, frame: Frame) -> Message:
        values = {
            "header": _header(self._frame_ns, "camera"),
            "format": "jpeg",
            "data": self._jpeg.encode(frame.pixels),
        }
        return _message(IMAGE, self._frame_ns, values)

    def _published(self, published: Published) -> list[Message]:
        at_ns = self._clock.stamp_ns(published.at_s)
        twist: dict[str, float] = dict(zip(TWIST_FIELDS, published.twist.values, strict=True))
        command = {"header": _header(at_ns, "base_link"), "twist": _twist(twist)}
        safety = {
            "header": _header(at_ns),
            "level": published.level,
            "reasons": published.reasons,
            "wanted": _twist({field: published.wanted.get(field, math.nan) for field in TWIST_FIELDS}),
            "frame_age_s": published.frame_age_s,
            "action_age_s": published.action_age_s,
        }
        return [_message(COMMAND, at_ns, command), _message(SAFETY, at_ns, safety)]


def run_metadata(info: RunInfo, clock: Clock, facts: Mapping[str, str]) -> dict[str, str]:
    """What a file says about its run: metadata in MCAP is text by name.

    Args:
        facts: anything more.
    """
    return {
        "format": "1",
        "robot": info.robot,
        "bundle": info.bundle,
        "manifest_sha256": info.manifest_sha256,
        "backend": info.backend,
        "precision": info.precision,
        "action_names": json.dumps(info.action_names),
        "action_units": json.dumps(info.action_units),
        "decide_hz": repr(float(info.decide_hz)),
        "publish_hz": repr(float(info.publish_hz)),
        "strategy": info.strategy,
        "settings": info.settings,
        "clock": "wall clock read once, at wall_ns; every stamp is wall_ns + (monotonic time - monotonic_ns)",
        "wall_ns": str(clock.wall_ns),
        "monotonic_ns": str(clock.monotonic_ns),
        **facts,
    }


def _message(kind: str, time_ns: int, values: Mapping[str, Any]) -> Message:
    return Message(TOPIC_OF[kind], time_ns, encode(kind, values))


def _header(time_ns: int, frame_id: str = "") -> dict[str, object]:
    return {"stamp": stamp(time_ns), "frame_id": frame_id}


def _twist(fields: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {part: {axis: fields[f"{part}_{axis}"] for axis in "xyz"} for part in ("linear", "angular")}
