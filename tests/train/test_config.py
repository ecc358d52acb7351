"""What a RoboVLMs config is read as, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import ConfigError, UnsupportedPolicyError
from tests.oracle import CASES, oracle_case
from train.config import HeadSpec, LoraSpec, policy_spec, read_json
from train.synthetic_layout import SyntheticOptions
from train.synthetic_records import training_config

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    return training_config(SyntheticOptions())


def set_path(config: Config, path: str, value: object) -> None:
    section, _, leaf = path.rpartition(".")
    (config[section] if section else config)[leaf] = value


def drop_path(config: Config, path: str) -> None:
    section, _, leaf = path.rpartition(".")
    del (config[section] if section else config)[leaf]


def test_every_fact_of_an_upstream_config(config: Config) -> None:
    spec = policy_spec(config)

    assert spec.head == HeadSpec("actions_gripper", outputs=7, hidden=40, layers=4, latent=1, pooling=False)
    assert spec.lora == LoraSpec(r=4, alpha=8.0, dropout=0.1)
    assert spec.lora.scaling == 2.0
    assert (spec.window, spec.chunk, spec.image_size) == (8, 10, 224)
    assert not spec.hand_camera
    assert (spec.normalized, spec.minimum, spec.maximum, spec.mu) == (True, -0.65, 0.65, None)
    assert not spec.fork
    assert spec.base_path == "base"
    assert spec.prompt_template.format(instruction="go") == "<grounding>An image of a robot go"


def test_window_and_chunk_come_from_the_top_level(config: Config) -> None:
    """The copies inside act_head are ignored by the code that wrote them, and wrong in shipped configs."""
    assert config["act_head"]["window_size"] == config["act_head"]["fwd_pred_next_n"] == 1
    config["window_size"], config["fwd_pred_next_n"] = 4, 5
    spec = policy_spec(config)
    assert (spec.window, spec.chunk) == (4, 5)


def test_every_fact_of_a_fork_config() -> None:
    spec = policy_spec(training_config(SyntheticOptions(size="full", layout="fork", head="velocities")))
    assert spec.head == HeadSpec("velocities", outputs=2, hidden=512, layers=4, latent=1, pooling=False)
    assert spec.lora == LoraSpec(r=32, alpha=16.0, dropout=0.1)
    assert spec.lora.scaling == 0.5
    assert spec.fork
    assert (spec.minimum, spec.maximum) == (-1.0, 1.0)


def test_classes_count_as_outputs() -> None:
    spec = policy_spec(training_config(SyntheticOptions(head="classes", action_dim=8)))
    assert (spec.head.kind, spec.head.outputs) == ("classes", 8)


def test_the_forks_early_runs_have_upstreams_head_but_its_trainer() -> None:
    spec = policy_spec(training_config(SyntheticOptions(layout="fork", action_dim=2)))
    assert (spec.head.kind, spec.head.outputs, spec.fork) == ("actions_gripper", 2, True)


def test_options_that_change_the_network(config: Config) -> None:
    config["use_hand_rgb"] = True
    config["act_head"] |= {"latent": 3, "down_sample": "pooling", "num_layers": 2}
    config |= {"use_mu_law": True, "mu_val": 100, "norm_action": False}
    config["train_setup"]["lora_enable"] = False
    spec = policy_spec(config)
    assert spec.hand_camera
    assert (spec.head.latent, spec.head.pooling, spec.head.layers) == (3, True, 2)
    assert (spec.mu, spec.normalized, spec.lora) == (100.0, False, None)


def test_absent_keys_mean_what_the_writing_code_defaults_to(config: Config) -> None:
    for path in ("image_size", "use_hand_rgb", "norm_action", "norm_min", "norm_max", "act_head.latent"):
        drop_path(config, path)
    for path in ("act_head.hidden_size", "act_head.down_sample", "act_head.history_type", "vlm", "trainer"):
        drop_path(config, path)
    config["use_mu_law"] = True
    spec = policy_spec(config)
    assert (spec.image_size, spec.hand_camera, spec.normalized) == (224, False, False)
    assert (spec.head.latent, spec.head.hidden, spec.head.layers, spec.head.pooling) == (1, 1024, 4, False)
    assert (spec.minimum, spec.maximum, spec.mu, spec.base_path) == (-1.0, 1.0, 255.0, None)


REQUIRED = (
    "window_size",
    "fwd_pred_next_n",
    "act_head",
    "act_head.type",
    "act_head.action_dim",
    "train_setup",
    "train_setup.lora_r",
    "train_setup.lora_alpha",
)


# A text is the right type of act_head.type; unknown heads have their own test.
WRONG = [(path, wrong) for path in REQUIRED for wrong in (None, True, [8], "eight")]
WRONG.remove(("act_head.type", "eight"))


@pytest.mark.parametrize(("path", "wrong"), WRONG)
def test_a_required_key_of_the_wrong_type_is_named(config: Config, path: str, wrong: object) -> None:
    set_path(config, path, wrong)
    with pytest.raises(ConfigError) as caught:
        policy_spec(config)
    assert caught.value.what == f"the training config lacks a usable `{path}`"
    assert caught.value.got == repr(wrong)
    assert "--config" in caught.value.hint


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_required_key_is_named(config: Config, path: str) -> None:
    drop_path(config, path)
    with pytest.raises(ConfigError, match=rf"lacks a usable `{path}`\n  got:      None\n  expected: \w+"):
        policy_spec(config)


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        ({"abs_action": True}, "train_dataset.abs_action"),
        ([{"abs_action": False}, {"abs_action": True}], r"train_dataset\[1\]\.abs_action"),
    ],
)
def test_sizes_without_a_sign_are_refused_by_the_exporter_too(config: Config, dataset: Any, key: str) -> None:
    """Every command would go to one side."""
    config["train_dataset"] = dataset
    with pytest.raises(UnsupportedPolicyError, match=rf"uses {key} = True(.|\n)*the side that the instruction names"):
        policy_spec(config)
    config["train_dataset"] = {"abs_action": False}
    policy_spec(config)


OPTIONAL = (
    "image_size",
    "norm_min",
    "norm_max",
    "act_head.hidden_size",
    "act_head.num_layers",
    "act_head.latent",
)


@pytest.mark.parametrize("path", OPTIONAL)
@pytest.mark.parametrize("wrong", [None, "many"], ids=["null", "text"])
def test_an_optional_key_of_the_wrong_type_is_named(config: Config, path: str, wrong: object) -> None:
    set_path(config, path, wrong)
    with pytest.raises(ConfigError, match=path):
        policy_spec(config)


@pytest.mark.parametrize(
    "path", ["window_size", "fwd_pred_next_n", "image_size", "act_head.latent", "act_head.hidden_size"]
)
@pytest.mark.parametrize("wrong", [0, -1])
def test_a_size_below_one_is_named(config: Config, path: str, wrong: int) -> None:
    set_path(config, path, wrong)
    with pytest.raises(ConfigError, match=path):
        policy_spec(config)


@pytest.mark.parametrize("limits", [(1.0, -1.0), (0.5, 0.5)])
def test_a_range_of_actions_that_is_none_is_refused(config: Config, limits: tuple[float, float]) -> None:
    config["norm_min"], config["norm_max"] = limits
    with pytest.raises(ConfigError, match="norm_m"):
        policy_spec(config)


def test_an_unknown_head_is_refused_with_the_known_ones(config: Config) -> None:
    config["act_head"]["type"] = "OtherDecoder"
    with pytest.raises(UnsupportedPolicyError) as caught:
        policy_spec(config)
    assert str(caught.value) == (
        "unknown action head 'OtherDecoder'\n"
        "  expected: LSTMDecoder, MobileVLALSTMDecoder, MobileVLAClassificationDecoder, NavPolicyRegression, NavPolicy\n"
        "\n"
        "hint: only LSTM heads are built; FCDecoder, GPTDecoder and diffusion heads are not."
    )


@pytest.mark.parametrize(
    ("kind", "takes"),
    [
        ("FCDecoder", "an action head without states"),
        ("GPTDecoder", "a GPT-2 over them at every tick"),
        ("DiscreteDecoder", "a cache of keys and values"),
        ("HybridActionHead", "its constructor does not take"),
    ],
)
def test_known_heads_that_are_not_built_say_what_they_would_take(config: Config, kind: str, takes: str) -> None:
    config["act_head"]["type"] = kind
    with pytest.raises(UnsupportedPolicyError) as caught:
        policy_spec(config)
    assert caught.value.what == f"this policy uses act_head.type = {kind!r}, which jetvla does not build"
    assert takes in caught.value.hint


@pytest.mark.parametrize(
    ("path", "value", "takes"),
    [
        ("model", "paligemma", "that backbone's own stages"),
        ("model", "kosmos-g", "the text that RoboVLMs' loader puts around an instruction"),
        ("robovlm_name", "RoboFlamingo", "that backbone's own stages"),
        ("fwd_head", {"type": "FwdDecoder"}, "has not published"),
        ("tcp_rel", True, "the tool's pose at every tick"),
        ("regular_action", True, "the inverse of x_mean and x_std"),
        ("train_setup.predict_action", False, "a head that has learned something"),
        ("act_head.history_type", "pre", "kept from tick to tick"),
        ("act_head.history_type", "video", "kept from tick to tick"),
        ("act_head.history_type", None, "kept from tick to tick"),
        ("act_head.action_space", "discrete", "whose config says continuous"),
        ("act_head.action_space", "down_sample", "a head that pools them"),
        ("act_head.down_sample", "resampler", "a resampler of action tokens"),
        ("act_head.fill_zero", True, "a mask in the language stage"),
        ("act_head.text_in_features", 1024, "to all tokens of the prompt, padding included"),
    ],
)
def test_a_known_variant_that_is_not_built_is_refused_by_name(
    config: Config, path: str, value: object, takes: str
) -> None:
    set_path(config, path, value)
    with pytest.raises(UnsupportedPolicyError) as caught:
        policy_spec(config)
    assert caught.value.what == f"this policy uses {path} = {value!r}, which jetvla does not build"
    assert "LSTM head" in str(caught.value.expected)
    assert caught.value.hint.startswith("it would take ")
    assert takes in caught.value.hint


def test_class_heads_alone_are_told_the_instruction(config: Config) -> None:
    config["act_head"]["instr_in_features"] = 2048
    assert not policy_spec(config).head.told
    config["act_head"] |= {"type": "NavPolicy", "num_classes": 8}
    assert policy_spec(config).head.told
    config["act_head"]["instr_in_features"] = None
    assert not policy_spec(config).head.told


@pytest.mark.parametrize("loader", ["NavDataset", "MobileVLAH5Dataset"])
def test_another_kosmos_is_a_name_where_class_and_loader_do_not_ask(config: Config, loader: str) -> None:
    """Upstream's loaders choose the text around an instruction by it, so there it counts."""
    config |= {"model": "kosmos-g", "train_dataset": {"type": loader}}
    assert policy_spec(config).head.kind == "actions_gripper"
    del config["robovlm_name"]
    with pytest.raises(UnsupportedPolicyError, match="model = 'kosmos-g'"):
        policy_spec(config)


