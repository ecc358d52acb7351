"""Brings a frame to the model's square, with one arithmetic for training and for the robot.

Pillow's, because all training so far used Pillow: its bicubic is an antialiased fixed-point filter that no GPU or OpenCV resize
reproduces, and a resize that differs is a silent change of the policy. Needs no HDF5, so a robot can import it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ResizeFilter = Literal["bicubic", "bilinear", "letterbox"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def squash(frame: NDArray[np.uint8], size: int, resize: ResizeFilter) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] to uint8 [size, size, 3]; the aspect ratio is lost, as in training, unless `letterbox` keeps it.

    `letterbox` is bilinear, in the middle of a black square, as the lab's loader has it (sides rounded to even halves).

    Width first, then height, as every Pillow up to 12 does it in one call, and thus all training so far; Pillow 13 takes the other
    order for upright frames, and the two differ by rounding.
    """
    image = Image.fromarray(np.ascontiguousarray(frame))
    if resize != "letterbox":
        narrow = image.resize((size, image.height), _FILTERS[resize])
        return np.asarray(narrow.resize((size, size), _FILTERS[resize]))
    scale = min(size / image.width, size / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    narrow = image.resize((width, image.height), _FILTERS["bilinear"])
    square = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(narrow.resize((width, height), _FILTERS["bilinear"]))
    return square
