"""How regular a run was, in memory that does not grow: histograms, and the summary that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_LOWEST, _RATIO = 1e-6, 1.01
_BINS = math.ceil(math.log(1e3 / _LOWEST, _RATIO)) + 1


class Histogram:
    """Durations in seconds in bins 1 % apart, from a microsecond to a quarter of an hour; 17 kB however long the run."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)
        self.count, self.total_s, self.max_s = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; below zero counts as none."""
        bounded = max(seconds, 0.0)
        index = 0 if bounded <= _LOWEST else min(int(math.log(bounded / _LOWEST, _RATIO)) + 1, _BINS - 1)
        self._counts[index] += 1
        self.count += 1
        self.total_s += bounded
        self.max_s = max(self.max_s, bounded)

    def percentile(self, q: float) -> float:
        """Seconds below which q percent lie, 1 % too high at most; 0 where nothing was counted."""
        if not self.count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._counts), q / 100 * self.count))
        return min(_LOWEST * _RATIO**index, self.max_s)


@dataclass(frozen=True)
class Summary:
    """What a run was like.

    Attributes:
        seconds: from the first command to the last.
        published: commands sent; late_ticks of them began more than a period after their time.
        jitter_ms: how late ticks began: p50, p99 and max.
        overhead_ms: what a tick took: p50, p99 and max.
        decisions, missed, failed: of the policy; missed are deadlines.
        decide_hz: effective, against wanted_decide_hz.
        spacing_ms: between the frames of successive decisions: p50 and p95; the training's is 1000 / wanted_decide_hz.
        section_ms: p50 per section of a decision; section_share: of their total time.
        held_back_s: seconds in which the robot was not told what was wanted, by reason.
        zero_sent: the last command was a zero.
        camera: counts of the camera's.
    """

    seconds: float
    published: int
    late_ticks: int
    jitter_ms: Mapping[str, float]
    overhead_ms: Mapping[str, float]
    decisions: int
    missed: int
    failed: int
    decide_hz: float
    wanted_decide_hz: float
    spacing_ms: Mapping[str, float]
    section_ms: Mapping[str, float]
    section_share: Mapping[str, float]
    held_back_s: Mapping[str, float]
    zero_sent: bool
    camera: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


def percentiles_ms(histogram: Histogram, *points: float) -> dict[str, float]:
    """Of a histogram, in milliseconds, with the maximum."""
    shown = {f"p{q:g}": histogram.percentile(q) * 1e3 for q in points}
    return shown | {"max": histogram.max_s * 1e3}
