"""The order of things in a run: kills between any two writes, stops at the last step, results that come out otherwise the second time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file

import train.large_files
import train.ledger
import train.trainer
from bundle.errors import CheckpointError
from tests.train.runs import RunFiles, needs_bf16_lstm
from train.launch import Launch, launch
from train.ledger import Ledger, read_run, verify_checkpoints
from train.run_log import read_steps
from train.run_state import STATE_NAME, load_state
from train.trainer import Trainer
from train.validation import Validation, Validator

# Two steps in an epoch, a state after each; the better checkpoint of the second epoch replaces that of the first.
SHORT: dict[str, Any] = {
    "loop.epochs": 2,
    "loop.batch_size": 9,
    "loop.accumulate": 3,
    "loop.windows_per_episode": 9,
    "loop.keep_best": 1,
    "loop.save_minutes": 1e-9,
    "augment.mirror": 0.5,
}


class KilledError(BaseException):
    """Nobody catches it, and nothing is written after it."""


@pytest.fixture
def run(run_files: RunFiles, tmp_path: Path) -> Callable[..., Launch]:
    def start(settings: dict[str, Any] | None = None, **options: Any) -> Launch:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = run_files.config(tmp_path / "run.json", {**SHORT, **(settings or {})})
        return launch(path, console=Console(quiet=True), **options)

    return start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "quick"


@pytest.fixture
def killed_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Die before the write of that number (from 0, counted from now on); None counts only. Gives the list of writes that fills up."""
    writes: list[str] = []
    limit: list[int | None] = [None]

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if limit[0] is not None and len(writes) >= limit[0]:
                raise KilledError(name)
            writes.append(f"{name} {arguments[0]}")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(train.ledger, "write_bytes")
    watch(train.trainer, "write_bytes")
    watch(train.large_files, "publish_file")
    monkeypatch.setattr(Ledger, "fail", lambda *_, **__: None)

    def arrange(count: int | None) -> list[str]:
        writes.clear()
        limit[0] = count
        return writes

    return arrange


def test_killed_before_any_write_the_run_goes_on_exactly(
    run: Callable[..., Launch], folder: Path, killed_before: Callable[[int | None], list[str]]
) -> None:
    run({"name": "first", "loop.max_steps": 1})  # fills the caches
    writes = killed_before(None)
    run({"name": "whole"})
    whole = folder.with_name("whole")
    expected = load_file(whole / "checkpoints" / "last.safetensors")
    metrics = [epoch.metrics for epoch in read_run(whole).epochs]
    names = sorted(path.name for path in whole.rglob("*") if path.is_file())
    total = len(writes)
    assert sum("state.pt" in write for write in writes) >= 4

    for count in range(1, total):  # before the first there is no run
        settings = {"name": f"killed{count}"}
        killed = folder.with_name(settings["name"])
        killed_before(count)
        with pytest.raises(KilledError):
            run(settings)
        killed_before(None)
        run(settings, resume=True)

        found = load_file(killed / "checkpoints" / "last.safetensors")
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), count
        record = read_run(killed)
        assert record.status == "finished"
        assert [epoch.metrics for epoch in record.epochs] == metrics, count
        assert verify_checkpoints(record, killed) == [], count
        assert sorted(path.name for path in killed.rglob("*") if path.is_file()) == names, count
        assert [row["step"] for row in read_steps(killed)] == [1, 2, 3, 4]


