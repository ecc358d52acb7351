"""Checkpoints of every layout give the policy that they hold, on the base that they were trained on."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bundle.errors import BaseWeightsError, CheckpointError, ConfigError, JetvlaError, StorageError
from tests.checkpoints import Variant, configs, file_size_limit, read, rewrite, unshared
from tests.oracle import CASES, oracle_case
from tests.train.conftest import MakeSynthetic
from train.checkpoint import LoadedPolicy, load, load_policy, save_small
from train.checkpoint_file import SMALL_FORMAT, read_raw
from train.keys import canonical
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint
from train.synthetic_layout import is_trained


def assert_same_policy(actual: LoadedPolicy, expected: LoadedPolicy) -> None:
    assert actual.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(actual.state[name], tensor), name
    ours, theirs = actual.policy.state_dict(), expected.policy.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    # Where the prompt is from differs: what was assumed is recorded.
    assert replace(actual.policy.spec, prompt_source="") == replace(expected.policy.spec, prompt_source="")


# --- what is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_recorded_checkpoints_are_read_strictly(name: str) -> None:
    case = oracle_case(name)
    loaded = load(case.checkpoint, packing=case.packing)

    assert loaded.raw.kind == "lightning"
    assert loaded.base.tokenizer is not None
    assert loaded.base.tokenizer.resolve() == (case.folder.parent / "vlm_tiny" / "tokenizer.json").resolve()
    assert loaded.from_base == ()
    assert loaded.base_sha256 is None
    assert loaded.config == json.loads((case.folder / "config.json").read_text())
    assert all(key.endswith("lm_head.weight") for key in loaded.ignored)
    used = {canonical(key) for key in loaded.raw.state if key not in loaded.ignored}
    assert used == set(loaded.state)


def test_a_policy_is_ready_for_inference(upstream: SyntheticFiles) -> None:
    policy = load_policy(str(upstream.checkpoint))
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert not any(tensor.is_meta for tensor in [*policy.parameters(), *policy.buffers()])
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_tensors_are_mapped_and_not_copied(upstream: SyntheticFiles) -> None:
    loaded = load(upstream.checkpoint)
    name = "action_token"
    assert loaded.policy.action_token.data_ptr() == loaded.raw.state[f"model.{name}"].data_ptr()
    assert loaded.state[name].data_ptr() == loaded.raw.state[f"model.{name}"].data_ptr()


def test_every_adapted_module_is_built(upstream: SyntheticFiles, synthetic: MakeSynthetic) -> None:
    assert len(load(upstream.checkpoint).policy.adapted) == 3 * 6 + 2 * 6 + 5
    frozen = load(synthetic(SyntheticOptions(lora=False)).checkpoint)
    assert frozen.policy.adapted == ()
    assert not any("lora" in name for name in frozen.state)


def test_reading_leaves_the_file_alone(tmp_path: Path) -> None:
    files = make_checkpoint(tmp_path, SyntheticOptions())
    before = files.checkpoint.read_bytes()
    policy = load(files.checkpoint).policy
    policy.action_token.zero_()
    assert files.checkpoint.read_bytes() == before


@pytest.mark.parametrize("peft", ["new", "old"])
@pytest.mark.parametrize("layout", ["upstream", "fork"])
def test_layouts_hold_the_same_policy(synthetic: MakeSynthetic, peft: Any, layout: Any) -> None:
    options = SyntheticOptions(layout=layout, peft=peft)
    loaded = load(synthetic(options).checkpoint, packing="upstream")
    expected = load(synthetic(SyntheticOptions()).checkpoint, packing="upstream")
    assert loaded.state.keys() == expected.state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in expected.state.items())


@pytest.mark.parametrize(
    "options",
    [
        SyntheticOptions(layout="fork", head="velocities"),
        SyntheticOptions(layout="fork", head="classes"),
        SyntheticOptions(layout="fork", head="classes", action_dim=6),
        SyntheticOptions(action_dim=3, hidden_size=16),
        SyntheticOptions(hand_camera=True, latent=2, pooling=True),
        SyntheticOptions(lora=False, peft="old"),
    ],
    ids=lambda options: f"{options.head}-{options.outputs}-{options.latent}",
)
def test_every_variant_that_is_built_is_read(synthetic: MakeSynthetic, options: SyntheticOptions) -> None:
    policy = load_policy(synthetic(options).checkpoint, packing="upstream")
    spec = policy.spec
    assert (spec.head.kind, spec.head.outputs, spec.head.hidden) == (options.head, options.outputs, options.hidden)
    assert (spec.head.latent, spec.head.pooling, spec.hand_camera) == (
        options.latent,
        options.pooling,
        options.hand_camera,
    )
    assert policy.act_head.rnn.input_size == options.latent * 64


def as_torch_file(content: dict[str, Any], key: str = "state_dict", prefix: str = "") -> dict[str, Any]:
    return {key: {f"{prefix}{name}": tensor for name, tensor in content["state_dict"].items()}}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
@pytest.mark.parametrize("beside", ["policy.json", "config.json", None])
def test_a_torch_file_takes_its_config_from_beside_or_from_the_caller(
    upstream: SyntheticFiles, tmp_path: Path, key: str, beside: str | None
) -> None:
    content = read(upstream.checkpoint)
    path = tmp_path / "policy.pt"
    torch.save(as_torch_file(content, key), path)
    config = tmp_path / (beside or "elsewhere.json")
    config.write_text(json.dumps(configs(content)))

    loaded = load(path, base=upstream.base, config=None if beside else config)

    assert loaded.raw.kind == "torch"
    assert_same_policy(loaded, load(upstream.checkpoint))


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "module._forward_module."])
def test_prefixes_of_distributed_training_are_stripped(upstream: SyntheticFiles, tmp_path: Path, prefix: str) -> None:
    content = read(upstream.checkpoint)
    path = tmp_path / "policy.pt"
    torch.save(as_torch_file(content, prefix=prefix) | {"hyper_parameters": content["hyper_parameters"]}, path)
    assert_same_policy(load(path, base=upstream.base), load(upstream.checkpoint))


def test_a_state_dict_of_the_bare_policy_is_read(variant: Variant, upstream: SyntheticFiles) -> None:
    """As DeepSpeed's zero_to_fp32 and hand-written scripts leave it: no `model.` in front."""

    def strip(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        content["state_dict"] = {key.removeprefix("model."): tensor for key, tensor in state.items()}

    assert_same_policy(load(variant(strip)), load(upstream.checkpoint))


@pytest.mark.parametrize("keep", ["model.backbone.", "model.model.base_model.model."])
def test_either_name_of_the_backbone_is_enough(variant: Variant, upstream: SyntheticFiles, keep: str) -> None:
    def drop_other(content: dict[str, Any]) -> None:
        aliases = {"model.backbone.", "model.model.base_model.model."} - {keep}
        state = content["state_dict"]
        content["state_dict"] = {key: value for key, value in state.items() if not key.startswith(tuple(aliases))}

    assert_same_policy(load(variant(drop_other)), load(upstream.checkpoint))


def test_peft_s_model_may_stand_in_the_backbone_s_place(variant: Variant, upstream: SyntheticFiles) -> None:
    """As in the fork's later trainer, whose state dict has the backbone once."""

    def move(content: dict[str, Any]) -> None:
        aliased, wrapped = "model.model.base_model.model.", "model.backbone.base_model.model."
        state = content["state_dict"]
        content["state_dict"] = {
            key.replace("model.backbone.", wrapped, 1): value
            for key, value in state.items()
            if not key.startswith(aliased)
        }

    assert_same_policy(load(variant(move)), load(upstream.checkpoint))


def test_aliases_with_storages_of_their_own_may_agree(variant: Variant, upstream: SyntheticFiles) -> None:
    def unshare(content: dict[str, Any]) -> None:
        content["state_dict"] = unshared(content["state_dict"])

    assert_same_policy(load(variant(unshare)), load(upstream.checkpoint))


def test_an_adapter_may_have_any_name(variant: Variant, upstream: SyntheticFiles) -> None:
    def rename(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        content["state_dict"] = {key.replace(".default.", ".robot."): tensor for key, tensor in state.items()}

    assert_same_policy(load(variant(rename)), load(upstream.checkpoint))


def test_half_precision_is_read_as_float(variant: Variant, upstream: SyntheticFiles) -> None:
    def halve(content: dict[str, Any]) -> None:
        content["state_dict"] = {key: tensor.half() for key, tensor in content["state_dict"].items()}

    loaded = load(variant(halve))
    expected = load(upstream.checkpoint)
    assert all(torch.equal(loaded.state[name], tensor.half().float()) for name, tensor in expected.state.items())


def test_an_old_file_that_is_no_zip_is_read(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(read(upstream.checkpoint), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_same_policy(load(path, base=upstream.base), load(upstream.checkpoint))


def test_paths_among_the_records_are_harmless(variant: Variant) -> None:
    load(variant(lambda content: content["callbacks"].update(dirpath=Path("runs/checkpoints"))))


def keep_trained(content: dict[str, Any]) -> None:
    state = content["state_dict"]
    content["state_dict"] = {key: tensor for key, tensor in state.items() if is_trained(canonical(key))}


def test_a_checkpoint_of_what_was_trained_takes_the_rest_from_its_base(
    variant: Variant, upstream: SyntheticFiles
) -> None:
    loaded = load(variant(keep_trained))
    assert_same_policy(loaded, load(upstream.checkpoint))
    assert set(loaded.from_base) == {name for name in loaded.state if not is_trained(name)}
    assert loaded.base_sha256 is not None
    assert len(loaded.base_sha256) == 64


def test_a_tuned_projection_wins_over_the_base(variant: Variant) -> None:
    name = "model.backbone.image_to_text_projection.latent_query"

    def tune(content: dict[str, Any]) -> None:
        tuned = content["state_dict"][name] + 1
        keep_trained(content)
        content["state_dict"][name] = tuned

    loaded = load(variant(tune))
    assert "backbone.image_to_text_projection.latent_query" not in loaded.from_base
    assert torch.equal(loaded.policy.backbone.image_to_text_projection.latent_query, loaded.raw.state[name])


# --- where the base is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["base", "/data/elsewhere/base", "weights/base"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_base_is_found_near_the_checkpoint(
    upstream: SyntheticFiles, tmp_path: Path, written: str, depth: int
) -> None:
    folder = tmp_path.joinpath(*["runs", "first"][:depth])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(upstream.base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))

    def name_base(content: dict[str, Any]) -> None:
        configs(content)["vlm"]["pretrained_model_name_or_path"] = written

    path = rewrite(upstream.checkpoint, folder / "policy.ckpt", name_base)
    folder_found = load(path).base.folder
    assert folder_found is not None
    assert folder_found.resolve() == (tmp_path / "base").resolve()


def test_a_stated_base_wins(upstream: SyntheticFiles, tmp_path: Path) -> None:
    shutil.copytree(upstream.base, tmp_path / "other")
    assert load(upstream.checkpoint, base=tmp_path / "other").base.folder == tmp_path / "other"


def test_a_base_that_is_not_found_is_asked_for(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = tmp_path / "policy.ckpt"
    shutil.copy(upstream.checkpoint, path)
    with pytest.raises(BaseWeightsError) as caught:
        load(path)
    folders = [str(folder / "base") for folder in path.parents[:3]]
    assert str(caught.value) == (
        "the base model of policy.ckpt was not found\n"
        f"  got:      no Kosmos-2 in {', '.join(folders)}; widths in the checkpoint {{'vision': 48, 'text': 64}}\n"
        "  expected: that directory, or the widths of microsoft/kosmos-2-patch14-224 {'vision': 1024, 'text': 2048}\n"
        "\n"
        "hint: pass the Kosmos-2 directory (config.json, tokenizer.json) with --base DIR."
    )


@pytest.mark.parametrize(
    ("content", "got"),
    [("{", "Expecting property name"), ('{"model_type": "llama"}', "model_type 'llama'"), ("[]", "'list'")],
)
def test_a_stated_folder_that_is_no_kosmos_is_refused(
    upstream: SyntheticFiles, tmp_path: Path, content: str, got: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json is not (a Kosmos-2 config|JSON)\n  got:      {got}"):
        load(upstream.checkpoint, base=tmp_path)


def test_a_stated_folder_without_a_config_is_refused(upstream: SyntheticFiles, tmp_path: Path) -> None:
    with pytest.raises(BaseWeightsError, match=r"is not a base model\n  got:      no config\.json"):
        load(upstream.checkpoint, base=tmp_path)


@pytest.mark.parametrize("text_config", [{"layers": "two"}, {"embed_dim": 64, "attention_heads": 5}])
def test_impossible_dimensions_of_a_base_are_refused(
    upstream: SyntheticFiles, tmp_path: Path, text_config: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kosmos-2", "text_config": text_config}))
    with pytest.raises(JetvlaError, match="config"):
        load(upstream.checkpoint, base=tmp_path)


def test_a_base_of_other_dimensions_is_refused_with_the_shapes(upstream: SyntheticFiles, tmp_path: Path) -> None:
    """Wider, but no deeper: nothing is missing, everything is misshapen."""
    config = json.loads((upstream.base / "config.json").read_text())
    config["text_config"]["embed_dim"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load(upstream.checkpoint, base=tmp_path)
    assert caught.value.what == "the weights of epoch=0-step=2.ckpt do not fit its config and base"
    assert "action_token [64], not [128]" in str(caught.value.got)
    assert str(caught.value.got).endswith("and 67 more")
    assert "--base" in caught.value.hint


def test_missing_weights_need_a_base_that_has_weights(variant: Variant, synthetic: MakeSynthetic) -> None:
    empty = synthetic(SyntheticOptions(base_weights=False)).base
    with pytest.raises(BaseWeightsError, match=r"base holds no weights\n  expected: model\.safetensors"):
        load(variant(keep_trained), base=empty)


def test_a_truncated_base_is_damaged(variant: Variant, upstream: SyntheticFiles, tmp_path: Path) -> None:
    base = tmp_path / "cut"
    shutil.copytree(upstream.base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BaseWeightsError, match=r"model\.safetensors is damaged"):
        load(variant(keep_trained), base=base)


def test_a_base_that_lacks_weights_too_is_reported(variant: Variant, upstream: SyntheticFiles, tmp_path: Path) -> None:
    base = tmp_path / "partial"
    shutil.copytree(upstream.base, base)
    tensors = load_file(base / "model.safetensors")
    del tensors["text_model.model.layer_norm.bias"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 1: backbone\.text_model\.model\.layer_norm\.bias"):
        load(variant(keep_trained), base=base)


# --- conventions --------------------------------------------------------------------------------------------------------


def test_upstreams_packing_is_inferred_and_says_so(upstream: SyntheticFiles) -> None:
    conventions = load(upstream.checkpoint).policy.conventions
    assert (conventions.packing, conventions.x_attn_causal) == ("upstream", False)
    assert conventions.packing_source.startswith("inferred")
    assert conventions.x_attn_causal_source.startswith("assumed")


@pytest.mark.parametrize(
    "options",
    [
        SyntheticOptions(layout="fork", head="velocities"),
        SyntheticOptions(layout="fork", head="classes"),
        SyntheticOptions(layout="upstream", head="velocities"),
        SyntheticOptions(layout="fork", action_dim=2),
    ],
    ids=lambda options: f"{options.layout}-{options.head}",
)
def test_the_forks_packing_must_be_stated(synthetic: MakeSynthetic, options: SyntheticOptions) -> None:
    with pytest.raises(ConfigError) as caught:
        load(synthetic(options).checkpoint)
    assert "comes from the 2-DoF fork" in caught.value.what
    assert caught.value.got == "packing auto"
    assert caught.value.expected == "--packing upstream, or --packing fork_overwrite"
    assert "pixel_values" in caught.value.hint


@pytest.mark.parametrize("packing", ["upstream", "fork_overwrite"])
def test_stated_conventions_are_taken(fork: SyntheticFiles, packing: Any) -> None:
    conventions = load(fork.checkpoint, packing=packing, x_attn_causal=True).policy.conventions
    assert (conventions.packing, conventions.packing_source) == (packing, "stated by the user")
    assert (conventions.x_attn_causal, conventions.x_attn_causal_source) == (True, "stated by the user")


@pytest.mark.parametrize("options", [SyntheticOptions(hand_camera=True), SyntheticOptions(latent=2)])
def test_overwriting_is_not_defined_for_what_the_fork_lacks(
    synthetic: MakeSynthetic, options: SyntheticOptions
) -> None:
    with pytest.raises(ConfigError, match="fork_overwrite is not defined for a hand camera or latent > 1"):
        load(synthetic(options).checkpoint, packing="fork_overwrite")


def test_a_stated_config_wins_and_inherits(upstream: SyntheticFiles, tmp_path: Path) -> None:
    config = configs(read(upstream.checkpoint))
    (tmp_path / "parent.json").write_text(json.dumps(config))
    child = tmp_path / "child.json"
    child.write_text(json.dumps({"parent": "/elsewhere/parent.json", "window_size": 4}))
    loaded = load(upstream.checkpoint, config=child)
    assert loaded.policy.spec.window == 4
    assert loaded.config == config | {"window_size": 4}


# --- the small format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "frozen"])
def test_a_small_file_round_trips_exactly(synthetic: MakeSynthetic, tmp_path: Path, lora: bool) -> None:
    files = synthetic(SyntheticOptions(layout="fork", head="velocities", lora=lora))
    loaded = load(
        files.checkpoint,
        packing="fork_overwrite",
        x_attn_causal=True,
        prompt_template="{instruction}",
        pad_prompt_to=256,
    )
    path = tmp_path / "policy.safetensors"

    save_small(loaded, path)
    again = load(path, base=files.base)

    assert_same_policy(again, loaded)
    assert again.raw.kind == "jetvla"
    assert again.config == loaded.config
    spec = again.policy.spec
    assert (spec.prompt_template, spec.pad_to, spec.prompt_source) == ("{instruction}", 256, "recorded")
    assert (again.policy.conventions.packing, again.policy.conventions.x_attn_causal) == ("fork_overwrite", True)
    assert again.policy.conventions.packing_source == again.policy.conventions.x_attn_causal_source == "recorded"
    assert set(load_file(path)) == {name for name in loaded.state if is_trained(name)}
    assert again.base_sha256 == read_raw(path).recorded["base_sha256"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_file_holds_what_was_tuned_besides(variant: Variant, upstream: SyntheticFiles, tmp_path: Path) -> None:
    name = "image_to_text_projection.dense.base_layer.bias"

    def tune(content: dict[str, Any]) -> None:
        for prefix in ("model.backbone.", "model.model.base_model.model."):
            content["state_dict"][prefix + name] = torch.full((64,), 0.5)

    loaded = load(variant(tune))
    save_small(loaded, tmp_path / "policy.safetensors")
    assert "backbone.image_to_text_projection.dense.bias" in load_file(tmp_path / "policy.safetensors")
    assert_same_policy(load(tmp_path / "policy.safetensors"), loaded)


def test_a_small_file_may_be_read_under_other_conventions(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_small(load(upstream.checkpoint), path)
    again = load(path, base=upstream.base, packing="fork_overwrite")
    assert (again.policy.conventions.packing, again.policy.conventions.packing_source) == (
        "fork_overwrite",
        "stated by the user",
    )


def test_a_small_file_refuses_another_base(upstream: SyntheticFiles, synthetic: MakeSynthetic, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_small(load(upstream.checkpoint), path)
    other = synthetic(SyntheticOptions(seed=1)).base
    with pytest.raises(BaseWeightsError) as caught:
        load(path, base=other)
    assert caught.value.what == f"{other} is not the base of policy.safetensors"
    assert caught.value.expected == read_raw(path).recorded["base_sha256"]
    assert caught.value.got != caught.value.expected
    assert caught.value.hint


def test_a_small_file_needs_a_base_to_refer_to(
    upstream: SyntheticFiles, synthetic: MakeSynthetic, tmp_path: Path
) -> None:
    loaded = load(upstream.checkpoint, base=synthetic(SyntheticOptions(base_weights=False)).base)
    with pytest.raises(BaseWeightsError, match="holds no weights"):
        save_small(loaded, tmp_path / "policy.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_small_file(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"old")
    with file_size_limit(1_000_000), pytest.raises(StorageError, match="File too large"):
        save_small(load(upstream.checkpoint), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "got"), [(None, "no format"), ({"format": "jetvla-policy/9"}, "jetvla-policy/9"), ({}, "no format")]
)
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None, got: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"is not a jetvla policy\n  got:      {got}\n  expected: {SMALL_FORMAT}"):
        read_raw(path)


@pytest.mark.parametrize("config", [None, "{", "[]"])
def test_a_small_file_without_a_usable_config_is_damaged(tmp_path: Path, config: str | None) -> None:
    path = tmp_path / "policy.safetensors"
    metadata = {"format": SMALL_FORMAT} | ({} if config is None else {"config": config})
    save_file({"action_token": torch.zeros(64)}, path, metadata)
    with pytest.raises(CheckpointError, match="config"):
        load(path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_small_file_is_damaged(upstream: SyntheticFiles, tmp_path: Path, length: int) -> None:
    path = tmp_path / "policy.safetensors"
    save_small(load(upstream.checkpoint), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is damaged\n  got:"):
        read_raw(path)
