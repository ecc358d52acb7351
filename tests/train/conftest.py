"""Synthetic checkpoints, made once for all tests that read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.checkpoints import MakeSynthetic, Variant, make_once, rewrite
from tests.train.runs import RunFiles, make_run_files
from train.synthetic import SyntheticFiles, SyntheticOptions


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make tests of tiny models ten times slower, not faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> MakeSynthetic:
    """See make_once."""
    return make_once(tmp_path_factory)


@pytest.fixture(scope="session")
def upstream(synthetic: MakeSynthetic) -> SyntheticFiles:
    """Upstream's LoRA policy with six arm actions and a gripper."""
    return synthetic(SyntheticOptions())


@pytest.fixture(scope="session")
def fork(synthetic: MakeSynthetic) -> SyntheticFiles:
    """The 2-DoF fork's LoRA policy with two velocities."""
    return synthetic(SyntheticOptions(layout="fork", head="velocities"))


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state per process; runs in tests are processes of their own in spirit."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def run_files(fork: SyntheticFiles, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A base, eight small episodes, and a cache: what quick runs train on. Tests must not change them."""
    return make_run_files(tmp_path_factory.mktemp("run"), fork)


@pytest.fixture
def variant(upstream: SyntheticFiles, tmp_path: Path) -> Variant:
    """Edits to upstream's checkpoint, to a file of its own beside the base."""
    (tmp_path / "base").symlink_to(upstream.base)
    return lambda edit: rewrite(upstream.checkpoint, tmp_path / "variant.ckpt", edit)
