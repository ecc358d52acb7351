"""Draws a latency result as SVG for a page that is light or dark, on a phone or on paper.

How a figure becomes part of a page is export/svg_figure.py's business. Series are thinned to their extremes, so that no spike is lost.
Nothing that somebody else wrote (names, instructions) is drawn: that stands in the page. Knows nothing about pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.results import StageFloor, Timing
from export.svg_figure import ROLES, available, figure, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["available", "driven", "histogram", "stage_bars", "thin", "timeline"]

_HEIGHT = 2.9  # inches
_POINTS = 500  # of a line
_FAR = 2.5  # a deadline beyond so many times the data is told, not drawn


def histogram(timing: Timing, deadline_ms: float, name: str, *, of: str) -> str:
    """Distribution of a timing, with p50, p99 and the deadline.

    Args:
        name: of the figure; unique in its page.
        of: what is counted.
    """
    with figure(name, _HEIGHT) as (axes, done):
        samples = np.asarray(timing.samples)
        axes.hist(samples, bins=_bins(samples).tolist(), color=ROLES["ours"], alpha=0.75)
        for value, label, style in ((timing.p50, "p50", "-"), (timing.p99, "p99", (0, (4, 2)))):
            axes.axvline(value, color=ROLES["ink"], linewidth=1.1, linestyle=style, label=f"{label} {value:.4g} ms")
        _limit(axes, deadline_ms, float(samples.max()), vertical=True)
        axes.set_xlabel("ms")
        axes.set_ylabel(of)
        legend(axes)
    return done[0]


def timeline(timing: Timing, deadline_ms: float, name: str, *, x_label: str, last: float | None = None) -> str:
    """A timing in the order of time, with the deadline.

    Args:
        last: of the x axis; None counts samples.
    """
    with figure(name, _HEIGHT) as (axes, done):
        samples = np.asarray(timing.samples)
        x = np.arange(1, len(samples) + 1) * timing.stride
        if last is not None:
            x = x * (last / x[-1])
        axes.plot(*thin(x, samples), color=ROLES["ours"], linewidth=0.9)
        _limit(axes, deadline_ms, float(samples.max()), vertical=False)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, x[-1])
        axes.set_xlabel(x_label)
        axes.set_ylabel("ms")
        axes.grid(axis="y")
        legend(axes)
    return done[0]


def stage_bars(
    sections: Mapping[str, Timing], floors: Mapping[str, StageFloor], names: Sequence[str], name: str
) -> str:
    """Medians of sections, whiskers to p95, and for those that the planner knows its floor and what it expects."""
    with figure(name, _HEIGHT) as (axes, done):
        rows = np.arange(len(names))[::-1]
        p50 = np.array([sections[each].p50 for each in names])
        p95 = np.array([sections[each].p95 for each in names])
        axes.barh(rows, p50, color=ROLES["ours"], alpha=0.75, height=0.55, label="measured, p50 (line to p95)")
        axes.hlines(rows, p50, p95, color=ROLES["ink"], linewidth=1.2)
        known = [(row, floors[each]) for row, each in zip(rows, names, strict=True) if each in floors]
        for values, marker, colour, label in (
            ([floor.floor_ms for _, floor in known], "|", ROLES["limit"], "roofline floor"),
            ([floor.expected_ms for _, floor in known], "D", ROLES["other"], "expected"),
        ):
            if known:
                size = 240 if marker == "|" else 26
                rows_known = [row for row, _ in known]
                axes.scatter(values, rows_known, s=size, c=colour, marker=marker, label=label, linewidths=2, zorder=3)
        axes.set_yticks(rows, names)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("ms")
        axes.grid(axis="x")
        legend(axes)
    return done[0]


def driven(predicted: NDArray[np.float64], recorded: NDArray[np.float64], fps: float | None, name: str) -> str:
    """Predicted (solid) and recorded (dashed) values of one axis."""
    with figure(name, _HEIGHT) as (axes, done):
        x = np.arange(len(predicted)) / (fps or 1.0)
        axes.plot(x, recorded, color=ROLES["other"], linewidth=1.6, linestyle=(0, (4, 2)), label="recorded")
        axes.plot(x, predicted, color=ROLES["ours"], linewidth=1.3, label="predicted")
        axes.set_xlabel("s" if fps else "frame")
        axes.grid(axis="y")
        legend(axes)
    return done[0]


def thin(
    x: NDArray[np.float64] | NDArray[np.int64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most about 2 * _POINTS points: of each stretch its lowest and its highest, in order."""
    if len(y) <= 2 * _POINTS:
        return np.asarray(x, np.float64), y
    kept: set[int] = {0, len(y) - 1}
    edges = np.linspace(0, len(y), _POINTS + 1).astype(int)
    for start, end in pairwise(edges.tolist()):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    index = sorted(kept)
    return np.asarray(x, np.float64)[index], y[index]


def _bins(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of 10 to 40 bins from the lowest to the highest sample; all samples may be equal."""
    low, high = float(samples.min()), float(samples.max())
    pad = max((high - low) * 0.02, abs(high) * 1e-3, 1e-6)
    return np.linspace(low - pad, high + pad, int(np.clip(2 * np.sqrt(len(samples)), 10, 40)) + 1)


def _limit(axes: Axes, deadline_ms: float, most: float, *, vertical: bool) -> None:
    """The deadline as a line; far beyond the data it would squeeze them flat, so it is only told."""
    label = f"deadline {deadline_ms:g} ms"
    if deadline_ms > _FAR * most:
        axes.plot([], [], color=ROLES["limit"], linewidth=2, linestyle=":", label=f"{label}: beyond this picture")
        return
    draw = axes.axvline if vertical else axes.axhline
    draw(deadline_ms, color=ROLES["limit"], linewidth=2, linestyle=":", label=label)
    if not vertical:
        axes.set_ylim(top=1.1 * max(most, deadline_ms))
