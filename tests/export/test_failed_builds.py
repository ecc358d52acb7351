"""Builds that must not give a bundle: engines that differ from the checkpoint, and inputs that cannot be built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle.errors import (
    BaseWeightsError,
    BundleError,
    CheckpointError,
    ConfigError,
    EpisodeError,
    JetvlaError,
    ParityError,
    PromptError,
    UnsupportedPolicyError,
)
from bundle.manifest import Manifest
from export import builder
from export.build_engines import main
from export.pipeline import BuildConfig, build
from export.weights import MergedWeights
from runtime.policy import Policy
from tests.checkpoints import GO_LEFT, configs, rewrite
from tests.export.builds import QUICK, assert_complete, change, command_line, contents, left_over, quietly
from tests.export.conftest import MakeSynthetic
from train.synthetic import SyntheticFiles, SyntheticOptions

UPSTREAM = SyntheticOptions()
FORK = SyntheticOptions(layout="fork", head="velocities")
SEVEN = SyntheticOptions(layout="fork", head="classes", action_dim=7)

# --- verification that fails ----------------------------------------------------------------------------------------------------


def perturb(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    """Let the exporter, and only it, read one tensor wrongly."""
    real = builder.merged_weights

    def merged(loaded: Any) -> MergedWeights:
        weights = real(loaded)
        return MergedWeights({**weights.state, name: weights.state[name] * by}, weights.scaling)

    monkeypatch.setattr(builder, "merged_weights", merged)


@pytest.mark.parametrize(
    ("name", "stage", "existing"),
    [
        ("backbone.vision_model.model.encoder.layers.1.mlp.fc2.weight", "vision", False),
        ("backbone.text_model.model.layers.1.ffn.fc2.weight", "language", True),
        ("act_head.rnn.weight_hh_l1", "action_head", False),
    ],
)
def test_engines_that_differ_are_not_published(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str, existing: bool
) -> None:
    """One weight off by a tenth: FAIL, the report names the stage, and the old bundle stays as it is."""
    out = tmp_path / "policy.bundle"
    config = BuildConfig(checkpoint=upstream.checkpoint, out=out, force=True)
    if existing:
        quietly(change(config, verify_frames=QUICK))
    before = contents(out) if existing else {}
    perturb(monkeypatch, name, 1.1)

    with pytest.raises(ParityError, match="the engines do not do what the checkpoint does") as caught:
        build(config)

    assert f"hint: no bundle was written; {out}.failed/parity.json says which stage differs." in str(caught.value)
    assert left_over(tmp_path) == (["policy.bundle"] if existing else []) + ["policy.bundle.failed"]
    assert (contents(out) if existing else {}) == before
    failed = tmp_path / "policy.bundle.failed"
    assert sorted(contents(failed)) == ["build.log", "parity.json"]
    parity = json.loads((failed / "parity.json").read_text())
    assert parity["verdict"] == "FAIL"
    errors = {key: value["max_error"] for key, value in parity["stages"].items()}
    assert max(errors, key=lambda key: errors[key]) == stage
    assert errors[stage] > 1e-3
    assert all(error < 1e-3 for key, error in errors.items() if key != stage)
    log = (failed / "build.log").read_text()
    assert "[4/5] Verify" in log
    assert "the engines do not do what the checkpoint does" in log
    assert str(caught.value) in log


def test_a_weight_off_by_a_hundredth_of_a_percent_is_seen(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "policy.bundle"
    perturb(monkeypatch, "backbone.text_model.model.layers.0.ffn.fc1.weight", 1.0001)
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=out))
    seen = Manifest.load(out).parity.feature_max_error
    monkeypatch.undo()
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=out, force=True))
    assert seen > 5 * Manifest.load(out).parity.feature_max_error


PERTURBED = """
import runpy, sys
from export import builder
from export.weights import MergedWeights

real = builder.merged_weights

def merged(loaded):
    weights = real(loaded)
    name = "act_head.rnn.bias_hh_l0"
    return MergedWeights({**weights.state, name: weights.state[name] + 1}, weights.scaling)

