"""Keeps a folder of recordings within its share of the disk: the oldest go first.

Only files that are recordings of ours by name and by content count and are removed; a file that somebody is writing never is. Age is the
number in the name, not a date: the clock of a robot may be wrong.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.recorder.recording_file import LIBRARY

_NAME = re.compile(r"(\d{6,})-.+-\d{8}-\d{6}(?:\.(\d{3,}))?\.mcap")
_MAGIC = b"\x89MCAP0\r\n"


@dataclass(frozen=True)
class Stored:
    """A recording in the folder: `number` of its run, `part` of the run from 0, size in bytes."""

    path: Path
    number: int
    part: int
    size: int


def recordings(folder: Path) -> list[Stored]:
    """Those in a folder, the oldest first; empty where the folder cannot be read."""
    found = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            continue
        path = Path(entry.path)
        try:
            if _is_ours(path):
                found.append(Stored(path, int(match[1]), int(match[2] or 0), entry.stat().st_size))
        except OSError:
            continue  # gone, or not ours to read
    return sorted(found, key=lambda stored: (stored.number, stored.part))


def next_number(folder: Path) -> int:
    """One more than the largest number that a name in the folder has, whosever it is."""
    try:
        names = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    except OSError:
        return 1
    return 1 + max((int(match[1]) for match in names if match is not None), default=0)


def recording_name(number: int, robot: str, started: str, part: int) -> str:
    """The name of a file; `started` is YYYYmmdd-HHMMSS."""
    robot = re.sub(r"[^A-Za-z0-9_]+", "-", robot).strip("-")[:40] or "robot"
    return f"{number:06d}-{robot}-{started}{f'.{part:03d}' if part else ''}.mcap"


def make_room(folder: Path, current: Path | None, limit: int) -> list[Path]:
    """Remove the oldest recordings until all together have at most `limit` bytes; returns the removed.

    Args:
        current: the file that is being written; it counts and stays.
    """
    stored = recordings(folder)
    total = sum(one.size for one in stored)
    removed = []
    for one in stored:
        if total <= limit:
            break
        if one.path != current and _remove(one.path):
            removed.append(one.path)
            total -= one.size
    return removed


def _is_ours(path: Path) -> bool:
    """By the library that the file's header names."""
    with path.open("rb") as file:
        head = file.read(64)
    # Magic, opcode 1, length, then profile and library, each text with its length.
    if head[:9] != _MAGIC + b"\x01":
        return False
    profile = int.from_bytes(head[17:21], "little")
    return head[25 + profile : 25 + profile + len(LIBRARY)] == LIBRARY.encode()


def _remove(path: Path) -> bool:
    """Unless somebody is writing it, or the disk refuses."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with suppress(OSError):  # a file system without locks has nobody who holds one
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
