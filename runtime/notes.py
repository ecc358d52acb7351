"""Notes for the person who drives: one line each on the terminal, repeated ones counted instead of shown again."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from runtime.events import Event, Listener, Note, RunInfo

_QUIET_S = 5.0


class Notes:
    """A listener that shows notes; called, it also hands one on to the other listeners (for those that are no loop's, as a camera's)."""

    def __init__(self, console: Console, others: Sequence[Listener] = ()) -> None:
        self._console, self._others = console, tuple(others)
        # Kind and text of the last one, when it was shown, and how often it has come since.
        self._last, self._shown_s, self._more = ("", ""), 0.0, 0

    def __call__(self, note: Note) -> None:
        """Show it and hand it on."""
        self.take(note)
        for listener in self._others:
            listener.take(note)

    def start(self, info: RunInfo) -> None:
        """Nothing to show: the plan has been."""

    def take(self, event: Event) -> None:
        """Show a note."""
        if not isinstance(event, Note):
            return
        key = event.kind, event.text
        if key == self._last and event.at_s - self._shown_s < _QUIET_S:
            self._more += 1
            return
        again = f" (and {self._more} times before)" if key == self._last and self._more else ""
        self._last, self._shown_s, self._more = key, event.at_s, 0
        self._console.print(f"{event.kind}: {event.text}{again}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to end."""
