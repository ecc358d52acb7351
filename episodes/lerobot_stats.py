"""Statistics that a LeRobot dataset stores of each feature: range, mean, standard deviation, quantiles, and of how many values.

LeRobot normalises with them, and adds to them when more episodes are recorded into the dataset, so all that it writes must be there. They
are kept for each episode and for the whole; those of images are per channel, in 0 to 1, of shape [3, 1, 1], and of some pixels only, as
LeRobot's own are. Sums are float64. Quantiles are exact within an episode; those of several are their mean weighted by frames, as LeRobot
aggregates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PIXELS = 150  # about as many along the shorter side are enough
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)  # stored as q01, q10, ...
_LEVELS = 256


@dataclass(frozen=True)
class Stats:
    """Of one feature; float64 arrays of one shape, `quantiles` with an axis of QUANTILES before it."""

    minimum: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    quantiles: npt.NDArray[np.float64]
    values: int
    count: int  # frames

    def as_dict(self) -> dict[str, list[object]]:
        """As LeRobot writes it."""
        mean = self.total / self.values
        std = np.sqrt(np.maximum(self.squares / self.values - mean**2, 0.0))
        arrays = {"min": self.minimum, "max": self.maximum, "mean": mean, "std": std, "count": np.array([self.count])}
        arrays |= {f"q{round(share * 100):02d}": part for share, part in zip(QUANTILES, self.quantiles, strict=True)}
        return {name: array.tolist() for name, array in arrays.items()}


class FrameStats:
    """Of the images of an episode, frame by frame; shape [3, 1, 1]. Eight bits have few values, so their counts say everything."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, _LEVELS), np.int64)
        self._frames = 0

    def add(self, frame: npt.NDArray[np.uint8]) -> None:
        """One image, uint8 [H, W, 3]."""
        stride = max(1, min(frame.shape[:2]) // _PIXELS)
        pixels = frame[::stride, ::stride].reshape(-1, 3)
        self._counts += np.stack([np.bincount(channel, minlength=_LEVELS) for channel in pixels.T])
        self._frames += 1

    def stats(self) -> Stats:
        """Of all that were added, at least one."""
        levels = np.arange(_LEVELS) / (_LEVELS - 1)
        values = int(self._counts[0].sum())
        seen = [levels[counts > 0] for counts in self._counts]
        quantiles = [[_quantile(counts, levels, share) for counts in self._counts] for share in QUANTILES]
        arrays = (
            [part.min() for part in seen],
            [part.max() for part in seen],
            self._counts @ levels,
            self._counts @ levels**2,
        )
        low, high, total, squares = (np.asarray(array, np.float64).reshape(3, 1, 1) for array in arrays)
        shaped = np.asarray(quantiles, np.float64).reshape(len(QUANTILES), 3, 1, 1)
        return Stats(low, high, total, squares, shaped, values, self._frames)


def stats_of(values: npt.NDArray[np.generic]) -> Stats:
    """Of [T] or [T, A]; shape [1] or [A]."""
    table = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(table, QUANTILES, axis=0)
    return Stats(table.min(0), table.max(0), table.sum(0), (table**2).sum(0), quantiles, len(table), len(table))


def merge(parts: Sequence[Stats]) -> Stats:
    """Of everything that the parts, which are episodes, are of."""
    weights = np.array([part.count for part in parts], np.float64)
    return Stats(
        np.min([part.minimum for part in parts], axis=0),
        np.max([part.maximum for part in parts], axis=0),
        np.sum([part.total for part in parts], axis=0),
        np.sum([part.squares for part in parts], axis=0),
        np.average([part.quantiles for part in parts], axis=0, weights=weights),
        sum(part.values for part in parts),
        sum(part.count for part in parts),
    )


def _quantile(counts: npt.NDArray[np.int64], levels: npt.NDArray[np.float64], share: float) -> float:
    """The quantile of values that are given by how often each level occurs, interpolated linearly as numpy does."""
    place = share * (int(counts.sum()) - 1)
    below = int(np.floor(place))
    edges = np.cumsum(counts)
    first, second = (
        levels[int(np.searchsorted(edges, index, side="right"))]
        for index in (below, min(below + 1, int(edges[-1]) - 1))
    )
    return float(first + (place - below) * (second - first))
