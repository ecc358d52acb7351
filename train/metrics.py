"""Measures of predicted actions against recorded ones, on plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from episodes.actions import CLASS_THRESHOLD

SIDES = ("left", "none", "right")


def left_right_confusion(
    predicted: NDArray[np.float32], recorded: NDArray[np.float32], *, threshold: float = CLASS_THRESHOLD
) -> NDArray[np.int64]:
    """How often each side was taken for which: int64 [3, 3], recorded by predicted, in the order of SIDES.

    Args:
        predicted, recorded: [T] lateral velocities, positive to the left; within `threshold` counts as none.
    """
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (_sides(recorded, threshold), _sides(predicted, threshold)), 1)
    return confusion


def _sides(lateral: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    return np.where(lateral > threshold, 0, np.where(lateral < -threshold, 2, 1)).astype(np.int64)
