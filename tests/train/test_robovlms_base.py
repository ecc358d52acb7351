"""Training on RoboVLMs weights: a base directory made of a checkpoint's backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bundle.errors import BaseWeightsError, CheckpointError
from tests.checkpoints import MakeSynthetic
from tests.train.runs import RunFiles
from train.checkpoint import load, load_policy
from train.launch import launch
from train.ledger import read_run
from train.load_config import load_run_config
from train.robovlms_base import robovlms_base
from train.run_setup import gather
from train.synthetic import SyntheticFiles, SyntheticOptions
from train.trainable import build_policy


def test_the_merged_backbone_computes_what_the_checkpoint_does(
    synthetic: MakeSynthetic, run_files: RunFiles, tmp_path: Path
) -> None:
    files = synthetic(SyntheticOptions(seed=3))
    base = robovlms_base(files.checkpoint, files.base, tmp_path / "bases")
    config = load_run_config(run_files.config(tmp_path / "run.json", {"model.lora.targets": "none"})).config
    policy = build_policy(config, base, action_range=(-1.0, 1.0)).eval()
    reference = load_policy(files.checkpoint)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 60, 9, 12, 2]] * 2)
    with torch.no_grad():
        expected, found = reference.image_tokens(pixels), policy.image_tokens(pixels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        policy.action_token.copy_(reference.action_token)
        features = (each.features(expected, ids, torch.ones_like(ids)) for each in (reference, policy))
        first, second = features
        torch.testing.assert_close(second, first, atol=2e-5, rtol=0)


def test_it_is_made_once_and_read_by_everything(fork: SyntheticFiles, tmp_path: Path) -> None:
    base = robovlms_base(fork.checkpoint, fork.base, tmp_path)
    made = (base / "model.safetensors").stat().st_mtime_ns
    assert robovlms_base(fork.checkpoint, fork.base, tmp_path) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == made
    assert (base / "tokenizer.json").read_bytes() == (fork.base / "tokenizer.json").read_bytes()
    assert not any(".lora_" in name for name in load_file(base / "model.safetensors"))


def test_another_checkpoint_is_another_base(synthetic: MakeSynthetic, fork: SyntheticFiles, tmp_path: Path) -> None:
    other = synthetic(SyntheticOptions(layout="fork", head="velocities", seed=5))
    assert robovlms_base(fork.checkpoint, fork.base, tmp_path) != robovlms_base(other.checkpoint, other.base, tmp_path)


def test_a_damaged_checkpoint_leaves_no_base(fork: SyntheticFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(fork.checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        robovlms_base(broken, fork.base, tmp_path / "bases")
    assert not list((tmp_path / "bases").glob("*/")) if (tmp_path / "bases").exists() else True


def test_a_run_on_such_weights_exports(fork: SyntheticFiles, run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(
        tmp_path / "run.json",
        {"base.weights": str(fork.checkpoint), "output.cache": str(tmp_path / "cache"), "loop.epochs": 1},
    )
    done = launch(config, console=Console(quiet=True))
    assert done.outcome is not None
    loaded = load(done.outcome.last)  # type: ignore[arg-type]
    record = read_run(done.folder)
    assert loaded.base_sha256 == record.base.sha256
    assert "bases" in record.base.path


def test_a_stated_hash_is_held_to(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"base.sha256": "0" * 64})
    with pytest.raises(BaseWeightsError, match="other weights than the config states"):
        gather(load_run_config(config))
