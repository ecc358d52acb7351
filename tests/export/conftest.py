"""Checkpoints and bundles, made once for all tests that only read them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.pipeline import BuildConfig, build
from tests.checkpoints import MakeSynthetic, make_once
from tests.export.builds import QUICK
from train.synthetic import SyntheticFiles, SyntheticOptions

Built = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Beside onnxruntime's own threads, more of them only wait for each other; in child processes too."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> MakeSynthetic:
    """See make_once."""
    return make_once(tmp_path_factory)


@pytest.fixture(scope="session")
def upstream(synthetic: MakeSynthetic) -> SyntheticFiles:
    """Upstream's LoRA policy with six arm actions and a gripper."""
    return synthetic(SyntheticOptions())


@pytest.fixture(scope="session")
def built(synthetic: MakeSynthetic, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Options of a checkpoint and of its build to a bundle; tests must not change it."""
    made: dict[Any, Path] = {}

    def make(options: SyntheticOptions, **config: Any) -> Path:
        key = (options, *sorted(config.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "policy.bundle"
            made[key] = build(BuildConfig(checkpoint=synthetic(options).checkpoint, out=out, **config))
        return made[key]

    return make


@pytest.fixture
def bundle(upstream: SyntheticFiles, tmp_path: Path) -> BuildConfig:
    """A checkpoint of this test's own, built; the config that built it."""
    shutil.copyfile(upstream.checkpoint, tmp_path / "policy.ckpt")
    (tmp_path / "base").symlink_to(upstream.base)
    config = BuildConfig(checkpoint=tmp_path / "policy.ckpt", out=tmp_path / "policy.bundle", verify_frames=QUICK)
    build(config)
    return config
