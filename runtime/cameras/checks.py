"""Which frames count: what a camera with a fault hands over must never look like a newer picture.

A refused frame does not become the newest one, so the newest one ages, and the age stops the robot: every fault ends there, whatever its
kind. So this module errs on the side of refusing, and says why.

Pixels that repeat are the hard case: a camera that froze goes on handing over frames, each with a new time. Here the second of two equal
pictures is refused at once, so that a freeze shows in the frame's age from the first moment, and stops the robot after `stale_frame_s`
alone. `frozen_after_s` is only when that gets the name `frozen`, and the camera is opened anew. A sensor's noise makes two equal pictures
in a row rare, and costs one frame period where it happens. Where the check is off (0), equal pictures are as good as others.

Knows nothing about threads or about what happens to a refused frame.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from runtime.cameras.base import Frame
from runtime.cameras.orientation import upright_size
from runtime.robot_file import CameraConfig

Refusal = Literal[
    "not a picture",
    "wrong size",
    "no capture time",
    "from the future",
    "older than the newest",
    "duplicate stamp",
    "stamp went backwards",
    "too dark",
    "repeated",
    "frozen",
]
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)
_FUTURE_SLACK_S = 0.001
_STRIDE = 8


class FrameChecks:
    """The state that the checks need: what came last. One for each camera; not thread-safe."""

    def __init__(self, config: CameraConfig) -> None:
        self._config = config
        self._size = upright_size(config)
        self._first_shape: tuple[int, ...] | None = None
        self._newest_s = -math.inf
        self._stamp: float | None = None
        self._pixels: NDArray[np.uint8] | None = None
        self._pixels_since_s = 0.0

    def reconnected(self) -> None:
        """The source may start its clock anew, and change its size if the robot file leaves it open; frozen pixels stay frozen."""
        self._first_shape = None
        self._stamp = None

    def refuse(self, frame: Frame, now_s: float) -> Refusal | None:
        """Why a frame does not count; None if it does, and is the newest from now on.

        Args:
            now_s: time.monotonic().
        """
        reason = self._malformed(frame.pixels) or self._mistimed(frame, now_s)
        if reason is not None:
            return reason
        if is_dark(frame.pixels, self._config.dark_below):
            return "too dark"
        if self._config.frozen_after_s > 0:
            if self._pixels is not None and same_pixels(self._pixels, frame.pixels):
                frozen = now_s - self._pixels_since_s > self._config.frozen_after_s
                return "frozen" if frozen else "repeated"
            self._pixels, self._pixels_since_s = frame.pixels, now_s
        self._first_shape = frame.pixels.shape
        self._newest_s = frame.captured_s
        return None

    def _malformed(self, pixels: NDArray[np.uint8]) -> Refusal | None:
        shape, (width, height) = pixels.shape, self._size
        if pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            return "not a picture"
        fits = height in (0, shape[0]) and width in (0, shape[1])
        # Where any size is taken, it is the first one's: a camera that changes it is not the camera that the run began with.
        return None if fits and shape == (self._first_shape or shape) else "wrong size"

    def _mistimed(self, frame: Frame, now_s: float) -> Refusal | None:
        if not math.isfinite(frame.captured_s):
            return "no capture time"
        if frame.captured_s > now_s + _FUTURE_SLACK_S:
            return "from the future"
        stamp, before = frame.source_stamp_s, self._stamp
        if stamp is not None:
            if before is not None and stamp == before:
                return "duplicate stamp"
            if before is not None and not stamp > before:  # so that NaN is refused too
                return "stamp went backwards"
            self._stamp = stamp
        return "older than the newest" if frame.captured_s <= self._newest_s else None


def is_dark(pixels: NDArray[np.uint8], below: float) -> bool:
    """Whether the mean brightness (0 to 255, all channels alike) of a sample of the pixels is under `below`."""
    return below > 0 and brightness(pixels) < below


def brightness(pixels: NDArray[np.uint8]) -> float:
    """Mean of a sample of the pixels, 0 to 255."""
    return float(pixels[::_STRIDE, ::_STRIDE].mean())


def same_pixels(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two pictures are equal to the last bit; mostly a small sample tells."""
    sample = np.s_[::_STRIDE, ::_STRIDE]
    return np.array_equal(one[sample], other[sample]) and np.array_equal(one, other)