builder.merged_weights = merged
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_failed_verification_is_exit_code_three(upstream: SyntheticFiles, tmp_path: Path) -> None:
    """Through the real command line."""
    out = tmp_path / "policy.bundle"
    done = command_line(upstream.checkpoint, "--out", out, "--verify-frames", QUICK, program=PERTURBED)
    assert done.returncode == 3, done.stderr
    assert "error: ParityError" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert left_over(tmp_path) == ["policy.bundle.failed"]


# --- what cannot be built -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A build that must fail: the checkpoint and its edit, options, the error and words of its text."""

    name: str
    error: type[JetvlaError]
    texts: tuple[str, ...]
    options: SyntheticOptions = UPSTREAM
    config: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[dict[str, Any]], object] | None = None


def set_nan(content: dict[str, Any]) -> None:
    content["state_dict"]["model.act_head.rnn.bias_ih_l0"][3] = torch.nan


def drop_base_weights(content: dict[str, Any]) -> None:
    for name in [name for name in content["state_dict"] if ".vision_model." in name]:
        del content["state_dict"][name]


def other_rank(content: dict[str, Any]) -> None:
    configs(content)["train_setup"]["lora_r"] = 16


def other_window(content: dict[str, Any]) -> None:
    configs(content)["window_size"] = "eight"


def diffusion(content: dict[str, Any]) -> None:
    configs(content)["act_head"]["type"] = "DiffusionHead"


def other_size(content: dict[str, Any]) -> None:
    configs(content)["image_size"] = 336


