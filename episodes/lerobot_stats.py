"""Statistics that a LeRobot dataset stores of each feature: minimum, maximum, mean, standard deviation, and of how many values.

LeRobot normalises with them. They are kept for each episode and for the whole; those of images are per channel, in 0 to 1, of shape
[3, 1, 1], and of some pixels only, as LeRobot's own are. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PIXELS = 150  # about as many along the shorter side are enough


@dataclass(frozen=True)
class Stats:
    """Of one feature; float64 arrays of one shape."""

    minimum: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    values: int
    count: int  # frames

    def as_dict(self) -> dict[str, list[object]]:
        """As LeRobot writes it."""
        mean = self.total / self.values
        std = np.sqrt(np.maximum(self.squares / self.values - mean**2, 0.0))
        arrays = {"min": self.minimum, "max": self.maximum, "mean": mean, "std": std, "count": np.array([self.count])}
        return {name: array.tolist() for name, array in arrays.items()}


def stats_of(values: npt.NDArray[np.generic]) -> Stats:
    """Of [T] or [T, A]; shape [1] or [A]."""
    table = values.reshape(len(values), -1).astype(np.float64)
    return Stats(table.min(0), table.max(0), table.sum(0), (table**2).sum(0), len(table), len(table))


def stats_of_frame(frame: npt.NDArray[np.uint8]) -> Stats:
    """Of one image, uint8 [H, W, 3]; shape [3, 1, 1]."""
    stride = max(1, min(frame.shape[:2]) // _PIXELS)
    pixels = frame[::stride, ::stride].reshape(-1, 3).astype(np.float64) / 255.0
    low, high, total, squares = (
        array.reshape(3, 1, 1) for array in (pixels.min(0), pixels.max(0), pixels.sum(0), (pixels**2).sum(0))
    )
    return Stats(low, high, total, squares, len(pixels), 1)


def merge(parts: Sequence[Stats]) -> Stats:
    """Of everything that the parts are of."""
    return Stats(
        np.min([part.minimum for part in parts], axis=0),
        np.max([part.maximum for part in parts], axis=0),
        np.sum([part.total for part in parts], axis=0),
        np.sum([part.squares for part in parts], axis=0),
        sum(part.values for part in parts),
        sum(part.count for part in parts),
    )
