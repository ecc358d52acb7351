"""An evaluation for people: tables, and a picture of predicted and recorded commands over time."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bundle.atomic import write_bytes
from bundle.errors import ConfigError
from episodes.actions import CLASS_NAMES
from train.evaluation import Evaluation
from train.metrics import SIDES, has_directions


def render(found: Evaluation) -> Group:
    """Everything that fits on a screen."""
    return Group(*_parts(found))


def _parts(found: Evaluation) -> Iterator[RenderableType]:
    measures = found.measures
    yield Text(found.description, style="bold")
    yield Text(f"{measures.episodes} episodes, {measures.frames} frames; intervals are 95 %, by resampling episodes\n")
    yield _axes(found)
    yield Text()
    yield _horizon(found)
    yield Text()
    if has_directions(found.axes):
        name, share = measures.majority
        yield Text(f"direction accuracy {measures.direction_accuracy}; always saying {name} would score {share:.3f}")
    if found.swapped is not None:
        accuracy, change = found.swapped
        named = f"direction accuracy {accuracy:.3f}; " if has_directions(found.axes) else ""
        yield Text(f"with left and right swapped in the words: {named}actions change by {change:.3f} on average")
    if measures.sides[[0, 2]].any():
        yield Text()
        yield _sides(found)
    if measures.names != CLASS_NAMES:
        yield Text()
        yield _classes(found)
    if len(found.by_instruction) > 1:
        yield Text()
        yield _instructions(found)


def _axes(found: Evaluation) -> Table:
    measures = found.measures
    table = _table("axis", "RMSE", "MAE", "RMSE of a constant", "right sign")
    for axis, unit, rmse, mae, constant, sign in zip(
        found.axes,
        found.units,
        measures.rmse,
        measures.mae,
        measures.constant_rmse,
        measures.sign_accuracy,
        strict=True,
    ):
        table.add_row(f"{axis} ({unit})", str(rmse), str(mae), f"{constant:.3f}", f"{sign.value:.3f}")
    return table


def _horizon(found: Evaluation) -> Table:
    """A few steps of the chunk: how well do they foretell what was recorded later?"""
    chunk = len(found.horizon_rmse)
    steps = sorted({0, 1, chunk // 2, chunk - 1} & set(range(chunk)))
    table = _table("RMSE of chunk step", *map(str, steps))
    for column, axis in enumerate(found.axes):
        table.add_row(axis, *(f"{found.horizon_rmse[step, column]:.3f}" for step in steps))
    return table


def _sides(found: Evaluation) -> Table:
    table = _table("recorded", *(f"predicted {side}" for side in SIDES))
    for side, row in zip(SIDES, found.measures.sides, strict=True):
        table.add_row(side, *map(str, row))
    return table


def _classes(found: Evaluation) -> Table:
    """A class head's confusion; classes that neither were recorded nor predicted are left out."""
    counts, names = found.measures.directions, found.measures.names
    shown = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    table = _table("recorded", *(f"predicted {names[index]}" for index in shown))
    for row in shown:
        table.add_row(names[row], *(str(counts[row, column]) for column in shown))
    return table


def _instructions(found: Evaluation) -> Table:
    directions = has_directions(found.axes)
    table = _table(
        "instruction", "episodes", *(f"RMSE {axis}" for axis in found.axes), *(["direction"] if directions else [])
    )
    table.columns[0].overflow = "fold"
    for text, measures in found.by_instruction.items():
        errors = (f"{value.value:.3f}" for value in measures.rmse)
        accuracy = (f"{measures.direction_accuracy.value:.3f}",) if directions else ()
        table.add_row(text, str(measures.episodes), *errors, *accuracy)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def check_plot(path: Path) -> None:
    """Find out that there will be no picture before hours of work rather than after.

    Raises:
        ConfigError: matplotlib is not installed, or it is no name of a PNG in a folder that can be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib", expected="the extra `report`", hint="pip install 'jetvla[report]'")
    if path.suffix.lower() != ".png" or path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot plot to {path}",
            expected="a name that ends in .png, in a folder that you may write to",
            hint="--plot evaluation.png",
        )


def plot(found: Evaluation, path: Path) -> None:
    """Predicted and recorded commands of the worst and the median episode, as a PNG; see `check_plot`.

    Raises:
        StorageError: the disk refuses.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ranked = sorted(found.episodes, key=lambda played: played.rmse)
    chosen = {"median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    count = len(found.axes)
    figure: Any
    figure, grid = pyplot.subplots(
        count, 2, figsize=(11, 2.2 * count + 1.4), sharex="col", sharey="row", squeeze=False, constrained_layout=True
    )
    for column, (label, played) in enumerate(chosen.items()):
        grid[0][column].set_title(f"{label}: {played.name}\n{played.instruction}", fontsize=8, wrap=True)
        for row, (axis, unit) in enumerate(zip(found.axes, found.units, strict=True)):
            panel = grid[row][column]
            time = np.arange(len(played.recorded))
            panel.step(time, played.recorded[:, row], where="mid", color="#555555", label="recorded")
            panel.plot(time, played.predicted[:, row], color="#0072B2", marker=".", label="predicted")
            panel.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
            if column == 0:
                panel.set_ylabel(f"{axis} ({unit})")
        grid[-1][column].set_xlabel("frame")
        grid[-1][column].xaxis.get_major_locator().set_params(integer=True)
    grid[0][0].legend(loc="best", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())
