"""What a flight recording says: its run, its decisions and their pictures, and what was sent to the robot.

Reads and checks everything but the pictures, of which it notes the place. Knows nothing about episodes (episodes/recording.py).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bundle.errors import InputFileError, RecordingError
from bundle.reading_limits import parse_json
from episodes.recording_messages import COMMAND, DECISION, IMAGE, NOTE, SAFETY, TOPIC_OF, TOPICS, decode, nanoseconds_of
from episodes.recording_scan import COPY_AGAIN, METADATA_NAME, MessagePlace, Scan, scan

FORMAT = "1"
# Notes after which the policy does not remember what the file says it saw, by kind, and what that is called.
_ANEW = {
    "reset": "reset",
    "instruction": "instruction given",
    "history": "history forgotten",
    "policy": "decision failed",
}


@dataclass(frozen=True)
class Command:
    """What went to the robot: by Twist field, m/s and rad/s. `wanted` is false where the policy had nothing to say."""

    time_ns: int
    values: dict[str, float]
    wanted: bool


@dataclass(frozen=True, eq=False)
class Decided:
    """One step of the policy.

    Attributes:
        number: counts decisions of the run from 0.
        started_ns, finished_ns: wall-clock time.
        picture_ns: the stamp of the picture.
        values: float32 [n, A], the policy's units.
        picture: where the picture is; None if it is not in the file.
        anew: why the policy did not remember what it saw before; empty where it did.
    """

    number: int
    instruction: str
    started_ns: int
    finished_ns: int
    picture_ns: int
    missed: bool
    values: npt.NDArray[np.float32]
    picture: MessagePlace | None
    anew: str


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A recording, read.

    Attributes:
        metadata: as the recorder wrote it.
        action_names, action_units: of the columns of values.
        decisions, commands: in time order.
        torn: bytes at the end that could not be read, because the recorder was killed.
        unfinished: the file has no end, because the recorder was killed, or is still writing.
    """

    path: Path
    metadata: dict[str, str]
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    decisions: tuple[Decided, ...]
    commands: tuple[Command, ...]
    torn: int
    unfinished: bool
    found: Scan = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings; empty where they are no JSON object."""
        try:
            settings = parse_json(self.metadata.get("settings", "{}"), origin="settings")
        except InputFileError:
            return {}
        return settings if isinstance(settings, dict) else {}


def read_run(path: Path) -> RecordedRun:
    """Read a recording.

    Raises:
        RecordingError: missing, no MCAP file, damaged, no flight recording, or of another version.
    """
    wanted = [TOPIC_OF[kind] for kind in (DECISION, COMMAND, SAFETY, NOTE)]
    found = scan(path, wanted)
    metadata = _metadata(found)
    names, units = (_names(path, metadata, key) for key in ("action_names", "action_units"))
    if not names or len(names) != len(units):
        raise _damaged(path, f"axes {names}, units {units}")
    places = _places(found)
    notes = sorted((place.time_ns, str(_decode(path, NOTE, place)["name"])) for place in places[NOTE])
    pictures = {place.time_ns: place for place in places[IMAGE]}
    decisions = [_decided(path, place, pictures, names) for place in places[DECISION]]
    decisions.sort(key=lambda decided: decided.finished_ns)
    commands = _commands(path, places[COMMAND], places[SAFETY])
    return RecordedRun(
        path,
        metadata,
        names,
        units,
        tuple(_beginnings(decisions, notes)),
        tuple(sorted(commands, key=lambda command: command.time_ns)),
        torn=0 if found.finished else found.size - found.good_end,
        unfinished=not found.finished,
        found=found,
    )


def _metadata(found: Scan) -> dict[str, str]:
    metadata = found.metadata.get(METADATA_NAME)
    if metadata is None:
        topics = ", ".join(sorted({channel.topic for channel in found.channels.values()})[:8])
        raise RecordingError(
            f"{found.path} is an MCAP file, but no flight recording",
            got=f"topics {topics}" if topics else "no topics, and no metadata",
            expected=f"metadata {METADATA_NAME!r}, which the flight recorder writes",
            hint="other bags are not read; record with `recorder` in the robot file (docs/recordings.md).",
        )
    if metadata.get("format") != FORMAT:
        raise RecordingError(
            f"{found.path} has another format",
            got=metadata.get("format"),
            expected=FORMAT,
            hint="read it with the version of jetvla that recorded it.",
        )
    return metadata


def _names(path: Path, metadata: dict[str, str], key: str) -> tuple[str, ...]:
    try:
        names = parse_json(metadata[key], origin=key)
    except (KeyError, InputFileError) as error:
        raise _damaged(path, f"{key}: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(path, f"{key}: {names}")
    return tuple(names)


def _places(found: Scan) -> dict[str, list[MessagePlace]]:
    """Messages by their type; only those of our topics."""
    kinds = {
        number: channel.schema
        for number, channel in found.channels.items()
        if TOPICS.get(channel.topic) == channel.schema and channel.encoding == "cdr"
    }
    places: dict[str, list[MessagePlace]] = {kind: [] for kind in TOPICS.values()}
    for message in found.messages:
        if message.channel in kinds:
            places[kinds[message.channel]].append(message)
    return places


def _decode(path: Path, kind: str, place: MessagePlace) -> dict[str, Any]:
    try:
        return decode(kind, place.data or b"")
    except RecordingError as error:
        raise _damaged(path, f"{error.what}: {error.got}") from None


def _decided(path: Path, place: MessagePlace, pictures: dict[int, MessagePlace], names: tuple[str, ...]) -> Decided:
    stored = _decode(path, DECISION, place)
    values = np.array(stored["values"], dtype=np.float32)
    if stored["names"] != names or values.size != stored["steps"] * len(names) or not values.size:
        raise _damaged(path, f"a decision of {values.size} numbers for {stored['steps']} steps of {stored['names']}")
    picture_ns = nanoseconds_of(stored["picture"])
    return Decided(
        number=stored["number"],
        instruction=stored["instruction"],
        started_ns=nanoseconds_of(stored["started"]),
        finished_ns=nanoseconds_of(stored["finished"]),
        picture_ns=picture_ns,
        missed=stored["missed"],
        values=values.reshape(-1, len(names)),
        picture=pictures.get(picture_ns) if stored["pictured"] else None,
        anew="",
    )


def _commands(path: Path, sent: list[MessagePlace], safety: list[MessagePlace]) -> list[Command]:
    nothing_wanted = set()
    for place in safety:  # of one event with the command of the same time
        wanted = _decode(path, SAFETY, place)["wanted"]
        if all(math.isnan(value) for part in wanted.values() for value in part.values()):
            nothing_wanted.add(place.time_ns)
    commands = []
    for place in sent:
        twist = _decode(path, COMMAND, place)["twist"]
        values = {f"{part}_{axis}": twist[part][axis] for part in ("linear", "angular") for axis in "xyz"}
        commands.append(Command(place.time_ns, values, place.time_ns not in nothing_wanted))
    return commands


def _beginnings(decisions: list[Decided], notes: list[tuple[int, str]]) -> list[Decided]:
    """Say of each decision that began first after such a note why it began anew."""
    waiting = deque((time_ns, _ANEW[kind]) for time_ns, kind in notes if kind in _ANEW)
    marked: list[Decided] = []
    for decided in decisions:
        why = ""
        while waiting and waiting[0][0] <= decided.started_ns:
            why = waiting.popleft()[1]
        marked.append(replace(decided, anew=why))
    return marked


def _damaged(path: Path, got: str) -> RecordingError:
    return RecordingError(f"{path} is damaged", got=got, expected="what the flight recorder writes", hint=COPY_AGAIN)
