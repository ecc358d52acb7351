"""Curves of runs over their epochs: a picture for a report, and a line of blocks for a terminal.

Draws what run.json holds and nothing else; a value that is not finite leaves a gap. matplotlib is imported when a picture is asked for,
without its global state, so that no display and no setting of the user matters.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.atomic import write_bytes
from bundle.errors import ConfigError
from train.attribution import SELECTION, best_epoch
from train.comparison import Run

# Okabe and Ito's colours, told apart in every common form of colour blindness; yellow is left out, as it does not show on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.,-~=*#"
_LOG_RATIO = 10.0  # the end of a curve that falls further cannot be read on a linear axis
_RMSE = "val_rmse_"


def sparkline(values: Sequence[float | None], *, width: int = 24, ascii_only: bool = False) -> str:
    """Values as blocks from the lowest to the highest, `x` for one that is missing or not finite.

    Logarithmic where a linear picture would drown the end of the curve. Longer series show the last value of each stretch.
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    if len(values) > width:
        values = [values[(index + 1) * len(values) // width - 1] for index in range(width)]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = math.log if _is_steep(low, high) else lambda value: value / 2  # halved, as a difference may overflow
    bottom, span = (scale(low), scale(high) - scale(low)) if finite else (0.0, 0.0)
    shown = ""
    for value in values:
        if value is None or not math.isfinite(value):
            shown += "x"
        else:
            share = (scale(value) - bottom) / span if span > 0 else 0.0
            shown += blocks[round(share * (len(blocks) - 1))]
    return shown


def check_plot(path: Path) -> None:
    """Check that a picture can be written there.

    Raises:
        ConfigError: another kind of file than .png, .svg and .pdf, or no such folder.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(
            f"cannot draw {path}",
            got=path.suffix or "no suffix",
            expected=".png, .svg or .pdf",
            hint="for example --plot curves.png",
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"cannot draw {path}", got="no such folder", expected="a folder that exists", hint="make the folder first."
        )


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Losses (validation solid, training dashed) and the error of each axis per epoch; rings mark the epochs that runs are judged at.

    Args:
        path: its suffix decides the kind of file.

    Raises:
        ConfigError: see `check_plot`; or matplotlib is missing.
        StorageError: the disk refuses.
    """
    check_plot(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib", got=error, hint="pip install 'jetvla[report]'") from None
    axes_names = sorted(
        {name for run in runs for entry in run.record.epochs for name in entry.metrics if name.startswith(_RMSE)}
    )
    panels = [
        ("loss", (SELECTION, "train_loss")),
        *((f"RMSE {name.removeprefix(_RMSE)}", (name,)) for name in axes_names),
    ]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.35 + 0.22 * len(runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(panels):
            _draw_panel(axes, runs, *panels[index])
        else:
            axes.set_visible(False)
    _draw_legend(figure, runs)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix.lower().removeprefix("."))
    write_bytes(path, data.getvalue())


def _is_steep(low: float, high: float) -> bool:
    return low > 0 and high / low > _LOG_RATIO


def _draw_panel(axes: Any, runs: Sequence[Run], title: str, metrics: Sequence[str]) -> None:
    drawn: list[float] = []
    for index, run in enumerate(runs):
        best = best_epoch(run.record)
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        for number, metric in enumerate(metrics):
            found = [(entry.epoch, entry.value(metric)) for entry in run.record.epochs]
            points = [
                (epoch, math.nan if value is None or not math.isfinite(value) else value) for epoch, value in found
            ]
            drawn += [value for _, value in points if math.isfinite(value)]
            style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.1, "alpha": 0.75}
            if number == 0:
                style = {"linestyle": "-", "linewidth": 1.8, "marker": marker, "markersize": 4}
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, **style)
        value = None if best is None else best.value(metrics[0])
        if best is not None and value is not None and math.isfinite(value):
            axes.plot([best.epoch], [value], marker="o", markersize=11, fillstyle="none", color=colour)
    if drawn and _is_steep(min(drawn), max(drawn)):
        _log_scale(axes)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _log_scale(axes: Any) -> None:
    """With 0.02 and 0.05 at the ticks rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_legend(figure: Any, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        # A space before the name and a backslash before each dollar keep matplotlib from reading them as its own marks.
        Line2D(
            [],
            [],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=" " + run.label.replace("$", r"\$"),
        )
        for i, run in enumerate(runs)
    ]
    handles += [
        Line2D([], [], color="0.3", linewidth=1.8, label=" validation"),
        Line2D([], [], color="0.3", linewidth=1.1, linestyle="--", label=" training"),
        Line2D(
            [],
            [],
            color="0.3",
            linestyle="none",
            marker="o",
            markersize=9,
            fillstyle="none",
            label=" lowest validation loss",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
