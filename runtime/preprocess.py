"""From a camera frame to the vision stage's input: uint8 [image_size, image_size, 3] RGB.

The resize is the very function that training uses. Scaling to [0, 1] and the mean/std are not here: they are folded into the stage's
first weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundle.errors import FrameError
from bundle.manifest import Preprocessing
from episodes.resize import squash


def check_frame(frame: object) -> NDArray[np.uint8]:
    """Return the frame if it is a non-empty uint8 array [H, W, 3].

    Raises:
        FrameError: anything else; float images in [0, 1] and grey or RGBA images are the usual ones.
    """
    hint = "pass RGB uint8 as the camera gives it; convert BGR with frame[..., ::-1] and floats with (frame * 255).round()."
    if not isinstance(frame, np.ndarray):
        raise FrameError(
            "a frame is not an array", got=type(frame).__name__, expected="numpy uint8 [H, W, 3]", hint=hint
        )
    if frame.dtype != np.uint8:
        raise FrameError("a frame has the wrong dtype", got=frame.dtype, expected="uint8", hint=hint)
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise FrameError(
            "a frame has the wrong shape", got=list(frame.shape), expected="[H, W, 3], not empty", hint=hint
        )
    return frame


def resize(frame: NDArray[np.uint8], preprocessing: Preprocessing, size: int) -> NDArray[np.uint8]:
    """Squash a frame to [size, size, 3] with the filter of the manifest.

    Raises:
        FrameError: see check_frame.
    """
    return squash(check_frame(frame), size, preprocessing.resize)
