from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bundle.errors import StorageError
from tests.checkpoints import file_size_limit
from train.run_log import STEPS_NAME, RunLog, read_steps


def log(folder: Path, step: int, *, tensorboard: bool = False) -> RunLog:
    return RunLog(folder, step=step, tensorboard=tensorboard, console=Console(quiet=True))


def write(run: RunLog, number: int) -> None:
    run.step(number, epoch=0, loss=0.1 * number, learning_rate=1e-4, norm=1.0, rmse={"linear_x": 0.5})


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    with log(tmp_path, 0, tensorboard=True) as first:
        first.epoch(0, 1, steps=5, done=0)
        for number in range(1, 6):
            write(first, number)
    with log(tmp_path, 3, tensorboard=True) as second:
        second.epoch(0, 1, steps=5, done=3)
        for number in range(4, 6):
            write(second, number)
    rows = read_steps(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[4]["loss"] == 0.5


def test_a_line_that_a_kill_cut_in_two_goes(tmp_path: Path) -> None:
    with log(tmp_path, 0) as first:
        write(first, 1)
        write(first, 2)
    path = tmp_path / STEPS_NAME
    path.write_text(path.read_text() + "3,1,0.2")
    with log(tmp_path, 3):
        pass
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with log(tmp_path, 0) as run:
        write(run, 1)
        with file_size_limit(100), pytest.raises(StorageError):
            write(run, 2)


def test_no_steps_yet(tmp_path: Path) -> None:
    assert read_steps(tmp_path) == []
