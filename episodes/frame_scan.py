"""Reads every frame of an episode once and keeps what can be told from pixels: damage, repeats, blackness, whiteness, colour by height.

Colour is kept as the mean of red and of blue in horizontal bands. That is enough to tell RGB from BGR when files are compared
(episodes/colour_order.py), because floor and background differ in red and blue and stay at their height in the picture.

Judges nothing; episodes/examination.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError

BANDS = 8
_BLACK = 16  # of 255; no pixel of a frame that shows something stays below it
_WHITE = 250  # of 255; from there on a pixel shows nothing
_WHITE_SHARE, _OVEREXPOSED_SHARE = 0.9, 0.5  # of the pixels; 12-bit values cut to 8 bits leave a sixteenth
_GIVES_UP = 100  # frames in a row
_STRIDE = 4  # every fourth pixel is enough for a mean


@dataclass(frozen=True)
class CorruptFrame:
    """A frame that cannot be read, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class FrameScan:
    """What the frames of one episode look like.

    Attributes:
        sizes: (height, width) -> frames of that size; the most frequent first.
        corrupt: frames that cannot be read.
        repeated: indices of frames that equal the frame before them in every pixel.
        black: indices of frames that show nothing.
        white: indices of frames of which nine tenths or more are white.
        overexposed: indices of the others of which half or more is white.
        bands: (mean red, mean blue), 0-255, of BANDS horizontal bands from top to bottom; black and white frames are left out. None
            where no frame can be used.
    """

    sizes: dict[tuple[int, int], int]
    corrupt: tuple[CorruptFrame, ...]
    repeated: tuple[int, ...]
    black: tuple[int, ...]
    white: tuple[int, ...]
    overexposed: tuple[int, ...]
    bands: tuple[tuple[float, float], ...] | None


def scan_frames(read: Callable[[int], npt.NDArray[np.uint8]], count: int) -> FrameScan:
    """Read frames 0 to `count` - 1, two in memory at a time.

    Args:
        read: gives frame i as uint8 [H, W, 3] RGB, or raises EpisodeError.
    """
    sizes: dict[tuple[int, int], int] = {}
    corrupt: list[CorruptFrame] = []
    repeated: list[int] = []
    black: list[int] = []
    white: list[int] = []
    overexposed: list[int] = []
    profiles: list[npt.NDArray[np.float64]] = []
    before: npt.NDArray[np.uint8] | None = None
    unreadable = 0  # in a row
    for index in range(count):
        if unreadable >= _GIVES_UP:
            corrupt.append(CorruptFrame(index, f"not looked at: the {_GIVES_UP} frames before it cannot be read"))
            continue
        try:
            frame = read(index)
        except EpisodeError as error:
            corrupt.append(CorruptFrame(index, str(error.got)))
            before = None
            unreadable += 1
            continue
        unreadable = 0
        height, width = frame.shape[:2]
        sizes[height, width] = sizes.get((height, width), 0) + 1
        if before is not None and np.array_equal(frame, before):
            repeated.append(index)
        before = frame
        white_share = float((frame[::_STRIDE, ::_STRIDE].min(axis=2) >= _WHITE).mean())
        if int(frame.max()) < _BLACK:
            black.append(index)
        elif white_share >= _WHITE_SHARE:
            white.append(index)
        else:
            profiles.append(_profile(frame))
            if white_share >= _OVEREXPOSED_SHARE:
                overexposed.append(index)
    return FrameScan(
        sizes=dict(sorted(sizes.items(), key=lambda item: -item[1])),
        corrupt=tuple(corrupt),
        repeated=tuple(repeated),
        black=tuple(black),
        white=tuple(white),
        overexposed=tuple(overexposed),
        bands=tuple((float(red), float(blue)) for red, blue in np.mean(profiles, axis=0)) if profiles else None,
    )


def _profile(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """float64 [BANDS, 2]: mean red and blue of each band."""
    height = frame.shape[0]
    profile = np.empty((BANDS, 2))
    for band in range(BANDS):
        top = band * height // BANDS
        bottom = max((band + 1) * height // BANDS, top + 1)
        profile[band] = frame[top:bottom:_STRIDE, ::_STRIDE, ::2].mean(axis=(0, 1), dtype=np.float64)
    return profile
