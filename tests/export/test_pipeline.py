"""From a checkpoint to a bundle: every public layout, and the recorded policies, give what their manifests state."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from bundle.errors import ConfigError, PromptError
from bundle.manifest import Manifest, Precision
from episodes.synthetic import write_synthetic
from export.console import Reporter
from export.parity import LIMITS
from export.pipeline import STEPS, BuildConfig, build
from export.weights import STAGES
from runtime.policy import Policy
from tests.checkpoints import GO_LEFT, GO_RIGHT, rewrite
from tests.export.builds import (
    QUICK,
    assert_complete,
    change,
    contents,
    edit_weight,
    left_over,
    quietly,
    report,
    weight_files,
)
from tests.export.conftest import Built, MakeSynthetic
from tests.oracle import CASES, oracle_case
from tests.policies import NORMS, PAD
from train.checkpoint import load, save_small
from train.policy import CLIP_MEAN, CLIP_STD, ReferenceStream
from train.synthetic import SyntheticFiles, SyntheticOptions

TEXT_LORA = "backbone.text_model.model.layers.1.ffn.fc1.lora_B.default.weight"


@dataclass(frozen=True)
class Layout:
    """A checkpoint, the options it is built with, and what the manifest must state then."""

    name: str
    options: SyntheticOptions
    config: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


FORK = SyntheticOptions(layout="fork", head="velocities")
ARM = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
LAYOUTS = (
    Layout(
        "upstream",
        SyntheticOptions(),
        states={
            "action.head": "actions_gripper",
            "action.names": ARM,
            "action.normalized": True,
            "action.minimum": -0.65,
            "action.maximum": 0.65,
            "prompt.packing": "upstream",
            "prompt.packing_source": "inferred: upstream's trainer has no other layout",
            "prompt.pad_to": None,
            "prompt.instructions": (),
            "preprocessing.resize": "bicubic",
            "preprocessing.mean": CLIP_MEAN,
            "preprocessing.std": CLIP_STD,
            "preprocessing.cameras": ("static",),
            "x_attn_causal": False,
            "precision": "fp32",
            "source.checkpoint_format": "lightning",
            "source.lora_modules": 35,
            "dimensions.window": 8,
            "dimensions.chunk": 10,
            "dimensions.latent": 1,
        },
    ),
    Layout(
        "two velocities and a gripper",
        SyntheticOptions(action_dim=3),
        states={
            "action.names": ("linear_x", "linear_y", "gripper"),
            "action.units": ("m/s", "m/s", "-1 or 1"),
        },
    ),
    Layout(
        "fork, upstream packing",
        FORK,
        {"packing": "upstream"},
        {
            "action.head": "velocities",
            "action.names": ("linear_x", "linear_y"),
            "prompt.packing": "upstream",
            "prompt.packing_source": "stated by the user",
        },
    ),
    Layout(
        "fork, overwritten",
        FORK,
        {"packing": "fork_overwrite", "instruction": (GO_LEFT, GO_RIGHT)},
        {"prompt.packing": "fork_overwrite"},
    ),
    Layout(
        "nine classes",
        SyntheticOptions(layout="fork", head="classes"),
        {"packing": "upstream", "class_speed": 0.5},
        {
            "action.head": "classes",
            "action.normalized": False,
            "action.class_names": ("Stop", "F", "B", "L", "R", "FL", "FR", "BL", "BR"),
            "action.class_values": (
                (0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5),
                (0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5),
            ),
        },
    ),
    Layout(
        "six classes",
        SyntheticOptions(layout="fork", head="classes", action_dim=6),
        {"packing": "upstream", "classes": ("Stop", "F", "L", "R", "FL", "FR")},
        {"action.class_names": ("Stop", "F", "L", "R", "FL", "FR"), "action.names": ("linear_x", "linear_y")},
    ),
    Layout(
        "eight classes, as the lab orders them",
        SyntheticOptions(layout="fork", head="classes", action_dim=8),
        {"packing": "upstream"},
        {
            "action.class_names": ("Stop", "F", "L", "R", "FL", "FR", "TurnL", "TurnR"),
            "action.names": ("linear_x", "linear_y", "angular_z"),
            "action.units": ("m/s", "m/s", "rad/s"),
            "action.classes_source": "assumed: the lab's order of 8",
            "prompt.template_source": "assumed: upstream's text",
        },
    ),
    Layout(
        "eight classes, told the instruction",
        SyntheticOptions(layout="fork", head="classes", action_dim=8, told=True),
        {"packing": "upstream", "prompt_template": "<grounding>{instruction}", "pad_prompt_to": 256},
        {"prompt.told": True, "prompt.pad_to": 256},
    ),
    Layout(
        "eight classes, told what their rows do not show",
        SyntheticOptions(layout="fork", head="classes", action_dim=8, told=True, lora=False),
        {"packing": "fork_overwrite"},
        {"prompt.told": True},
    ),
    Layout(
        "seven classes with their commands",
        SyntheticOptions(layout="fork", head="classes", action_dim=7),
        {
            "packing": "upstream",
            "classes": ("Stop", "F", "B=-0.2,0", "arc=0.5,0,0.3", "TurnL=0,0,0.4", "L", "R"),
            "class_speed": 1.0,
            "prompt_template": "<grounding>{instruction}",
            "pad_prompt_to": 256,
            "instruction": (GO_LEFT,),
        },
        {
            "action.class_values": (
                (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.2, 0.0, 0.0), (0.5, 0.0, 0.3), (0.0, 0.0, 0.4), (0.0, 1.0, 0.0),
                (0.0, -1.0, 0.0),
            ),
            "action.classes_source": "stated by the user",
            "prompt.template": "<grounding>{instruction}",
            "prompt.pad_to": 256,
            "prompt.template_source": "stated by the user",
        },
    ),
    Layout(
        "hand camera",
        SyntheticOptions(hand_camera=True),
        states={"preprocessing.cameras": ("hand", "static")},
    ),
    Layout("RoboVLMs' own resampler", SyntheticOptions(vision_resampler=True)),
    Layout(
        "RoboVLMs' own resampler, where the fork's rows go without",
        SyntheticOptions(layout="fork", head="velocities", vision_resampler=True),
        {"packing": "fork_overwrite"},
    ),
    Layout(
        "two action tokens, pooled",
        SyntheticOptions(latent=2, pooling=True),
        states={"dimensions.latent": 2},
    ),
    Layout(
        "causal resampler",
        SyntheticOptions(),
        {"x_attn_causal": True},
        {"x_attn_causal": True, "x_attn_causal_source": "stated by the user"},
    ),
    Layout("no adapters", SyntheticOptions(lora=False), states={"source.lora_modules": 0}),
    Layout("old peft", SyntheticOptions(peft="old"), states={"source.lora_modules": 35}),
    Layout(
        "padded prompts",
        SyntheticOptions(),
        {"pad_prompt_to": 40, "instruction": (GO_LEFT,)},
        {"prompt.pad_to": 40},
    ),
    Layout(
        "as the fork's loader",
        FORK,
        {"packing": "fork_overwrite", "resize": "bilinear", "pixel_norm": "none", "action_range": (-1.15, 1.15)},
        {
            "preprocessing.resize": "bilinear",
            "preprocessing.mean": (0.0, 0.0, 0.0),
            "preprocessing.std": (1.0, 1.0, 1.0),
            "action.normalized": True,
            "action.minimum": -1.15,
            "action.maximum": 1.15,
        },
    ),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_becomes_a_bundle_that_does_what_its_checkpoint_does(
    built: Built, synthetic: MakeSynthetic, layout: Layout
) -> None:
    """PASS, the manifest states what was asked, and camera frames through the runtime give the reference's actions."""
    bundle = built(layout.options, **layout.config)
    manifest = assert_complete(bundle)
    assert manifest.parity.verdict == report(bundle, "parity.json")["verdict"] == "PASS"
    # Two episodes, and two frames for each bucket that their prompts leave out.
    glances = 2 * (len(manifest.prompt.buckets) - 1)
    assert manifest.parity.frames == 2 * manifest.dimensions.window + 6 + glances
    for path, expected in layout.states.items():
        value: Any = manifest
        for part in path.split("."):
            value = getattr(value, part)
        assert value == expected, path

    policy = Policy.load(bundle, "ort:cpu", threads=1)
    policy.reset(GO_LEFT)
    reference = reference_stream(synthetic(layout.options), layout)
    cameras = 2 if layout.options.hand_camera else 1
    rng = np.random.default_rng(0)
    for _ in range(3):
        views = rng.integers(0, 256, (cameras, 90, 160, 3), np.uint8)
        expected = reference.step(np.stack([resize(view, layout) for view in views]))
        chunk = policy.step(views[-1], hand=views[0] if layout.options.hand_camera else None)
        np.testing.assert_allclose(chunk.feature, expected.feature, atol=1e-4)
        np.testing.assert_allclose(chunk.normalized, expected.action, atol=1e-4)


