"""A camera that does what a test tells it to, and ways to wait for what a grabber then does."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from runtime.cameras.base import Frame
from runtime.events import Note

LIMIT_S = 60.0  # far beyond what anything here takes


class ScriptedCamera:
    """Hands out what is put into it: frames, exceptions, or functions to call."""

    def __init__(self) -> None:
        self.steps: queue.Queue[Frame | Exception | Callable[[], Frame | None]] = queue.Queue()
        self.open_errors: list[Exception] = []
        self.close_errors: list[Exception] = []
        self.opened = self.closed = 0

    def put(self, *steps: Frame | Exception | Callable[[], Frame | None]) -> None:
        for step in steps:
            self.steps.put(step)

    def open(self) -> None:
        self.opened += 1
        if self.open_errors:
            raise self.open_errors.pop(0)

    def read(self, timeout_s: float) -> Frame | None:
        try:
            step = self.steps.get(timeout=min(timeout_s, 0.02))
        except queue.Empty:
            return None
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, Frame) else step()

    def close(self) -> None:
        self.closed += 1
        if self.close_errors:
            raise self.close_errors.pop(0)


class Notes(list[Note]):
    """Collects notes."""

    @property
    def kinds(self) -> list[str]:
        return [note.kind for note in self]


_RANDOM = np.random.default_rng(0)
_LOCK = threading.Lock()


def fresh(captured_s: float | None = None, stamp: float | None = None) -> Frame:
    """A frame unlike all others, uint8 [12, 16, 3]."""
    with _LOCK:
        pixels = _RANDOM.integers(50, 200, (12, 16, 3), dtype=np.uint8)
    return Frame(pixels, time.monotonic() if captured_s is None else captured_s, stamp)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:g} s in vain: {what}"
        time.sleep(0.005)
