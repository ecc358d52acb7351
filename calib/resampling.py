"""How far a mean over frames may be trusted: whole streams are drawn again, because frames of one resemble each other.

Where there are few streams, so that they alone give too few different draws, also circular blocks of frames within each that is drawn:
D. Politis and J. Romano, "A circular block-resampling procedure for stationary data" (1992). Knows nothing about actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_FEW_STREAMS = 8
_LEVEL = 0.95


def bootstrap_interval(values: NDArray[np.float64], lengths: Sequence[int], *, seed: int = 0) -> NDArray[np.float64]:
    """95 % intervals of means over frames: float64 [2, K], low and high; same input, same answer.

    Args:
        values: float64 [frames, K], streams one after the other. Differences are paired before: of each frame with itself.
        lengths: frames of each stream; none is 0.
    """
    rng = np.random.default_rng(seed)
    count = len(lengths)
    drawn = rng.integers(0, count, (_RESAMPLES, count))
    sums = np.empty((_RESAMPLES, count, values.shape[1]))
    for stream, part in enumerate(np.split(values, np.cumsum(lengths)[:-1])):
        here = drawn == stream
        sums[here] = _block_sums(part, int(here.sum()), rng) if count < _FEW_STREAMS else part.sum(axis=0)
    means = sums.sum(axis=1) / np.asarray(lengths)[drawn].sum(axis=1)[:, None]
    edge = (1 - _LEVEL) / 2
    interval: NDArray[np.float64] = np.quantile(means, [edge, 1 - edge], axis=0)
    return interval


def _block_sums(part: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sums over a stream drawn again in circular blocks of about the square root of its length: [draws, K]."""
    length = len(part)
    block = math.ceil(math.sqrt(length))
    starts = rng.integers(0, length, (draws, -(-length // block), 1))
    index = ((starts + np.arange(block)) % length).reshape(draws, -1)[:, :length]
    # Column by column: all at once would be gigabytes for long streams.
    return np.stack([column[index].sum(axis=1) for column in part.T], axis=1)