def reference_stream(files: SyntheticFiles, layout: Layout) -> ReferenceStream:
    """The checkpoint's own forward, under the conventions that the test asked for."""
    stated = layout.config
    loaded = load(
        files.checkpoint, packing=stated.get("packing", "auto"), x_attn_causal=stated.get("x_attn_causal", False)
    )
    tokenizer = Tokenizer.from_file(str(files.base / "tokenizer.json"))
    template = stated.get("prompt_template", "<grounding>An image of a robot {instruction}")
    ids = tokenizer.encode(template.format(instruction=GO_LEFT)).ids
    hidden = max(0, stated.get("pad_prompt_to", 0) - len(ids))
    mean, std = NORMS[stated.get("pixel_norm", "clip")]
    mask = np.array([1] * len(ids) + [0] * hidden)
    return ReferenceStream(loaded.policy, np.array(ids + [PAD] * hidden), mask, mean=mean, std=std)


def resize(view: NDArray[np.uint8], layout: Layout) -> NDArray[np.uint8]:
    name = layout.config.get("resize", "bicubic")
    return np.asarray(Image.fromarray(view).resize((224, 224), Image.Resampling[name.upper()]))


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in CASES), ("lora_7d", "fp16"), ("fork2dof_stock", "fp16")]
)
def test_recorded_policies_become_bundles_that_repeat_the_recording(
    tmp_path: Path, name: str, precision: Precision
) -> None:
    """The reference implementation's own numbers, frame by frame through a reset, from camera frame to command."""
    case = oracle_case(name)
    out = tmp_path / "case.bundle"
    quietly(BuildConfig(checkpoint=case.checkpoint, out=out, packing=case.packing, precision=precision))
    manifest = assert_complete(out)
    assert manifest.parity.verdict == "PASS"
    policy = Policy.load(out, "ort:cpu", threads=1)
    ids = case.inputs["win0.input_ids"][0].tolist()
    expected = case.chunks("stream", "arm_chunk", "gripper_logit_chunk")
    resets = {0, *case.inputs["stream.reset_before"].tolist()}
    # Tiny policies in fp16 are promoted to fp32 until half the limit is left.
    tolerance = 5e-5 if precision == "fp32" else LIMITS["fp16"].action_error_pass
    errors = []
    for step, index in enumerate(case.inputs["stream.frame_index"]):
        if step in resets:
            policy.reset(token_ids=ids)
        chunk = policy.step(case.inputs["frames_u8"][0][index])
        errors.append(np.abs(chunk.normalized - expected[step].reshape(chunk.normalized.shape)).max())
        if "stream.final_action" in case.expected:
            final = case.expected["stream.final_action"][step]
            np.testing.assert_allclose(chunk.values[0], final, atol=tolerance)
    assert max(errors) < tolerance
    assert expected.std(0).max() > 1e-2