def test_the_labs_trainer_does_not_ask_whether_actions_are_predicted(config: Config) -> None:
    """Its loader of V5 came with that trainer; RoboVLMs' own asks."""
    config["train_setup"]["predict_action"] = False
    config["train_dataset"] = {"type": "NavDataset", "grounding_prefix": True}
    policy_spec(config)
    config["train_dataset"] = {"type": "NavDataset"}
    with pytest.raises(UnsupportedPolicyError, match="predict_action = False"):
        policy_spec(config)


@pytest.mark.parametrize(
    ("name", "other"),
    [("NavPolicy", "MobileVLAClassificationDecoder"), ("NavPolicyRegression", "MobileVLALSTMDecoder")],
)
def test_the_labs_names_of_heads_mean_the_forks(config: Config, name: str, other: str) -> None:
    """Dropout acts in training, and the sizes of chunk and window are the top level's."""
    config["act_head"] |= {"type": other}
    expected = policy_spec(config)
    config["act_head"] |= {"type": name, "dropout": 0.1, "policy_rnn_dropout_p": 0.1, "chunk_size": 5, "window_size": 3}
    config["act_head"]["fwd_pred_next_n"] = 2
    assert policy_spec(config) == expected
    assert expected.fork


@pytest.mark.parametrize("section", ["act_head", "train_setup", "vlm"])
def test_a_section_that_is_no_object_is_no_crash(config: Config, section: str) -> None:
    config[section] = "none"
    if section == "vlm":
        assert policy_spec(config).base_path is None
    else:
        with pytest.raises(ConfigError, match=f"lacks a usable `{section}`"):
            policy_spec(config)


