"""Commands shown on stderr: moves nothing, for a first try of a bundle and a camera.

Shows changes only, and a few a second at most: a terminal that scrolls is not read. Knows nothing about robots.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from runtime.commands.base import TWIST_FIELDS, Twist

_SECONDS_PER_LINE = 0.25


class ConsoleSink:
    """Prints. Every stop is shown at once; a change that comes too soon after another is shown when the next command comes."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._shown: Twist | None = None
        self._shown_s = -_SECONDS_PER_LINE

    def send(self, twist: Twist) -> None:
        """See CommandSink."""
        now = self._clock()
        soon = now - self._shown_s < _SECONDS_PER_LINE
        if twist == self._shown or (soon and not twist.is_zero):
            return
        self._shown, self._shown_s = twist, now
        self._console.print(describe(twist), highlight=False, markup=False)

    def listeners(self) -> int | None:
        """See CommandSink."""
        return None

    def close(self) -> None:
        """See CommandSink."""


def describe(twist: Twist) -> str:
    """One line: the fields that are not zero, with their units."""
    if twist.is_zero:
        return "command: stop"
    parts = [
        f"{field} {value:+.3f} {'m/s' if field.startswith('linear') else 'rad/s'}"
        for field, value in zip(TWIST_FIELDS, twist.values, strict=True)
        if value
    ]
    return "command: " + ", ".join(parts)
