"""What is no checkpoint, wants to run code, or does not fit: refused by name, with what to do about it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bundle.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from tests.checkpoints import Edit, Variant, configs, rewrite
from tests.train.conftest import MakeSynthetic
from train.checkpoint import load, read_raw
from train.keys import canonical
from train.synthetic import SyntheticFiles, SyntheticOptions

# --- files that are none ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_zip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a few kilobytes."""
    path = tmp_path_factory.mktemp("zip") / "small.ckpt"
    torch.save({"state_dict": {"model.action_token": torch.arange(64.0)}}, path)
    return path.read_bytes()


def assert_refused(path: Path, what: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_raw(path)
    assert caught.value.what == f"{path} {what}"
    assert caught.value.hint
    assert "\n\nhint: " in str(caught.value)
    return caught.value


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_called_so(small_zip: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.ckpt"
    length = int(len(small_zip) * share)
    path.write_bytes(small_zip[:length])
    error = assert_refused(path, "is truncated or not a checkpoint")
    assert f"{length} bytes" in str(error.got)
    assert "compare sizes" in error.hint


def test_a_full_checkpoint_without_its_last_byte_is_truncated(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    shutil.copy(upstream.checkpoint, path)
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(path, "is truncated or not a checkpoint")


@pytest.mark.parametrize("length", [5, 50, -4])
def test_a_truncated_old_file_is_called_so(small_zip: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.arange(64.0)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(path, "is truncated or not a checkpoint")


MISTAKEN = "what torch says of bytes that are no pickle is taken for code"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text file\n",
        b"\x00" * 5000,
        b"P",
        b"<html><body>404</body></html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(range(255, 100, -1)) * 20,
    ],
    ids=["empty", "text", "zeros", "one byte", "html", "git-lfs", "noise"],
)
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "policy.ckpt"
    path.write_bytes(content)
    error = assert_refused(path, "is truncated or not a checkpoint")
    assert f"{len(content)} bytes" in str(error.got)


def test_another_zip_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "policy.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_refused(path, "is truncated or not a checkpoint")


@pytest.mark.parametrize(
    ("made", "hint"),
    [
        (("checkpoints/last.safetensors",), "name the checkpoint in it: .*/checkpoints/last.safetensors"),
        (("config.json", "model.safetensors"), "and this folder with --base"),
    ],
)
def test_a_directory_of_ours_says_what_was_meant(tmp_path: Path, made: tuple[str, ...], hint: str) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert re.search(hint, assert_refused(tmp_path, "is a directory").hint)


def test_a_text_is_no_checkpoint_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "policy.ckpt"
    path.write_text("[model]\nhead = 'lstm'\n", encoding="utf-8")
    error = assert_refused(path, "is truncated or not a checkpoint")
    assert "bytes of text: '[model]" in str(error.got)
    assert "name the checkpoint itself" in error.hint


def test_a_file_that_cannot_be_read_is_no_checkpoint() -> None:
    assert_refused(Path("/proc/self/mem"), "is truncated or not a checkpoint")


def test_a_part_of_pefts_folder_names_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert f"pass {tmp_path}" in assert_refused(tmp_path / "adapter_model.safetensors", "is not a jetvla policy").hint


def test_a_directory_is_pointed_to_deepspeeds_script(tmp_path: Path) -> None:
    error = assert_refused(tmp_path, "is a directory")
    assert "zero_to_fp32.py" in error.hint


def test_a_missing_file_is_called_so(tmp_path: Path) -> None:
    assert_refused(tmp_path / "gone.ckpt", "does not exist")


@pytest.mark.parametrize(
    ("content", "what", "got"),
    [
        ([1, 2], "holds no policy", "list"),
        ({"weights": {}, "epoch": 1}, "holds no policy", "['epoch', 'weights']"),
        ({"state_dict": [1]}, "holds no policy", "['state_dict']"),
        ({"state_dict": {}}, "holds an empty state_dict", "0"),
        ({"state_dict": {"a": 1}}, "holds an empty state_dict", "0"),
    ],
)
def test_a_file_without_a_state_dict_is_no_policy(tmp_path: Path, content: object, what: str, got: str) -> None:
    path = tmp_path / "policy.pt"
    torch.save(content, path)
    assert str(assert_refused(path, what).got) == got


# --- code in pickles ----------------------------------------------------------------------------------------------------


class Opens:
    """Creates a file when unpickled: a function that torch does not allow."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.marker), "w")


class RunsShell(Opens):
    """Creates a file when unpickled: a function of a module that torch blocks."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


class Evaluates(Opens):
    """Creates a file when unpickled: a builtin."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def write_tar(content: object, path: Path) -> None:
    """The format of torch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


WRITERS: dict[str, Callable[[object, Path], object]] = {
    "zip": torch.save,
    "old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "tar": write_tar,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("bomb", [Opens, RunsShell, Evaluates])
@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "top level"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, writer: str, bomb: type[Opens], place: str) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "policy.ckpt"
    content: Any = {"state_dict": {"model.action_token": torch.zeros(4)}, "hyper_parameters": {}}
    if place == "top level":
        content = bomb(marker)
    else:
        content[place]["x"] = bomb(marker)
    if writer in ("pickle", "tar") and place != "top level":
        content["state_dict"].pop("model.action_token")  # no tensors in plain pickles
    WRITERS[writer](content, path)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert not marker.exists()
    assert caught.value.hint
    assert "torch.load" not in caught.value.hint, "nobody should be told to switch the safety off"


NAMES = "the message is cut before the name, and names of blocked modules are not recognised"


@pytest.mark.parametrize(
    ("bomb", "name"), [(Opens, "io.open"), (RunsShell, "system"), (Evaluates, "eval")], ids=["open", "system", "eval"]
)
def test_the_code_that_wants_to_run_is_named(tmp_path: Path, bomb: type[Opens], name: str) -> None:
    path = tmp_path / "policy.ckpt"
    torch.save({"state_dict": {"x": bomb(tmp_path / "marker")}}, path)
    error = assert_refused(path, "wants to run code")
    assert name in str(error.got)
    assert error.expected == "tensors and plain data"
    assert "weights_only" not in str(error)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickle_of_a_newer_protocol_is_refused_without_a_warning(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "policy.ckpt"
    path.write_bytes(pickle.dumps({"x": Opens(tmp_path / "marker")}, protocol=protocol))
    with pytest.raises(CheckpointError):
        read_raw(path)
    assert not (tmp_path / "marker").exists()


# --- weights that do not fit --------------------------------------------------------------------------------------------

EMBEDDING = "model.backbone.text_model.model.embed_tokens.weight"
HEAD = "model.act_head.actions.mlp.6.weight"
QUERY = "text_model.model.layers.0.self_attn.q_proj"


def put(key: str, value: Tensor) -> Edit:
    return lambda content: content["state_dict"].update({key: value})


def drop(*parts: str) -> Edit:
    """Remove the keys that contain all parts."""

    def edit(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        content["state_dict"] = {key: value for key, value in state.items() if not all(part in key for part in parts)}

    return edit


def set_config(section: str | None, key: str, value: object) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        config = configs(content)
        (config[section] if section else config)[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "got"),
    [
        (drop("action_token"), "missing 1: action_token"),
        (drop("act_head.gripper"), "missing 8: act_head.gripper.mlp.0.bias, act_head.gripper.mlp.0.weight, "),
        (drop(QUERY, "lora_B"), f"missing 1: backbone.{QUERY}.lora_B.weight"),
        (drop(QUERY, "lora_A"), f"unknown 1: backbone.{QUERY}.lora_B.weight"),
        (put("model.act_head.extra.weight", torch.zeros(2)), "unknown 1: act_head.extra.weight"),
        (put("model.backbone.extra", torch.zeros(2)), "unknown 1: backbone.extra"),
        (put("optimizer.step", torch.zeros(())), "unknown 1: optimizer.step"),
        (put("model.action_token", torch.zeros(63)), "misshapen 1: action_token [63], not [64]"),
        (put("model.action_token", torch.zeros(1, 64)), "misshapen 1: action_token [1, 64], not [64]"),
        (set_config("act_head", "hidden_size", 64), "misshapen 18: act_head.actions.mlp.0.weight [1024, 40], not "),
        (set_config("act_head", "num_layers", 3), "unknown 4: act_head.rnn.bias_hh_l3, "),
        (set_config("act_head", "num_layers", 5), "missing 4: act_head.rnn.bias_hh_l4, "),
        (set_config("act_head", "action_dim", 3), "[60], not [20]"),
        (set_config("act_head", "type", "MobileVLALSTMDecoder"), "missing 8: act_head.velocities.mlp.0.bias, "),
        (set_config(None, "fwd_pred_next_n", 5), "act_head.gripper.mlp.6.bias [10], not [5]"),
    ],
)
def test_every_key_that_does_not_fit_is_listed(variant: Variant, edit: Edit, got: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(variant(edit), packing="upstream")
    assert caught.value.what == "the weights of variant.ckpt do not fit its config and base"
    assert got in str(caught.value.got)
    assert str(caught.value.expected).startswith("exactly the ")
    assert caught.value.hint


def test_all_kinds_of_misfit_are_listed_at_once(variant: Variant) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"][HEAD.replace("actions", "other")] = torch.zeros(1)
        content["state_dict"][HEAD] = torch.zeros(1)
        del content["state_dict"]["model.action_token"]

    with pytest.raises(CheckpointError, match=r"missing 1: action_token; unknown 1: .*; misshapen 1: .* \[1\], not"):
        load(variant(edit))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["model.action_token", HEAD, EMBEDDING])
def test_weights_that_are_not_finite_are_refused_by_name(variant: Variant, key: str, value: float) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(variant(lambda content: content["state_dict"][key].view(-1)[5:6].fill_(value)))
    assert caught.value.what == "variant.ckpt holds NaN or infinite weights"
    assert caught.value.got == f"1: {canonical(key)}"
    assert "training diverged" in caught.value.hint


def test_infinities_that_cancel_are_still_infinite(variant: Variant) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"][HEAD][0, :2] = torch.tensor([float("inf"), -float("inf")])

    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load(variant(edit))


@pytest.mark.parametrize(
    "value", [torch.zeros(64), torch.zeros(63), torch.full((64,), float("nan"))], ids=["value", "shape", "nan"]
)
def test_aliases_that_disagree_are_refused(variant: Variant, value: Tensor) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(variant(put("model.model.base_model.model.text_model.model.layer_norm.bias", value)))
    assert caught.value.what == "variant.ckpt gives one parameter two values"
    assert caught.value.got == "1: backbone.text_model.model.layer_norm.bias"


def test_two_adapters_are_refused_by_name(variant: Variant) -> None:
    def add(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        state.update({key.replace(".default.", ".second."): value for key, value in list(state.items())})

    with pytest.raises(CheckpointError, match="holds several adapters\n  got:      default, second\n  expected: one"):
        load(variant(add))


@pytest.mark.parametrize("module", ["act_head.actions.mlp.0", "other.backbone.text_model.model.layers.0.ffn.fc1"])
def test_an_adapter_outside_of_the_backbone_is_listed(variant: Variant, module: str) -> None:
    with pytest.raises(CheckpointError, match=f"unknown .*{module}"):
        load(variant(put(f"model.{module}.lora_A.default.weight", torch.zeros(4, 64))))


def test_a_value_that_is_no_tensor_is_reported(variant: Variant) -> None:
    loaded = load(variant(lambda content: content["state_dict"].update({"model.extra_state": {"a": 1}})))
    assert "model.extra_state" in loaded.ignored


# --- configs that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "frozen"])
def test_config_and_weights_must_agree_about_lora(synthetic: MakeSynthetic, tmp_path: Path, lora: bool) -> None:
    files = synthetic(SyntheticOptions(lora=lora))
    path = rewrite(files.checkpoint, tmp_path / "x.ckpt", set_config("train_setup", "lora_enable", not lora))
    with pytest.raises(ConfigError) as caught:
        load(path, base=files.base)
    assert caught.value.what == "config and weights of x.ckpt disagree about LoRA"
    assert caught.value.got == f"{35 if lora else 0} adapted modules in the weights"
    assert caught.value.expected == f"lora_enable {not lora}"
    assert "--config" in caught.value.hint


def test_config_and_weights_must_agree_about_the_rank(variant: Variant) -> None:
    with pytest.raises(ConfigError) as caught:
        load(variant(set_config("train_setup", "lora_r", 8)))
    assert caught.value.what == "config and weights of variant.ckpt disagree about the LoRA rank"
    assert (caught.value.got, caught.value.expected) == ("[4] in the weights", "lora_r 8")


@pytest.mark.parametrize("key", ["window_size", "fwd_pred_next_n", "act_head", "train_setup"])
def test_a_config_that_lacks_a_key_is_refused_by_name(variant: Variant, key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks a usable `{key}`"):
        load(variant(lambda content: configs(content).pop(key)))


def test_a_file_without_a_config_asks_for_it(variant: Variant) -> None:
    with pytest.raises(ConfigError) as caught:
        load(variant(lambda content: content.pop("hyper_parameters")))
    assert caught.value.what == "variant.ckpt carries no training config"
    assert caught.value.got == "no hyper_parameters.configs, no variant.json or config.json beside it"
    assert "--config" in caught.value.hint


@pytest.mark.parametrize(
    ("section", "key", "value", "name"),
    [
        ("act_head", "type", "FCDecoder", "FCDecoder"),
        ("act_head", "history_type", "pre", "act_head.history_type = 'pre'"),
        ("act_head", "action_space", "discrete", "act_head.action_space = 'discrete'"),
        ("act_head", "action_space", "down_sample", "act_head.action_space = 'down_sample'"),
    ],
)
def test_a_variant_that_is_not_built_is_refused_by_name(
    variant: Variant, section: str | None, key: str, value: object, name: str
) -> None:
    with pytest.raises(UnsupportedPolicyError) as caught:
        load(variant(set_config(section, key, value)))
    assert name in caught.value.what


def test_a_circle_of_stated_configs_is_refused(upstream: SyntheticFiles, tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"parent": f"{parent}.json"}))
    with pytest.raises(ConfigError, match="inherits from itself"):
        load(upstream.checkpoint, config=tmp_path / "a.json")


def test_a_stated_config_whose_parent_is_gone_is_refused(upstream: SyntheticFiles, tmp_path: Path) -> None:
    (tmp_path / "child.json").write_text(json.dumps({"parent": "gone.json"}))
    with pytest.raises(ConfigError, match=r"gone\.json does not exist\n  got:      named by .*child\.json"):
        load(upstream.checkpoint, config=tmp_path / "child.json")


@pytest.mark.parametrize(
    ("head", "stated", "true"),
    [
        ("actions_gripper", "MobileVLALSTMDecoder", "LSTMDecoder (one arm column and a gripper"),
        ("velocities", "LSTMDecoder", "MobileVLALSTMDecoder"),
        ("classes", "NavPolicyRegression", "MobileVLAClassificationDecoder"),
    ],
)
def test_a_config_that_names_another_head_is_told_which_one_the_file_has(
    synthetic: MakeSynthetic, tmp_path: Path, head: Any, stated: str, true: str
) -> None:
    """In some of the lab's code MobileVLALSTMDecoder was another name of upstream's LSTMDecoder."""
    files = synthetic(SyntheticOptions(head=head, action_dim=2, lora=False))

    def name_it(content: dict[str, Any]) -> None:
        configs(content)["act_head"] |= {"type": stated, "action_dim": 2}

    path = rewrite(files.checkpoint, tmp_path / "other.ckpt", name_it)
    with pytest.raises(CheckpointError, match="do not fit its config and base") as caught:
        load(path, base=files.base, packing="upstream")
    assert f"these are the weights of {true}" in caught.value.hint


def test_a_head_that_is_told_something_else_is_refused_by_name(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """The lab's loader can read embeddings of another width from a file of its own."""
    files = synthetic(SyntheticOptions(layout="fork", head="classes", told=True))

    def widen(content: dict[str, Any]) -> None:
        configs(content)["act_head"]["instr_in_features"] = 1024
        content["state_dict"]["model.act_head.instr_proj.weight"] = torch.zeros(64, 1024)

    path = rewrite(files.checkpoint, tmp_path / "wide.ckpt", widen)
    with pytest.raises(
        UnsupportedPolicyError, match=r"instr_in_features = 1024, which jetvla does not build"
    ) as caught:
        load(path, base=files.base, packing="upstream")
    assert "64, the width of this base's word embeddings" in str(caught.value.expected)


@pytest.mark.parametrize("drop", [True, False], ids=["weights missing", "key missing"])
def test_a_head_that_is_told_needs_its_weights_and_its_key(
    synthetic: MakeSynthetic, tmp_path: Path, drop: bool
) -> None:
    files = synthetic(SyntheticOptions(layout="fork", head="classes", told=True))

    def tear(content: dict[str, Any]) -> None:
        if not drop:
            del configs(content)["act_head"]["instr_in_features"]
            return
        for name in [name for name in content["state_dict"] if "instr_proj" in name]:
            del content["state_dict"][name]

    path = rewrite(files.checkpoint, tmp_path / "torn.ckpt", tear)
    with pytest.raises(CheckpointError, match="missing 2" if drop else "unknown 2") as caught:
        load(path, base=files.base, packing="upstream")
    assert "act_head.instr_proj" in str(caught.value.got)
    assert ("a config without the key" in caught.value.hint) == drop
