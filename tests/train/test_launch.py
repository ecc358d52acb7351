"""Whole runs, small ones, in this process: what they leave behind, and what every kind of bad luck leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import train.optimization
from bundle.errors import CheckpointError, ConfigError, EpisodeError, StorageError, TrainingError
from episodes.synthetic import write_synthetic
from tests.checkpoints import file_size_limit
from tests.train.runs import RunFiles, needs_bf16_lstm
from train.checkpoint import load
from train.fast_forward import TrainingForward
from train.launch import Launch, launch
from train.ledger import read_run, verify_checkpoints
from train.run_log import RunLog, read_steps

QUIET = Console(quiet=True)


@pytest.fixture
def run(run_files: RunFiles, tmp_path: Path) -> Callable[..., Launch]:
    def start(settings: dict[str, Any] | None = None, **options: Any) -> Launch:
        path = run_files.config(tmp_path / "run.json", settings)
        return launch(path, console=QUIET, **options)

    return start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "quick"


def sha256s(folder: Path) -> dict[str, str]:
    return {entry.file: entry.sha256 for entry in read_run(folder).checkpoints if not entry.removed}


def test_what_a_run_leaves(run: Callable[..., Launch], folder: Path) -> None:
    done = run({"output.tensorboard": True, "output.lightning": True})

    assert done.outcome is not None
    assert done.outcome.status == "finished"
    record = read_run(folder)
    assert record.effective_status() == "finished"
    assert [epoch.epoch for epoch in record.epochs] == [0, 1, 2]
    assert {entry.kind for entry in record.checkpoints} == {"best", "last", "lightning"}
    assert verify_checkpoints(record, folder) == []
    assert record.mix["real"].files == 8
    for name in ("val_loss", "val_rmse_linear_x", "instruction_sensitivity", "feature_drift", "train_loss"):
        assert name in record.epochs[-1].metrics
    steps = read_steps(folder)
    assert [row["step"] for row in steps] == list(range(1, record.epochs[-1].step + 1))
    assert list((folder / "tensorboard").glob("events*"))
    loaded = load(done.outcome.last)
    assert loaded.base_sha256 == record.base.sha256
    assert loaded.facts is not None
    assert loaded.facts.fps == 6.0
    lightning = load(folder / "checkpoints" / "last.ckpt")
    assert lightning.state.keys() == loaded.state.keys()
    for name, tensor in loaded.state.items():
        assert torch.equal(tensor, lightning.state[name]), name


def test_a_dry_run_writes_no_run(run: Callable[..., Launch], folder: Path) -> None:
    done = run(dry_run=True)
    assert done.outcome is None
    assert not folder.exists()
    assert json.dumps(done.plan.as_json())


@pytest.mark.parametrize(
    "settings",
    [
        {"model.lora.targets": "all", "augment.mirror": 0.5, "augment.brightness": 0.2, "augment.crop": 0.1},
        {"model.head": "classes"},
        {"model.head": "actions_gripper", "model.action_dim": 7, "data.actions": ["linear_x", "linear_y", "angular_z"]},
        {"model.gradient_checkpointing": True, "augment.mirror": 0.5, "loop.cache_image_tokens": False},
        {"loop.precision": "bf16", "loop.workers": 2},
        {"data.window": 16, "data.chunk": 2},
        {"model.lora.targets": "none", "model.freeze_backbone": False, "model.train_vision": True},
    ],
    ids=lambda settings: " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()),
)
def test_every_kind_of_run_learns(run: Callable[..., Launch], folder: Path, settings: dict[str, Any]) -> None:
    if settings.get("loop.precision") == "bf16":
        needs_bf16_lstm()
    run({"loop.epochs": 3, **settings})
    losses = [epoch.value("val_loss") for epoch in read_run(folder).epochs]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]


def test_cached_tokens_change_nothing(run: Callable[..., Launch], run_files: RunFiles, folder: Path) -> None:
    run()
    cached = read_steps(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    run({"name": "computed", "loop.cache_image_tokens": False})
    computed = read_steps(folder.with_name("computed"))
    np.testing.assert_allclose([row["loss"] for row in cached], [row["loss"] for row in computed], rtol=1e-5)


def test_workers_change_nothing(run: Callable[..., Launch], folder: Path) -> None:
    run()
    AcceleratorState._reset_state(reset_partial_state=True)
    run({"name": "workers", "loop.workers": 2})
    assert sha256s(folder)["checkpoints/last.safetensors"] != ""
    first, second = (read_steps(folder.with_name(name)) for name in ("quick", "workers"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_micro_batches_are_cut_as_one_likes(run: Callable[..., Launch], folder: Path) -> None:
    """The same windows in a step, as one batch or as six: the same losses (dropout draws differ, so it is off)."""
    plain = {"model.dropout": 0.0, "model.lora.dropout": 0.0, "loop.windows_per_episode": 1}
    run({**plain, "loop.batch_size": 6, "loop.accumulate": 1})
    AcceleratorState._reset_state(reset_partial_state=True)
    run({**plain, "name": "cut", "loop.batch_size": 1, "loop.accumulate": 6})
    whole, cut = (read_steps(folder.with_name(name)) for name in ("quick", "cut"))
    np.testing.assert_allclose([row["loss"] for row in whole], [row["loss"] for row in cut], rtol=1e-4)


def test_only_the_best_are_kept(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.epochs": 4, "loop.keep_best": 2})
    kept = {path.name for path in (folder / "checkpoints").glob("epoch=*")}
    record = read_run(folder)
    losses = {entry.file: entry.val_loss for entry in record.checkpoints if entry.kind == "best"}
    assert len(losses) >= 2
    best = sorted(losses, key=lambda name: float(losses[name]))[:2]  # type: ignore[arg-type]
    assert kept == {Path(name).name for name in best}
    assert verify_checkpoints(record, folder) == []


def test_early_stopping(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.epochs": 30, "loop.patience": 1, "optimizer.learning_rate": 1e-12, "model.dropout": 0.0})
    epochs = read_run(folder).epochs
    assert len(epochs) < 30
    assert read_run(folder).status == "finished"


def test_max_steps(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.max_steps": 3})
    assert read_run(folder).epochs[-1].step == 3


def test_a_run_is_never_overwritten(run: Callable[..., Launch]) -> None:
    run({"loop.epochs": 1})
    with pytest.raises(ConfigError, match="a run of this name exists"):
        run({"loop.epochs": 1})


@pytest.fixture
def terminated_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """SIGTERM, for real, right after a step."""

    def arrange(step: int) -> None:
        real = RunLog.step

        def watched(self: RunLog, number: int, **values: Any) -> None:
            real(self, number, **values)
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(RunLog, "step", watched)

    return arrange


@pytest.mark.parametrize("step", [1, 6, 11])
def test_sigterm_saves_and_the_run_goes_on_exactly(
    run: Callable[..., Launch], folder: Path, terminated_at: Callable[[int], None], step: int
) -> None:
    """In the first epoch, and around the end of one (there are 9 steps in each); dropout and mirroring are on."""
    settings = {"loop.epochs": 2, "augment.mirror": 0.5}
    run({**settings, "name": "whole"})
    whole = folder.with_name("whole")
    terminated_at(step)

    stopped = run(settings)
    assert stopped.outcome is not None
    assert stopped.outcome.status == "stopped"
    assert stopped.outcome.last is not None
    assert load(stopped.outcome.last)
    assert read_run(folder).status == "stopped"
    resumed = run(settings, resume=True)

    assert resumed.outcome is not None
    assert resumed.outcome.status == "finished"
    tensors = [load_file(each / "checkpoints" / "last.safetensors") for each in (whole, folder)]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    assert [row["loss"] for row in read_steps(folder)] == [row["loss"] for row in read_steps(whole)]
    mine, theirs = read_run(folder), read_run(whole)
    assert [epoch.metrics for epoch in mine.epochs] == [epoch.metrics for epoch in theirs.epochs]
    assert len(mine.resumes) == 1
    assert verify_checkpoints(mine, folder) == []


def test_resuming_needs_the_same_settings_and_an_intact_state(
    run: Callable[..., Launch], folder: Path, terminated_at: Callable[[int], None]
) -> None:
    terminated_at(2)
    run()
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        run({"optimizer.learning_rate": 0.5}, resume=True)
    (folder / "state.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        run(resume=True)
    (folder / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(resume=True)


def test_frozen_parameters_that_change_are_found(run: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: TrainingForward, batch: Any) -> Tensor:
        with torch.no_grad():
            self.policy.backbone.text_model.model.layer_norm.bias += 1e-6
        return self.chunks(self.features(batch), batch.frame_of)

    monkeypatch.setattr(TrainingForward, "forward", careless)
    with pytest.raises(TrainingError, match="a frozen parameter changed"):
        run({"loop.epochs": 1, "loop.max_steps": 1})


def test_a_loss_that_is_not_a_number_stops_the_run(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch: the first one's checkpoint stays, and the message names the windows."""
    real, calls = train.optimization.loss_terms, [0]

    def broken(*arguments: Any) -> dict[str, Tensor]:
        terms = real(*arguments)
        calls[0] += 1
        return {"main": terms["main"] * float("nan")} if calls[0] == 22 else terms

    monkeypatch.setattr(train.optimization, "loss_terms", broken)
    with pytest.raises(TrainingError, match=r"(?s)the loss is not finite at step 11.*episode_2025.*from frame"):
        run({"loop.epochs": 5})
    record = read_run(folder)
    assert record.status == "failed"
    assert record.error is not None
    assert "from frame" in record.error.message
    assert verify_checkpoints(record, folder) == []
    assert load(folder / "checkpoints" / "last.safetensors")


