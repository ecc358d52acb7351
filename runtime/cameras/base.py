"""What every camera gives, and the protocol that all kinds of it implement.

A camera hands out its newest frame and never a queue of old ones: a robot that acts on what it saw a second ago is a danger. Knows nothing
about threads or staleness (runtime/cameras/grabber.py) or about what a policy makes of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture.

    Attributes:
        pixels: uint8 [H, W, 3] RGB, contiguous; nobody writes into it afterwards.
        captured_s: when it was taken, by time.monotonic() of this machine; where the source cannot tell, when it arrived.
        source_stamp_s: the source's own time of it, or None. Compared only with other stamps of the same source: clocks of other machines
            jump and differ.
        hand: the same of a second camera, at the robot's hand, where there is one; see runtime/cameras/pair.py.
    """

    pixels: NDArray[np.uint8]
    captured_s: float
    source_stamp_s: float | None = None
    hand: NDArray[np.uint8] | None = None


class EndOfFrames(Exception):
    """A recording is over, which is no error; nothing comes after it."""


class Camera(Protocol):
    """A source of frames. Used by one thread; may be opened again after `close`."""

    def open(self) -> None:
        """Connect.

        Raises:
            CameraError: it is not there, is busy, or gives something else than configured.
        """
        ...

    def read(self, timeout_s: float) -> Frame | None:
        """The newest frame that has not been returned yet; None if none came in time.

        Raises:
            FrameError: one picture is damaged; the next may be good.
            CameraError: the connection is lost, or gives something else than configured; the caller closes and opens again.
            EndOfFrames: a recording is over.
        """
        ...

    def close(self) -> None:
        """Disconnect; safe to call twice, and from a state of error."""
        ...
