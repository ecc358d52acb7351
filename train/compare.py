#!/usr/bin/env python3
"""Command line: what differs between runs, and whether the difference in their results may be put down to it.

    python train/compare.py runs/a runs/b
    python train/compare.py runs/a-* runs/b-* --metric val_rmse_linear_x --plot curves.png

Exit codes: 0 compared, 1 failed, 2 usage, 3 no effect can be attributed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bundle.errors import JetvlaError
from train.attribution import SELECTION, Comparison, compare
from train.comparison import Run, check_folders, load_runs
from train.curves import check_plot, draw_curves, sparkline

REFUSED = 3
_CURVE_WIDTH = 16


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs.

    Attributes:
        runs: folders of runs, or their run.json.
        metric: what to judge by: a loss, an RMSE or an accuracy that the runs recorded. Each run is judged at the epoch with its lowest
            val_loss.
        plot: draw the curves into this .png, .svg or .pdf.
        json: machine-readable result on stdout.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    metric: str = SELECTION
    plot: Path | None = None
    json: bool = False


def main() -> int:
    """Parse, compare, print."""
    config = tyro.cli(CompareConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    checked = False
    try:
        check_folders(config.runs)
        if config.plot is not None:
            check_plot(config.plot)
        checked = True
        with console.status("hashing checkpoints"):
            runs = load_runs(config.runs)
        comparison = compare(runs, config.metric)
        if config.plot is not None:
            draw_curves(runs, config.plot)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1 if checked else 2
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    if config.json:
        print(json.dumps(as_json(runs, comparison)))
    else:
        show(runs, comparison, Console(highlight=False))
    if config.plot is not None:
        console.print(f"curves: {config.plot}", markup=False, soft_wrap=True)
    return REFUSED if comparison.refusals else 0


def show(runs: tuple[Run, ...], comparison: Comparison, out: Console) -> None:
    """Print differences, results and the verdict."""
    arms = {label: chr(ord("A") + index) for index, arm in enumerate(comparison.arms) for label in arm.runs}
    _show_differences(runs, comparison, arms, out)
    out.print()
    _show_results(runs, comparison, arms, out)
    out.print()
    if comparison.refusals:
        out.print("[bold]No effect is attributed.[/]")
        for refusal in comparison.refusals:
            out.print(Text(f"  - {refusal.text}"), soft_wrap=True)
    else:
        for pair in comparison.pairs:
            out.print(Text(pair.text), soft_wrap=True)
    behind = {(score.label, score.file) for score in comparison.scores}
    for run in runs:
        for problem in run.problems:
            if (run.label, problem.file) not in behind:
                out.print(Text(f"{run.label}, beside the point: {problem}", style="dim"), soft_wrap=True)


def as_json(runs: tuple[Run, ...], comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data."""
    result = asdict(comparison)
    result["verdict"] = "refused" if comparison.refusals else [pair.outcome for pair in comparison.pairs]
    result["arms"] = [
        asdict(arm) | ({"mean": arm.mean, "low": arm.low, "high": arm.high} if arm.values else {})
        for arm in comparison.arms
    ]
    result["runs"] = [
        {"label": run.label, "folder": str(run.folder), "problems": [asdict(problem) for problem in run.problems]}
        for run in runs
    ]
    return result


def _show_differences(runs: tuple[Run, ...], comparison: Comparison, arms: dict[str, str], out: Console) -> None:
    """Factors in a table with a column for each arm, whose runs agree in them; everything else in lines."""
    factors = [difference for difference in comparison.differences if difference.factor in comparison.factors]
    if factors:
        first = {arms[run.label]: index for index, run in reversed(list(enumerate(runs)))}
        shown = _table("factor", "setting", *sorted(first))
        before = None
        for difference in factors:
            name = "" if difference.factor == before else difference.factor
            before = difference.factor
            values = (Text(difference.values[first[arm]]) for arm in sorted(first))
            shown.add_row(Text(name or ""), Text(difference.key), *values)
        out.print(shown)
    else:
        out.print("No factor differs.")
    for difference in comparison.differences:
        if difference.factor not in comparison.factors and difference.key != "name":
            listed = ", ".join(dict.fromkeys(difference.values))
            out.print(Text(f"no factor: {difference.key} ({difference.reason}): {listed}", style="dim"), soft_wrap=True)


def _show_results(runs: tuple[Run, ...], comparison: Comparison, arms: dict[str, str], out: Console) -> None:
    metric = comparison.metric
    shown = _table("arm", "run", "seed", "status", metric, "epoch", "file", SELECTION)
    ascii_only = not out.encoding.lower().startswith("utf")
    for run, score in zip(runs, comparison.scores, strict=True):
        epochs = run.record.epochs
        shown.add_row(
            arms[score.label],
            Text(score.label),
            "" if score.seed is None else str(score.seed),
            score.status,
            "none" if score.value is None else f"{score.value:.5g}",
            "none" if score.epoch is None else f"{score.epoch} of {epochs[-1].epoch}",
            "hash ok" if score.fault is None else "[bold]NO[/]",
            sparkline([entry.value(SELECTION) for entry in epochs], width=_CURVE_WIDTH, ascii_only=ascii_only),
        )
    out.print(shown)
    if any(len(arm.runs) > 1 for arm in comparison.arms):
        out.print()
        table = _table("arm", "runs", f"mean {metric}", "range", "")
        for arm in comparison.arms:
            if arm.values:
                span = f"{arm.low:.5g} to {arm.high:.5g}"
                table.add_row(arms[arm.runs[0]], str(len(arm.values)), f"{arm.mean:.5g}", span, Text(arm.label))
        out.print(table)


def _table(*headers: str) -> Table:
    return Table(*headers, box=None, padding=(0, 2, 0, 0), header_style="dim")


if __name__ == "__main__":
    sys.exit(main())