def test_weights_that_explode_stop_the_run(run: Callable[..., Launch], folder: Path) -> None:
    with pytest.raises(TrainingError, match="is not finite at step"):
        run({"loop.epochs": 2, "optimizer.learning_rate": 1e30, "optimizer.schedule": "constant"})
    assert read_run(folder).status == "failed"


def test_memory_that_does_not_suffice_names_what_to_halve(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TrainingForward, batch: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(TrainingForward, "forward", full)
    with pytest.raises(TrainingError, match=r"loop\.batch_size"):
        run()
    assert read_run(folder).status == "failed"


def test_words_that_do_not_reach_the_action_fail_loudly(
    run: Callable[..., Launch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the fork's packing, in which image tokens lie over the words."""
    real = TrainingForward._features

    def deaf(self: TrainingForward, tokens: Tensor, prompt: Tensor) -> Tensor:
        return real(self, tokens, torch.full_like(prompt, 5))

    monkeypatch.setattr(TrainingForward, "_features", deaf)
    monkeypatch.setattr("train.trainer.check_forward", lambda *_: 0.0)
    with pytest.raises(TrainingError, match="the words of the instruction do not reach the action"):
        run()


def test_the_forks_packing_is_reproduced_and_deaf(run: Callable[..., Launch], folder: Path) -> None:
    run({"model.packing": "fork_overwrite"})
    assert read_run(folder).epochs[-1].value("instruction_sensitivity") == 0.0
    loaded = load(folder / "checkpoints" / "last.safetensors")
    assert loaded.policy.conventions.packing == "fork_overwrite"


def test_a_full_disk_keeps_the_last_good_checkpoint(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.epochs": 1}, dry_run=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    good = (folder / "checkpoints" / "last.safetensors").read_bytes()
    with file_size_limit(len(good) // 2), pytest.raises(StorageError):
        run({"name": "full", "loop.epochs": 1})
    failed = folder.with_name("full")
    assert read_run(failed).status == "failed"
    assert not list((failed / "checkpoints").iterdir())
    assert (folder / "checkpoints" / "last.safetensors").read_bytes() == good


def test_a_typo_is_answered_with_the_right_key(run: Callable[..., Launch]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)optimizer.learning_rat.*did you mean.*optimizer.learning_rate"):
        run({"optimizer.learning_rat": 1e-4})


def test_missing_paths_are_named_together(run: Callable[..., Launch], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)base.model does not exist.*nothing\.h5"):
        run({"base.model": str(tmp_path / "no"), "data.sources": [{"files": [str(tmp_path / "nothing.h5")]}]})


def test_a_base_checkpoint_that_does_not_exist_is_refused(run: Callable[..., Launch], tmp_path: Path) -> None:
    """A run once went on without the weights that it was named after."""
    with pytest.raises(ConfigError, match=r"base\.weights does not exist"):
        run({"base.weights": str(tmp_path / "kosmos_ph_oxe-pretrain.pt")})


def test_mixed_schemas_are_refused(run: Callable[..., Launch], tmp_path: Path) -> None:
    for schema in ("v1", "v6"):
        write_synthetic(tmp_path, schema, side="left", seed=1, height=48, width=64, length=12)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, EpisodeError), match="schema"):
        run({"data.sources": [{"files": [str(tmp_path / "*.h5")]}]})


def test_mixed_frame_rates_are_refused(run: Callable[..., Launch], tmp_path: Path) -> None:
    for seed in (1, 2):
        path = write_synthetic(tmp_path, "v1", side="left", seed=seed, height=48, width=64, length=12)
        if seed == 2:
            with h5py.File(path, "r+") as file:
                file.attrs["total_duration"] = 12 / 15.0
    with pytest.raises(ConfigError, match="rate"):
        run({"data.sources": [{"files": [str(tmp_path / "*.h5")]}]})


def test_actions_that_are_not_numbers_are_refused(run: Callable[..., Launch], tmp_path: Path) -> None:
    for seed in (1, 2):
        path = write_synthetic(tmp_path, "v1", side="left", seed=seed, height=48, width=64, length=12)
        if seed == 2:
            with h5py.File(path, "r+") as file:
                file["actions"][3, 1] = np.nan
    with pytest.raises(EpisodeError, match=r"(?s)1 of 2 episodes cannot be trained on.*action 3 is not finite"):
        run({"data.sources": [{"files": [str(tmp_path / "*.h5")]}]})


def test_steps_are_written_as_numbers_that_read_back(run: Callable[..., Launch], folder: Path) -> None:
    run({"loop.epochs": 1})
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds"} == set(rows[0])
    assert float(rows[0]["gradient_norm"]) > 0


def test_a_run_for_a_gpu_is_planned_without_one(run: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run({"loop.precision": "fp16"}, dry_run=True)
    assert any("fp16 needs a GPU" in problem.what for problem in done.plan.problems)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        run({"loop.precision": "fp16"})


def test_a_head_that_is_told_trains_and_is_read_again(run: Callable[..., Launch], folder: Path) -> None:
    """And hears words that the fork's rows do not show."""
    settings = {"model.head": "classes", "model.instruction_in_head": True, "model.packing": "fork_overwrite"}
    done = run({**settings, "loop.max_steps": 2, "output.lightning": True})
    assert (read_run(folder).epochs[-1].value("instruction_sensitivity") or 0) > 0
    assert done.outcome is not None
    assert done.outcome.last is not None
    loaded = load(done.outcome.last)
    assert loaded.policy.spec.head.told
    assert loaded.config["act_head"]["instr_in_features"] == loaded.base.kosmos.text_config.embed_dim
    whole = load(folder / "checkpoints" / "last.ckpt")
    assert torch.equal(loaded.state["act_head.instr_proj.weight"], whole.state["act_head.instr_proj.weight"])
    assert loaded.state["act_head.instr_proj.bias"].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_robovlms_own_resampler_is_read_again_whether_or_not_it_trains(
    run: Callable[..., Launch], folder: Path, frozen: bool
) -> None:
    settings = {"model.vision_resampler": True, "model.freeze_resampler": frozen, "output.lightning": True}
    done = run(settings | {"loop.max_steps": 2})
    assert done.outcome is not None
    assert done.outcome.last is not None
    loaded = load(done.outcome.last)
    assert loaded.policy.spec.vision_resampler
    whole = load(folder / "checkpoints" / "last.ckpt")
    name = "vision_resampler.layers.5.0.to_kv.weight"
    assert torch.equal(loaded.state[name], whole.state[name])
    planned = next(facts.items["checkpoints"] for facts in done.plan.disk if "checkpoints" in facts.items)
    assert planned // 5 == pytest.approx(
        done.outcome.last.stat().st_size, rel=0.05
    )  # three of the best, the last, and a draft