REFUSALS = (
    Refusal("NaN weights", CheckpointError, ("holds NaN or infinite weights", "act_head.rnn.bias_ih_l0"), edit=set_nan),
    Refusal(
        "missing weights",
        BaseWeightsError,
        ("holds no weights", "expected: model.safetensors"),
        SyntheticOptions(base_weights=False),
        edit=drop_base_weights,
    ),
    Refusal("another run's config", ConfigError, ("disagree about the LoRA rank", "lora_r 16"), edit=other_rank),
    Refusal("an unusable config", ConfigError, ("lacks a usable `window_size`", "'eight'"), edit=other_window),
    Refusal("another head", UnsupportedPolicyError, ("unknown action head 'DiffusionHead'",), edit=diffusion),
    Refusal("another image size", ConfigError, ("disagree about the image size", "image_size 336"), edit=other_size),
    Refusal("unstated packing", ConfigError, ("nothing in it tells how its rows were packed", "--packing"), FORK),
    Refusal(
        "a packing without a layout",
        ConfigError,
        ("packing fork_overwrite is not defined",),
        SyntheticOptions(latent=2),
        {"packing": "fork_overwrite"},
    ),
    Refusal(
        "unstated classes",
        ConfigError,
        ("what the 7 classes mean must be stated", "got:      nothing", "--classes Stop F L R FL FR"),
        SEVEN,
        {"packing": "upstream"},
    ),
    Refusal(
        "too few classes",
        ConfigError,
        ("--classes names 2 of 7 classes", "got:      Stop F"),
        SEVEN,
        {"packing": "upstream", "classes": ("Stop", "F")},
    ),
    Refusal(
        "too many names",
        ConfigError,
        ("the action names do not fit the head", "expected: 7 different names"),
        config={"action_names": ("linear_x", "linear_y")},
    ),
    Refusal(
        "an empty range",
        ConfigError,
        ("the action range is empty", "1.0 to -1.0"),
        config={"action_range": (1.0, -1.0)},
    ),
    Refusal(
        "a base that is none",
        BaseWeightsError,
        ("is not a base model", "no config.json"),
        config={"base": Path("/nonexistent")},
    ),
    Refusal("a config that is none", ConfigError, ("does not exist",), config={"config": Path("/nonexistent.json")}),
    Refusal(
        "a tokenizer that is none",
        ConfigError,
        ("does not exist", "expected: a tokenizer.json"),
        config={"tokenizer": Path("/nonexistent.json")},
    ),
    Refusal(
        "a prompt longer than its padding",
        PromptError,
        ("longer than the padding", "at most 5"),
        config={"pad_prompt_to": 5, "instruction": (GO_LEFT,)},
    ),
    Refusal(
        "an episode that is none", EpisodeError, ("not found",), config={"verify_episode": Path("/nonexistent.h5")}
    ),
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_cannot_be_built_is_exit_code_one_and_leaves_nothing(
    synthetic: MakeSynthetic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: Refusal,
) -> None:
    files = synthetic(refusal.options)
    checkpoint = files.checkpoint
    if refusal.edit is not None:
        checkpoint = rewrite(checkpoint, tmp_path / "edited.ckpt", refusal.edit)
        (tmp_path / "base").symlink_to(files.base)
    out = tmp_path / "out" / "policy.bundle"
    out.parent.mkdir()
    arguments = [str(checkpoint), "--out", str(out)]
    for name, value in refusal.config.items():
        arguments.append(f"--{name.replace('_', '-')}")
        arguments += map(str, value if isinstance(value, tuple) else (value,))
    monkeypatch.setattr(sys, "argv", ["build_engines.py", *arguments])
    assert main() == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"error: {refusal.error.__name__}\n" in shown.err
    for text in (*refusal.texts, "\n\nhint: "):
        assert text in shown.err
    assert left_over(out.parent) == []


@pytest.mark.parametrize("kind", ["missing", "folder", "truncated", "text"])
def test_files_that_are_no_checkpoint(upstream: SyntheticFiles, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "policy.ckpt"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        path.write_bytes(upstream.checkpoint.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="hint: ") as caught:
        build(BuildConfig(checkpoint=path, out=tmp_path / "out" / "policy.bundle"))
    expected = {"missing": "does not exist", "folder": "is a directory"}
    assert expected.get(kind, "is truncated or not a checkpoint") in str(caught.value)
    assert not (tmp_path / "out" / "policy.bundle").exists()


def test_an_unknown_instruction_needs_a_tokenizer(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """Without one, an instruction cannot be built in; token ids still work."""
    files = synthetic(SyntheticOptions())
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(files.base / "config.json", base / "config.json")
    config = BuildConfig(checkpoint=files.checkpoint, base=base, out=tmp_path / "policy.bundle", verify_frames=QUICK)
    with pytest.raises(PromptError, match="cannot tokenise 'Navigate to the gray basket on the left'") as caught:
        build(change(config, instruction=(GO_LEFT,)))
    assert "--base DIR or --tokenizer FILE" in str(caught.value)
    assert left_over(tmp_path) == ["base"]

    quietly(config)
    assert_complete(config.target)
    policy = Policy.load(config.target, "ort:cpu", threads=1)
    with pytest.raises(PromptError, match="cannot tokenise"):
        policy.reset(GO_LEFT)
    policy.reset(token_ids=[0, 5, 6, 7, 2])

    quietly(change(config, instruction=(GO_LEFT,), tokenizer=files.base / "tokenizer.json"))
    assert Manifest.load(config.target).prompt.instructions[0].text == GO_LEFT


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_jetvla_did_not_write_is_not_replaced(upstream: SyntheticFiles, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "precious"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        build(BuildConfig(checkpoint=upstream.checkpoint, out=out, verify_frames=QUICK))
    assert contents(tmp_path) == before


# --- what should be refused in words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_a_tokenizer_that_cannot_be_read(upstream: SyntheticFiles, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text("not JSON")
    config = BuildConfig(checkpoint=upstream.checkpoint, tokenizer=path, out=tmp_path / "policy.bundle")
    with pytest.raises(JetvlaError, match=r"tokenizer\.json"):
        build(config)


def test_an_out_below_a_file(upstream: SyntheticFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JetvlaError, match="file"):
        build(BuildConfig(checkpoint=upstream.checkpoint, out=tmp_path / "file" / "policy.bundle"))


def test_a_checkpoint_that_is_written_to_ends_the_build(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are mapped: they would be other ones, or SIGBUS."""
    path = tmp_path / "own.ckpt"
    shutil.copy(upstream.checkpoint, path)
    writers = []

    def write(*_: object) -> None:
        writers.append(subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'wb').write(b'new')"]))
        time.sleep(60)  # is interrupted

    monkeypatch.setattr(builder, "_export", write)
    out = tmp_path / "policy.bundle"
    with pytest.raises(CheckpointError, match=r"own.ckpt was changed while it was in use"):
        quietly(BuildConfig(checkpoint=path, base=upstream.base, out=out, verify_frames=QUICK))
    assert not out.exists()
    assert writers[0].wait(60) == 0
