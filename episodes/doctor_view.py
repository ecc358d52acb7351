"""Shows findings as a table, a list of problems and a summary. Decides nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from episodes.actions import CLASS_NAMES
from episodes.findings import Examination, Problem
from episodes.instruction import InstructionSource
from episodes.repair import Repaired
from episodes.set_examination import SetSummary

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"
_MANY = 3
_TEXT: dict[InstructionSource, str] = {"stored": "stored", "file name": "name", "none": "none"}
_LEGEND = (
    f"012345678: frames of each class: {', '.join(f'{number} {name}' for number, name in enumerate(CLASS_NAMES))}",
    "text: instruction stored, suggested by the file name, or none; L/R: frames that go left/right; bad: unreadable frames",
)
_STYLES = {"error": "bold red", "warning": "yellow"}


def show(episodes: Sequence[Examination], summary: SetSummary, out: Console) -> None:
    """Print all of it; file names wrap, nothing is cut off."""
    out.print(_table(episodes, out))
    out.print()
    for line in _LEGEND:
        out.print(Text(line, "dim"), soft_wrap=True)
    _show_problems(episodes, out)
    out.print()
    _show_summary(summary, out)


def show_repairs(repaired: Sequence[Repaired], refused: Sequence[tuple[Path, str]], out: Console) -> None:
    """Print one line for each file."""
    out.print()
    for result in repaired:
        dropped = f", {result.dropped} unreadable frames at the end left out" if result.dropped else ""
        how = "JPEG as stored" if result.copied else "compressed to JPEG"
        out.print(Text(f"repaired: {result.path}, {result.frames} frames, {how}{dropped}"), soft_wrap=True)
    for path, why in refused:
        line = Text("not repaired: ", _STYLES["error"])
        line.append(f"{path.name}: {why}")
        out.print(line, soft_wrap=True)


def histogram(counts: Sequence[int], *, ascii_only: bool) -> str:
    """One character for each count, as high as its share of the largest; a space for none."""
    levels = _ASCII_BARS if ascii_only else _BARS
    top = max(counts, default=0)
    # Rounded up: a class that occurs at all is to be seen.
    return "".join(levels[-(-count * (len(levels) - 1) // top)] if top else " " for count in counts)


def _show_problems(episodes: Sequence[Examination], out: Console) -> None:
    """By episode; what many of them share comes once, at the end."""
    sharing = Counter(problem for episode in episodes for problem in episode.problems)
    for episode in episodes:
        own = [problem for problem in episode.problems if sharing[problem] <= _MANY]
        if own:
            out.print()
            out.print(Text(_name(episode), "bold"), soft_wrap=True)
        for problem in own:
            _show_problem(problem, out)
    for problem, count in sharing.items():
        if count > _MANY:
            out.print()
            out.print(Text(f"{count} episodes", "bold"))
            _show_problem(problem, out)


def _show_problem(problem: Problem, out: Console) -> None:
    line = Text("  ")
    line.append(f"{problem.severity}: ", _STYLES[problem.severity])
    line.append(problem.text)
    out.print(line, soft_wrap=True)
    out.print(Text(f"    hint: {problem.hint}", "dim"), soft_wrap=True)


def _table(episodes: Sequence[Examination], out: Console) -> Table:
    # As narrow as it goes, so that a terminal of 80 columns shows all of them.
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("episode", overflow="fold", min_width=10)
    for header in ("", "schema", "frames", "size", "fps", "text", "012345678", "L/R", "bad", "colour"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("frames", "fps", "bad") else "left")
    ascii_only = not out.encoding.lower().startswith("utf")
    for episode in episodes:
        table.add_row(
            Text(_name(episode)),
            _verdict(episode),
            "" if episode.schema is None else f"{episode.schema}{' jpeg' if episode.encoding == 'jpeg' else ''}",
            str(episode.frames or ""),
            "" if episode.height is None else f"{episode.height}x{episode.width}",
            "" if episode.fps is None else f"{episode.fps:.1f}",
            "" if episode.schema is None else _TEXT[episode.instruction_source],
            histogram(list(episode.classes.values()), ascii_only=ascii_only),
            f"{episode.left}/{episode.right}" if episode.axes else "",
            str(len(episode.corrupt) or ""),
            "swap?" if any(problem.code == "colour_order" for problem in episode.problems) else "",
        )
    return table


def _name(episode: Examination) -> str:
    # A name that is no UTF-8 cannot be printed as it is.
    return os.fsencode(Path(episode.path).name).decode("utf-8", "replace")


def _verdict(episode: Examination) -> Text:
    if episode.errors:
        return Text("ERROR", _STYLES["error"])
    return Text("warn", _STYLES["warning"]) if episode.problems else Text("ok", "green")


def _show_summary(summary: SetSummary, out: Console) -> None:
    usable = summary.episodes - summary.unusable
    known = sum(count for rate, count in summary.rates.items() if rate != "unknown")
    lines = [
        f"{summary.episodes} episodes, {usable} usable: {summary.frames} frames, {summary.bytes / 1e6:.1f} MB"
        + (f", {summary.seconds:.0f} s" if known == usable else f", {summary.seconds:.0f} s in {known} of them")
    ]
    if usable:
        lines += [
            "schemas: " + _counted(summary.schemas) + "; sizes: " + _counted(summary.sizes),
            "fps: " + _counted(summary.rates),
            "sides: "
            + ", ".join(f"{side} {count}" for side, count in summary.sides.items())
            + f" episodes; {summary.left_frames} frames go left, {summary.right_frames} right",
            "actions: " + ", ".join(f"{name} {count}" for name, count in summary.classes.items() if count),
        ]
        lines += [f"instruction: {text!r} {count} x" for text, count in summary.instructions.items()]
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    for advice in summary.advice:
        out.print(Text(f"advice: {advice}"), soft_wrap=True)


def _counted(values: dict[str, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(values.items(), key=lambda item: -item[1]))
