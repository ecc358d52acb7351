"""Two cameras as one source of frames: the static camera's newest picture with the newest of the hand's.

A pair is as old as its older picture, so a hand camera that dies or freezes makes the pair stale and stops the robot like a static one
that does. A picture that is missing is never made up: without both there is no pair. Knows nothing about kinds of cameras.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.cameras.base import Frame
from runtime.decisions import FrameSource


@dataclass(frozen=True, eq=False)
class PairedFrame(Frame):
    """A picture of each camera.

    Attributes:
        static: the frame that `pixels` are of.
    """

    static: Frame | None = field(default=None, repr=False)


class PairedFrames:
    """A FrameSource of two; ask it from any thread."""

    def __init__(self, static: FrameSource, hand: FrameSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._static, self._hand, self._clock = static, hand, clock

    @property
    def ended(self) -> bool:
        """One of them plays a recording that is over."""
        return self._static.ended or self._hand.ended

    def latest(self) -> Frame | None:
        """The newest good pair."""
        static, hand = self._static.latest(), self._hand.latest()
        return None if static is None or hand is None else _pair(static, hand)

    def wait_newer(self, than: Frame | None, timeout_s: float) -> Frame | None:
        """The newest good pair once its static picture is another one than that of `than`; None if none came in time."""
        until_s = self._clock() + timeout_s
        static = self._static.wait_newer(than.static if isinstance(than, PairedFrame) else None, timeout_s)
        if static is None:
            return None
        hand = self._hand.latest() or self._hand.wait_newer(None, max(until_s - self._clock(), 0.0))
        return None if hand is None else _pair(static, hand)


def _pair(static: Frame, hand: Frame) -> PairedFrame:
    captured_s = min(static.captured_s, hand.captured_s)
    return PairedFrame(static.pixels, captured_s, static.source_stamp_s, hand=hand.pixels, static=static)
