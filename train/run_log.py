"""What a run shows and writes while it works: a progress line, steps.csv, TensorBoard events.

Only the first process of a run has one. A resumed run goes on where its state stands: later lines of an earlier sitting are cut off, so
no step appears twice. Knows nothing about models.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bundle.atomic import disk_errors, write_bytes

STEPS_NAME = "steps.csv"
_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds")
_SMOOTHING = 0.9


class RunLog:
    """The written and shown side of a run; use it as a context manager.

    Args:
        folder: of the run.
        step: steps done so far; what an earlier sitting wrote beyond them is cut off.
        tensorboard: write event files.
        console: stderr.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool, console: Console) -> None:
        self.console = console
        self._path = folder / STEPS_NAME
        _cut(self._path, step)
        with disk_errors(self._path):
            self._file = self._path.open("a", newline="")
            self._board: Any = _board(folder / "tensorboard", step) if tensorboard else None
        self._rows = csv.writer(self._file)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._smoothed: dict[str, float] = {}
        self._last = time.monotonic()

    def epoch(self, epoch: int, epochs: int, *, steps: int, done: int) -> None:
        """Start the bar of an epoch (from 0)."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(f"epoch {epoch + 1}/{epochs}", total=steps, completed=done, shown="")
        self._last = time.monotonic()

    def step(
        self, number: int, *, epoch: int, loss: float, learning_rate: float, norm: float, rmse: dict[str, float]
    ) -> None:
        """A finished step; `number` counts from 1. `rmse` is of this step's windows, per axis.

        Raises:
            StorageError: the disk is full.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        with disk_errors(self._path):
            self._rows.writerow(
                [number, epoch + 1, repr(loss), f"{learning_rate:.6e}", f"{norm:.6e}", f"{seconds:.4f}"]
            )
            self._file.flush()
        self.scalars(number, {"train/loss": loss, "train/learning_rate": learning_rate, "train/gradient_norm": norm})
        self.scalars(number, {f"train/rmse_{axis}": value for axis, value in rmse.items()})
        for name, value in {"loss": loss, "seconds": seconds, **rmse}.items():
            before = self._smoothed.get(name, value)
            self._smoothed[name] = _SMOOTHING * before + (1 - _SMOOTHING) * value
        if self._task is not None:
            errors = " ".join(f"{axis} {self._smoothed[axis]:.3f}" for axis in rmse)
            rate = 1 / max(self._smoothed["seconds"], 1e-9)
            shown = f"loss {self._smoothed['loss']:.4f}  RMSE {errors}  {rate:.2f} it/s" if rmse else f"{rate:.2f} it/s"
            self._progress.update(self._task, advance=1, shown=shown)

    def scalars(self, number: int, values: dict[str, float]) -> None:
        """Numbers for TensorBoard at step `number`.

        Raises:
            StorageError: the disk is full.
        """
        if self._board is not None:
            with disk_errors(self._path):
                for name, value in values.items():
                    self._board.add_scalar(name, value, number)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar beside the epoch's; yields the function that advances it."""
        task = self._progress.add_task(label, total=total, shown="")
        try:
            yield lambda amount: self._progress.advance(task, amount)
        finally:
            self._progress.remove_task(task)
            self._last = time.monotonic()

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        # What a full disk refused is tried again here; if that is why we leave, the error has been raised already.
        with disk_errors(self._path), suppress(*([OSError] if error is not None else [])):
            try:
                self._file.close()
            finally:
                if self._board is not None:
                    self._board.close()


def read_steps(folder: Path) -> list[dict[str, float]]:
    """The rows of steps.csv, as numbers."""
    path = folder / STEPS_NAME
    if not path.exists():
        return []
    return [
        {name: float(value) for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    ]


def _cut(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; a line that a kill cut in two goes too."""
    kept = [",".join(_COLUMNS)]
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    for line in lines:
        fields = line.split(",")
        if len(fields) == len(_COLUMNS) and fields[0].isdigit() and int(fields[0]) <= step:
            kept.append(line)
    write_bytes(path, ("\n".join(kept) + "\n").encode())


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed: the numbers stand in steps.csv and run.json anyway."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
