"""The range of an activation: what one INT8 step stands for.

Symmetric per tensor: x is about scale * q, q in -127..127. A range that covers the largest value seen (`minmax`) spends its steps on
outliers; a smaller one clips them. `percentile` clips a fixed share, `mse` what minimises the square error of rounding and clipping.
Works on histograms of |x|, so any number of frames fits in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["minmax", "percentile", "mse"]
BINS = 2048
LEVELS = 127
# A tensor that never exceeds this is zero: the width of a bin would not be a float32 any more.
_TINY = 1e-30
# Clipped share of the values: one in ten thousand.
_PERCENTILE = 99.99
# Candidate ranges for mse, as shares of the largest value.
_SHARES = np.linspace(0.2, 1.0, 81)


@dataclass
class Histogram:
    """Counts of |x| in BINS equal bins over 0..top; what lies above counts into the last one."""

    top: float
    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, top: float) -> Histogram:
        return cls(top, np.zeros(BINS, np.int64))

    def add(self, magnitudes: NDArray[np.float32]) -> None:
        """Count |x|, any shape."""
        if self.top > _TINY:
            index = (magnitudes.ravel() * np.float32(BINS / self.top)).astype(np.int32)
            np.minimum(index, BINS - 1, out=index)
            self.counts += np.bincount(index, minlength=BINS)


def activation_scale(histogram: Histogram, method: Method) -> float:
    """The scale of one tensor; 1 for one that was always zero."""
    if histogram.top <= _TINY or not histogram.counts.any():
        return 1.0
    return _clip(histogram, method) / LEVELS


def _clip(histogram: Histogram, method: Method) -> float:
    if method == "minmax":
        return histogram.top
    width = histogram.top / BINS
    if method == "percentile":
        below = np.cumsum(histogram.counts)
        bin_index = int(np.searchsorted(below, below[-1] * _PERCENTILE / 100))
        return float((min(bin_index, BINS - 1) + 1) * width)
    centres = (np.arange(BINS, dtype=np.float64) + 0.5) * width
    errors = [_square_error(centres, histogram.counts, share * histogram.top) for share in _SHARES]
    return float(_SHARES[int(np.argmin(errors))] * histogram.top)


def _square_error(values: NDArray[np.float64], counts: NDArray[np.int64], clip: float) -> float:
    """Summed square error of quantizing `values` (centres of bins) with a range of `clip`.

    Quantizes them, instead of taking rounding errors as uniform: most values beside an outlier are far below one step, and cost less.
    """
    scale = clip / LEVELS
    restored = np.minimum(np.rint(values / scale), LEVELS) * scale
    return float((counts * (restored - values) ** 2).sum())
