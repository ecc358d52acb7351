"""The clock of measurements: monotonic, and watched by the others.

Durations never come from the wall clock, which NTP, a user or a robot's first GPS fix may move. It is read beside the monotonic one only
to say that it jumped, and so is the clock that goes on while a machine sleeps: a suspended laptop or a paused virtual machine makes steps
look slow that were not.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

_NOTICED_S = 0.05


class Clock(Protocol):
    """What time it is, in seconds."""

    def now(self) -> float:
        """Monotonic."""
        ...

    def wall(self) -> float:
        """Since the epoch."""
        ...

    def awake(self) -> float:
        """Monotonic, going on while the machine sleeps."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Return at `now() == moment`, or at once if that is over."""
        ...


class SystemClock:
    """The machine's own."""

    now = staticmethod(time.perf_counter)
    wall = staticmethod(time.time)

    @staticmethod
    def awake() -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    @staticmethod
    def sleep_until(moment: float) -> None:
        left = moment - time.perf_counter()
        if left > 0:
            time.sleep(left)


class JumpWatch:
    """Notices that other clocks went otherwise than the monotonic one between two calls of `look`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offsets = self._read()
        self.jumps: list[float] = []

    def look(self) -> None:
        """Compare; cheap enough for every step. Slow drift (NTP slewing) is no jump."""
        offsets = self._read()
        moved = max((new - old for new, old in zip(offsets, self._offsets, strict=True)), key=abs)
        if abs(moved) > _NOTICED_S:
            self.jumps.append(moved)
        self._offsets = offsets

    def _read(self) -> tuple[float, float]:
        now = self._clock.now()
        return self._clock.wall() - now, self._clock.awake() - now


def process_age_s() -> float:
    """Seconds since this process was started, to a hundredth: imports included.

    Source: field 22 (starttime, in ticks since boot) of /proc/self/stat, proc(5).
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
