"""What a build and a running policy must notice: replaced bundles, unverified buckets, keys that are too wide or too narrow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bundle.errors import BundleError, CheckpointError, ConfigError
from bundle.manifest import Manifest
from export import stages
from export.config import BuildConfig
from export.ops import TorchOps
from export.pipeline import build
from export.plan import _STAGE_DIMS
from export.stages import StageDims
from export.to_onnx import stage_dims
from export.weights import MergedWeights
from runtime.policy import Policy
from tests.export.builds import QUICK
from train.checkpoint import load, save_small
from train.policy import CLIP_MEAN, CLIP_STD
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SyntheticFiles:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), SyntheticOptions())


def test_a_policy_notices_that_its_bundle_was_replaced(files: SyntheticFiles, tmp_path: Path) -> None:
    """Its other buckets would be another policy's."""
    out = build(BuildConfig(checkpoint=files.checkpoint, out=tmp_path / "x.bundle", verify_frames=QUICK))
    policy = Policy.load(out, "ort:cpu", threads=1)
    policy.reset("go left")
    other = make_checkpoint(tmp_path / "other", SyntheticOptions(seed=1))
    build(BuildConfig(checkpoint=other.checkpoint, out=out, verify_frames=QUICK))
    assert np.isfinite(policy.step(np.zeros((48, 64, 3), np.uint8)).values).all()
    with pytest.raises(BundleError, match="was replaced while it was in use"):
        policy.reset("go right")


def test_a_policy_follows_its_bundle_not_the_working_folder(
    files: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(BuildConfig(checkpoint=files.checkpoint, out=tmp_path / "x.bundle", verify_frames=QUICK))
    monkeypatch.chdir(tmp_path)
    policy = Policy.load("x.bundle", "ort:cpu", threads=1)
    monkeypatch.chdir("/")
    policy.reset(token_ids=[0, *range(20, 60), 2])
    assert np.isfinite(policy.step(np.zeros((48, 64, 3), np.uint8)).values).all()


def test_every_bucket_is_run_before_it_is_published(
    files: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    reset = Policy.reset

    def spy(self: Policy, *arguments: object, **options: object) -> None:
        reset(self, *arguments, **options)  # type: ignore[arg-type]
        seen.add(self._chain._bucket)

    monkeypatch.setattr(Policy, "reset", spy)
    out = build(BuildConfig(checkpoint=files.checkpoint, out=tmp_path / "x.bundle", verify_frames=QUICK))
    buckets = Manifest.load(out).prompt.buckets
    assert len(buckets) == 2
    assert seen == set(buckets)


@pytest.mark.parametrize("stage", ["vision", "language", "action_head"])
def test_stage_keys_hold_what_the_stage_reads(files: SyntheticFiles, stage: str) -> None:
    """Reading a dimension that is not in the key would let a stale stage be reused."""
    loaded = load(files.checkpoint)
    dims = stage_dims(loaded.policy, loaded.base, mean=CLIP_MEAN, std=CLIP_STD)
    fields = {field.name for field in dataclasses.fields(StageDims)}
    derived = {"patches", "image_tokens", "feature", "hidden"}
    read: set[str] = set()

    class Spy:
        def __getattr__(self, name: str) -> object:
            if name in fields | derived:
                read.add(name)
            return getattr(dims, name)

    import torch

    weights = MergedWeights(loaded.state, 2.0)
    ops, spy = TorchOps(), Spy()
    tokens = torch.zeros(1, dims.image_tokens, dims.width)
    state = torch.zeros(dims.window, dims.head.layers, dims.hidden)
    if stage == "vision":
        stages.vision(ops, weights, spy, torch.zeros(1, 224, 224, 3))  # type: ignore[arg-type]
    elif stage == "language":
        index = torch.full((72,), dims.image_tokens)
        stages.language(ops, weights, spy, 72, tokens, torch.zeros(1, 72, dims.width), index, torch.tensor([70]))  # type: ignore[arg-type]
    else:
        stages.action_head(ops, weights, spy, torch.zeros(1, dims.feature), state, state)  # type: ignore[arg-type]
    assert read <= set(_STAGE_DIMS[stage])


def test_a_convention_of_vision_rebuilds_vision_only(files: SyntheticFiles, tmp_path: Path) -> None:
    config = BuildConfig(checkpoint=files.checkpoint, out=tmp_path / "x.bundle", verify_frames=QUICK)
    build(config)
    build(dataclasses.replace(config, pixel_norm="none"))
    report = json.loads((tmp_path / "x.bundle" / "reports" / "build.json").read_text())
    assert report["reused_stages"] == ["language", "action_head"]


@pytest.mark.parametrize(("key", "value"), [("packing", "fork-overwrite"), ("x_attn_causal", "True")])
def test_a_misspelt_record_is_not_a_default(files: SyntheticFiles, tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "small.safetensors"
    save_small(load(files.checkpoint), path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, {**metadata, key: value})
    with pytest.raises(CheckpointError, match=f"unknown {key}"):
        load(path, base=files.base)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"action_range": (float("-inf"), 1.0)}, "not finite"),
        ({"class_speed": float("nan")}, "not finite"),
        ({"max_prompt_tokens": 100_000}, "too large"),
    ],
)
def test_numbers_that_make_no_bundle(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BuildConfig(checkpoint=Path("a.ckpt"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"action_range": (-0.4, 0.4)}, "gripper at -1"),
        ({"action_names": ("a",) * 7}, "do not fit"),
        ({"classes": ("F",) * 9}, "has no classes"),
    ],
)
def test_meanings_that_contradict_the_head(
    files: SyntheticFiles, tmp_path: Path, options: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        build(BuildConfig(checkpoint=files.checkpoint, out=tmp_path / "x.bundle", **options))  # type: ignore[arg-type]
    assert not (tmp_path / "x.bundle").exists()
