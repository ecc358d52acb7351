"""Policies of two cameras, from episodes to a bundle: the order of cameras, the caches, and that both are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bundle.errors import ConfigError, EpisodeError
from bundle.manifest import Manifest
from episodes.reader import open_episode
from episodes.resize import squash
from export.engine_options import EngineOptions
from export.pipeline import BuildConfig, build
from runtime.policy import Policy
from runtime.replay import replay
from tests.train.runs import RunFiles, make_run_files
from train.base import read_base_config
from train.checkpoint import load
from train.evaluation import evaluate
from train.fast_forward import TrainingForward
from train.inputs import as_recorded
from train.launch import Launch, launch
from train.load_config import load_run_config
from train.memory import count_parameters, estimate_memory
from train.policy import normalize_frames
from train.predictors import Stated, open_predictor
from train.run_setup import Setup, gather, prepare
from train.sampling import View, Window
from train.synthetic import SyntheticFiles

BOTH = {"data.cameras": ["static", "hand"]}  # in any order; policies have theirs


@pytest.fixture(scope="module")
def hand_files(tmp_path_factory: pytest.TempPathFactory, fork: SyntheticFiles) -> RunFiles:
    return make_run_files(tmp_path_factory.mktemp("hand"), fork, hand=True)


def train(files: RunFiles, folder: Path, settings: dict[str, Any]) -> Launch:
    return launch(files.config(folder / "run.json", settings), console=Console(quiet=True))


def prepared(files: RunFiles, folder: Path, **settings: Any) -> Setup:
    path = files.config(folder / "run.json", {**BOTH, "output.cache": str(folder / "cache"), **settings})
    return prepare(gather(load_run_config(path)), torch.device("cpu"))


@pytest.mark.parametrize("cached", [True, False], ids=["cached tokens", "pixels"])
def test_the_training_forward_is_the_reference_s(hand_files: RunFiles, tmp_path: Path, cached: bool) -> None:
    """The reference takes [B, W, cameras, 3, s, s], the hand first: as upstream inserts it."""
    setup = prepared(hand_files, tmp_path, **{"loop.cache_image_tokens": cached})
    source, policy = setup.val, setup.policy.eval()
    assert (source.tokens is not None) == cached
    batch = source.batch([Window(as_recorded(0), start) for start in (0, 3)])
    frames = source.frames(batch)
    episode = source.episodes[0]
    shown = np.zeros((2, 4, 2, 224, 224, 3), np.uint8)
    with open_episode(episode.path) as opened:
        for row, start in enumerate((0, 3)):
            for step in range(4):
                views = (opened.frame(start + step, "hand"), opened.frame(start + step))
                shown[row, step] = [squash(view, 224, "bilinear") for view in views]
    ids = source.prompts[episode.instruction]
    with torch.no_grad():
        found = TrainingForward(policy)(frames)
        expected = policy(normalize_frames(shown), ids.expand(2, -1), torch.ones(2, len(ids), dtype=torch.int64))
        swapped = policy(
            normalize_frames(shown[:, :, ::-1]), ids.expand(2, -1), torch.ones(2, len(ids), dtype=torch.int64)
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (swapped - expected).abs().max() > 1e-4


def test_views_of_both_cameras_change_alike(hand_files: RunFiles, tmp_path: Path) -> None:
    setup = prepared(hand_files, tmp_path, **{"augment.brightness": 0.5, "augment.mirror": 1.0})
    plain = prepared(hand_files, tmp_path)
    window = [Window(View(0, mirrored=True, draw=3), 0)]
    frames = setup.train.batch(window).frames
    assert frames.shape[1:] == (2, 224, 224, 3)
    recorded = plain.train.store.frames(plain.train.episodes[0])[0]
    for found, original in zip(frames[0], recorded, strict=True):
        assert not np.array_equal(found, original)
        assert setup.train.augmenter is not None
        np.testing.assert_array_equal(found, setup.train.augmenter.apply(np.ascontiguousarray(original[:, ::-1]), 3))


@pytest.mark.parametrize(
    "settings", [{}, {"model.lora.targets": "all", "augment.mirror": 0.5}], ids=["text", "all, mirrored"]
)
def test_from_episodes_to_a_bundle_that_replays(hand_files: RunFiles, tmp_path: Path, settings: dict[str, Any]) -> None:
    done = train(hand_files, tmp_path, {**BOTH, **settings, "output.lightning": True})
    assert done.outcome is not None
    assert done.outcome.last is not None
    assert load(done.outcome.last).config["use_hand_rgb"] is True
    bundle = build(
        BuildConfig(
            checkpoint=done.outcome.last,
            out=tmp_path / "p.bundle",
            engines=EngineOptions(tensorrt="off"),
            verify_frames=6,
        )
    )
    assert Manifest.load(bundle).preprocessing.cameras == ("hand", "static")

    paths = sorted(hand_files.episodes.glob("*.h5"))[:2]
    judged = [
        evaluate(open_predictor(each, Stated(), backend="ort:cpu"), paths)
        for each in (done.outcome.last, done.outcome.last.with_suffix(".ckpt"), bundle)
    ]
    policy = Policy.load(bundle, "ort:cpu")
    for path, *played in zip(paths, *(each.episodes for each in judged), strict=True):
        for other in played[1:]:
            np.testing.assert_allclose(other.predicted, played[0].predicted, atol=1e-3)
        with open_episode(path) as episode:
            np.testing.assert_allclose(replay(policy, episode).predicted, played[0].predicted, atol=1e-3)


def test_episodes_without_a_hand_camera_are_refused(run_files: RunFiles, tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"8 of 8 episodes cannot be trained on(.|\n)*has no hand camera"):
        gather(load_run_config(run_files.config(tmp_path / "run.json", BOTH)))


@pytest.mark.parametrize(
    "settings",
    [
        {"data.cameras": ["hand"]},
        {"data.cameras": []},
        {"data.cameras": ["static", "static"]},
        {**BOTH, "model.packing": "fork_overwrite"},
    ],
)
def test_cameras_that_no_policy_has(run_files: RunFiles, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.cameras"):
        load_run_config(run_files.config(tmp_path / "run.json", settings))


def test_one_camera_of_two_can_be_trained_alone(hand_files: RunFiles, tmp_path: Path) -> None:
    setup = prepared(hand_files, tmp_path, **{"data.cameras": ["static"]})
    assert setup.train.store.frames(setup.train.episodes[0]).shape == (12, 224, 224, 3)


def test_memory_and_rows_count_both(hand_files: RunFiles, tmp_path: Path) -> None:
    found = []
    for cameras in (["static"], ["hand", "static"]):
        path = hand_files.config(tmp_path / "run.json", {"data.cameras": cameras, "model.lora.targets": "all"})
        config, base = load_run_config(path).config, read_base_config(hand_files.base)
        counts = count_parameters(base, config)
        found.append(estimate_memory(base, config, device="cpu", prompt_tokens=9, counts=counts))
    one, two = found
    assert two.slots - one.slots == 64
    assert 1.7 < two.activations / one.activations < 2.3
