"""No reader of a file that somebody names waits for a pipe that nobody writes to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.results import read_result
from bundle.errors import JetvlaError
from bundle.hashing import sha256_file
from bundle.manifest import Manifest
from episodes.reader import open_episode
from runtime.robot_toml import load_limits_file, load_robot_file
from train.checkpoint import load
from train.ledger_record import read_run
from train.load_config import load_run_config
from train.split import read_split

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a manifest": ("manifest.json", lambda path: Manifest.load(path.parent)),
    "a run": ("run.json", read_run),
    "a latency result": ("latency.json", read_result),
    "a split": ("split.json", read_split),
    "a training config": ("run.toml", load_run_config),
    "a lab's config": ("lab.json", load_run_config),
    "a robot file": ("robot.toml", load_robot_file),
    "a limits file": ("limits.toml", load_limits_file),
    "a checkpoint": ("policy.ckpt", load),
    "an episode": ("episode.h5", open_episode),
    "what is hashed": ("weights.bin", sha256_file),
}


@pytest.mark.parametrize("what", READERS)
def test_a_pipe_is_refused_at_once(what: str, tmp_path: Path) -> None:
    name, read = READERS[what]
    os.mkfifo(tmp_path / name)
    with pytest.raises(JetvlaError):
        read(tmp_path / name)
