"""Adapters of the real peft, in every form it has: merged as peft merges them, or refused by the name of the reason."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Kosmos2ForConditionalGeneration

from bundle.errors import BaseWeightsError, CheckpointError, ConfigError, JetvlaError, UnsupportedPolicyError
from export.weights import MergedWeights
from tests.checkpoints import configs, read
from train.adapter_recipe import recipe_of_peft, recipe_of_setup
from train.base import read_base_config
from train.checkpoint import LoadedPolicy, load, save_small
from train.synthetic import SyntheticFiles

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "dense")
TEXT_FC1 = r"text_model\..*\.fc1"
NOT_OURS = ("lm_head", "embed_positions")


@pytest.fixture(scope="module")
def model(upstream: SyntheticFiles) -> nn.Module:
    """Kosmos-2 with the weights of the synthetic base."""
    made = Kosmos2ForConditionalGeneration(read_base_config(upstream.base)).eval()
    made.load_state_dict(load_file(upstream.base / "model.safetensors"), strict=False)
    return made


def wrap(model: nn.Module, **fields: Any) -> PeftModel:
    """The model with random adapters."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**given))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return wrapped.eval()


def truth(wrapped: PeftModel) -> dict[str, Tensor]:
    """Canonical name -> what peft multiplies with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(wrapped).merge_and_unload()
    return {
        f"backbone.{name}": value
        for name, value in merged.state_dict().items()
        if not any(part in name for part in NOT_OURS)
    }


def save(
    upstream: SyntheticFiles,
    wrapped: nn.Module,
    path: Path,
    *,
    setup: dict[str, Any] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    rename: Callable[[str], str] = lambda name: name,
) -> Path:
    """The Lightning file that RoboVLMs' trainer writes of a peft model."""
    content = read(upstream.checkpoint)
    state = {
        name: value
        for name, value in content["state_dict"].items()
        if "backbone" not in name and "base_model" not in name
    }
    inner = wrapped.base_model.model if isinstance(wrapped, PeftModel) else wrapped
    state |= {f"model.backbone.{name}": value for name, value in inner.state_dict().items()}
    content["state_dict"] = {rename(name): value for name, value in state.items() if keep(name)}
    config = configs(content)
    config["vlm"]["pretrained_model_name_or_path"] = str(upstream.base)
    config["train_setup"] |= {"lora_r": 4, "lora_alpha": 8, **(setup or {})}
    torch.save(content, path)
    return path


def assert_merged(loaded: LoadedPolicy, expected: dict[str, Tensor]) -> None:
    lora = loaded.policy.spec.lora
    weights = MergedWeights(loaded.state, 0.0 if lora is None else lora.scaling)
    for name, tensor in expected.items():
        ours = weights.weight(name.removesuffix(".weight")) if name.endswith(".weight") else weights.tensor(name)
        assert torch.allclose(ours, tensor.float(), atol=1e-5), name


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "all linears": ({"target_modules": list(PROJECTIONS)}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "rslora by its other name": ({"use_rslora": True}, {"lora_use_rslora": True}),
    "ranks": ({"rank_pattern": {TEXT_FC1: 6}, "target_modules": ["fc1", "q_proj"]}, {"rank_pattern": {TEXT_FC1: 6}}),
    "alphas": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 24}}, {"lora_alpha_pattern": {"layers.1.self_attn.q_proj": 24}}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "dora that the config does not mention": ({"use_dora": True}, {}),
    "biases of adapters": ({"lora_bias": True}, {"lora_bias": True}),
    "trained biases": ({"bias": "lora_only"}, {"lora_bias": "lora_only"}),
    "some layers": ({"layers_to_transform": [0]}, {}),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "a module to save": ({"modules_to_save": ["dense"]}, {}),
    "pissa": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_merged_as_peft_merges_it(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, form: str
) -> None:
    fields, setup = FORMS[form]
    wrapped = wrap(model, **fields)
    assert_merged(load(save(upstream, wrapped, tmp_path / "a.ckpt", setup=setup)), truth(wrapped))


