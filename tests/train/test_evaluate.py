"""One ruler: a checkpoint and the bundle built from it get the same numbers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from bundle.errors import BackendError, ConfigError, EpisodeError
from bundle.manifest import Action
from episodes.instruction import sentence
from episodes.reader import open_episode
from episodes.synthetic import write_synthetic
from export.engine_options import EngineOptions
from export.pipeline import BuildConfig, build
from tests.train.runs import RunFiles
from train.action_meaning import action_of
from train.checkpoint import load
from train.evaluate import main as evaluate_main
from train.evaluation import episode_paths, evaluate
from train.evaluation_view import plot, render
from train.load_config import load_run_config
from train.predictors import Stated, open_predictor
from train.run_checkpoints import checkpoint_config, save_policy
from train.run_config import DataConfig, SourceConfig
from train.run_setup import facts_of, gather
from train.split import Split, save_split
from train.trainable import build_policy

EVALUATE = Path(__file__).resolve().parents[2] / "train" / "evaluate.py"


def checkpoint(run_files: RunFiles, folder: Path, settings: dict[str, Any]) -> Path:
    """An untrained policy with a head that has opinions, as a run would write it."""
    gathered = gather(load_run_config(run_files.config(folder / "run.json", settings)))
    policy = build_policy(gathered.config, gathered.base, action_range=gathered.action_range)
    with torch.no_grad():
        policy.action_token.normal_(generator=torch.Generator().manual_seed(0))
        for name, parameter in policy.act_head.named_parameters():
            if "mlp" in name or "logits" in name:
                parameter.mul_(3)
    facts = facts_of(gathered)
    path = folder / "policy.safetensors"
    save_policy(path, policy, checkpoint_config(gathered.config, policy, facts, base=str(run_files.base)), facts)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"data.resize": "bicubic", "data.pixel_norm": "none"},
        {"model.head": "classes"},
        {"data.actions": ["linear_x", "linear_y", "angular_z"]},
        {"model.head": "actions_gripper", "model.action_dim": 7},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_checkpoint_and_bundle_get_the_same_numbers(
    run_files: RunFiles, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = checkpoint(run_files, tmp_path, settings)
    bundle = build(
        BuildConfig(checkpoint=path, out=tmp_path / "p.bundle", engines=EngineOptions(tensorrt="off"), verify_frames=6)
    )
    episodes = sorted(run_files.episodes.glob("*.h5"))[:4]

    judged = [
        evaluate(open_predictor(each, Stated(), backend="ort:cpu"), episodes, swap_words=True)
        for each in (path, bundle)
    ]

    first, second = (each.as_json() for each in judged)
    for played, same in zip(judged[0].episodes, judged[1].episodes, strict=True):
        np.testing.assert_allclose(played.predicted, same.predicted, atol=1e-3)
    assert first["axes"] == second["axes"]
    assert first["units"] == second["units"]
    assert first["directions"] == second["directions"]
    assert first["swapped_words"]["mean_change"] == pytest.approx(second["swapped_words"]["mean_change"], abs=1e-3)
    assert set(first["by_instruction"]) == {sentence("v1", "left"), sentence("v1", "right")}


class Scripted:
    """A predictor that plays what it is given: a fake at the edge of models."""

    def __init__(self, chunks: dict[str, NDArray[np.float32]], run_files: RunFiles, folder: Path) -> None:
        spec = load(checkpoint(run_files, folder, {})).policy.spec
        self.action: Action = action_of(spec)
        self.template = spec.prompt_template
        self.description = "scripted"
        self.cameras: tuple[str, ...] = ("static",)
        self._chunks = chunks
        self._now: list[NDArray[np.float32]] = []

    def reset(self, instruction: str) -> None:
        self._now = list(self._chunks[instruction])

    def predict(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self._now.pop(0)

    def check_rate(self, fps: float | None) -> None:
        pass


def test_a_policy_that_knows_the_future_makes_no_error_at_any_horizon(run_files: RunFiles, tmp_path: Path) -> None:
    path = sorted(run_files.episodes.glob("*_left_*.h5"))[0]
    with open_episode(path) as episode:
        actions = episode.actions[:, :2]
    padded = np.concatenate([actions, np.zeros((3, 2), np.float32)])
    chunks = np.stack([padded[start : start + 3] for start in range(len(actions))])
    found = evaluate(Scripted({sentence("v1", "left"): chunks}, run_files, tmp_path), [path])
    np.testing.assert_array_equal(found.horizon_rmse, np.zeros((3, 2)))
    assert found.measures.direction_accuracy.value == 1.0

    shifted = np.roll(chunks, 1, axis=1)
    later = evaluate(Scripted({sentence("v1", "left"): shifted}, run_files, tmp_path), [path])
    assert later.horizon_rmse[1].max() > 0


def test_a_prediction_that_is_not_a_number_is_named(run_files: RunFiles, tmp_path: Path) -> None:
    path = sorted(run_files.episodes.glob("*_left_*.h5"))[0]
    chunks = np.zeros((12, 3, 2), np.float32)
    chunks[7, 0, 1] = np.nan
    with pytest.raises(BackendError, match=f"frame 7 of {path.name}"):
        evaluate(Scripted({sentence("v1", "left"): chunks}, run_files, tmp_path), [path])


def test_words_that_do_not_matter_show(run_files: RunFiles, tmp_path: Path) -> None:
    path = sorted(run_files.episodes.glob("*_left_*.h5"))[0]
    chunks = np.zeros((12, 3, 2), np.float32)
    both = {sentence("v1", "left"): chunks, sentence("v1", "right"): chunks}
    found = evaluate(Scripted(both, run_files, tmp_path), [path], swap_words=True)
    assert found.swapped is not None
    assert found.swapped[1] == 0.0
    both[sentence("v1", "right")] = chunks + 0.5
    found = evaluate(Scripted(both, run_files, tmp_path), [path], swap_words=True)
    assert found.swapped is not None
    assert found.swapped[1] == 0.5


def test_an_episode_without_an_instruction_needs_one(run_files: RunFiles, tmp_path: Path) -> None:
    path = write_synthetic(
        tmp_path, "v1", side="left", seed=1, height=48, width=64, length=12, store_instruction=False
    ).rename(tmp_path / "episode_20251106_120000.h5")
    predictor = open_predictor(checkpoint(run_files, tmp_path, {}), Stated())
    with pytest.raises(EpisodeError, match="has no instruction"):
        evaluate(predictor, [path])
    assert evaluate(predictor, [path], instruction="Go").episodes[0].instruction == "Go"


def test_another_frame_rate_is_said(run_files: RunFiles, tmp_path: Path) -> None:
    predictor = open_predictor(checkpoint(run_files, tmp_path, {}), Stated())
    predictor.check_rate(6.0)
    predictor.check_rate(None)
    with pytest.warns(UserWarning, match=r"30\.0 frames per second, the policy was trained at 6\.0"):
        predictor.check_rate(30.0)


def test_a_bundle_is_told_nothing(tmp_path: Path) -> None:
    tmp_path.joinpath("manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="records how it was trained"):
        open_predictor(tmp_path, Stated(packing="upstream"))


def test_parts_of_a_split(run_files: RunFiles, tmp_path: Path) -> None:
    names = sorted(path.name for path in run_files.episodes.glob("*.h5"))
    save_split(tmp_path / "split.json", Split(train=tuple(names[:6]), val=tuple(names[6:]), seed=0, val_share=0.25))
    pattern = str(run_files.episodes / "*.h5")
    found = episode_paths([pattern], split=tmp_path / "split.json", part="val")
    assert [path.name for path in found] == names[6:]
    assert len(episode_paths([pattern], split=None, part="val")) == len(names)
    with pytest.raises(ConfigError, match="none of the episodes is in the val part"):
        episode_paths([str(run_files.episodes / names[0])], split=tmp_path / "split.json", part="val")
    assert DataConfig(sources=(SourceConfig(files=(pattern,)),)).window == 8


def test_the_command(run_files: RunFiles, tmp_path: Path) -> None:
    path = checkpoint(run_files, tmp_path, {})
    pattern = str(run_files.episodes / "*.h5")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, str(EVALUATE), str(path), pattern, *options]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)

    done = run("--json", "--plot", str(tmp_path / "p.png"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["episodes"] == 8
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    gated = run("--max-rmse", "0.0001", "--min-direction-accuracy", "0")
    assert gated.returncode == 3
    assert "is above 0.0001" in gated.stderr
    assert "direction accuracy" in gated.stdout
    failed = run("--part", "val", "--split", str(tmp_path / "no.json"))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


def test_what_is_shown(run_files: RunFiles, tmp_path: Path) -> None:
    found = evaluate(
        open_predictor(checkpoint(run_files, tmp_path, {}), Stated()), sorted(run_files.episodes.glob("*.h5"))
    )
    console = Console(width=110, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(found))
    text = captured.get()
    assert "linear_x (m/s)" in text
    assert "always saying" in text
    plot(found, tmp_path / "p.png")


def test_a_policy_that_only_turns_is_not_judged_by_directions(
    run_files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"data.actions": ["angular_z"], "data.action_range": [-1.0, 1.0]}
    arguments = [
        str(EVALUATE),
        str(checkpoint(run_files, tmp_path, settings)),
        str(run_files.episodes / "*.h5"),
        "--swap-words",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert evaluate_main() == 0
    shown = capsys.readouterr().out
    assert "direction" not in shown
    assert "right sign" in shown
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", "--min-direction-accuracy", "0"])
    assert evaluate_main() == 3
    found = json.loads(capsys.readouterr().out)
    assert found["direction_accuracy"] is found["majority"] is found["swapped_words"]["direction_accuracy"] is None
    assert found["sign_accuracy"]["angular_z"]["value"] >= 0
    assert "no direction accuracy without linear_x or linear_y" in found["missed"][0]


def test_episodes_of_the_training_set_are_called_so(
    run_files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of a run lies two folders below the run's split."""
    path = checkpoint(run_files, tmp_path, {})
    names = sorted(each.name for each in run_files.episodes.iterdir())
    split = tmp_path / "runs" / "a" / "split.json"
    placed = split.parent / "checkpoints" / "last.safetensors"
    placed.parent.mkdir(parents=True)
    path.rename(placed)
    save_split(split, Split(train=tuple(names[2:]), val=tuple(names[:2])))
    arguments = [str(EVALUATE), str(placed), str(run_files.episodes), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert evaluate_main() == 0
    assert "6 of 8 episodes are what this policy was trained on" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--split", str(split)])
    assert evaluate_main() == 0
    assert "trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["p.gifx", "no/p.png", "p"])
def test_a_plot_that_cannot_be_is_said_before_any_work(
    run_files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("train.evaluate.evaluate", lambda *_, **__: pytest.fail("played"))
    monkeypatch.setattr(
        sys, "argv", [str(EVALUATE), "none.safetensors", str(run_files.episodes), "--plot", str(tmp_path / name)]
    )
    assert evaluate_main() == 1
    assert "cannot plot to" in capsys.readouterr().err
