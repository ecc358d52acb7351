"""SmoothQuant, folded exactly: outlier channels of an activation are scaled down, and the weights that meet them scaled up.

x W^T = (x / s) (W s)^T for any s > 0 per channel. Where x is the output of a LayerNorm, x / s is the same LayerNorm with gamma / s and
beta / s, so nothing is added to the graph; the products are equal to rounding (tests/calib/test_smoothing.py runs both graphs). In the
decoder all four GEMM inputs of a layer are LayerNorm outputs. Source of s: Xiao et al., SmoothQuant (2022), eq. 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Factors beyond this would only move an outlier from one side to the other, and lose bits in an fp16 gamma.
_LARGEST = 1e4


def factors(activation_peaks: Floats, weights: Sequence[NDArray[np.generic]], strength: float) -> Floats:
    """s [K] of one LayerNorm and all the weights [N, K] that read it.

    Args:
        activation_peaks: largest |x| of each channel, [K].
        strength: alpha, 0..1: the share of the difficulty that moves into the weights; 0 and the unsmoothed graph are different things.
    """
    weight_peaks = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0).astype(np.float64)
    seen = (activation_peaks > 0) & (weight_peaks > 0)
    s = np.ones(len(activation_peaks))
    s[seen] = activation_peaks[seen].astype(np.float64) ** strength / weight_peaks[seen] ** (1 - strength)
    # A common factor of all channels changes nothing in INT8; without it s stays near 1.
    s[seen] /= np.exp(np.mean(np.log(s[seen]))) if seen.any() else 1.0
    return np.clip(s, 1 / _LARGEST, _LARGEST).astype(np.float32)


def fold_norm(parameter: NDArray[np.generic], s: Floats) -> Floats:
    """gamma or beta [K] of the LayerNorm."""
    folded: Floats = (parameter.astype(np.float64) / s).astype(np.float32)
    return folded


def fold_weight(weight: NDArray[np.generic], s: Floats) -> Floats:
    """A weight [N, K] that reads it."""
    folded: Floats = weight.astype(np.float32) * s
    return folded