names = st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=4, unique=True)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    targets=names,
    r=st.integers(1, 6),
    alpha=st.integers(1, 30),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("use_rslora", "use_dora", "lora_bias")}),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "mlp.fc1", "layers.0.ffn.fc2"]), st.integers(1, 8), max_size=2),
    alphas=st.dictionaries(st.sampled_from(["v_proj", TEXT_FC1]), st.integers(1, 40), max_size=2),
)
def test_any_config_of_peft_is_merged_as_peft_merges_it(
    model: nn.Module,
    upstream: SyntheticFiles,
    tmp_path: Path,
    targets: list[str],
    r: int,
    alpha: int,
    flags: dict[str, bool],
    ranks: dict[str, int],
    alphas: dict[str, int],
) -> None:
    if flags["use_dora"] and flags["lora_bias"]:
        flags = {**flags, "lora_bias": False}  # peft refuses the two together
    fields = {
        "target_modules": targets,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **flags,
    }
    wrapped = wrap(model, **fields)
    stated = {"lora_r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, **flags}
    path = save(upstream, wrapped, tmp_path / "a.ckpt", setup={**stated, "lora_bias": flags["lora_bias"] or "none"})
    assert_merged(load(path), truth(wrapped))


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "_forward_module"]
)
@pytest.mark.parametrize("place", ["model.", "model.backbone.", "self_attn."])
def test_names_of_wrappers_are_taken_out(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, wrapper: str, place: str
) -> None:
    wrapped = wrap(model)
    path = save(upstream, wrapped, tmp_path / "a.ckpt", rename=lambda name: name.replace(place, f"{place}{wrapper}."))
    assert_merged(load(path), truth(wrapped))


# --- peft's own folder --------------------------------------------------------------------------------------------------


def peft_folder(upstream: SyntheticFiles, wrapped: PeftModel, folder: Path, *, rest: str = "policy.pt") -> Path:
    wrapped.save_pretrained(folder, safe_serialization=True)
    content = read(upstream.checkpoint)
    config = configs(content)
    config["vlm"]["pretrained_model_name_or_path"] = str(upstream.base)
    config["train_setup"]["lora_enable"] = False
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        name: value for name, value in content["state_dict"].items() if "act_head" in name or "action_token" in name
    }
    torch.save({"state_dict": state}, folder / rest)
    return folder


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"use_rslora": True, "r": 8}, {"rank_pattern": {"q_proj": 2}}]
)
@pytest.mark.parametrize("rest", ["policy.pt", "non_lora_trainables.bin"])
def test_pefts_own_folder_is_a_checkpoint(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, fields: dict[str, Any], rest: str
) -> None:
    wrapped = wrap(model, **fields)
    loaded = load(peft_folder(upstream, wrapped, tmp_path / "peft", rest=rest), base=upstream.base)
    assert_merged(loaded, truth(wrapped))
    assert loaded.raw.kind == "peft"
    assert len(loaded.adapted) == sum(name.endswith("lora_A.default.weight") for name in wrapped.state_dict())


def test_a_folder_without_a_head_says_what_is_missing(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    folder = peft_folder(upstream, wrap(model), tmp_path / "peft")
    (folder / "policy.pt").unlink()
    with pytest.raises(CheckpointError, match="without the action head and action token"):
        load(folder, base=upstream.base)


def test_a_folder_and_a_config_that_disagree(model: nn.Module, upstream: SyntheticFiles, tmp_path: Path) -> None:
    folder = peft_folder(upstream, wrap(model), tmp_path / "peft")
    config = json.loads((folder / "config.json").read_text())
    config["train_setup"] |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="disagree about the adapters"):
        load(folder, base=upstream.base)


@pytest.mark.parametrize("damage", ["config", "weights", "pickled"])
def test_a_damaged_folder_is_called_so(model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, damage: str) -> None:
    folder = peft_folder(upstream, wrap(model), tmp_path / "peft")
    if damage == "config":
        (folder / "adapter_config.json").write_text("{")
    elif damage == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    else:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"is damaged|is not JSON|lacks adapter_model\.safetensors"):
        load(folder, base=upstream.base)