def test_instructions_work_with_and_without_a_tokenizer(built: Built, synthetic: MakeSynthetic) -> None:
    """Those given at build time stand in the manifest; the tokenizer serves all others."""
    bundle = built(FORK, packing="fork_overwrite", instruction=(GO_LEFT, GO_RIGHT))
    prompt = Manifest.load(bundle).prompt
    assert [item.text for item in prompt.instructions] == [GO_LEFT, GO_RIGHT]
    left, right = (item.token_ids for item in prompt.instructions)
    assert (left[0], left[-1]) == (0, 2)
    assert sum(a != b for a, b in zip(left, right, strict=True)) == 1
    shipped = (bundle / "tokenizer.json").read_bytes()
    assert shipped == (synthetic(FORK).base / "tokenizer.json").read_bytes()
    policy = Policy.load(bundle, "ort:cpu", threads=1)
    frame = np.zeros((48, 64, 3), np.uint8)
    for instruction in (GO_LEFT, "Pick up the red block"):
        policy.reset(instruction)
        assert np.isfinite(policy.step(frame).values).all()


def test_an_untrained_policy_is_built_with_a_warning(upstream: SyntheticFiles, tmp_path: Path) -> None:
    def untrain(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        for name in state:
            if ".lora_B." in name or name.endswith("action_token"):
                state[name].zero_()

    path = rewrite(upstream.checkpoint, tmp_path / "untrained.ckpt", untrain)
    options = {"base": upstream.base, "out": tmp_path / "policy.bundle", "verify_frames": QUICK}
    log = quietly(BuildConfig(checkpoint=path, **options))  # type: ignore[arg-type]
    assert "warning: every LoRA-B is zero: this adapter was never trained, and does nothing." in log
    assert "warning: the action token is zero: this policy was never trained." in log
    assert "warning" not in quietly(BuildConfig(checkpoint=upstream.checkpoint, **options))  # type: ignore[arg-type]


def test_what_is_left_out_of_a_checkpoint_is_said(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """The lab's heads for boxes, weights of losses, upstream's CLIP; and a resampler that the row goes without takes no room."""
    lossy = {
        "grounding_bbox_head.0.weight": torch.zeros(8, 8),
        "grounding_bbox_head.3.bias": torch.zeros(4),
        "grounding_coarse_head.3.weight": torch.zeros(3, 8),
        "loss_balance_logits": torch.zeros(3),
        "loss_balance_ema": torch.ones(3),
        "model.clip_norm_head.lang_fc.weight": torch.zeros(2, 2),
    }
    files = synthetic(dataclasses.replace(FORK, vision_resampler=True))
    path = rewrite(files.checkpoint, tmp_path / "aux.ckpt", lambda content: content["state_dict"].update(lossy))
    options: dict[str, Any] = {"base": files.base, "packing": "fork_overwrite", "x_attn_causal": False}
    log = quietly(BuildConfig(checkpoint=path, out=tmp_path / "aux.bundle", verify_frames=QUICK, **options))
    for said in (
        "grounding_bbox_head (2 tensors)",
        "grounding_coarse_head (1 ",
        "loss_balance_ema (1 ",
        "clip_norm_head (1 ",
    ):
        assert said in log
    assert "warning: vision_resampler (69 tensors) is left out" in log
    manifest = assert_complete(tmp_path / "aux.bundle")
    assert lossy.keys() < set(manifest.source.ignored_keys)
    plain = BuildConfig(
        checkpoint=synthetic(FORK).checkpoint, out=tmp_path / "plain.bundle", verify_frames=QUICK, **options
    )
    assert "left out" not in quietly(plain)
    without = assert_complete(tmp_path / "plain.bundle")
    assert manifest.stages["vision"].weight_bytes == without.stages["vision"].weight_bytes


def test_the_forks_resampler_is_asked_about(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    config = BuildConfig(
        checkpoint=synthetic(FORK).checkpoint, packing="upstream", out=tmp_path / "policy.bundle", verify_frames=QUICK
    )
    assert "warning: x_attn_causal False (assumed" in quietly(config)
    assert "warning" not in quietly(change(config, x_attn_causal=False))


@pytest.mark.parametrize("pad_to", [None, 256])
def test_the_longest_promised_prompt_fits(upstream: SyntheticFiles, tmp_path: Path, pad_to: int | None) -> None:
    """64 tokens by default, special ones included; in a padded prompt `</s>` stays visible."""
    out = tmp_path / "policy.bundle"
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=out, pad_prompt_to=pad_to, verify_frames=QUICK))
    policy = Policy.load(out, "ort:cpu", threads=1)
    ids = [0, *range(20, 82), 2]
    assert len(ids) == 64
    policy.reset(token_ids=ids + [PAD] * ((pad_to or 64) - 64))
    assert np.isfinite(policy.step(np.zeros((48, 64, 3), np.uint8)).values).all()
    with pytest.raises(PromptError, match="too long for this bundle"):
        policy.reset(token_ids=[0, *range(20, 100), 2])


def test_jetvlas_own_small_format_becomes_the_same_bundle(upstream: SyntheticFiles, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    save_small(load(upstream.checkpoint), small)
    out, other = tmp_path / "small.bundle", tmp_path / "lightning.bundle"
    quietly(BuildConfig(checkpoint=small, base=upstream.base, out=out, verify_frames=QUICK))
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=other, verify_frames=QUICK))
    manifest = assert_complete(out)
    assert manifest.source.checkpoint_format == "jetvla"
    assert manifest.source.base_sha256
    for stage, (_, content) in weight_files(other).items():
        assert weight_files(out)[stage][1] == content


