"""Draws a series of measurements again in blocks of neighbours, to find out how much a quantile of it may be trusted.

The block bootstrap: H. Kuensch, "The jackknife and the bootstrap for general stationary observations", Annals of Statistics 17 (1989),
with circular blocks, so that the ends count as much as the middle: D. Politis and J. Romano, "A circular block-resampling procedure for
stationary data" (1992). Knows nothing about latency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_SIGNIFICANT = 2.0  # standard errors of an autocorrelation
_QUIET = 5  # lags in a row without one, at least


def resampled(samples: NDArray[np.float64], percentiles: Sequence[float], *, seed: int) -> NDArray[np.float64]:
    """Percentiles of the series drawn again: float64 [_RESAMPLES, len(percentiles)].

    Args:
        samples: in the order of time.
    """
    count, block = len(samples), block_length(samples)
    starts = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, -(-count // block), 1))
    index = ((starts + np.arange(block)) % count).reshape(_RESAMPLES, -1)[:, :count]
    return np.percentile(samples[index], percentiles, axis=1).T


def block_length(samples: NDArray[np.float64]) -> int:
    """Samples in a block: about n^(1/3), more where neighbours resemble each other for longer; 1 where they do not.

    The rule of D. Politis and H. White, "Automatic block-length selection for the dependent bootstrap", Econometric Reviews 23 (2004), as
    corrected by A. Patton, D. Politis and H. White, Econometric Reviews 28 (2009), on ranks: a single spike must not hide everything else.
    """
    count = len(samples)
    ranks = np.argsort(np.argsort(samples, kind="stable"), kind="stable") - (count - 1) / 2
    if count < 2 * _QUIET:
        return 1
    # A run of equal values is no trend, though stable ranks of it are one.
    _, inverse, sizes = np.unique(samples, return_inverse=True, return_counts=True)
    ranks = (np.bincount(inverse, ranks) / sizes)[inverse]
    variance = float(ranks @ ranks) / count
    if variance == 0:
        return 1
    quiet = max(_QUIET, math.ceil(math.sqrt(math.log10(count))))
    most = min(math.ceil(math.sqrt(count)) + quiet, count - 1)
    covariance = np.array([ranks[lag:] @ ranks[: count - lag] / count for lag in range(most + 1)])
    loud = np.abs(covariance / variance) > _SIGNIFICANT * math.sqrt(math.log10(count) / count)
    last = next((lag for lag in range(most - quiet + 1) if not loud[lag + 1 : lag + 1 + quiet].any()), most)
    width = min(2 * max(last, 1), most)
    lags = np.arange(1, width + 1)
    weights = np.minimum(1.0, 2 * (1 - lags / width)) * covariance[lags]
    spread = 2 * float(weights @ lags)
    power = variance + 2 * float(weights.sum())
    # Neighbours that avoid each other make the sum small or negative: then there is nothing that longer blocks could keep.
    if power <= 0 or spread <= 0:
        return 1
    length = (1.5 * spread**2 / power**2 * count) ** (1 / 3)
    return max(1, min(round(length), math.ceil(min(3 * math.sqrt(count), count / 3))))