# --- what does not belong together --------------------------------------------------------------------------------------


def test_adapters_that_are_merged_and_kept_are_found(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    wrapped = wrap(model)
    wrapped.merge_adapter()
    with pytest.raises(CheckpointError, match="already merged into the weights beside them"):
        load(save(upstream, wrapped, tmp_path / "a.ckpt"), base=upstream.base)


def test_half_precision_hides_nothing(model: nn.Module, upstream: SyntheticFiles, tmp_path: Path) -> None:
    wrapped = wrap(model)
    wrapped.merge_adapter()
    path = save(upstream, wrapped.half(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="already merged"):
        load(path, base=upstream.base)


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"target_modules": ["embed_tokens"]}],
    ids=["dora", "dora and rslora", "an embedding"],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merged_adapters_of_other_forms_are_found(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, fields: dict[str, Any], kind: torch.dtype
) -> None:
    wrapped = wrap(model, **fields)
    wrapped.merge_adapter()
    setup = {name: value for name, value in fields.items() if name.startswith("use_")}
    with pytest.raises(CheckpointError, match="already merged into the weights beside them"):
        load(save(upstream, wrapped.to(kind), tmp_path / "a.ckpt", setup=setup), base=upstream.base)


@pytest.mark.parametrize("again", [False, True], ids=["as rounded", "as fp32 again"])
def test_merged_changes_smaller_than_rounding_are_found(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, again: bool
) -> None:
    wrapped = wrap(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.005)
    wrapped.merge_adapter()
    wrapped = wrapped.bfloat16()
    with pytest.raises(CheckpointError, match="already merged"):
        load(save(upstream, wrapped.float() if again else wrapped, tmp_path / "a.ckpt"), base=upstream.base)


def test_another_base_that_the_file_holds_whole_is_used_and_said(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    wrapped = wrap(changed)
    loaded = load(save(upstream, wrapped, tmp_path / "a.ckpt"), base=upstream.base)
    assert_merged(loaded, truth(wrapped))
    assert loaded.remark is not None
    assert "the file's own are used" in loaded.remark


def test_another_base_is_not_mixed_with_the_files(model: nn.Module, upstream: SyntheticFiles, tmp_path: Path) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    path = save(upstream, wrap(changed), tmp_path / "a.ckpt", keep=lambda name: "vision_model" not in name)
    with pytest.raises(BaseWeightsError, match="is not the base of"):
        load(path, base=upstream.base)


@pytest.mark.parametrize("trains", [True, False])
def test_a_projection_that_trained_beside_its_adapters_is_no_other_base(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, trains: bool
) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.image_to_text_projection.parameters():
            parameter.mul_(1.01)
    wrapped = wrap(changed, target_modules=r".*(text_model.*q_proj|image_to_text_projection\.dense)")
    path = save(
        upstream,
        wrapped,
        tmp_path / "a.ckpt",
        setup={"tune_mm_projector": trains},
        keep=lambda name: "vision_model" not in name,
    )
    if trains:
        loaded = load(path, base=upstream.base)
        assert_merged(loaded, truth(wrapped))
        assert loaded.remark is None
    else:
        with pytest.raises(BaseWeightsError, match="is not the base of"):
            load(path, base=upstream.base)


@pytest.mark.parametrize(
    ("fields", "setup", "missing"),
    [
        ({"bias": "lora_only"}, {"lora_bias": "lora_only"}, "q_proj.bias"),
        ({"bias": "all"}, {"lora_bias": "all"}, "fc1.bias"),
        ({}, {"train_text_embedding": True}, "embed_tokens.weight"),
        ({}, {"tune_mm_projector": True}, "image_to_text_projection.dense.weight"),
    ],
)
def test_what_was_trained_is_not_taken_from_the_base(
    model: nn.Module,
    upstream: SyntheticFiles,
    tmp_path: Path,
    fields: dict[str, Any],
    setup: dict[str, Any],
    missing: str,
) -> None:
    path = save(
        upstream,
        wrap(model, **fields),
        tmp_path / "a.ckpt",
        setup=setup,
        keep=lambda name: "backbone" not in name or "lora_" in name,
    )
    with pytest.raises(CheckpointError, match="does not hold all that its config says was trained") as caught:
        load(path, base=upstream.base)
    assert missing in str(caught.value.got) or "more" in str(caught.value.got)


def test_a_changed_base_is_not_replaced_by_the_published_one(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    wrapped = wrap(model, init_lora_weights="pissa")
    path = save(
        upstream,
        wrapped,
        tmp_path / "a.ckpt",
        setup={"init_lora_weights": "pissa"},
        keep=lambda name: "backbone" not in name or "lora_" in name,
    )
    with pytest.raises(BaseWeightsError, match="changed base"):
        load(path, base=upstream.base)


@pytest.mark.parametrize("target", ["patch_embedding", "lm_head"])
def test_adapters_where_none_are_merged_are_refused_by_name(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, target: str
) -> None:
    wrapped = wrap(model, target_modules=["q_proj", target])
    with pytest.raises(UnsupportedPolicyError, match=target):
        load(save(upstream, wrapped, tmp_path / "a.ckpt"))


def test_a_stated_dora_without_magnitudes_is_not_whole(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    path = save(upstream, wrap(model), tmp_path / "a.ckpt", setup={"use_dora": True})
    with pytest.raises(CheckpointError, match="is not whole") as caught:
        load(path)
    assert "lora_magnitude_vector" in str(caught.value.got)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["weight"]),
        ("a_field_of_tomorrow", {"scale": 2}),
    ],
)
def test_fields_that_change_the_product_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedPolicyError, match=field):
        recipe_of_peft({"peft_type": "LORA", "r": 4, "lora_alpha": 8, field: value}, origin="adapter_config.json")


