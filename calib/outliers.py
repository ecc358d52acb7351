"""Channels that stand out: what smoothing is for, and what it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calib.calibrate import StageCalibration


@dataclass(frozen=True)
class OutlierRow:
    """Activations of one site: largest and median peak of the channels in use, the ratio before and after smoothing, the worst channel."""

    site: str
    peak: float
    median: float
    ratio_before: float
    ratio_after: float
    channel: int


def outliers(calibrations: Mapping[str, StageCalibration]) -> tuple[OutlierRow, ...]:
    """Every site's largest channel against its median one, before and after smoothing; the worst first."""
    rows = []
    for found in calibrations.values():
        for key, peaks in found.peaks.items():
            norm_factors = found.factors_of(key)
            after = peaks if norm_factors is None else peaks / norm_factors
            live = peaks[peaks > 0]  # behind a ReLU most channels may be silent
            median = float(np.median(live)) if len(live) else 0.0
            rows.append(
                OutlierRow(
                    site=key,
                    peak=float(peaks.max()),
                    median=median,
                    ratio_before=float(peaks.max()) / median if len(live) else 1.0,
                    ratio_after=float(after.max()) / float(np.median(after[peaks > 0])) if len(live) else 1.0,
                    channel=int(peaks.argmax()),
                )
            )
    return tuple(sorted(rows, key=lambda row: -row.ratio_before))
