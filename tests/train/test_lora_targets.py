"""Which modules get adapters, against the real peft on the same Kosmos-2."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ForConditionalGeneration, Kosmos2Model

from bundle.errors import ConfigError
from tests.train.runs import RunFiles
from tests.train.test_robovlms_config import fork_config
from tests.train.test_run_config import config
from train.load_config import load_run_config
from train.lora_targets import LEAVES, TEXT, VISION, adapted_modules, robovlms_targets
from train.robovlms_config import from_robovlms
from train.robovlms_layout import linear_modules
from train.run_config import LoraConfig
from train.run_setup import gather

KOSMOS = Kosmos2Config(
    text_config={"vocab_size": 64, "embed_dim": 32, "layers": 3, "ffn_dim": 16, "attention_heads": 2},
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    latent_query_num=2,
)


@cache
def linears() -> tuple[str, ...]:
    with torch.device("meta"):
        return linear_modules(Kosmos2Model(KOSMOS))


def adapted_by_peft(targets: Any, layers: list[int] | None = None) -> set[str]:
    """What peft adapts in the model that the labs load; its tied head, which we have not, aside. Raises what peft raises."""
    with torch.device("meta"):
        model = Kosmos2ForConditionalGeneration(KOSMOS)
    settings = peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM")
    names = peft.get_peft_model(model, settings, low_cpu_mem_usage=True).base_model.model.named_modules()
    found = {name.removesuffix(".lora_A") for name, _ in names if name.endswith(".lora_A")}
    return found - {"text_model.lm_head"}


def ours(targets: Any, layers: Any = None) -> set[str] | None:
    """What we adapt; None where we refuse."""
    try:
        return set(adapted_modules(KOSMOS, LoraConfig(targets=targets, layers=layers)))
    except ConfigError:
        return None


names = st.sampled_from(
    [*LEAVES, "self_attn.q_proj", "ffn.fc1", "mlp.fc2", "x_attn.out_proj", "text_model.model.layers.1.ffn.fc1"]
    + ["1.self_attn.k_proj", "image_to_text_projection.dense", "q", "proj", "fc", "nothing", "layers.0"]
)
roots = st.sampled_from([".*", "text_model.*", r"vision_model\..+", r"(vision_model|image_to_text_projection)\..+"])
ends = st.sampled_from(
    [r"\.q_proj", r"\.(q_proj|v_proj)", r"fc[12]", r"\.fc1$", "_proj", "dense", r"\.layers\.1\..*fc1", "x"]
)


@settings(max_examples=40)
@given(
    st.lists(names, min_size=1, max_size=4, unique=True),
    st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=2),
)
def test_lists_and_layers_are_peft_s(targets: list[str], layers: list[int] | None) -> None:
    found = ours(tuple(targets), None if layers is None else tuple(layers))
    idle = [each for each in targets if not any(name == each or name.endswith(f".{each}") for name in linears())]
    if idle:
        assert found is None  # peft goes on with the others
        return
    try:
        expected = adapted_by_peft(targets, layers)
    except ValueError:
        assert found is None
    else:
        assert found == expected


@settings(max_examples=40)
@given(roots, ends)
def test_expressions_are_peft_s(root: str, end: str) -> None:
    found = ours(root + end)
    try:
        expected = adapted_by_peft(root + end)
    except ValueError:
        assert found is None
    else:
        assert found == expected


@pytest.mark.parametrize("word", ["all", "all-linear", "ALL-LINEAR"])
def test_all_is_peft_s_and_the_labs(word: str) -> None:
    assert ours(word) == set(linears()) == adapted_by_peft("all-linear") == adapted_by_peft(list(LEAVES))


def test_text_and_vision_are_the_two_halves_also_for_peft() -> None:
    text, vision = ours("text"), ours("vision")
    assert text == adapted_by_peft(TEXT) == {name for name in linears() if name.startswith("text_model.")}
    assert vision == adapted_by_peft(VISION) == set(linears()) - (text or set())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_layers_are_those_of_the_text_model(count: int) -> None:
    """As the lab's later code does it: every Linear of the last decoder layers, handed to peft by its whole name."""
    layer = re.compile(r"text_model\.model\.layers\.(\d+)\.")
    last = [name for name in linears() if (found := layer.match(name)) and int(found[1]) >= 3 - count]
    assert ours("all", count) == adapted_by_peft(last) == set(last)
    assert ours(("q_proj", "fc1"), count) == {name for name in last if name.endswith(("q_proj", "fc1"))}


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (("q_porj",), None, r"match nothing: 'q_porj'.*did you mean q_proj"),
        (("q_proj", "fc3"), None, r"match nothing: 'fc3'.*did you mean fc"),
        ("tetx", None, r"match nothing: 'tetx'.*did you mean text"),
        ("q_proj", None, r"match nothing: 'q_proj'"),
        ("all", 4, r"more than the text model has.*at most 3"),
        (("dense",), 1, "leave nothing to adapt"),
        (("fc1",), (7,), "leave nothing to adapt"),
        (("embed_tokens",), None, "no Linear"),
        (
            r".*embed_tokens",
            None,
            r"no Linear.*embed_tokens \(Embedding\)",
        ),
        (r".*layers\.0.*", None, "no Linear"),
    ],
)
def test_what_cannot_be_adapted_is_refused(targets: Any, layers: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_modules(KOSMOS, LoraConfig(targets=targets, layers=layers))
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize(
    ("lora", "key"),
    [({"targets": "("}, "model.lora.targets"), ({"targets": "none", "layers": 2}, "model.lora.layers")],
)
def test_what_needs_no_model_is_refused_with_the_config(lora: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        config(model={"lora": lora})


@settings(max_examples=30)
@given(
    st.sampled_from(["all", "text", "vision", ("q_proj",), ("fc1", "dense"), r".*\.q_proj"]),
    st.none() | st.integers(1, 3) | st.tuples(st.integers(0, 1)),
)
def test_what_a_checkpoint_says_is_read_as_the_same_modules(targets: Any, layers: Any) -> None:
    """By our reader of lab configs, and by peft in the lab's code."""
    lora = LoraConfig(targets=targets, layers=layers)
    if (expected := ours(targets, layers)) is None:
        return
    adapted = adapted_modules(KOSMOS, lora)
    keys = robovlms_targets(lora, adapted)
    values = fork_config(**{path.replace(".", "__"): value for path, value in keys.items()})
    read = from_robovlms(values, origin="ckpt")[0]["model"]["lora"]
    assert ours(read["targets"], read.get("layers")) == expected
    if (named := keys.get("train_setup.lora_target_modules")) is not None:
        assert adapted_by_peft(named) == expected


def test_an_override_names_a_list_or_an_expression(run_files: RunFiles, tmp_path: Path) -> None:
    path = run_files.config(tmp_path / "run.json")
    chosen = load_run_config(path, ['model.lora.targets=["q_proj", "fc1"]', "model.lora.layers=1"]).config.model.lora
    assert (chosen.targets, chosen.layers) == (("q_proj", "fc1"), 1)
    assert load_run_config(path, [r"model.lora.targets=.*\.q_proj"]).config.model.lora.targets == r".*\.q_proj"
    gather(load_run_config(path))
