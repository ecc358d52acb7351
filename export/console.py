"""What a person sees while a build runs: step headers, one result line a step, progress bars, and a log file of the same.

Everything goes to stderr through rich (NO_COLOR respected, bars only on a terminal); stdout stays free for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Reporter:
    """Prints steps and keeps their log.

    Args:
        steps: how many there will be.
        quiet: keep the log, print nothing (for use as a library).
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._steps = steps
        self._step = 0
        self._title = ""
        self._started = time.monotonic()
        self._lines: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A numbered step; its duration is kept under its title."""
        self._step += 1
        self._title = title
        self._print(f"[bold cyan]\\[{self._step}/{self._steps}][/] {title}", f"[{self._step}/{self._steps}] {title}")
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[title] = round(time.monotonic() - start, 2)

    def result(self, text: str) -> None:
        """The step's result line."""
        self._print(f"      {text}", f"      {text}", markup=False)

    def warn(self, text: str) -> None:
        """Something the user should know though the build goes on."""
        self._print(f"      [yellow]warning:[/] {escape(text)}", f"      warning: {text}")

    def table(self, table: Table) -> None:
        """A table, on the screen only, indented like result lines."""
        self.console.print(Padding(table, (0, 0, 0, 6)))

    @contextmanager
    def bytes_bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over bytes; yields the function that advances it."""
        columns = (
            TextColumn("      {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with self._bar(*columns) as progress:
            task = progress.add_task(label, total=total)
            yield lambda amount: progress.advance(task, amount)

    @contextmanager
    def count_bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar over items; yields the function that advances it by one."""
        columns = (
            TextColumn("      {task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with self._bar(*columns) as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task, 1)

    @contextmanager
    def phases_bar(self, label: str) -> Iterator[Callable[[str, str | None, int, int], None]]:
        """A progress bar over nested phases; yields the function that takes (phase, parent, steps done, steps)."""
        columns = (
            TextColumn("      {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        phases: dict[str, tuple[str | None, int, int]] = {}

        def share(phase: str) -> float:
            """How much of a phase is done, with the running phases inside it."""
            _, done, steps = phases[phase]
            inner = max((share(child) for child, (parent, *_) in phases.items() if parent == phase), default=0.0)
            return min(1.0, (done + inner) / steps) if steps else 0.0

        with self._bar(*columns) as progress:
            task = progress.add_task(label, total=1.0)

            def report(phase: str, parent: str | None, done: int, steps: int) -> None:
                phases[phase] = (parent, done, steps)
                roots = [name for name, (above, *_) in phases.items() if above is None]
                share_done = max((share(root) for root in roots), default=0.0)
                if done >= steps:
                    phases.pop(phase)
                progress.update(task, completed=share_done, description=f"{label}: {phase.lower()}")

            yield report

    def _bar(self, *columns: ProgressColumn) -> Progress:
        # In a pipe or a log a transient bar is only an empty line.
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    @property
    def log(self) -> str:
        """Everything printed so far, with seconds since the start."""
        return "\n".join(self._lines) + "\n"

    def _print(self, shown: str, logged: str, *, markup: bool = True) -> None:
        self.console.print(shown, markup=markup, soft_wrap=True)
        self._lines.append(f"{time.monotonic() - self._started:8.2f}s {logged}")


def plain_table(*headers: str) -> Table:
    """A borderless table whose cells are never cut or wrapped."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table


def human_bytes(count: int) -> str:
    """Decimal units, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
