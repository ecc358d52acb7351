"""From nothing to a robot's decisions, with the commands that a user types: fixtures, training, engines, replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from episodes.instruction import Side, sentence
from episodes.reader import open_episode
from runtime.policy import Policy
from train.ledger import read_run, verify_checkpoints

pytestmark = pytest.mark.timeout(1500)  # training is most of it, and is no measurement: a busy machine takes minutes

ROOT = Path(__file__).resolve().parents[1]
LEFT, RIGHT = sentence("v1", "left"), sentence("v1", "right")


def run(*arguments: str | Path, folder: Path) -> str:
    """A command of this repository, in a process of its own; returns its stdout."""
    done = subprocess.run(
        [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("from-nothing")
    options = [
        "--size",
        "tiny",
        "--layout",
        "fork",
        "--head",
        "velocities",
        "--no-episodes",
        "--training",
        "24",
        "--out",
    ]
    run("scripts/make_fixtures", *options, path, folder=path)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The best checkpoint of the run."""
    result = json.loads(run("train/finetune.py", "run.toml", "--json", folder=folder))
    assert result["status"] == "finished"
    return folder / result["best"]


@pytest.fixture(scope="module")
def bundle(folder: Path, trained: Path) -> Path:
    instructions = [option for text in (LEFT, RIGHT) for option in ("--instruction", text)]
    run("export/build_engines.py", trained, "--tensorrt", "off", *instructions, "--out", "p.bundle", folder=folder)
    return folder / "p.bundle"


def test_training_learns(folder: Path, trained: Path) -> None:
    record = read_run(folder / "runs" / "first")
    first, last = record.epochs[0].value("val_loss"), record.epochs[-1].value("val_loss")
    assert first is not None
    assert last is not None
    assert last < 0.2 * first
    sensitivity = record.epochs[-1].value("instruction_sensitivity")
    assert sensitivity is not None
    assert sensitivity > 0.05
    assert verify_checkpoints(record, folder / "runs" / "first") == []


def test_nothing_about_the_policy_has_to_be_stated_again(bundle: Path) -> None:
    """The checkpoint says how it was trained, and the bundle follows it."""
    manifest = Policy.load(bundle, backend="ort:cpu").manifest
    assert manifest.prompt.packing == "upstream"
    assert manifest.prompt.packing_source == "recorded"
    assert manifest.preprocessing.resize == "bilinear"
    assert manifest.action.names == ("linear_x", "linear_y")
    assert (manifest.action.minimum, manifest.action.maximum) == (-1.15, 1.15)
    assert manifest.parity.verdict == "PASS"


def test_left_and_right_go_to_opposite_sides(folder: Path, bundle: Path) -> None:
    """The same pictures, with a target on each side; only the words differ."""
    policy = Policy.load(bundle, backend="ort:cpu")
    episodes = sorted((folder / "training").glob("*.h5"))[:4]
    lateral: dict[Side, list[float]] = {"left": [], "right": []}
    for path in episodes:
        with open_episode(path) as episode:
            for side, values in lateral.items():
                policy.reset(sentence("v1", side))
                values += [float(policy.step(frame).values[0, 1]) for frame in episode.frames()][2:]
    assert np.all(np.array(lateral["left"]) > 0)
    assert np.all(np.array(lateral["right"]) < 0)


def test_the_replay_drives_forward_and_to_the_named_side(folder: Path, bundle: Path) -> None:
    episode = sorted((folder / "training").glob("*_left_*.h5"))[0]
    replay = json.loads(run("runtime/run_robot.py", bundle, "--replay", episode, "--json", folder=folder))
    predicted = np.array(replay["predicted"])
    recorded = np.array(replay["recorded"])
    errors = np.sqrt(np.mean((predicted - recorded) ** 2, axis=0))
    standing_still = np.sqrt(np.mean(recorded**2, axis=0))
    assert np.all(errors < 0.9 * standing_still)
    assert predicted[2:, 0].min() > 0.5
    assert predicted[:, 1].mean() > 0
