#!/usr/bin/env python3
"""Command line: is B slower than A?

    python bench/compare.py A.json B.json
    python bench/compare.py A1.json B1.json A2.json B2.json A3.json B3.json A4.json B4.json A5.json B5.json

Compares results of bench/latency.py from one machine: one run each, or, on a machine that others use as well, several measured in turns.
Exit codes: 0 not shown to be slower, 1 failed, 2 usage, or results that cannot be compared, 3 B is slower.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.comparable import bundle_differences, cautions, check_comparable, setting_differences
from bench.comparison import LEAST_PAIRS, Comparison, Ratio, compare
from bench.results import Result, read_result
from bundle.errors import ConfigError, JetvlaError

SLOWER = 3


@dataclass(frozen=True)
class CompareConfig:
    """Compare latency results.

    Attributes:
        results: A.json B.json; or pairs in the order in which they were measured, at least 5.
        threshold: a share below which a difference does not matter.
        force: compare partial results, and those of different machines, software or settings.
        json: machine-readable result on stdout.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="A.json B.json")]
    threshold: float = 0.03
    force: bool = False
    json: bool = False


def main() -> int:
    """Parse, compare, print."""
    config = tyro.cli(CompareConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        with console.status("comparing"):
            results, forced = load(config)
            comparison = compare(list(zip(results[::2], results[1::2], strict=True)), config.threshold)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    a, b = results[:2]
    notes = {
        "forced": forced,
        "bundle": bundle_differences(a, b),
        "settings": setting_differences(a, b),
        "cautions": cautions(results),
    }
    if config.json:
        print(json.dumps(asdict(comparison) | notes))
    else:
        show(comparison, notes, Console(highlight=False))
    return SLOWER if comparison.outcome == "slower" else 0


def load(config: CompareConfig) -> tuple[list[Result], list[str]]:
    """The results, and what would have kept them from being compared without --force.

    Raises:
        ConfigError: see bench.comparable.check_comparable; or one is missing, damaged or named twice.
    """
    if not 0 <= config.threshold < 1:
        raise ConfigError(
            "--threshold is out of range", got=config.threshold, expected="0 to 1, e.g. 0.03", hint="3 % is 0.03."
        )
    twice = [str(path) for path, count in Counter(path.resolve() for path in config.results).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{twice[0]} is named twice", expected="different runs", hint="a run cannot be compared with itself."
        )
    results = [read_result(path) for path in config.results]
    return results, check_comparable(list(map(str, config.results)), results, force=config.force)


def show(comparison: Comparison, notes: dict[str, list[str]], out: Console) -> None:
    """Print the verdict, ratios, and what else differs."""
    style = {"slower": "bold red", "faster": "bold green"}.get(comparison.outcome, "bold")
    out.print(Text(comparison.line, style=style), soft_wrap=True)
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, header in enumerate(("", "p50, B / A", "p95, B / A", "A ms", "B ms", "")):
        table.add_column(header, justify="right" if index in (3, 4) else "left", no_wrap=True)
    for kind, title in (("section", None), ("layer", "up to and with")):
        if title:
            table.add_row(Text(title, style="dim"))
        for row in (row for row in comparison.rows if row.kind == kind):
            told = {"same": "no difference", "unclear": "not shown"}.get(row.outcome, row.outcome)
            table.add_row(Text(row.name), _told(row.p50), _told(row.p95), f"{row.a_ms:.2f}", f"{row.b_ms:.2f}", told)
    out.print(table)
    runs = "one run each" if comparison.pairs == 1 else f"{comparison.pairs} pairs"
    out.print(f"\n{runs}, 95 % intervals; a difference counts beyond {comparison.threshold:.1%}", style="dim")
    if comparison.outcome == "unclear" and comparison.pairs == 1:
        out.print(f"for a sharper answer, measure A and B in turns, at least {LEAST_PAIRS} times each", style="dim")
    labels = {"forced": "forced, although", "bundle": "bundle", "settings": "setting", "cautions": "caution"}
    for key, label in labels.items():
        for line in notes[key]:
            out.print(Text(f"{label}: {line}", style="red" if key == "forced" else "dim"), soft_wrap=True)


def _told(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.2f}-{ratio.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
