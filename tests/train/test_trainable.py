from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bundle.errors import BaseWeightsError, ConfigError, TrainingError
from tests.checkpoints import MakeSynthetic
from tests.train.runs import RunFiles
from train.keys import canonical
from train.load_config import load_run_config
from train.policy import KosmosPolicy
from train.proofs import check_frozen, frozen_sha256, trained_groups
from train.run_config import RunConfig
from train.synthetic import SyntheticFiles, SyntheticOptions
from train.trainable import build_policy, reaches_vision, training_mode


def config_of(run_files: RunFiles, tmp_path: Path, **settings: object) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return load_run_config(run_files.config(tmp_path / "run.json", changed)).config


def built(run_files: RunFiles, tmp_path: Path, **settings: object) -> KosmosPolicy:
    return build_policy(config_of(run_files, tmp_path, **settings), run_files.base, action_range=(-1.0, 1.0))


def parts(policy: KosmosPolicy) -> set[str]:
    """What trains: `head`, `lora text`, `lora vision`, `lora projection`, `text`, `embedding`, `vision`, `projection`."""
    found = set()
    for name in (canonical(name) for name, p in policy.named_parameters() if p.requires_grad):
        if not name.startswith("backbone."):
            found.add("head")
            continue
        root = {"text_model": "text", "vision_model": "vision", "image_to_text_projection": "projection"}[
            name.split(".")[1]
        ]
        found.add(f"lora {root}" if ".lora_" in name else "embedding" if "embed_tokens" in name else root)
    return found


ALL_LORA = {"head", "lora text", "lora vision", "lora projection"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__lora__targets": "none"}, {"head"}),
        (
            {"model__lora__targets": "none", "model__train_vision": True, "model__train_text_embedding": True},
            {"head", "vision", "embedding"},
        ),
        ({"model__lora__targets": "all"}, ALL_LORA),
        ({"model__lora__targets": "all", "model__train_text_embedding": True}, ALL_LORA | {"embedding"}),
        ({"model__lora__targets": "text"}, {"head", "lora text"}),
        ({"model__lora__targets": "text", "model__train_projection": True}, {"head", "lora text", "projection"}),
        ({"model__lora__targets": "none", "model__freeze_backbone": False}, {"head", "text", "projection"}),
        (
            {
                "model__lora__targets": "none",
                "model__freeze_backbone": False,
                "model__train_vision": True,
                "model__train_text_embedding": True,
            },
            {"head", "text", "projection", "vision", "embedding"},
        ),
        (
            {"model__lora__targets": "none", "model__freeze_backbone": False, "model__train_decoder_layers": 1},
            {"head", "text"},
        ),
        ({"model__lora__targets": "text", "model__lora__bias": "lora_only"}, {"head", "lora text", "text"}),
    ],
)
def test_what_trains(run_files: RunFiles, tmp_path: Path, settings: dict[str, object], expected: set[str]) -> None:
    assert parts(built(run_files, tmp_path, **settings)) == expected


def test_the_last_layers_alone(run_files: RunFiles, tmp_path: Path) -> None:
    policy = built(
        run_files,
        tmp_path,
        model__lora__targets="none",
        model__freeze_backbone=False,
        model__train_decoder_layers=1,
    )
    text = [name for name, p in policy.named_parameters() if p.requires_grad and "text_model" in name]
    assert text
    assert all(".layers.1." in name for name in text)  # of two


def test_only_adapted_biases_train_with_lora_only(run_files: RunFiles, tmp_path: Path) -> None:
    policy = built(run_files, tmp_path, model__lora__targets="text", model__lora__bias="lora_only")
    biases = [name for name, p in policy.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert any(".base_layer.bias" in name for name in biases)
    assert not any("layer_norm" in name or "vision_model" in name for name in biases)


def test_upstreams_number_of_adapted_modules(run_files: RunFiles, tmp_path: Path) -> None:
    """As in the synthetic checkpoint, whose keys are those of the recorded lists."""
    policy = built(run_files, tmp_path, model__lora__targets="all")
    assert len(policy.adapted) == sum(
        isinstance(module, torch.nn.Linear) and "lora" not in name for name, module in policy.backbone.named_modules()
    )


def test_the_first_step_is_the_base(run_files: RunFiles, tmp_path: Path) -> None:
    plain = built(run_files, tmp_path, model__lora__targets="none").eval()
    adapted = built(run_files, tmp_path, model__lora__targets="all").eval()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(adapted.image_tokens(pixels), plain.image_tokens(pixels))


def test_the_seed_decides_what_is_new(run_files: RunFiles, tmp_path: Path) -> None:
    first, same = built(run_files, tmp_path), built(run_files, tmp_path)
    other = built(run_files, tmp_path, loop__seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name
    assert not torch.equal(first.act_head.rnn.weight_ih_l0, other.act_head.rnn.weight_ih_l0)
    assert torch.equal(
        first.backbone.text_model.model.layer_norm.weight, other.backbone.text_model.model.layer_norm.weight
    )


def test_frozen_vision_is_in_evaluation_mode_while_training(run_files: RunFiles, tmp_path: Path) -> None:
    text, everything = built(run_files, tmp_path), built(run_files, tmp_path, model__lora__targets="all")
    for policy in (text, everything):
        training_mode(policy)
        assert policy.backbone.text_model.training
    assert not reaches_vision(text)
    assert not text.backbone.vision_model.model.encoder.layers[0].self_attn.training
    assert not text.backbone.image_to_text_projection.x_attn.training
    assert reaches_vision(everything)
    assert everything.backbone.vision_model.training


def test_a_changed_frozen_parameter_is_found(run_files: RunFiles, tmp_path: Path) -> None:
    policy = built(run_files, tmp_path)
    before = frozen_sha256(policy)
    with torch.no_grad():
        policy.action_token += 1.0
    check_frozen(policy, before)
    with torch.no_grad():
        policy.backbone.text_model.model.layer_norm.weight[3] += 1e-6
    with pytest.raises(TrainingError, match="a frozen parameter changed"):
        check_frozen(policy, before)


def test_groups_add_up(run_files: RunFiles, tmp_path: Path) -> None:
    policy = built(run_files, tmp_path, model__lora__targets="all")
    assert sum(group.values for group in trained_groups(policy)) == sum(
        p.numel() for p in policy.parameters() if p.requires_grad
    )


def test_a_base_without_weights_is_refused(synthetic: MakeSynthetic, run_files: RunFiles, tmp_path: Path) -> None:
    files: SyntheticFiles = synthetic(SyntheticOptions(base_weights=False))
    with pytest.raises(BaseWeightsError, match="holds no weights"):
        build_policy(config_of(run_files, tmp_path), files.base, action_range=(-1.0, 1.0))


def test_a_base_of_other_dimensions_is_refused(run_files: RunFiles, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    settings = json.loads((run_files.base / "config.json").read_text())
    settings["text_config"]["ffn_dim"] = 96
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").symlink_to((run_files.base / "model.safetensors").resolve())
    with pytest.raises(BaseWeightsError, match=r"does not hold the weights of its config\.json"):
        build_policy(config_of(run_files, tmp_path), folder, action_range=(-1.0, 1.0))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="not a Kosmos-2 config"):
        build_policy(config_of(run_files, tmp_path), folder, action_range=(-1.0, 1.0))