def test_a_recorded_episode_can_be_what_is_verified_on(upstream: SyntheticFiles, tmp_path: Path) -> None:
    """More frames than the episode has are taken in a circle."""
    episode = write_synthetic(tmp_path, "v1", side="left", seed=0, height=48, width=64, length=4)
    out = tmp_path / "policy.bundle"
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=out, verify_episode=episode, verify_frames=10))
    manifest = assert_complete(out)
    assert (manifest.parity.verdict, manifest.parity.frames) == ("PASS", 22)
    with np.load(out / "golden.npz") as golden:
        frames = golden["frames"]
    assert frames.shape == (1, 224, 224, 3)
    # A drawn scene, not noise: neighbouring pixels are mostly equal.
    assert (np.diff(frames[0].astype(int), axis=1) == 0).mean() > 0.5


# --- plans and names ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(
    upstream: SyntheticFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copyfile(upstream.checkpoint, tmp_path / "policy.ckpt")
    config = BuildConfig(checkpoint=checkpoint, base=upstream.base, out=tmp_path / "deep" / "policy.bundle")
    build(change(config, dry_run=True), Reporter(STEPS))
    shown = capsys.readouterr().err
    assert shown.count(" build ") == len(STAGES)
    assert "cached" not in shown
    assert "dry run: nothing was written." in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.ckpt"]

    quietly(change(config, verify_frames=QUICK))
    edit_weight(config.checkpoint, TEXT_LORA)
    before = contents(config.target)
    build(change(config, dry_run=True, verify_frames=QUICK), Reporter(STEPS))
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    states = {row[0]: row[-1] for row in rows if row and row[0] in STAGES}
    assert states == {"vision": "cached", "language": "build", "action_head": "cached"}
    assert contents(config.target) == before


