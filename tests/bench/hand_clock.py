"""A clock that stands still unless it is moved."""

from __future__ import annotations


class HandClock:
    """See bench.clocks.Clock; `asleep` is how long the machine slept, `wall_offset` what was set by hand."""

    def __init__(self) -> None:
        self.time = 100.0
        self.wall_offset = 1e9
        self.asleep = 0.0

    def pass_(self, seconds: float) -> None:
        """Let time go by."""
        self.time += seconds

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time + self.asleep + self.wall_offset

    def awake(self) -> float:
        return self.time + self.asleep

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)