def test_every_default_of_peft_is_accepted(model: nn.Module, tmp_path: Path) -> None:
    wrap(model).save_pretrained(tmp_path)
    recipe = recipe_of_peft(json.loads((tmp_path / "adapter_config.json").read_text()), origin="adapter_config.json")
    assert recipe.plain
    assert (recipe.r, recipe.alpha) == (4, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"use_rslora": "yes"},
        {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": [1]},
        {"lora_r": 0},
        {"lora_alpha": None},
    ],
)
def test_values_of_the_wrong_type_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(JetvlaError) as caught:
        recipe_of_setup({"lora_r": 4, "lora_alpha": 8, **wrong})
    assert next(iter(wrong)).removeprefix("lora_") in caught.value.what


def test_a_wrong_formula_does_not_pass(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of each merged module against peft's own layer can fail."""
    import train.adapter_merge as merging

    right = merging._merged
    monkeypatch.setattr(
        merging, "_merged", lambda weight, bias, adapter, scaling: right(weight, bias, adapter, 1.1 * scaling)
    )
    path = save(upstream, wrap(model, use_rslora=True), tmp_path / "a.ckpt", setup={"use_rslora": True})
    with pytest.raises(CheckpointError, match="does not give what peft computes"):
        load(path)


def test_a_folded_policy_is_saved_without_adapters(model: nn.Module, upstream: SyntheticFiles, tmp_path: Path) -> None:
    wrapped = wrap(model, use_dora=True)
    loaded = load(save(upstream, wrapped, tmp_path / "a.ckpt"), base=upstream.base)
    save_small(loaded, tmp_path / "a.safetensors")
    assert_merged(load(tmp_path / "a.safetensors", base=upstream.base), truth(wrapped))


def test_a_small_file_may_leave_out_what_training_did_not_move(
    model: nn.Module, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    """Merged adapters leave a config behind that says the rest was to train; what equals the base is not written again."""
    wrapped = wrap(model, use_dora=True)
    setup = {"use_dora": True, "freeze_backbone": False, "train_vision": True}
    loaded = load(save(upstream, wrapped, tmp_path / "a.ckpt", setup=setup), base=upstream.base)
    save_small(loaded, tmp_path / "small.safetensors")
    assert_merged(load(tmp_path / "small.safetensors", base=upstream.base), truth(wrapped))
