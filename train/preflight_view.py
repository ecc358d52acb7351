"""A plan for people: what `--dry-run` shows, and every run before its first step.

Knows nothing about how the facts were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from train.data_facts import PartFacts
from train.preflight import Plan

_SHOWN = 8
_SIDES = ("left", "right", "none")


def render(plan: Plan) -> Group:
    """Everything in the plan, in the order in which people ask."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    yield Text.assemble(("run ", "bold"), (plan.name, "bold cyan"), f"  {_path(plan.folder)}")
    for table in (_summary(plan), _data(plan), _actions(plan), _instructions(plan)):
        yield Padding(table, (1, 0, 0, 0))
    yield from _notes(plan)
    yield Text()
    for problem in plan.problems:
        if problem.severity == "error":  # whoever prints the plan ends with these, all together
            continue
        yield Text.assemble(("warning: ", "yellow"), problem.what)
        yield Padding(Text(problem.hint, style="dim"), (0, 0, 0, 2))


def _summary(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    memory, counts = plan.memory, plan.parameters
    rows = {
        "config": " over ".join(map(_path, plan.files)),
        "base": f"{_path(plan.base)}  sha256 {plan.base_sha256[:12]}",
        **_start(plan),
        "trains": f"{counts.trained:,} of {counts.total:,} parameters on {plan.device}"
        + (f", {plan.processes} processes" if plan.processes > 1 else ""),
        "of it": ", ".join(f"{part.name} {part.values:,} in {part.tensors:,}" for part in counts.parts) + " tensors",
        "steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} in an epoch), {plan.warmup_steps:,} of them warm-up",
        "memory": f"about {_size(memory.total)}, {_size(plan.memory_free)} free: "
        + _listed(
            {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                f"activations of {memory.frames} x {memory.slots} slots": memory.activations,
                "reserve": memory.reserve,
            }
        ),
    }
    for index, disk in enumerate(plan.disk):
        rows["disk" + " " * index] = f"{_size(disk.needed)}, {_size(disk.free)} free: {_listed(disk.items)}"
    frames = sum(plan.classes.values())
    classes = sorted(plan.classes.items(), key=lambda item: -item[1])
    rows["classes"] = ", ".join(f"{name} {count / frames:.0%}" for name, count in classes if count)
    for key, value in rows.items():
        table.add_row(key, Text(value))
    return table


def _start(plan: Plan) -> dict[str, str]:
    start = plan.start
    return {} if start.weights_sha256 is None else {"weights": f"{start.story}  sha256 {start.weights_sha256[:12]}"}


def _data(plan: Plan) -> Table:
    table = _table("part", "episodes", "frames", "windows", *_SIDES[:2], "no side")
    table.add_column("kinds")
    for name, part in (("training", plan.train), ("validation", plan.val)):
        sides = (str(part.sides.get(side, 0)) for side in _SIDES)
        table.add_row(name, f"{part.episodes:,}", f"{part.frames:,}", f"{part.windows:,}", *sides, _kinds(part))
    return table


def _kinds(part: PartFacts) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in part.kinds.items())


def _actions(plan: Plan) -> Table:
    table = _table("action", "minimum", "maximum", "mean", "std", "zero", "clipped")
    low, high = plan.action_range
    table.caption = f"{low:g} becomes -1, {high:g} becomes +1"
    table.caption_justify = "left"
    for axis in plan.axes:
        numbers = (f"{value:.3f}" for value in (axis.minimum, axis.maximum, axis.mean, axis.std))
        table.add_row(axis.name, *numbers, f"{axis.zero:.0%}", f"{axis.clipped:.1%}")
    return table


def _instructions(plan: Plan) -> Table:
    table = _table("instruction", "tokens", "training", "validation")
    for each in plan.instructions[:_SHOWN]:
        table.add_row(Text(each.text), str(each.tokens), str(each.train), str(each.val))
    if len(plan.instructions) > _SHOWN:
        table.add_row(f"and {len(plan.instructions) - _SHOWN} more", "", "", "")
    return table


def _notes(plan: Plan) -> Iterator[RenderableType]:
    if plan.notes.assumed:
        yield Text("\nwhat the lab's config leaves open, or is done otherwise here:", style="bold")
        table = Table.grid(padding=(0, 1))
        for sentence in plan.notes.assumed:
            table.add_row("-", Text(sentence))
        yield table
    if plan.notes.ignored:
        shown, more = plan.notes.ignored[:_SHOWN], len(plan.notes.ignored) - _SHOWN
        rest = f" and {more} more" if more > 0 else ""
        text = (
            f"keys without effect, here as there (docs/training-config.md says why of each): {', '.join(shown)}{rest}"
        )
        yield Text(f"\n{len(plan.notes.ignored)} {text}", style="dim")


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _listed(items: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in items.items())


def _size(size: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _path(path: Path) -> str:
    """As seen from the working directory, where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
