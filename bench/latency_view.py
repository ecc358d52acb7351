"""A latency result on a terminal: what fits on one screen; the rest stands in the report."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.results import Baseline, Result, Timing

_COLOURS = {"pass": "bold green", "miss": "bold yellow", "invalid": "bold red"}
_COLUMNS = ("p50", "p90", "p95", "p99", "p99_9", "max", "jitter")


def show(result: Result, console: Console) -> None:
    """Print verdict, sections, layers, loop and baselines."""
    bundle, settings = result.bundle, result.settings
    console.print(
        f"{bundle.name}: {bundle.precision} on {bundle.backend}, {settings.sequence} slots, frames {settings.frames}, "
        f"{settings.frame_size[1]}x{settings.frame_size[0]}",
        markup=False,
        soft_wrap=True,
    )
    if result.partial:
        console.print(Text(f"PARTIAL: {result.stopped}", style="bold red"))
    console.print(_timings("section, ms", result.sections))
    console.print(_timings("up to and with, ms", result.layers))
    lines = [
        f"loaded in {result.start.loaded_s:.2f} s, first action {result.start.first_action_s:.2f} s after the process started"
    ]
    if result.loop is not None:
        loop = result.loop
        lines.append(
            f"loop at {settings.rate_hz:g} Hz: {loop.miss_rate:.1%} late, {loop.skipped} ticks left out, "
            f"camera to command p50 {loop.reaction.p50:.1f} ms, p99 {loop.reaction.p99:.1f} ms"
        )
    if result.soak is not None:
        soak = result.soak
        lines.append(
            f"soak {soak.minutes:.1f} min: p50 {soak.step.p50:.1f} ms, first tenth {soak.first:.1f}, last tenth {soak.last:.1f}; "
            f"memory {soak.rss_growth_mb:+.1f} MB"
        )
    if result.memory is not None:
        memory = result.memory
        lines.append(
            f"memory {memory.rss_mb / 1e3:.2f} GB, peak {memory.rss_peak_mb / 1e3:.2f} GB; a step allocates "
            f"{memory.python_kb_per_step:.0f} kB in Python and leaves {memory.blocks_per_step:.2f} objects"
        )
    if result.energy is not None:
        energy = result.energy
        told = energy.joules_per_step is not None and energy.watts is not None
        lines.append(
            f"{energy.joules_per_step:.2f} J a step, {energy.watts:.1f} W ({energy.sensor})"
            if told
            else f"energy unknown: {energy.note}"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if result.plan is not None:
        console.print(_plan(result))
    if result.baselines:
        console.print(_baselines(result.baselines))
    console.print(Text(result.verdict.line, style=_COLOURS[result.verdict.outcome]), soft_wrap=True)
    for reason in result.verdict.reasons:
        console.print(Text(f"  {reason}", style="yellow"), soft_wrap=True)


def _timings(title: str, values: dict[str, Timing]) -> Table:
    table = _table(title, *_COLUMNS)
    for name, timing in values.items():
        table.add_row(name, *(f"{getattr(timing, column):.2f}" for column in _COLUMNS))
    return table


def _plan(result: Result) -> Table:
    assert result.plan is not None
    table = _table("against the roofline", "floor ms", "expected ms", "measured ms", "bottleneck")
    for name, stage in result.plan.stages.items():
        measured = f"{result.sections[name].p50:.2f}" if name in result.sections else "-"
        table.add_row(name, f"{stage.floor_ms:.2f}", f"{stage.expected_ms:.2f}", measured, stage.bottleneck)
    return table


def _baselines(baselines: tuple[Baseline, ...]) -> Table:
    table = _table("baseline", "ours / theirs", "95 %", "theirs ms", "ours ms")
    for each in baselines:
        if each.ratio is None or each.ours is None or each.theirs is None:
            table.add_row(each.about, "skipped", "", "", "")
            table.add_row(Text(f"  {each.skipped}", style="dim"))
        else:
            ratio, low, high = each.ratio
            interval = f"{low:.3f} to {high:.3f}"
            table.add_row(each.about, f"{ratio:.3f}", interval, f"{each.theirs.p50:.1f}", f"{each.ours.p50:.1f}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table
