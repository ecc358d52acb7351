"""Settings: defaults that stand, ranges, unknown keys, contradictions, and the documentation made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import ConfigError
from train.config_checks import convert, require_key
from train.run_config import AugmentConfig, LoraConfig, OptimizerConfig, RunConfig
from train.run_config_table import config_table

ROOT = Path(__file__).parents[2]

LEAST: dict[str, Any] = {"name": "run", "base": {"model": "kosmos"}, "data": {"sources": [{"files": ["*.h5"]}]}}


def config(**sections: Any) -> RunConfig:
    """The shortest config with some sections changed; `data` keeps its sources."""
    values = {**LEAST, **sections}
    values["data"] = {**LEAST["data"], **sections.get("data", {})}
    return convert(values, origin="run.toml")


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    return str(caught.value)


def test_defaults_are_those_of_the_reference_experiments() -> None:
    run = config()

    assert (run.data.window, run.data.chunk, run.data.val_share) == (8, 10, 0.2)
    assert (run.model.head, run.model.hidden, run.model.layers, run.model.freeze_backbone) == (
        "velocities",
        512,
        4,
        True,
    )
    assert (run.model.lora.targets, run.model.lora.r, run.model.lora.alpha, run.model.lora.dropout) == (
        "all",
        32,
        16,
        0.1,
    )
    assert (run.loop.epochs, run.loop.batch_size, run.loop.accumulate, run.loop.keep_best) == (20, 1, 8, 3)
    assert (run.optimizer.learning_rate, run.optimizer.clip_norm) == (1e-4, 1.0)


def test_plain_data_of_a_config_is_the_config_again() -> None:
    run = config(data={"action_range": [-1, 1], "actions": ["linear_x", "angular_z"]}, augment={"mirror": 0.5})

    assert convert(run.as_dict(), origin="again") == run


@pytest.mark.parametrize(
    ("sections", "key", "near"),
    [
        ({"loop": {"epoch": 3}}, "loop.epoch", "loop.epochs"),
        ({"model": {"lora": {"rank": 3, "alhpa": 8}}}, "model.lora.rank", None),
        ({"model": {"lora": {"alhpa": 8}}}, "model.lora.alhpa", "model.lora.alpha"),
        ({"learning_rate": 1e-4}, "learning_rate", "optimizer.learning_rate"),
        ({"data": {"sources": [{"files": ["a"]}, {"file": ["b"]}]}}, "data.sources[1].file", "data.sources[1].files"),
        ({"optimiser": {}}, "optimiser", "optimizer"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(sections: Any, key: str, near: str | None) -> None:
    message = refusal(**sections)

    assert f"unknown key `{key}`" in message
    assert f"did you mean `{near}`?" in message if near else "docs/training-config.md" in message


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"loop": {"epochs": 0}}, "loop.epochs"),
        ({"loop": {"epochs": 1.5}}, "loop.epochs"),
        ({"loop": {"batch_size": True}}, "loop.batch_size"),
        ({"loop": 3}, "loop"),
        ({"model": {"lora": {"dropout": 1.0}}}, "model.lora.dropout"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate"),
        ({"loss": {"huber_delta": math.nan}}, "loss.huber_delta"),
        ({"data": {"action_range": [-1.0, math.inf]}}, "data.action_range[1]"),
        ({"data": {"action_range": [1, -1]}}, "data.action_range"),
        ({"data": {"action_range": "automatic"}}, "data.action_range"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"data": {"sources": [{"files": "a.h5"}]}}, "data.sources[0].files"),
        ({"data": {"actions": ["linear_x", "linear_x"]}}, "data.actions"),
        ({"data": {"val_share": 0.0}}, "data.val_share"),
        ({"model": {"head": "classes", "classes": ["Stop", "Up"]}}, "model.classes"),
        ({"model": {"head": "classes", "classes": ["Stop", "A=1,x"]}}, "model.classes"),
        ({"model": {"head": "classes", "classes": ["Stop", "F"], "relabel": {"FL": "L"}}}, "model.classes"),
        ({"model": {"head": "classes", "classes": ["Stop", "TurnL"]}}, "data.actions"),
        ({"model": {"classes": ["Stop", "F"]}}, "model.classes"),
        ({"model": {"relabel": {"FL": "L"}}}, "model.relabel"),
        (
            {"model": {"head": "classes", "classes": ["Stop", "F"]}, "loss": {"class_weights": [1] * 9}},
            "loss.class_weights",
        ),
        ({"data": {"pad_prompt_to": 1}}, "data.pad_prompt_to"),
        ({"data": {"prompt_template": "{instruction}, {instruction}"}}, "data.prompt_template"),
        ({"data": {"prompt_template": "{instruction} }"}}, "data.prompt_template"),
        ({"data": {"prompt_template": "{instruction} {other}"}}, "data.prompt_template"),
        ({"base": {"model": "kosmos", "sha256": "abc"}}, "base.sha256"),
        ({"name": "a/b"}, "name"),
        ({"name": "run\n"}, "name"),
        ({"name": ".."}, "name"),
        ({"model": {"head": "classes"}, "data": {"actions": ["linear_x"]}}, "data.actions"),
        ({"model": {"head": "actions_gripper", "action_dim": 2}}, "model.action_dim"),
        ({"model": {"action_dim": 7}}, "model.action_dim"),
        ({"model": {"packing": "fork_overwrite", "latent": 2}}, "model.latent"),
        ({"model": {"head": "velocities", "instruction_in_head": True}}, "model.instruction_in_head"),
        ({"model": {"packing": "fork_overwrite", "vision_resampler": True}}, "model.vision_resampler"),
        ({"model": {"freeze_backbone": False}}, "model.freeze_backbone"),
        ({"model": {"train_decoder_layers": 2}}, "model.train_decoder_layers"),
        ({"data": {"sources": [{"files": ["a"], "words": {"up": ["Go"]}}]}}, "data.sources[0].words"),
        ({"data": {"sources": [{"files": ["a"], "words": {"left": []}}]}}, "data.sources[0].words"),
        ({"data": {"sources": [{"files": ["a"], "words": {"left": [" "]}}]}}, "data.sources[0].words"),
        ({"loss": {"class_weights": [1.0] * 9}}, "loss.class_weights"),
        ({"loss": {"class_weights": [1.0] * 8}, "model": {"head": "classes"}}, "loss.class_weights"),
        ({"loss": {"class_weights": [0.0] * 9}, "model": {"head": "classes"}}, "loss.class_weights"),
    ],
)
def test_unusable_values_are_refused_by_their_path(sections: Any, key: str) -> None:
    assert f"run.toml: `{key}` is not usable" in refusal(**sections)


def test_a_missing_section_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.toml is not a usable training config[\s\S]*`data`"):
        convert({"name": "run", "base": {"model": "x"}}, origin="run.toml")


def test_all_contradictions_are_told_at_once() -> None:
    message = refusal(data={"val_share": 1.0, "actions": []}, model={"action_dim": 3})

    assert "3 settings are not usable" in message
    assert all(key in message for key in ("data.val_share", "data.actions = none", "model.action_dim = 3"))


def test_what_contradicts_nothing_is_accepted() -> None:
    config(model={"freeze_backbone": False, "lora": {"targets": "none"}, "train_decoder_layers": 2})
    config(model={"head": "actions_gripper", "action_dim": 7}, loss={"gripper_ratio": 0})
    config(model={"head": "classes"}, loss={"class_weights": [1, 2, 0, 1, 1, 1, 1, 0, 0]})
    config(data={"val_share": 1.0, "split": "split.json"})


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=5,
)


@given(section=st.sampled_from(sorted(config().as_dict().keys() - {"name"})), data=st.data())
def test_any_value_is_converted_or_refused(section: str, data: st.DataObject) -> None:
    values = config().as_dict()
    key = data.draw(st.sampled_from(sorted(values[section])) | st.text(max_size=8))
    values[section][key] = data.draw(_PLAIN)

    try:
        run = convert(values, origin="any")
    except ConfigError:
        return
    assert convert(run.as_dict(), origin="again") == run


def test_the_type_of_a_key() -> None:
    assert require_key("model.lora", origin="x") is LoraConfig
    with pytest.raises(ConfigError, match=r"nothing below `loop\.epochs`"):
        require_key("loop.epochs.more", origin="x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 0), ({"warmup_steps": 5}, 5), ({"warmup_epochs": 0.1}, 4), ({"warmup_steps": 5, "warmup_epochs": 2}, 67)],
)
def test_warm_up_in_steps(settings: dict[str, Any], expected: int) -> None:
    resolved = OptimizerConfig(learning_rate=1e-3, **settings).resolved(31)

    assert (resolved.warmup_steps, resolved.warmup_epochs, resolved.learning_rate) == (expected, 0.0, 1e-3)


def test_only_pixels_that_change_keep_image_tokens_from_being_cached() -> None:
    assert not AugmentConfig(mirror=0.5).changes_pixels
    assert not AugmentConfig(blur=1.0, share=0.0).changes_pixels
    assert AugmentConfig(crop=0.1).changes_pixels


def test_the_documentation_is_made_of_the_code() -> None:
    path = ROOT / "docs" / "training-config.md"
    assert path.read_text(encoding="utf-8") == config_table(), (
        "run: python train/run_config_table.py > docs/training-config.md"
    )


def test_the_documentation_has_every_key_with_a_meaning() -> None:
    table = config_table()

    def check(kind: type[msgspec.Struct], path: str) -> None:
        for field in msgspec.structs.fields(kind):
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                assert f"## `[{path}{field.name}]`" in table
                check(field.type, f"{path}{field.name}.")
            else:
                ours = table.partition("## Keys of RoboVLMs configs")[0].splitlines()
                rows = [line for line in ours if line.startswith(f"| `{field.name}` |")]
                assert rows
                assert all(len(row.split(" | ")[3].rstrip(" |")) > 5 for row in rows)

    check(RunConfig, "")
