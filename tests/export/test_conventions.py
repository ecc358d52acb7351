"""Packing and resampler masking are found from an episode that the policy itself has driven, or the build is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import ConfigError, PromptError
from bundle.manifest import Packing
from bundle.prompt_template import PREFIXED, RAW, TEMPLATES, UPSTREAM
from episodes.writer import write_episode
from export.parity import random_frames
from export.pipeline import BuildConfig
from runtime.actions import denormalize
from runtime.tokenizer import tokenize
from tests.checkpoints import GO_LEFT
from tests.export.builds import QUICK, assert_complete, left_over, quietly
from tests.export.conftest import MakeSynthetic
from tests.policies import NORMS, Norm
from train.action_meaning import action_of
from train.checkpoint import load
from train.policy import ReferenceStream
from train.synthetic import SyntheticFiles, SyntheticOptions

FORK = SyntheticOptions(layout="fork", head="velocities")
PACKINGS: tuple[Packing, ...] = ("upstream", "fork_overwrite")
FRAMES = 10


def drive(
    files: SyntheticFiles,
    folder: Path,
    packing: Packing,
    *,
    x_attn_causal: bool = False,
    norm: Norm = "clip",
    noise: float = 0.0,
    instruction: str | None = GO_LEFT,
    template: str = UPSTREAM,
    pad_to: int = 0,
) -> Path:
    """An episode of what the policy does, under these conventions, in a world of random pictures."""
    policy = load(files.checkpoint, packing=packing, x_attn_causal=x_attn_causal).policy
    ids = np.array(tokenize(GO_LEFT, template, files.base / "tokenizer.json"))
    padding = np.full(max(pad_to - len(ids), 0), policy.kosmos.text_config.pad_token_id)
    mask = np.concatenate([np.ones_like(ids), np.zeros_like(padding)])
    mean, std = NORMS[norm]
    stream = ReferenceStream(policy, np.concatenate([ids, padding]), mask, mean=mean, std=std)
    frames = random_frames(FRAMES, 1, 96, seed=3)[:, 0]
    actions = np.array([stream.step(bicubic(frame)[None]).action[0] for frame in frames])
    actions += noise * np.random.default_rng(0).normal(size=actions.shape).astype(np.float32)
    commands = np.concatenate([actions, np.zeros((FRAMES, 1), np.float32)], axis=1)
    return write_episode(folder / "episode.h5", iter(frames), commands, instruction=instruction, fps=6.0)


def bicubic(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(frame).resize((224, 224), Image.Resampling.BICUBIC))


def config(files: SyntheticFiles, folder: Path, episode: Path, **options: Any) -> BuildConfig:
    return BuildConfig(
        checkpoint=files.checkpoint,
        out=folder / "policy.bundle",
        infer_from=episode,
        verify_frames=QUICK,
        **options,
    )


@pytest.mark.parametrize(("packing", "x_attn_causal"), list(product(PACKINGS, (False, True))))
def test_the_conventions_that_drove_an_episode_are_found(
    synthetic: MakeSynthetic, tmp_path: Path, packing: Packing, x_attn_causal: bool
) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, packing, x_attn_causal=x_attn_causal)
    quietly(config(files, tmp_path, episode))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.packing, manifest.x_attn_causal) == (packing, x_attn_causal)
    assert manifest.prompt.packing_source == manifest.x_attn_causal_source == "inferred from episode.h5"
    assert manifest.parity.verdict == "PASS"


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_resampler_counts_in_the_layout_that_uses_it(
    synthetic: MakeSynthetic, tmp_path: Path, packing: Packing
) -> None:
    files = synthetic(replace(FORK, vision_resampler=True))
    episode = drive(files, tmp_path, packing)
    log = quietly(config(files, tmp_path, episode, x_attn_causal=False))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.packing, manifest.parity.verdict) == (packing, "PASS")
    idle = [name for name in manifest.source.ignored_keys if name.startswith("vision_resampler.")]
    assert bool(idle) == (packing == "fork_overwrite") == ("use_vision_resampler has no effect" in log)


def test_what_is_stated_is_not_inferred(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "fork_overwrite", x_attn_causal=True)
    quietly(config(files, tmp_path, episode, packing="fork_overwrite"))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.packing, manifest.prompt.packing_source) == ("fork_overwrite", "stated by the user")
    assert (manifest.x_attn_causal, manifest.x_attn_causal_source) == (True, "inferred from episode.h5")


def test_an_episode_that_nothing_predicts_is_refused(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """Another robot's episode: every hypothesis is as far from it as the others."""
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "upstream", noise=1.0)
    with pytest.raises(ConfigError, match="does not tell how the policy was trained") as caught:
        quietly(config(files, tmp_path, episode))
    assert "expected: the best below 80% of the next and of a constant" in str(caught.value)
    assert "hint: use an episode of the training set" in str(caught.value)
    assert left_over(tmp_path) == ["episode.h5"]


