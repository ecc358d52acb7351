"""Names of parameters across the layouts of lab checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import oracle_keys
from train.keys import canonical, lora_modules, loss_modules, map_keys
from train.synthetic_layout import SyntheticOptions, state_keys

LINEAR = "backbone.text_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("model.action_token", "action_token"),
        ("action_token", "action_token"),
        ("_forward_module.model.action_token", "action_token"),
        ("module.model.action_token", "action_token"),
        ("module._forward_module.model.action_token", "action_token"),
        (f"model.{LINEAR}.weight", f"{LINEAR}.weight"),
        (f"model.{LINEAR}.base_layer.weight", f"{LINEAR}.weight"),
        (f"model.{LINEAR}.base_layer.bias", f"{LINEAR}.bias"),
        (f"model.{LINEAR}.lora_A.default.weight", f"{LINEAR}.lora_A.weight"),
        (f"model.{LINEAR}.lora_B.robot.weight", f"{LINEAR}.lora_B.weight"),
        (f"model.model.base_model.model.{LINEAR.removeprefix('backbone.')}.base_layer.weight", f"{LINEAR}.weight"),
        (f"model.base_model.model.{LINEAR.removeprefix('backbone.')}.weight", f"{LINEAR}.weight"),
        (f"model.backbone.base_model.model.{LINEAR.removeprefix('backbone.')}.base_layer.weight", f"{LINEAR}.weight"),
        (
            f"model.backbone.base_model.model.{LINEAR.removeprefix('backbone.')}.lora_A.default.weight",
            f"{LINEAR}.lora_A.weight",
        ),
        ("text_model.model.layer_norm.bias", "backbone.text_model.model.layer_norm.bias"),
        ("image_to_text_projection.latent_query", "backbone.image_to_text_projection.latent_query"),
        ("model.act_head.rnn.weight_ih_l0", "act_head.rnn.weight_ih_l0"),
    ],
)
def test_canonical_name(raw: str, name: str) -> None:
    assert canonical(raw) == name


PARTS = st.lists(st.from_regex(r"[a-z0-9_]{1,12}", fullmatch=True), min_size=1, max_size=4).map(".".join)
NAMES = st.one_of(
    st.just("action_token"),
    st.sampled_from([key.name for key in state_keys(SyntheticOptions())]),
    st.builds("act_head.{}".format, PARTS),
    st.builds(
        "backbone.{}.{}".format, st.sampled_from(["text_model", "vision_model", "image_to_text_projection"]), PARTS
    ),
)
WRAPPERS = st.lists(st.sampled_from(["module.", "_forward_module."]), max_size=3).map("".join)


@given(NAMES)
def test_canonical_is_idempotent(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)


@given(st.text())
def test_canonical_takes_any_text(raw: str) -> None:
    assert not canonical(raw).startswith(("module.", "_forward_module."))


@given(NAMES, WRAPPERS)
def test_wrapping_does_not_change_the_canonical_name(name: str, wrappers: str) -> None:
    expected = canonical(name)
    assert canonical(wrappers + name) == expected
    assert canonical(f"{wrappers}model.{name}") == expected
    if name.startswith("backbone."):
        suffix = name.removeprefix("backbone.")
        assert canonical(f"{wrappers}model.model.base_model.model.{suffix}") == expected
        assert canonical(wrappers + suffix) == expected


@given(NAMES, st.sampled_from(["default", "robot", "adapter_1"]))
def test_peft_wrapping_does_not_change_the_canonical_name(name: str, adapter: str) -> None:
    module, _, leaf = canonical(name).rpartition(".")
    if not module:
        return
    assert canonical(f"model.{module}.base_layer.{leaf}") == f"{module}.{leaf}"
    assert canonical(f"model.{module}.lora_A.{adapter}.weight") == f"{module}.lora_A.weight"


@pytest.mark.parametrize("peft", ["new", "old"])
def test_map_keys_finds_every_tensor_of_a_checkpoint_once(peft: str) -> None:
    keys = state_keys(SyntheticOptions(peft=peft))  # type: ignore[arg-type]

    mapped = map_keys(key.raw for key in keys)

    tied = "text_model.lm_head.weight"
    assert set(mapped.names) == {key.name for key in keys}
    assert mapped.ignored == (f"model.backbone.{tied}", f"model.model.base_model.model.{tied}")
    assert mapped.adapters == {"default"}
    first, second = mapped.names["backbone.text_model.model.embed_tokens.weight"]
    assert first == "model.backbone.text_model.model.embed_tokens.weight"
    assert second == "model.model.base_model.model.text_model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    "stray",
    [
        "model.backbone.vision_model.model.embeddings.position_ids",
        "model.backbone.text_model.model.embed_positions.weights",
        "model.model.base_model.model.text_model.model.embed_positions.weights",
        "model.lm_head.rnn.weight_ih_l0",
        "model.lm_head.actions.mlp.0.weight",
        "model.backbone.text_model.lm_head.weight",
        "model.act_head.class_weights_tensor",
        "model.clip_norm_head.lang_fc.weight",
        "model.clip_norm_head.model.text_projection",
        "grounding_bbox_head.0.weight",
        "_forward_module.grounding_coarse_head.3.bias",
        "module.loss_balance_logits",
        "loss_balance_ema",
    ],
)
def test_buffers_and_second_names_are_ignored_by_name(stray: str) -> None:
    mapped = map_keys([stray, "model.action_token"])
    assert mapped.ignored == (stray,)
    assert set(mapped.names) == {"action_token"}


@pytest.mark.parametrize(
    "unknown",
    [
        "grounding_head.0.weight",
        "model.act_head.grounding_bbox_head.0.weight",
        "loss_balance_share",
        "model.fwd_head.fc.weight",
    ],
)
def test_a_name_that_only_looks_like_a_losss_is_not_ignored(unknown: str) -> None:
    assert map_keys([unknown]).ignored == ()


def test_modules_of_losses_are_counted() -> None:
    raw = ["grounding_bbox_head.0.weight", "module.grounding_bbox_head.0.bias", "loss_balance_ema", "model.lm_head.a"]
    assert loss_modules(raw) == {"grounding_bbox_head": 2, "loss_balance_ema": 1}


def test_map_keys_reports_every_adapter_name() -> None:
    raw = [f"model.{LINEAR}.lora_A.{adapter}.weight" for adapter in ("default", "second")]
    assert map_keys(raw).adapters == {"default", "second"}


def test_lora_modules_are_sorted_paths_below_the_backbone() -> None:
    names = [f"backbone.{path}.lora_{side}.weight" for path in ("b.fc1", "a.q_proj") for side in "AB"]
    assert lora_modules([*names, "action_token"]) == ("a.q_proj", "b.fc1")


@pytest.mark.parametrize(
    ("listing", "tensors", "adapted"),
    [("real_keys_lora_r32_7d.txt", 1504, 293), ("real_keys_frozen_nolora_7d.txt", 918, 0)],
)
def test_real_checkpoints_have_no_unknown_key(listing: str, tensors: int, adapted: int) -> None:
    mapped = map_keys(raw for raw, _ in oracle_keys(listing))
    assert len(mapped.names) == tensors
    assert all(name.startswith(("action_token", "act_head.", "backbone.")) for name in mapped.names)
    assert len(lora_modules(mapped.names)) == adapted
    assert all(raw.endswith("lm_head.weight") for raw in mapped.ignored)
