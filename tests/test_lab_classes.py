"""A lab's class policy that turns in place, from its config to the robot's commands: trained, built, replayed, evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from rich.console import Console

from bundle.manifest import Manifest
from episodes.writer import write_episode
from export.engine_options import EngineOptions
from export.pipeline import BuildConfig, build
from runtime.policy import Policy
from train.checkpoint import load
from train.evaluation import evaluate
from train.launch import launch
from train.predictors import Stated, open_predictor
from train.synthetic import SyntheticOptions, make_checkpoint

pytestmark = pytest.mark.timeout(600)  # no measurement: a busy machine takes longer

ROOT = Path(__file__).resolve().parents[1]
SPEED, TURN = 1.15, 0.5
EIGHT = ("Stop", "F", "L", "R", "FL", "FR", "TurnL", "TurnR")
EPISODES, LENGTH, TURNING = 6, 9, 4


def told(side: str) -> str:
    return f"Navigate to the gray basket on the {side}"


def frames(seed: int, side: int) -> NDArray[np.uint8]:
    """Blue while the robot should turn left, green while it should turn right, red while it should drive, white where it should stop."""
    pictures = np.random.default_rng(seed).integers(0, 40, (LENGTH, 48, 64, 3), dtype=np.uint8)
    pictures[:TURNING, ..., 2 if side > 0 else 1] += 200
    pictures[TURNING:, ..., 0] += 200
    pictures[-1, ..., 1:] += 200
    return pictures


def commands(side: int) -> NDArray[np.float32]:
    """Turn in place towards it, drive, stop; left is positive."""
    rows = np.zeros((LENGTH, 3), np.float32)
    rows[:TURNING, 2] = side * 0.2  # slower than the class's command, as the lab's recordings are
    rows[TURNING:-1, 0] = SPEED
    return rows


def lab_config(folder: Path) -> dict[str, Any]:
    """The lab's eight classes, as its runs of April 2026 have them; small, and with a rate for a tiny model."""
    dataset = {
        "type": "NavDataset",
        "min_episode_frames": 2,
        "data_dir": str(folder / "episodes"),
        "episode_pattern": "*.h5",
        "model_name": "kosmos",
        "train_split": 0.67,
        "discrete_action": True,
        "instruction_preset": "default",
        "num_classes": 8,
        "grounding_prefix": True,
    }
    return {
        "robovlm_name": "RoboKosMos",
        "exp_name": "eight",
        "model": "kosmos",
        "trainer_type": "MobileVLATrainer",
        "window_size": 4,
        "fwd_pred_next_n": 2,
        "image_size": 224,
        "seed": 1,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "norm_action": False,
        "discrete_action": True,
        "output_root": str(folder / "runs"),
        "train_setup": {"freeze_backbone": True, "lora_enable": False, "predict_action": True},
        "act_head": {
            "type": "MobileVLAClassificationDecoder",
            "hidden_size": 64,
            "num_layers": 1,
            "action_dim": 8,
            "num_classes": 8,
            "class_weights": [4.0, 1.0, 10.0, 10.0, 4.0, 4.0, 2.0, 2.0],
            "down_sample": "none",
            "latent": 1,
        },
        "fwd_head": None,
        "vlm": {"pretrained_model_name_or_path": str(folder / "base"), "name": "kosmos"},
        "trainer": {"precision": "32", "max_epochs": 14},
        "train_dataset": dataset,
        "val_dataset": {**dataset, "is_validation": True},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, episodes, and a run of the lab's config."""
    path = tmp_path_factory.mktemp("lab")
    make_checkpoint(path, SyntheticOptions(layout="fork", head="velocities"))
    (path / "episodes").mkdir()
    for number in range(EPISODES):
        side = 1 if number % 2 else -1
        name = "left" if side > 0 else "right"
        file = path / "episodes" / f"episode_20260416_12000{number}_target_{name}_path.h5"
        write_episode(file, iter(frames(number, side)), commands(side), instruction=told(name), fps=6.0)
    (path / "eight.json").write_text(json.dumps(lab_config(path)))
    AcceleratorState._reset_state(reset_partial_state=True)
    launch(path / "eight.json", console=Console(quiet=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / "runs" / "eight" / "checkpoints" / "last.safetensors"


@pytest.fixture(scope="module")
def bundle(folder: Path, checkpoint: Path) -> Path:
    instructions = tuple(told(side) for side in ("left", "right"))
    config = BuildConfig(
        checkpoint=checkpoint,
        out=folder / "eight.bundle",
        instruction=instructions,
        verify_frames=6,
        engines=EngineOptions(tensorrt="off"),
    )
    return build(config)


def episodes(folder: Path) -> list[Path]:
    return sorted((folder / "episodes").glob("*.h5"))


def test_the_bundle_says_what_the_classes_and_the_prompt_are(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    action, prompt = manifest.action, manifest.prompt
    assert (action.class_names, action.classes_source) == (EIGHT, "recorded")
    assert (action.names, action.units) == (("linear_x", "linear_y", "angular_z"), ("m/s", "m/s", "rad/s"))
    assert np.allclose(action.class_values[1], (SPEED, 0, 0))
    assert action.class_values[-2:] == ((0, 0, TURN), (0, 0, -TURN))
    assert (prompt.template, prompt.pad_to, prompt.template_source) == ("<grounding>{instruction}", 256, "recorded")
    assert manifest.parity.verdict == "PASS"


def test_turns_turn_on_the_robot(folder: Path, bundle: Path) -> None:
    """By the command that a user types, on an episode to each side."""
    for path in episodes(folder)[:2]:
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "runtime" / "run_robot.py",
                bundle,
                "--replay",
                path,
                "--json",
                "--backend",
                "ort:cpu",
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        replay = json.loads(done.stdout)
        assert [axis["name"] for axis in replay["axes"]] == ["linear_x", "linear_y", "angular_z"]
        predicted, recorded = np.array(replay["predicted"]), np.array(replay["recorded"])
        turning = np.sign(recorded[:, 2])
        assert set(turning[:TURNING]) == {1.0} if "left" in path.name else {-1.0}
        np.testing.assert_allclose(predicted[:TURNING, 2], TURN * turning[:TURNING])
        np.testing.assert_allclose(predicted[:TURNING, :2], 0)
        np.testing.assert_allclose(predicted[TURNING:-1, 0], SPEED, rtol=1e-6)
        np.testing.assert_allclose(predicted[TURNING:, 2], 0)


def test_checkpoint_and_bundle_are_judged_by_their_own_classes(folder: Path, checkpoint: Path, bundle: Path) -> None:
    judged = [
        evaluate(open_predictor(path, Stated(), backend="ort:cpu"), episodes(folder)) for path in (checkpoint, bundle)
    ]
    confusion = judged[0].measures.directions
    assert judged[0].measures.names == EIGHT
    assert confusion.sum() == EPISODES * LENGTH
    turned = (
        confusion[EIGHT.index("TurnL"), EIGHT.index("TurnL")],
        confusion[EIGHT.index("TurnR"), EIGHT.index("TurnR")],
    )
    assert turned == (EPISODES // 2 * TURNING, EPISODES // 2 * TURNING)
    np.testing.assert_array_equal(judged[1].measures.directions, confusion)
    assert judged[0].measures.direction_accuracy.value > 0.9
    assert judged[0].measures.sign_accuracy[2].value > 0.9  # a recorded turn of 0.2 rad/s is a turn


def test_a_whole_prompt_is_not_wrapped_again(checkpoint: Path, bundle: Path) -> None:
    policy, frame = Policy.load(bundle, backend="ort:cpu"), frames(0, 1)[0]
    features = []
    for text in (told("left"), f"<grounding>{told('left')}"):
        policy.reset(text)
        features.append(policy.step(frame).feature)
    np.testing.assert_array_equal(*features)
    spec = load(checkpoint).policy.spec
    assert (spec.prompt_template, spec.pad_to) == ("<grounding>{instruction}", 256)


def test_two_columns_are_enough_for_a_robot_that_does_not_turn(folder: Path, bundle: Path, tmp_path: Path) -> None:
    path = write_episode(tmp_path / "straight.h5", iter(frames(0, 1)), commands(0), instruction=told("left"), fps=6.0)
    with h5py.File(path, "r+") as file:
        del file["actions"]
        file["actions"] = commands(0)[:, :2]
    found = evaluate(open_predictor(bundle, Stated(), backend="ort:cpu"), [path, *episodes(folder)[:1]])
    assert found.axes == ("linear_x", "linear_y", "angular_z")
    assert found.measures.frames == 2 * LENGTH
