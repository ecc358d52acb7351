"""The command, in real processes: killed at any moment, terminated, run by torchrun, and fed with nonsense."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bundle.errors import ConfigError
from tests.train.runs import RunFiles
from train.launch import launch
from train.ledger import read_run, verify_checkpoints
from train.run_log import read_steps
from train.split import Split, save_split

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = str(ROOT / "train" / "finetune.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str, program: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, FINETUNE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(read_steps(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_any_moment_the_run_goes_on_exactly(run_files: RunFiles, tmp_path: Path) -> None:
    """SIGKILL twice, at steps that differ from run to run of this test; the state is saved after every step."""
    settings: dict[str, Any] = {"loop.epochs": 3, "loop.save_minutes": 1e-9, "augment.mirror": 0.5}
    whole = run_files.config(tmp_path / "whole.json", {**settings, "name": "whole"})
    killed = run_files.config(tmp_path / "killed.json", {**settings, "name": "killed"})
    code, _, err = finish(start(str(whole)))
    assert code == 0, err
    folder = tmp_path / "runs" / "killed"

    for wanted in (3, 12):
        process = start(str(killed), *(["--resume"] if (folder / "state.pt").exists() else []))
        wait_for_steps(folder, wanted, process)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert read_run(folder).effective_status() == "died"
    code, out, err = finish(start(str(killed), "--resume"))

    assert code == 0, err
    assert "finished" in out
    expected = load_file(tmp_path / "runs" / "whole" / "checkpoints" / "last.safetensors")
    found = load_file(folder / "checkpoints" / "last.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert [row["loss"] for row in read_steps(folder)] == [
        row["loss"] for row in read_steps(tmp_path / "runs" / "whole")
    ]
    record = read_run(folder)
    assert len(record.resumes) == 2
    assert verify_checkpoints(record, folder) == []


def test_sigterm_saves_and_exits(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"loop.epochs": 1000})
    folder = tmp_path / "runs" / "quick"
    process = start(str(config))
    wait_for_steps(folder, 2, process)
    process.terminate()
    code, out, err = finish(process)
    assert code == 1, err
    assert "--resume" in out
    assert read_run(folder).status == "stopped"
    assert (folder / "checkpoints" / "last.safetensors").exists()
    assert (folder / "state.pt").exists()


def test_two_processes_have_the_losses_of_one(run_files: RunFiles, tmp_path: Path) -> None:
    """torchrun with gloo; the step has five micro-batches at the end of an epoch, so that one process has nothing to do there."""
    settings: dict[str, Any] = {
        "model.dropout": 0.0,
        "model.lora.dropout": 0.0,
        "model.lora.targets": "all",
        "loop.batch_size": 4,
        "loop.accumulate": 4,
        "optimizer.learning_rate": 3e-4,
    }
    one = run_files.config(tmp_path / "one.json", {**settings, "name": "one"})
    two = run_files.config(tmp_path / "two.json", {**settings, "name": "two"})
    code, _, err = finish(start(str(one)))
    assert code == 0, err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    code, out, err = finish(start(str(two), "--json", program=torchrun))
    assert code == 0, err

    losses = {name: np.array([row["loss"] for row in read_steps(tmp_path / "runs" / name)]) for name in ("one", "two")}
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=2e-4)
    assert losses["one"][-1] != losses["one"][0]
    records = {name: read_run(tmp_path / "runs" / name) for name in ("one", "two")}
    assert records["two"].machine["processes"] == 2
    for first, second in zip(records["one"].epochs, records["two"].epochs, strict=True):
        for metric in ("val_loss", "val_rmse_linear_x", "feature_drift"):
            assert second.value(metric) == pytest.approx(first.value(metric), rel=2e-3, abs=1e-6), metric
    result = json.loads(out.strip().splitlines()[-1])
    assert result["status"] == "finished"


# What a process of torchrun runs: the command, after `spoil` has made this process differ from the others.
SPOILED = """
import os, runpy, sys, types
rank = int(os.environ["RANK"])
{spoil}
sys.argv = {arguments!r}
runpy.run_path({finetune!r}, run_name="__main__")
"""


def start_spoiled(folder: Path, spoil: str, *arguments: str) -> subprocess.Popen[str]:
    """Two processes, after each has run `spoil`, which sees its `rank`."""
    script = folder / "spoiled.py"
    script.write_text(SPOILED.format(spoil=spoil, arguments=[FINETUNE, *arguments], finetune=FINETUNE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def test_clocks_that_differ_and_a_process_without_validation_episodes(run_files: RunFiles, tmp_path: Path) -> None:
    """One process saves at every step and the other never; there is one validation episode for the two."""
    names = sorted(path.name for path in run_files.episodes.iterdir())
    save_split(tmp_path / "split.json", Split(train=tuple(names[1:]), val=(names[0],)))
    settings = {"loop.save_minutes": 1e-9, "data.split": "split.json", "loop.epochs": 1}
    config = run_files.config(tmp_path / "run.json", settings)
    spoil = "import train.trainer\nif rank == 1: train.trainer.time = types.SimpleNamespace(monotonic=lambda: 0.0)"
    process = start_spoiled(tmp_path, spoil, str(config))
    try:
        code, _, err = finish(process)
    finally:
        kill_group(process)
    assert code == 0, err
    folder = tmp_path / "runs" / "quick"
    record = read_run(folder)
    assert record.status == "finished"
    assert record.split.val == 1
    assert verify_checkpoints(record, folder) == []
    assert not list(folder.rglob(".*"))


def test_a_process_that_fails_takes_the_other_with_it(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"loop.epochs": 1000, "loop.save_minutes": 1e-9})
    spoil = (
        "import train.inputs\n"
        "from bundle.errors import EpisodeError\n"
        "real, calls = train.inputs.InputSource.targets, [0]\n"
        "def failing(self, batch):\n"
        "    calls[0] += 1\n"
        "    if rank == 1 and calls[0] == 12: raise EpisodeError('an episode is gone', hint='look')\n"
        "    return real(self, batch)\n"
        "train.inputs.InputSource.targets = failing"
    )
    process = start_spoiled(tmp_path, spoil, str(config))
    try:
        code, _, err = finish(process)
    finally:
        kill_group(process)
    assert code != 0
    assert "an episode is gone" in err
    folder = tmp_path / "runs" / "quick"
    record = read_run(folder)
    assert record.effective_status() in ("failed", "died")
    assert verify_checkpoints(record, folder) == []
    assert (folder / "state.pt").exists()


def test_torchrun_that_is_terminated_stops_both_and_goes_on(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"loop.epochs": 1000})
    folder = tmp_path / "runs" / "quick"
    process = start_spoiled(tmp_path, "", str(config))
    try:
        wait_for_steps(folder, 3, process)
        process.terminate()
        _, _, err = finish(process)
    finally:
        kill_group(process)
    assert read_run(folder).status == "stopped", err
    done = int(read_steps(folder)[-1]["step"])
    process = start_spoiled(tmp_path, "", str(config), "--resume", "--set", "loop.epochs=1000")
    try:
        wait_for_steps(folder, done + 2, process)
        process.terminate()
        finish(process)
    finally:
        kill_group(process)
    assert [row["step"] for row in read_steps(folder)][:done] == list(range(1, done + 1))


def kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_micro_batches_that_cannot_be_dealt_evenly_are_refused(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"loop.accumulate": 3})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    code, _, err = finish(start(str(config), program=torchrun))
    assert code != 0
    assert "loop.accumulate cannot be dealt evenly" in err


def test_json_and_exit_codes(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json")
    code, out, err = finish(start(str(config), "--json", "--dry-run"))
    assert code == 0, err
    assert json.loads(out)["plan"]["name"] == "quick"
    assert not (tmp_path / "runs" / "quick").exists()

    code, out, err = finish(start(str(config), "--set", "loop.epoch=3"))
    assert code == 1
    assert out == ""
    assert "did you mean" in err
    assert "loop.epochs" in err
    assert "Traceback" not in err

    code, _, err = finish(start(str(tmp_path / "absent.toml")))
    assert code == 1
    assert "does not exist" in err
    code, _, _ = finish(start())
    assert code == 2


def test_the_line_to_go_on_with_names_this_run(
    run_files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its settings it would go on with another one."""
    from train import finetune

    config = run_files.config(tmp_path / "a run.json")
    outcome = SimpleNamespace(status="stopped", best=None, last=None)
    options = finetune.FinetuneConfig(config, set=("name=third", "base.model=my base"))
    finetune._print_result(SimpleNamespace(outcome=outcome, folder="runs/third"), options)  # type: ignore[arg-type]
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.partition("\t")[2])[2:] == [
        str(config), "--set", "name=third", "--set", "base.model=my base", "--resume",
    ]  # fmt: skip


def test_a_dry_run_of_a_resume_looks_at_the_run(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json")
    with pytest.raises(ConfigError, match="there is no run to resume"):
        launch(config, console=Console(quiet=True), resume=True, dry_run=True)
