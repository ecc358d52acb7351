"""Tiny runs: a base, episodes with two targets of which the instruction names one, and configs that train on them in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from episodes.synthetic import write_synthetic
from train.synthetic import SyntheticFiles


def needs_bf16_lstm() -> None:
    """Skip where oneDNN is told to use fewer instructions than torch sees (ONEDNN_MAX_CPU_ISA): it then has no LSTM in bf16. The same
    tests run in fp32. Without that variable torch itself goes another way on such CPUs.
    """
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(4, 4, batch_first=True)(torch.zeros(1, 2, 4))
    except RuntimeError as error:
        pytest.skip(f"no bf16 LSTM here: {error}")


EPISODES = 8
LENGTH = 12


@dataclass(frozen=True)
class RunFiles:
    """What runs are made of: a folder with `base`, `episodes` and a cache that all runs share."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def episodes(self) -> Path:
        return self.folder / "episodes"

    def config(self, path: Path, settings: Mapping[str, Any] | None = None) -> Path:
        """A config file `path` (its folder will hold `runs`); `settings` are dotted keys over a quick run's."""
        values: dict[str, Any] = {
            "name": "quick",
            "base": {"model": str(self.base)},
            "data": {"sources": [{"files": [str(self.episodes / "*.h5")]}], "window": 4, "chunk": 3, "val_share": 0.25},
            "model": {"hidden": 16, "layers": 1, "dropout": 0.1, "lora": {"targets": "text", "r": 2, "alpha": 4.0}},
            "optimizer": {"learning_rate": 1e-3},
            "loop": {"epochs": 2, "batch_size": 3, "accumulate": 2, "windows_per_episode": 3},
            "output": {"cache": str(self.folder / "cache"), "tensorboard": False},
        }
        for key, value in (settings or {}).items():
            section = values
            *above, leaf = key.split(".")
            for name in above:
                section = section.setdefault(name, {})
            section[leaf] = value
        path.write_text(json.dumps(values))
        return path


def make_run_files(
    folder: Path, base: SyntheticFiles, *, episodes: int = EPISODES, length: int = LENGTH, hand: bool = False
) -> RunFiles:
    """The files, half of the episodes to each side; `hand` gives them a second camera."""
    files = RunFiles(folder)
    files.base.symlink_to(base.base)
    files.episodes.mkdir()
    for index in range(episodes):
        write_synthetic(
            files.episodes,
            "v1",
            side="left" if index % 2 else "right",
            seed=index,
            height=48,
            width=64,
            length=length,
            decoy=True,
            hand=hand,
        )
    return files
