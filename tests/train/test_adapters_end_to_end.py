"""Adapters in unusual places, from training to a bundle: what trained is what the checkpoint holds and what drives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from episodes.reader import open_episode
from export.engine_options import EngineOptions
from export.pipeline import BuildConfig, build
from runtime.policy import Policy
from runtime.replay import replay
from tests.train.runs import RunFiles
from train.checkpoint import load
from train.evaluation import evaluate
from train.keys import lora_modules
from train.launch import launch
from train.load_config import load_run_config
from train.lora_targets import adapted_modules
from train.predictors import Stated, open_predictor
from train.robovlms_config import from_robovlms
from train.run_config import LoraConfig

CASES: list[dict[str, Any]] = [
    {"targets": "vision", "r": 2, "alpha": 4.0},
    {
        "targets": r"(vision_model|image_to_text_projection)\..+\.(q_proj|v_proj|k_proj|out_proj|fc1|fc2)",
        "r": 2,
        "alpha": 4.0,
    },
    {"targets": ["q_proj", "fc2"], "layers": 1, "r": 2, "alpha": 4.0, "bias": "lora_only"},
]


@pytest.mark.parametrize(
    ("lora", "besides"),
    [
        *((lora, ()) for lora in CASES),
        (CASES[1], ("train_projection",)),
        (CASES[0], ("train_vision", "train_projection")),
    ],
    ids=["vision", "expression", "last layer", "with its projection", "with all that they stand on"],
)
def test_train_build_and_replay(
    run_files: RunFiles, tmp_path: Path, lora: dict[str, Any], besides: tuple[str, ...]
) -> None:
    settings = {"model.lora": lora, "loop.epochs": 1, "loop.max_steps": 3} | {f"model.{key}": True for key in besides}
    config = load_run_config(run_files.config(tmp_path / "run.json", settings)).config
    done = launch(tmp_path / "run.json", console=Console(quiet=True))
    assert done.outcome is not None
    assert done.outcome.last is not None

    loaded = load(done.outcome.last)
    adapted = adapted_modules(loaded.base.kosmos, config.model.lora)
    held = load_file(done.outcome.last)
    assert set(lora_modules(held)) == set(loaded.policy.adapted) == set(adapted)
    if not besides:
        biases = {name for name in held if name.endswith("bias") and name.startswith("backbone.")}
        expected = {f"backbone.{name}.bias" for name in adapted} if lora.get("bias") == "lora_only" else set()
        assert biases == expected
    read = from_robovlms(loaded.config, origin="ckpt")[0]["model"]["lora"]
    again = LoraConfig(targets=read["targets"], layers=read.get("layers"))
    assert adapted_modules(loaded.base.kosmos, again) == adapted

    bundle = build(
        BuildConfig(
            checkpoint=done.outcome.last,
            out=tmp_path / "p.bundle",
            engines=EngineOptions(tensorrt="off"),
            verify_frames=6,
        )
    )
    path = min(run_files.episodes.glob("*.h5"))
    judged = evaluate(open_predictor(done.outcome.last, Stated()), [path])
    with open_episode(path) as episode:
        found = replay(Policy.load(bundle, "ort:cpu"), episode)
    np.testing.assert_allclose(found.predicted, judged.episodes[0].predicted, atol=1e-3)