def test_a_run_whose_state_was_lost_is_not_begun_again(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.max_steps": 2})
    (folder / STATE_NAME).unlink()
    record = read_run(folder)
    Ledger(folder, record)._write(msgspec.structs.replace(record, status="stopped"))
    with pytest.raises(CheckpointError, match=r"(?s)nothing to resume.*under another name"):
        run({"loop.max_steps": 2}, resume=True)


def test_an_epoch_that_ends_otherwise_the_second_time_finds_its_best_checkpoint(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose sums are not the same twice. The state of epoch 2, by then the best, is never saved; done again, it is not."""
    losses = iter([9.0, 3.0, 2.0, 4.0])
    real = Validator.run

    def told(self: Validator, *arguments: Any) -> Validation:
        return dataclasses.replace(real(self, *arguments), loss=next(losses))

    monkeypatch.setattr(Validator, "run", told)
    save = Trainer._save_state

    def dying(self: Trainer) -> None:
        if self._state.epoch == 2:
            raise KilledError
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", dying)
        with pytest.raises(KilledError):
            run()
    done = run(resume=True)

    assert done.outcome is not None
    assert done.outcome.best is not None
    assert done.outcome.best.name.startswith("epoch=001")
    assert done.outcome.best.exists()
    assert [path.name for path in (folder / "checkpoints").glob("epoch=*")] == [done.outcome.best.name]
    assert verify_checkpoints(read_run(folder), folder) == []


def test_stopped_at_the_very_last_step_the_run_is_over(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while step 1 of 1 was running; a resumed run must not make a second."""
    step = train.trainer.Stepper.step
    monkeypatch.setattr(
        train.trainer.Stepper,
        "step",
        lambda self, *arguments, stop: step(self, *arguments, stop=stop or arguments[2] == 0),
    )
    done = run({"loop.max_steps": 1})
    assert done.outcome is not None
    assert done.outcome.status == "finished"
    assert read_run(folder).epochs[-1].step == 1


def test_saving_waits_for_no_other_process(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process looks at its own clock, so one may save at a step at which another does not."""
    saved: list[int] = []
    save = Trainer._save_state

    def watched(self: Trainer) -> None:
        saved.append(self._state.step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self._accelerator), "wait_for_everyone", lambda _: pytest.fail("waits for the others"))
            save(self)

    monkeypatch.setattr(Trainer, "_save_state", watched)
    run()
    assert saved


def test_leftovers_of_killed_writers_go(run: Callable[..., Launch], folder: Path, tmp_path: Path) -> None:
    pid = next(number for number in range(4_000_000, 5_000_000) if not Path(f"/proc/{number}").exists())
    (folder / "checkpoints").mkdir(parents=True)
    dead = [folder / f".state.pt.{pid}.tmp", folder / "checkpoints" / f".last.safetensors.{pid}.tmp"]
    living = folder / f".state.pt.{os.getppid()}.tmp"
    for path in (*dead, living):
        path.write_bytes(b"half")
    run()
    assert not any(path.exists() for path in dead)
    assert living.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_first_step_features_have_not_drifted(
    run: Callable[..., Launch], folder: Path, precision: str
) -> None:
    if precision == "bf16":
        needs_bf16_lstm()
    run({"loop.precision": precision, "loop.max_steps": 1})
    first, last = read_run(folder).epochs
    assert first.value("feature_drift") == pytest.approx(0.0, abs=1e-7)
    assert (last.value("feature_drift") or 0.0) > 1e-5


def test_what_trains_is_fp32_under_bf16(run: Callable[..., Launch], folder: Path) -> None:
    needs_bf16_lstm()
    run({"loop.precision": "bf16"})
    _, records = load_state(folder / STATE_NAME)
    assert {tensor.dtype for tensor in records["trained"].values()} == {torch.float32}
    moments = [value for state in records["optimizer"]["state"].values() for value in state.values()]
    assert {tensor.dtype for tensor in moments} == {torch.float32}


def test_weights_of_the_base_directory_are_never_written_to(
    run: Callable[..., Launch], run_files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are memory-mapped, and trained in place."""
    before = {path: path.read_bytes() for path in run_files.base.iterdir()}
    run({"model.train_projection": True, "model.train_vision": True})
    assert {path: path.read_bytes() for path in run_files.base.iterdir()} == before


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed_will_do(run: Callable[..., Launch], seed: int) -> None:
    done = run({"loop.seed": seed, "loop.max_steps": 1})
    assert done.outcome is not None


def test_only_what_trains_is_in_the_state(run: Callable[..., Launch], folder: Path) -> None:
    """A tensor that is a view of the memory-mapped base must not bring the whole of it along."""
    done = run({"model.lora.targets": "none", "model.train_projection": True, "loop.max_steps": 1})
    assert done.outcome is not None
    _, records = load_state(folder / STATE_NAME)
    values = sum(tensor.numel() for tensor in records["trained"].values())
    assert (folder / STATE_NAME).stat().st_size < 4 * 3 * values * 1.1 + 2**17
