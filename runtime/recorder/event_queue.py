"""What waits to be recorded: bounded, and never in the way of whoever drives.

When the disk cannot follow, pictures are let go first (they are nearly all of the bytes), then the oldest decisions and notes; commands
have a queue of their own, long enough for minutes. Whatever was let go is counted. Knows nothing about files.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

from runtime.events import Decision, Event, Published

# At 720p a waiting picture holds 2.8 MB: 45 MB at most.
PICTURES, DECISIONS, COMMANDS, NOTES = 16, 2048, 16384, 1024


@dataclass(frozen=True)
class Lost:
    """How many of each were let go."""

    pictures: int = 0
    decisions: int = 0
    commands: int = 0
    notes: int = 0

    def __bool__(self) -> bool:
        return bool(self.pictures or self.decisions or self.commands or self.notes)

    def __add__(self, other: Lost) -> Lost:
        return Lost(
            self.pictures + other.pictures,
            self.decisions + other.decisions,
            self.commands + other.commands,
            self.notes + other.notes,
        )

    def __str__(self) -> str:
        counts = (
            (self.pictures, "pictures"),
            (self.decisions, "decisions"),
            (self.commands, "commands"),
            (self.notes, "notes"),
        )
        return ", ".join(f"{count} {name}" for count, name in counts if count) or "nothing"


@dataclass(frozen=True)
class Waiting:
    """One event, and whether its picture is to be recorded."""

    number: int
    event: Event
    pictured: bool


class EventQueue:
    """Several threads put, one takes all. No call waits for anything but another's few instructions."""

    def __init__(
        self, pictures: int = PICTURES, decisions: int = DECISIONS, commands: int = COMMANDS, notes: int = NOTES
    ):
        self._lock = threading.Lock()
        self._pictures = pictures
        self._room = {"decisions": decisions, "commands": commands, "notes": notes}
        self._queues: dict[str, deque[Waiting]] = {kind: deque() for kind in self._room}
        self._pictured = 0
        self._number = 0
        self._lost = Lost()

    def put(self, event: Event) -> None:
        """Take one event; may let go an older one of its kind."""
        kind = "decisions" if isinstance(event, Decision) else "commands" if isinstance(event, Published) else "notes"
        queue = self._queues[kind]
        with self._lock:
            pictured = kind == "decisions" and self._pictured < self._pictures
            if kind == "decisions" and not pictured:
                self._lost = replace(self._lost, pictures=self._lost.pictures + 1)
            if len(queue) >= self._room[kind]:
                self._pictured -= queue.popleft().pictured
                self._lost = replace(self._lost, **{kind: getattr(self._lost, kind) + 1})
            queue.append(Waiting(self._number, event, pictured))
            self._pictured += pictured
            self._number += 1

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def take_all(self) -> tuple[list[Waiting], Lost]:
        """All that waits, in the order in which it came, and what was let go since the last call."""
        with self._lock:
            waiting = [item for queue in self._queues.values() for item in queue]
            for queue in self._queues.values():
                queue.clear()
            self._pictured = 0
            lost, self._lost = self._lost, Lost()
        waiting.sort(key=lambda item: item.number)
        return waiting, lost
