"""Is B slower than A? Ratios of medians and tails with intervals that hold on a machine which is shared with others.

Steps of one run resemble their neighbours, so drawing them one by one would give intervals that are far too narrow: blocks of neighbours
are drawn instead (bench/resampling.py). And two runs of the very same thing differ by more than either shows inside, because the machine
changes: an allowance for that is added, and a threshold below which nobody should care. What no arithmetic can tell from one run each is
a machine that was busy all through one of them; several pairs in turns can, and are judged by the pairs alone. Knows nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.baselines import paired_ratio
from bench.resampling import resampled
from bench.results import Result, Timing

JUDGED = "total"  # the section that decides
LEAST_PAIRS = 5  # fewer say nothing about how pairs differ
_LEAST_SAMPLES = 20
_LEAST_TAIL = 100  # samples, for a p95 that is not the maximum by another name
# Runs of one bundle differ about as much as the quarters of a run do: docs/latency.md has the numbers. The factor is the 97.5 % quantile of
# Student's t for the degrees of freedom of two times four quarters.
_ALLOWANCE = 2.447
_PARTS = 4

Outcome = Literal["slower", "faster", "same", "unclear"]


@dataclass(frozen=True)
class Ratio:
    """B's over A's, with a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One section or layer.

    Attributes:
        kind: `section` or `layer`.
        a_ms, b_ms: medians; of several runs, the median of them.
        p50, p95: None where there are too few samples, or times that are not positive.
        outcome: what p50 says: `slower` or `faster` if its whole interval lies beyond the threshold, `same` if it lies within it,
            else `unclear`.
    """

    kind: Literal["section", "layer"]
    name: str
    a_ms: float
    b_ms: float
    p50: Ratio | None
    p95: Ratio | None
    outcome: Outcome


@dataclass(frozen=True)
class Comparison:
    """All rows, the one that decides first; `outcome` and `line` are its word about the whole."""

    pairs: int
    threshold: float
    outcome: Outcome
    line: str
    rows: tuple[Row, ...]


def compare(pairs: Sequence[tuple[Result, Result]], threshold: float) -> Comparison:
    """Compare B with A.

    Args:
        pairs: (A, B): one, or LEAST_PAIRS and more that were measured in turns. All have a section `total`.
        threshold: a ratio within 1 / (1 + threshold) to 1 + threshold is no difference.
    """
    rows = []
    for kind in ("section", "layer"):
        first = [result.sections if kind == "section" else result.layers for pair in pairs for result in pair]
        names = [name for name in first[0] if all(name in each for each in first)]
        for name in sorted(names, key=lambda name: name != JUDGED):
            timings = [each[name] for each in first]
            rows.append(_row(kind, name, timings[::2], timings[1::2], threshold))
    total = rows[0]
    return Comparison(len(pairs), threshold, total.outcome, _line(total, threshold), tuple(rows))


def judge(ratio: Ratio | None, threshold: float) -> Outcome:
    """What a ratio says; see Row."""
    if ratio is None:
        return "unclear"
    upper = 1 + threshold
    if ratio.low > upper:
        return "slower"
    if ratio.high < 1 / upper:
        return "faster"
    return "same" if ratio.low >= 1 / upper and ratio.high <= upper else "unclear"


def _row(
    kind: Literal["section", "layer"], name: str, a: Sequence[Timing], b: Sequence[Timing], threshold: float
) -> Row:
    p50, p95 = _within_one_pair(a[0], b[0]) if len(a) == 1 else (_over_pairs(a, b, "p50"), _over_pairs(a, b, "p95"))
    if min(len(timing.samples) for timing in (*a, *b)) < _LEAST_TAIL:
        p95 = None
    medians = [float(np.median([timing.p50 for timing in side])) for side in (a, b)]
    return Row(kind, name, medians[0], medians[1], p50, p95, judge(p50, threshold))


def _over_pairs(a: Sequence[Timing], b: Sequence[Timing], name: str) -> Ratio | None:
    ours, theirs = ([getattr(timing, name) for timing in side] for side in (b, a))
    return Ratio(*paired_ratio(ours, theirs)) if min(*ours, *theirs) > 0 else None


def _within_one_pair(a: Timing, b: Timing) -> tuple[Ratio | None, Ratio | None]:
    """p50 and p95, from the blocks of one run each and the allowance."""
    quantiles = (50.0, 95.0)
    sides = [np.asarray(side.samples, np.float64) for side in (a, b)]
    if min(map(len, sides)) < _LEAST_SAMPLES or min(side.min() for side in sides) <= 0:
        return None, None
    drawn = [np.log(resampled(side, quantiles, seed=seed)) for seed, side in enumerate(sides)]
    allowance = _ALLOWANCE * math.hypot(*(_unrest(side) for side in sides))
    found = []
    for column, quantile in enumerate(quantiles):
        value = float(np.log(np.percentile(sides[1], quantile) / np.percentile(sides[0], quantile)))
        low, high = np.percentile(drawn[1][:, column] - drawn[0][:, column], [2.5, 97.5])
        below, above = (math.hypot(max(0.0, gap), allowance) for gap in (value - low, high - value))
        found.append(Ratio(math.exp(value), math.exp(value - below), math.exp(value + above)))
    return found[0], found[1]


def _unrest(samples: NDArray[np.float64]) -> float:
    """Standard deviation of the log medians of the quarters of a run: how much the machine changed its speed meanwhile."""
    return float(np.std([np.log(np.median(part)) for part in np.array_split(samples, _PARTS)], ddof=1))


def _line(row: Row, threshold: float) -> str:
    if row.p50 is None:
        return f"Nothing can be said: fewer than {_LEAST_SAMPLES} samples, or times that are not positive."
    told = f"p50 of {row.name} is {row.p50.value:.3f} ({row.p50.low:.3f} to {row.p50.high:.3f}) times A's"
    return {
        "slower": f"B is slower: {told}, which is more than {threshold:.0%} beyond doubt.",
        "faster": f"B is faster: {told}, which is more than {threshold:.0%} beyond doubt.",
        "same": f"No difference: {told}, within {threshold:.0%}.",
        "unclear": f"No difference shown: {told}; the interval is too wide to say that there is none beyond {threshold:.0%}.",
    }[row.outcome]
