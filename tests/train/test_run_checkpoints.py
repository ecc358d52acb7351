"""What a run writes, read back by the strict loader: the same policy, and the facts that export needs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle.errors import StorageError
from tests.checkpoints import file_size_limit
from tests.train.runs import RunFiles
from train.base import base_weights, tensors_sha256
from train.checkpoint import LoadedPolicy, load
from train.facts import TrainingFacts, training_facts
from train.load_config import load_run_config
from train.policy import KosmosPolicy
from train.run_checkpoints import checkpoint_config, save_lightning, save_policy
from train.run_config import RunConfig
from train.trainable import build_policy

IDS = torch.tensor([[0, 60, 9, 12, 33, 2]])

VARIANTS: list[dict[str, Any]] = [
    {"model.lora.targets": "all"},
    {"model.lora.targets": "text"},
    {"model.lora.targets": "none"},
    {"model.lora.targets": "text", "model.lora.bias": "lora_only"},
    {"model.lora.targets": "none", "model.freeze_backbone": False, "model.train_text_embedding": True},
    {"model.head": "actions_gripper", "model.action_dim": 7, "model.layers": 4},
    {"model.head": "classes"},
    {"model.packing": "fork_overwrite", "data.actions": ["linear_x", "linear_y", "angular_z"]},
]


class Trained:
    """A policy in which everything that trains has moved away from its start."""

    def __init__(self, run_files: RunFiles, folder: Path, settings: dict[str, Any]) -> None:
        self.config: RunConfig = load_run_config(run_files.config(folder / "run.json", settings)).config
        self.policy: KosmosPolicy = build_policy(self.config, run_files.base, action_range=(-1.15, 1.15)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.facts = TrainingFacts(
            packing=self.config.model.packing,
            x_attn_causal=False,
            resize="bilinear",
            pixel_norm="none",
            action_names=self.config.data.actions,
            action_minimum=-1.15,
            action_maximum=1.15,
            fps=6.0,
            base_sha256=_base_hash(run_files),
        )
        self.settings = checkpoint_config(self.config, self.policy, self.facts, base=str(run_files.base))

    def chunks(self, policy: KosmosPolicy) -> torch.Tensor:
        pixels = torch.randn(1, 3, 1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return policy(pixels, IDS, torch.ones_like(IDS))

    def check(self, path: Path) -> LoadedPolicy:
        """The file loads strictly, computes the same, and says how it was trained."""
        loaded = load(path)
        torch.testing.assert_close(self.chunks(loaded.policy), self.chunks(self.policy), atol=1e-5, rtol=0)
        assert loaded.policy.conventions.packing == self.config.model.packing
        assert loaded.policy.conventions.packing_source == "recorded"
        assert training_facts(loaded.config) == self.facts
        assert (loaded.policy.spec.minimum, loaded.policy.spec.maximum) == (-1.15, 1.15)
        return loaded


def _base_hash(run_files: RunFiles) -> str:
    return tensors_sha256(base_weights(run_files.base))


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_the_small_format_is_the_trained_policy(run_files: RunFiles, tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = Trained(run_files, tmp_path, settings)
    path = tmp_path / "last.safetensors"
    save_policy(path, trained.policy, trained.settings, trained.facts)
    loaded = trained.check(path)
    assert len(loaded.raw.state) == sum(p.requires_grad for p in trained.policy.parameters())


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_robovlms_layout_is_the_trained_policy(run_files: RunFiles, tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = Trained(run_files, tmp_path, settings)
    path = tmp_path / "last.ckpt"
    save_lightning(path, trained.policy, trained.settings, epoch=3, step=70)
    loaded = trained.check(path)
    assert loaded.raw.kind == "lightning"
    assert loaded.from_base == ()
    assert path.stat().st_size < 1.2 * 4 * sum(p.numel() for p in trained.policy.parameters()) + 2**20


def test_files_can_be_read_by_others(run_files: RunFiles, tmp_path: Path) -> None:
    trained = Trained(run_files, tmp_path, {})
    path = tmp_path / "last.safetensors"
    save_policy(path, trained.policy, trained.settings, trained.facts)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "run.json").stat().st_mode)


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(run_files: RunFiles, tmp_path: Path) -> None:
    trained = Trained(run_files, tmp_path, {})
    small, lightning = tmp_path / "last.safetensors", tmp_path / "last.ckpt"
    small.write_bytes(b"old")
    lightning.write_bytes(b"old")
    with file_size_limit(4096):
        with pytest.raises(StorageError):
            save_policy(small, trained.policy, trained.settings, trained.facts)
        with pytest.raises(StorageError):
            save_lightning(lightning, trained.policy, trained.settings, epoch=0, step=0)
    assert small.read_bytes() == lightning.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "last.safetensors", "last.ckpt"}
