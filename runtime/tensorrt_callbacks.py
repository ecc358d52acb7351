"""What TensorRT calls back: its log, the progress of a build, and where an engine's bytes go.

TensorRT wants subclasses of its own classes, and which TensorRT it is, is known only when it has been imported: so each class is made in a
function. Knows nothing about versions, engines or networks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

log = logging.getLogger("jetvla")

_ERROR, _WARNING, _INFO = 1, 2, 3
_KEPT_MESSAGES = 200
# Of TensorRT's many warnings, those that say that an engine is not this machine's.
_OF_ANOTHER_DEVICE = re.compile(r"across different models? of devices?", re.IGNORECASE)


class MessageLog:
    """What TensorRT said; `errors` also tells why a call returned nothing."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str]] = []
        self._shown: set[str] = set()

    def add(self, severity: int, text: str) -> None:
        if severity > _INFO:
            return
        self.messages.append((severity, text))
        del self.messages[:-_KEPT_MESSAGES]
        words = text.strip()
        if severity == _WARNING and words not in self._shown and _OF_ANOTHER_DEVICE.search(words):
            self._shown.add(words)
            log.warning("TensorRT: %s", words)

    def errors(self) -> str:
        """The errors since the log was made, on one line; the cause comes first."""
        found = [text.strip() for severity, text in self.messages if severity <= _ERROR]
        return "; ".join(dict.fromkeys(found)) or "TensorRT gave no reason"


def make_logger(module: Any, messages: MessageLog) -> Any:
    """An ILogger that writes into `messages`."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(int(severity), text)

    return Logger()


def make_monitor(module: Any, report: Callable[[str, str | None, int, int], bool]) -> Any:
    """An IProgressMonitor that calls `report(phase, parent, done, steps)` and stops the build when that returns False."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int]] = {}
            self._go_on = True

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases[phase] = (parent, steps)
            self._go_on &= report(phase, parent, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            parent, steps = self._phases.get(phase, (None, 0))
            self._go_on &= report(phase, parent, step + 1, steps)
            return self._go_on

        def phase_finish(self, phase: str) -> None:
            parent, steps = self._phases.pop(phase, (None, 0))
            self._go_on &= report(phase, parent, steps, steps)

    return Monitor()


def make_writer(module: Any, write: Callable[[Any], int]) -> Any:
    """An IStreamWriter that hands everything to `write`; its `error` is the OSError that ended the writing, if any."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # TensorRT swallows exceptions and short writes alike, and calls the truncated engine a success.
            try:
                return write(data) if self.error is None else 0
            except OSError as error:
                self.error = error
                return 0

    return Writer()