@pytest.mark.filterwarnings("ignore::episodes.instruction.EpisodeWarning")
def test_an_episode_without_an_instruction_or_a_common_axis_is_refused(
    synthetic: MakeSynthetic, tmp_path: Path
) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "upstream", instruction=None)
    with pytest.raises(PromptError, match="has no instruction"):
        quietly(config(files, tmp_path, episode))
    episode = drive(files, tmp_path, "upstream")
    with pytest.raises(ConfigError, match="have no action in common") as caught:
        quietly(config(files, tmp_path, episode, action_names=("a", "b")))
    assert "--action-names linear_x linear_y" in str(caught.value)
    assert left_over(tmp_path) == ["episode.h5"]


def test_a_policy_trained_without_pixel_normalisation_is_judged_without(
    synthetic: MakeSynthetic, tmp_path: Path
) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "fork_overwrite", norm="none")
    quietly(config(files, tmp_path, episode, pixel_norm="none"))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.packing, manifest.x_attn_causal) == ("fork_overwrite", False)


@pytest.mark.parametrize(("template", "pad_to"), [*((template, 0) for template in TEMPLATES[1:]), (PREFIXED, 256)])
def test_the_text_of_the_prompt_that_drove_an_episode_is_found(
    synthetic: MakeSynthetic, tmp_path: Path, template: str, pad_to: int
) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "upstream", template=template, pad_to=pad_to)
    quietly(config(files, tmp_path, episode, instruction=(GO_LEFT,)))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.template, manifest.prompt.pad_to) == (template, pad_to or None)
    assert (manifest.prompt.packing, manifest.x_attn_causal) == ("upstream", False)
    assert manifest.prompt.template_source == "inferred from episode.h5"
    assert manifest.parity.verdict == "PASS"


def test_a_stated_text_is_not_inferred(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "upstream", template=RAW, pad_to=256)
    quietly(config(files, tmp_path, episode, prompt_template=RAW))
    manifest = assert_complete(tmp_path / "policy.bundle")
    assert (manifest.prompt.template, manifest.prompt.pad_to) == (RAW, 256)
    with pytest.raises(ConfigError, match="does not tell how the policy was trained"):
        quietly(config(files, tmp_path, episode, prompt_template=PREFIXED, pad_prompt_to=0, force=True))


def test_an_episode_that_carries_the_text_can_only_mean_some_texts(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """The stored sentence has `<grounding>` before it: upstream's text would be put around it a second time."""
    files = synthetic(FORK)
    episode = drive(files, tmp_path, "upstream", template=PREFIXED, instruction=f"<grounding>{GO_LEFT}")
    quietly(config(files, tmp_path, episode))
    assert assert_complete(tmp_path / "policy.bundle").prompt.template in (RAW, PREFIXED)


@pytest.mark.parametrize(("told", "x_attn_causal", "template"), [(False, True, UPSTREAM), (True, False, PREFIXED)])
def test_classes_are_judged_by_their_surprise(
    synthetic: MakeSynthetic, tmp_path: Path, told: bool, x_attn_causal: bool, template: str
) -> None:
    """Those of a head that is told the instruction too."""
    files = synthetic(SyntheticOptions(layout="fork", head="classes", action_dim=8, told=told))
    checkpoint = tmp_path / "sure.ckpt"
    records = torch.load(files.checkpoint, weights_only=True)
    for name, tensor in records["state_dict"].items():
        if ".logits." in name:
            tensor *= 100  # as sure of itself as a trained one
    torch.save(records, checkpoint)
    loaded = load(checkpoint, base=files.base, packing="upstream", x_attn_causal=x_attn_causal)
    action = action_of(loaded.policy.spec)
    ids = np.array(tokenize(GO_LEFT, template, files.base / "tokenizer.json"))
    stream = ReferenceStream(loaded.policy, ids, np.ones_like(ids))
    frames = random_frames(FRAMES, 1, 96, seed=3)[:, 0]
    commands = np.array([denormalize(stream.step(bicubic(frame)[None]).action, action)[0] for frame in frames])
    episode = write_episode(tmp_path / "episode.h5", iter(frames), commands, instruction=GO_LEFT, fps=6.0)
    out = tmp_path / "policy.bundle"
    quietly(BuildConfig(checkpoint=checkpoint, base=files.base, out=out, infer_from=episode, verify_frames=QUICK))
    manifest = assert_complete(out)
    assert (manifest.prompt.packing, manifest.x_attn_causal) == ("upstream", x_attn_causal)
    assert manifest.prompt.template == template
    assert manifest.action.class_names == ("Stop", "F", "L", "R", "FL", "FR", "TurnL", "TurnR")
