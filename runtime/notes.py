"""Notes for the person who drives: one line each on the terminal, repeated ones counted instead of shown again.

Shown by a thread of its own: a terminal that was paused, or a full pipe, must not hold up whoever has something to say.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console

from runtime.events import Event, Listener, Note, RunInfo

_QUIET_S = 5.0


class Notes:
    """A listener that shows notes; called, it also hands one on to the other listeners (for those that are no loop's, as a camera's)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._others: tuple[Listener, ...] = ()
        # Kind and text of the last one, when it was shown, and how often it has come since.
        self._last, self._shown_s, self._more = ("", ""), 0.0, 0
        self._queue: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="notes", daemon=True)
        self._thread.start()

    def __call__(self, note: Note) -> None:
        """Show it and hand it on."""
        self.take(note)
        for listener in self._others:
            listener.take(note)

    def hand_on(self, others: Sequence[Listener]) -> None:
        """From now on; before, they were not started."""
        self._others = tuple(others)

    def start(self, info: RunInfo) -> None:
        """Nothing to show: the plan has been."""

    def take(self, event: Event) -> None:
        """Show a note, soon."""
        if isinstance(event, Note):
            self._queue.put(event)

    def close(self) -> None:
        """Show what is left, unless that takes longer than a second."""
        self._queue.put(None)
        self._thread.join(1.0)

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (note := self._queue.get()) is not None:
            self._show(note)

    def _show(self, note: Note) -> None:
        key = note.kind, note.text
        if key == self._last and note.at_s - self._shown_s < _QUIET_S:
            self._more += 1
            return
        again = f" (and {self._more} times before)" if key == self._last and self._more else ""
        self._last, self._shown_s, self._more = key, note.at_s, 0
        self._console.print(f"{note.kind}: {note.text}{again}", markup=False, soft_wrap=True)
