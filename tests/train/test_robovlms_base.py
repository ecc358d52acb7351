"""Training on RoboVLMs weights: a base directory made of a checkpoint's backbone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bundle.errors import BaseWeightsError, CheckpointError, ConfigError
from bundle.hashing import sha256_file
from tests.checkpoints import MakeSynthetic, configs, read
from tests.train.runs import RunFiles
from tests.train.test_robovlms_config import fork_config
from train.checkpoint import load, load_policy, save_small
from train.launch import launch
from train.ledger import read_run
from train.load_config import load_run_config
from train.policy import KosmosPolicy
from train.robovlms_base import StartingPoint, starting_point
from train.run_config import BaseConfig, LoraConfig
from train.run_setup import gather
from train.synthetic import SyntheticFiles, SyntheticOptions
from train.trainable import build_policy

QUERY = "image_to_text_projection.latent_query"
LORA = LoraConfig(targets="all", r=4, alpha=8.0)


def start(weights: Path, model: Path, folder: Path, **base: Any) -> StartingPoint:
    lora = base.pop("lora", LORA)
    return starting_point(BaseConfig(model=str(model), weights=str(weights), **base), lora, root=Path(), folder=folder)


def robovlms_base(weights: Path, model: Path, folder: Path) -> Path:
    return start(weights, model, folder).base


def same_policy(found: Any, reference: Any) -> None:
    """Equal features and actions, the head included."""
    pixels = torch.randn(2, 1, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 60, 9, 12, 2]] * 2)
    with torch.no_grad():
        expected = reference(pixels, ids, torch.ones_like(ids))
        torch.testing.assert_close(found.eval()(pixels, ids, torch.ones_like(ids)), expected, atol=2e-5, rtol=0)


def test_the_merged_backbone_computes_what_the_checkpoint_does(
    synthetic: MakeSynthetic, run_files: RunFiles, tmp_path: Path
) -> None:
    files = synthetic(SyntheticOptions(seed=3))
    base = robovlms_base(files.checkpoint, files.base, tmp_path / "bases")
    config = load_run_config(run_files.config(tmp_path / "run.json", {"model.lora.targets": "none"})).config
    policy = build_policy(config, base, action_range=(-1.0, 1.0)).eval()
    reference = load_policy(files.checkpoint)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 60, 9, 12, 2]] * 2)
    with torch.no_grad():
        expected, found = reference.image_tokens(pixels), policy.image_tokens(pixels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        policy.action_token.copy_(reference.action_token)
        features = (each.features(expected, ids, torch.ones_like(ids)) for each in (reference, policy))
        first, second = features
        torch.testing.assert_close(second, first, atol=2e-5, rtol=0)


def test_it_is_made_once_and_read_by_everything(fork: SyntheticFiles, tmp_path: Path) -> None:
    base = robovlms_base(fork.checkpoint, fork.base, tmp_path)
    made = (base / "model.safetensors").stat().st_mtime_ns
    assert robovlms_base(fork.checkpoint, fork.base, tmp_path) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == made
    assert (base / "tokenizer.json").read_bytes() == (fork.base / "tokenizer.json").read_bytes()
    assert not any(".lora_" in name for name in load_file(base / "model.safetensors"))


def test_another_checkpoint_is_another_base(synthetic: MakeSynthetic, fork: SyntheticFiles, tmp_path: Path) -> None:
    other = synthetic(SyntheticOptions(layout="fork", head="velocities", seed=5))
    assert robovlms_base(fork.checkpoint, fork.base, tmp_path) != robovlms_base(other.checkpoint, other.base, tmp_path)


def test_a_corrected_config_beside_the_checkpoint_is_another_base(fork: SyntheticFiles, tmp_path: Path) -> None:
    """It says how strongly adapters act: what was merged with another scale must not be taken again."""
    content = read(fork.checkpoint)
    config = configs(content)
    weights = tmp_path / "policy.pt"
    torch.save({"state_dict": content["state_dict"]}, weights)
    made = []
    for alpha in (8, 16, 8):
        config["train_setup"]["lora_alpha"] = alpha
        weights.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
        made.append(robovlms_base(weights, fork.base, tmp_path / "bases"))
    assert made[0] == made[2]
    one, other = (load_file(base / "model.safetensors") for base in made[:2])
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_checkpoint_leaves_no_base(fork: SyntheticFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(fork.checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        robovlms_base(broken, fork.base, tmp_path / "bases")
    assert not list((tmp_path / "bases").glob("*/")) if (tmp_path / "bases").exists() else True


@pytest.mark.parametrize(
    ("lora", "story"),
    [
        ({"targets": "all", "r": 4, "alpha": 8.0}, "35 adapters going on as they are"),
        ({"targets": "all", "r": 4, "alpha": 4.0}, "35 adapters merged into it"),
        ({"targets": "text", "r": 4, "alpha": 8.0}, "35 adapters merged into it"),
        ({"targets": "none"}, "35 adapters merged into it"),
    ],
)
def test_a_whole_policy_goes_on_as_it_was(
    fork: SyntheticFiles, run_files: RunFiles, tmp_path: Path, lora: dict[str, Any], story: str
) -> None:
    """Whatever adapters the run has: the first step is the policy of the checkpoint, its head included."""
    settings = {"base.weights": str(fork.checkpoint), "base.take": "policy", "model.lora": lora}
    head = {"model.hidden": 40, "model.layers": 4, "data.chunk": 10}
    config = load_run_config(run_files.config(tmp_path / "run.json", {**settings, **head})).config
    found = start(fork.checkpoint, fork.base, tmp_path / "bases", take="policy", lora=config.model.lora)
    assert found.story is not None
    assert story in found.story
    policy = build_policy(config, found.base, action_range=(-1.0, 1.0))
    same_policy(policy, load_policy(fork.checkpoint, packing="upstream"))
    other = config.model.lora.targets != "none" and "merged" in found.story
    assert not other or all(not p.any() for name, p in policy.named_parameters() if ".lora_B." in name)


def test_a_resampler_goes_on_where_the_run_has_one(
    synthetic: MakeSynthetic, run_files: RunFiles, tmp_path: Path
) -> None:
    """Under fork_overwrite no run has one, and the policy goes on without."""
    files = synthetic(SyntheticOptions(layout="fork", head="velocities", lora=False, vision_resampler=True))
    head = {"model.hidden": 40, "model.layers": 4, "data.chunk": 10, "model.lora": {"targets": "none"}}
    base = {"base.weights": str(files.checkpoint), "base.take": "policy"}

    def built(settings: dict[str, Any]) -> KosmosPolicy:
        config = load_run_config(run_files.config(tmp_path / "run.json", {**base, **head, **settings})).config
        found = start(files.checkpoint, files.base, tmp_path / "bases", take="policy", lora=config.model.lora)
        return build_policy(config, found.base, action_range=(-1.0, 1.0))

    same_policy(built({"model.vision_resampler": True}), load_policy(files.checkpoint, packing="upstream"))
    without = built({"model.packing": "fork_overwrite"})
    assert not without.resamples
    ids = torch.tensor([[0, 60, 9, 12, 2]])
    pixels = torch.randn(1, 1, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = load_policy(files.checkpoint, packing="fork_overwrite")(pixels, ids, torch.ones_like(ids))
    torch.testing.assert_close(without.eval()(pixels, ids, torch.ones_like(ids)), expected, atol=2e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"first vision_resampler(.|\n)*and its model\.vision_resampler"):
        built({})


def test_a_policy_with_another_head_is_refused(fork: SyntheticFiles, run_files: RunFiles, tmp_path: Path) -> None:
    settings = {"base.weights": str(fork.checkpoint), "base.take": "policy", "output.cache": str(tmp_path / "cache")}
    with pytest.raises(CheckpointError, match=r"does not fit this run's(.|\n)*base\.take = \"backbone\""):
        launch(run_files.config(tmp_path / "run.json", settings), console=Console(quiet=True))


def test_a_file_of_plain_weights_needs_no_config(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """Released weights come without one, and their head may be any."""
    files = synthetic(SyntheticOptions(lora=False, seed=4))
    state = dict(read(files.checkpoint)["state_dict"])
    state["model.act_head.strange"] = torch.zeros(1)
    state["model.clip_norm_head.lang_fc.weight"] = torch.zeros(2, 2)
    gone = "model.backbone.image_to_text_projection.latent_query"
    removed = state.pop(gone)
    bare = tmp_path / "weights.pt"
    torch.save({"state_dict": state}, bare)

    found = start(bare, files.base, tmp_path / "bases")

    assert found.story == f"the vision-language part of weights.pt, 1 tensors that it lacks from {files.base.name}"
    assert found.weights_sha256 == sha256_file(bare)
    made = load_file(found.base / "model.safetensors")
    for name, tensor in state.items():
        if "backbone" in name and "lm_head" not in name:
            assert torch.equal(made[name.removeprefix("model.backbone.")], tensor), name
    assert torch.equal(made["image_to_text_projection.latent_query"], removed)  # the base has the same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"model.act_head.rnn.weight_ih_l0": torch.zeros(1)}, "holds no weights of Kosmos-2"),
        (
            lambda state: {**state, "model.backbone.text_model.extra": torch.zeros(1)},
            "1 unknown: backbone.text_model.extra",
        ),
        (
            lambda state: {**state, f"model.backbone.{QUERY}": torch.zeros(3)},
            r"1 misshapen: backbone.*latent_query \[3\], not",
        ),
        (
            lambda state: {**state, f"model.backbone.{QUERY}": state[f"model.backbone.{QUERY}"] * torch.nan},
            "not finite",
        ),
        (lambda state: {**state, QUERY: state[f"model.backbone.{QUERY}"] + 1}, "gives one parameter two values"),
    ],
)
def test_plain_weights_that_are_not_kosmos_2_s(
    synthetic: MakeSynthetic, tmp_path: Path, change: Any, message: str
) -> None:
    files = synthetic(SyntheticOptions(lora=False))
    torch.save({"state_dict": change(dict(read(files.checkpoint)["state_dict"]))}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path / "bad.pt", files.base, tmp_path / "bases")
    assert not (tmp_path / "bases").exists()


def test_a_checkpoint_of_ours_is_only_taken_on_its_own_base(
    fork: SyntheticFiles, synthetic: MakeSynthetic, tmp_path: Path
) -> None:
    save_small(load(fork.checkpoint, packing="upstream"), tmp_path / "small.safetensors")
    assert start(tmp_path / "small.safetensors", fork.base, tmp_path / "bases").base.is_dir()
    other = synthetic(SyntheticOptions(layout="fork", head="velocities", seed=5))
    with pytest.raises(BaseWeightsError, match="is not the base of"):
        start(tmp_path / "small.safetensors", other.base, tmp_path / "bases")


def test_a_run_on_such_weights_exports(fork: SyntheticFiles, run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(
        tmp_path / "run.json",
        {"base.weights": str(fork.checkpoint), "output.cache": str(tmp_path / "cache"), "loop.epochs": 1},
    )
    done = launch(config, console=Console(quiet=True))
    assert done.outcome is not None
    loaded = load(done.outcome.last)  # type: ignore[arg-type]
    record = read_run(done.folder)
    assert loaded.base_sha256 == record.base.sha256
    assert "bases" in record.base.path
    assert record.base.weights == str(fork.checkpoint)
    assert record.base.weights_sha256 == sha256_file(fork.checkpoint)
    assert record.base.taken == f"the vision-language part of {fork.checkpoint.name}, 35 adapters merged into it"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pretrained_vlm_path": "no.pt", "load_vlm_only": True}, "pretrained_vlm_path"),
        ({"model_load_path": "no.pt"}, "model_load_path"),
    ],
)
def test_missing_weights_are_named_as_the_config_does_and_the_plan_is_shown_all_the_same(
    run_files: RunFiles, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    values = fork_config(
        **changes,
        vlm__pretrained_model_name_or_path=str(run_files.base),
        train_dataset__data_dir=str(run_files.episodes),
        val_dataset__data_dir=str(run_files.episodes),
        train_dataset__episode_pattern="*.h5",
        val_dataset__episode_pattern="*.h5",
        output_root=str(tmp_path / "runs"),
        trainer__precision="32",
    )
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(values))
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    with pytest.raises(ConfigError, match=f"^{key} does not exist: .*no.pt"):
        launch(path, console=console)
    assert "trains" not in console.export_text()
    with pytest.raises(ConfigError, match=f"^{key} does not exist: .*no.pt"):
        launch(path, dry_run=True, console=console)
    shown = console.export_text()
    assert "trains" in shown
    assert "act_head adapters" not in shown
    assert "text_model adapters" in shown
    with pytest.raises(ConfigError, match=f"^{key} does not exist: .*no.pt"):  # and not the hash of another base
        launch(path, [f"base.sha256={'0' * 64}"], dry_run=True, console=console)
    with pytest.raises(ConfigError, match=r"^base\.weights does not exist: .*other.pt"):
        launch(path, ["base.weights=other.pt"], console=console)


def test_a_stated_hash_is_held_to(run_files: RunFiles, tmp_path: Path) -> None:
    config = run_files.config(tmp_path / "run.json", {"base.sha256": "0" * 64})
    with pytest.raises(BaseWeightsError, match="other weights than the config states"):
        gather(load_run_config(config))
