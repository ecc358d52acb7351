"""Squashes a frame to the model's square, with one arithmetic for training and for the robot.

Pillow's, because all training so far used Pillow: its bicubic is an antialiased fixed-point filter that no GPU or OpenCV resize
reproduces, and a resize that differs is a silent change of the policy. Needs no HDF5, so a robot can import it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ResizeFilter = Literal["bicubic", "bilinear"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def squash(frame: NDArray[np.uint8], size: int, resize: ResizeFilter) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] to uint8 [size, size, 3]; the aspect ratio is lost, as in training.

    Width first, then height, as every Pillow up to 12 does it in one call, and thus all training so far; Pillow 13 takes the other
    order for upright frames, and the two differ by rounding.
    """
    image = Image.fromarray(np.ascontiguousarray(frame))
    narrow = image.resize((size, image.height), _FILTERS[resize])
    return np.asarray(narrow.resize((size, size), _FILTERS[resize]))