def test_reading_does_not_change_the_config(config: Config) -> None:
    before = copy.deepcopy(config)
    policy_spec(config)
    assert config == before


@pytest.mark.parametrize("name", CASES)
def test_recorded_configs_are_read(name: str) -> None:
    case = oracle_case(name)
    spec = policy_spec(read_json(case.folder / "config.json"))
    assert (spec.head.hidden, spec.window, spec.chunk) == (40, 8, 10)
    assert spec.fork == name.startswith("fork2dof")
    assert (spec.lora is None) == (name == "frozen_nolora_7d")
    assert spec.base_path == "vlm_tiny"


# --- files --------------------------------------------------------------------------------------------------------------


WriteJson = Callable[[str, object], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteJson:
    def write_json(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write_json


def test_a_child_wins_over_its_parents_and_sections_are_merged(write: WriteJson) -> None:
    write("grandparent.json", {"a": 1, "b": 1, "c": 1, "act_head": {"x": 1, "y": 1, "z": 1}, "parent": None})
    write("parent.json", {"b": 2, "c": 2, "act_head": {"y": 2, "z": 2}, "parent": "grandparent.json"})
    child = write("child.json", {"c": 3, "act_head": {"z": 3}, "parent": "parent.json"})

    assert read_json(child) == {"a": 1, "b": 2, "c": 3, "act_head": {"x": 1, "y": 2, "z": 3}, "parent": None}


def test_null_in_a_child_overrides_a_parents_section(write: WriteJson) -> None:
    write("parent.json", {"fwd_head": {"type": "x"}})
    assert read_json(write("child.json", {"fwd_head": None, "parent": "parent.json"}))["fwd_head"] is None


def test_a_parent_is_found_in_another_folder(write: WriteJson) -> None:
    write("base/parent.json", {"a": 1})
    assert read_json(write("runs/child.json", {"parent": "../base/parent.json"}))["a"] == 1


def test_a_parent_named_by_another_machines_path_is_found_beside_the_child(write: WriteJson) -> None:
    write("parent.json", {"a": 1})
    assert read_json(write("child.json", {"parent": "/data/elsewhere/configs/parent.json"}))["a"] == 1


def test_a_circle_of_parents_is_shown(write: WriteJson) -> None:
    first = write("first.json", {"parent": "second.json"})
    second = write("second.json", {"parent": "first.json"})
    with pytest.raises(ConfigError) as caught:
        read_json(first)
    assert caught.value.what == f"{first} inherits from itself"
    assert caught.value.got == f"{first} -> {second}"
    assert "remove one `parent`" in caught.value.hint


def test_a_config_that_names_itself_is_a_circle(write: WriteJson) -> None:
    with pytest.raises(ConfigError, match="inherits from itself"):
        read_json(write("self.json", {"parent": "self.json"}))


def test_a_missing_parent_is_named_with_its_child(write: WriteJson) -> None:
    child = write("child.json", {"parent": "gone.json"})
    with pytest.raises(ConfigError) as caught:
        read_json(child)
    assert caught.value.what.endswith("gone.json does not exist")
    assert caught.value.got == f"named by {child}"


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json does not exist\n\nhint: correct the path"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"act_head: {}\n"], ids=["empty", "cut", "bytes", "yaml"]
)
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert caught.value.what == f"{path} is not JSON"
    assert "(.json)" in caught.value.hint


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        read_json(tmp_path)


def test_json_that_is_no_object_is_refused(write: WriteJson) -> None:
    with pytest.raises(ConfigError, match="is not a config\n  got:      list\n  expected: a JSON object"):
        read_json(write("config.json", [1]))
