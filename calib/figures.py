"""Draws what an INT8 search found as SVG for a page that is light or dark, on a phone or on paper.

How a figure becomes part of a page is export/svg_figure.py's business. Knows nothing about pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.svg_figure import ROLES, available, figure, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BARS", "BlockRow", "Point", "available", "pareto", "plain", "sensitivity"]

BARS = 30  # of a diagram; the rest stands in the table
_FAR = 1.3  # a line beyond so many times the data would squeeze them: it is told, not drawn
# Where a number may stand beside its point: gaps (the farther ones with a line to it), and sides.
_AWAY = (0.5, 4.5, 9.5)
_SIDES = ((1, 1), (-1, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (0, 1), (0, -1))


@dataclass(frozen=True)
class Point:
    """One tried assignment of the search: its latency, the error of its actions in the head's -1..1, and what became of it."""

    label: str
    latency_ms: float
    action_error: float
    chosen: bool
    on_front: bool


@dataclass(frozen=True)
class BlockRow:
    """Sensitivity of one block: what returning it alone to floating point gains in action error, and costs in time."""

    block: str
    precision: str
    error_alone: float
    latency_ms: float


def pareto(points: Sequence[Point], budget: float, name: str, *, floating_ms: float | None = None) -> str:
    """Latency across, action error up on a log scale, the budget as a line; points carry their place in `points`, from 1.

    Args:
        name: of the figure; unique in its page.
        floating_ms: latency of the floating-point bundle.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with figure(name, 4.3) as (axes, done):
        x = np.array([point.latency_ms for point in points])
        error = np.array([point.action_error for point in points])
        # An error of 0 has no place on a log scale, and one that is not a number has none at all.
        usable = error[np.isfinite(error) & (error > 0)]
        low, high = (usable.min(), usable.max()) if len(usable) else (budget, budget)
        floor, ceiling = min(low, budget) / 1.8, max(high, budget) * 1.8
        y = np.clip(np.nan_to_num(error, nan=ceiling, posinf=ceiling), floor, ceiling)
        front = np.array([point.on_front for point in points])
        chosen = np.array([point.chosen for point in points])
        order = np.flatnonzero(front)[np.argsort(x[front], kind="stable")]
        axes.axhline(budget, color=ROLES["limit"], linewidth=2, linestyle=":", label=f"budget {budget:g}")
        axes.plot(x[order], y[order], color=ROLES["ours"], linewidth=1, alpha=0.6)
        plain = ~front & ~chosen
        axes.scatter(x[plain], y[plain], s=22, c=ROLES["soft"], alpha=0.75, linewidths=0, label="tried")
        axes.scatter(x[front], y[front], s=30, c=ROLES["ours"], linewidths=0, label="on the front")
        axes.scatter(
            x[chosen], y[chosen], s=130, c="none", edgecolors=ROLES["other"], linewidths=2.2, label="chosen", zorder=4
        )
        most = float(x.max(initial=0.0))
        if floating_ms is not None and floating_ms > _FAR * most:
            axes.plot([], [], " ", label=f"floating point: {floating_ms:.4g} ms")
        elif floating_ms is not None:
            axes.axvline(floating_ms, color=ROLES["soft"], linewidth=1.2, linestyle=(0, (4, 2)), label="floating point")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(floor / 1.3, ceiling * 1.3)
        axes.margins(x=0.1)
        axes.set_xlabel("latency of a step, ms")
        axes.set_ylabel("action error, -1..1")
        axes.grid(axis="both")
        legend(axes)
        _number(axes, x, y, np.where(chosen, 7.0, 3.5), budget, first=[*np.flatnonzero(chosen), *order])
    return done[0]


def sensitivity(blocks: Sequence[BlockRow], name: str) -> str:
    """Bars of the error gained by each block, the largest above, and beside each what it costs; colour says where it ended."""
    rows = sorted(blocks, key=lambda row: -row.error_alone)[:BARS]
    with figure(name, 1.0 + 0.21 * max(len(rows), 2)) as (axes, done):
        places = np.arange(len(rows))[::-1]
        gains = np.nan_to_num([row.error_alone for row in rows], posinf=0.0, neginf=0.0)
        for precision, colour in (("int8", ROLES["ours"]), ("fp32", ROLES["other"])):
            mine = np.array([(row.precision == "int8") == (precision == "int8") for row in rows], bool)
            label = "stays INT8" if precision == "int8" else "back in floating point"
            if mine.any():
                axes.barh(places[mine], gains[mine], color=colour, alpha=0.75, height=0.62, label=label)
        for place, gain, row in zip(places, gains, rows, strict=True):
            axes.annotate(
                f"{row.latency_ms:+.3g} ms", (max(gain, 0), place), (4, 0), textcoords="offset points", va="center",
                fontsize=9, color=ROLES["soft"],
            )  # fmt: skip
        axes.set_yticks(places, [plain(row.block, 26) for row in rows])
        axes.tick_params(axis="y", length=0, labelsize=9.5)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(min(0.0, float(gains.min())) * 1.1, max(float(gains.max()), 1e-9) * 1.28)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("action error removed in floating point")
        axes.grid(axis="x")
        legend(axes)
    return done[0]


def plain(text: str, most: int) -> str:
    """What may be drawn of a name: no control characters, and not too long."""
    shown = "".join(each for each in text if each.isprintable())
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _number(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    radius: NDArray[np.float64],
    line: float,
    *,
    first: Sequence[int],
) -> None:
    """Numbers beside points where they cover neither each other, a point nor the line; `first` come first, others may go without."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()
    spots = axes.transData.transform(np.column_stack([x, y])) * 72 / drawn.dpi
    frame = axes.get_window_extent().transformed(drawn.dpi_scale_trans.inverted()).extents * 72
    line_y = float(axes.transData.transform((x[0], line))[1]) * 72 / drawn.dpi
    taken = [tuple(box) for box in np.hstack([spots - radius[:, None], spots + radius[:, None]]).tolist()]
    taken.append((frame[0], line_y - 1, frame[2], line_y + 1))
    arrow = {"arrowstyle": "-", "color": ROLES["soft"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for index in dict.fromkeys([*map(int, first), *range(len(x))]):
        wide, high = 6.2 * len(str(index + 1)) + 2, 10.5
        for away, (right, up) in product(_AWAY, _SIDES):
            gap = away + radius[index]
            dx, dy = right * (gap + wide / 2), up * (gap + high / 2)
            centre = spots[index] + (dx, dy)
            box = (centre[0] - wide / 2, centre[1] - high / 2, centre[0] + wide / 2, centre[1] + high / 2)
            inside = box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(
                    str(index + 1), (x[index], y[index]), (dx, dy), textcoords="offset points", ha="center", va="center",
                    fontsize=9, arrowprops=arrow if away > _AWAY[0] else None,
                ).set_in_layout(False)  # fmt: skip
                break


def _overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