def test_without_out_the_bundle_is_named_after_the_checkpoint(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = build(BuildConfig(checkpoint=upstream.checkpoint, verify_frames=QUICK))
    assert path == Path("epoch=0-step=2.bundle")
    assert left_over(tmp_path) == ["epoch=0-step=2.bundle"]
    assert_complete(tmp_path / path)


def test_the_labs_config_says_what_its_loader_did(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """Its NavDataset since V5 puts `<grounding>` before the sentence and pads; the log says so."""
    files = synthetic(SyntheticOptions(layout="fork", head="classes", action_dim=8))
    settings = load(files.checkpoint, packing="upstream").config
    settings |= {"train_dataset": {"type": "NavDataset", "num_classes": 8, "grounding_prefix": True}}
    lab = tmp_path / "lab.json"
    lab.write_text(json.dumps(settings))
    out = tmp_path / "policy.bundle"
    log = quietly(
        BuildConfig(checkpoint=files.checkpoint, config=lab, out=out, packing="upstream", verify_frames=QUICK)
    )
    prompt, action = assert_complete(out).prompt, Manifest.load(out).action
    assert (prompt.template, prompt.pad_to) == ("<grounding>{instruction}", 256)
    assert prompt.template_source == "read from the config: NavDataset, grounding_prefix"
    assert action.classes_source == "assumed: the order of NavDataset of V5"
    assert "classes Stop=0,0 F=1.15,0 L=0,1.15" in log.replace("\n", " ")
    settings["train_dataset"]["num_classes"] = 6
    lab.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="what the 8 classes mean must be stated") as caught:
        quietly(BuildConfig(checkpoint=files.checkpoint, config=lab, out=tmp_path / "b", packing="upstream"))
    assert "labels 6 classes" in str(caught.value)


def test_a_policy_without_words_is_built_and_run_without(upstream: SyntheticFiles, tmp_path: Path) -> None:
    out = tmp_path / "silent.bundle"
    silent = BuildConfig(
        checkpoint=upstream.checkpoint, out=out, prompt_template="<grounding>", instruction=("",), verify_frames=QUICK
    )
    assert "whatever the robot is told, the policy does the same" in quietly(silent).replace("\n", " ")
    policy = Policy.load(out, "ort:cpu", threads=1)
    policy.reset("")
    assert np.isfinite(policy.step(np.zeros((48, 64, 3), np.uint8)).values).all()
    with pytest.raises(PromptError, match="trained without words"):
        policy.reset(GO_LEFT)
    with pytest.raises(PromptError, match="the instruction is empty"):
        quietly(BuildConfig(checkpoint=upstream.checkpoint, out=tmp_path / "b", instruction=("",)))
    with pytest.raises(ConfigError, match="the prompt template is not usable"):
        quietly(BuildConfig(checkpoint=upstream.checkpoint, out=tmp_path / "b", prompt_template="{go}"))
