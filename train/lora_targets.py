"""Which modules get adapters: the targets of a config, matched by peft itself, so that names and expressions mean what they mean there.

A list is of names, each of which also means every module whose path ends with it; a text is one regular expression that has to match a
whole path. `all`, `text`, `vision` and `none` are short for such targets. Only Linears are adapted. Knows nothing about weights.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2Model

from bundle.errors import ConfigError
from train.robovlms_layout import linear_modules
from train.run_config import LoraConfig

EVERY_LINEAR = "all-linear"  # peft's word for `all`
LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "dense")
_ATTENTION = r"\.(q|k|v|out)_proj"
TEXT = rf"text_model\.model\.layers\.\d+\.(self_attn{_ATTENTION}|ffn\.fc[12])"
VISION = (
    rf"vision_model\.model\.encoder\.layers\.\d+\.(self_attn{_ATTENTION}|mlp\.fc[12])"
    rf"|image_to_text_projection\.(dense|x_attn{_ATTENTION})"
)
_SHORT: Mapping[str, str | tuple[str, ...]] = {"all": LEAVES, EVERY_LINEAR: LEAVES, "text": TEXT, "vision": VISION}
_TEXT_LAYER = re.compile(r"^text_model\.model\.layers\.(\d+)\.")
_NEAR = 3


def adapted_modules(kosmos: Kosmos2Config, lora: LoraConfig) -> tuple[str, ...]:
    """Paths below `backbone.` of the Linears that get adapters, in the model's order.

    Raises:
        ConfigError: a target matches nothing, or something that is no Linear; or there are not so many layers.
    """
    if lora.targets == "none":
        return ()
    with torch.device("meta"):
        model = Kosmos2Model(kosmos)
    targets = lora.targets if isinstance(lora.targets, tuple) else _SHORT.get(lora.targets.lower(), lora.targets)
    layers = list(lora.layers) if isinstance(lora.layers, tuple) else None
    modules = {name: module for name, module in model.named_modules() if name}
    found = _matched(tuple(modules), targets)
    _refuse_idle(targets, found, linear_modules(model))
    if other := [name for name in found if not isinstance(modules[name], nn.Linear)]:
        raise ConfigError(
            "model.lora.targets also match modules that are no Linear",
            got=", ".join(f"{name} ({type(modules[name]).__name__})" for name in other[:_NEAR])
            + (f" and {len(other) - _NEAR} more" if len(other) > _NEAR else ""),
            expected="Linears, e.g. " + ", ".join(LEAVES),
            hint="name the projections themselves; adapters on embeddings, convolutions and norms are not built.",
        )
    if layers is not None:
        found = _of_layers(found, targets, layers)
    elif isinstance(lora.layers, int):
        found = _of_last_layers(found, lora.layers, kosmos.text_config.layers)
    if not found:
        raise ConfigError(
            "model.lora.layers leave nothing to adapt",
            got=f"targets {_shown(lora.targets)}, layers {_shown(lora.layers)}",
            expected=f"layers 0 to {kosmos.text_config.layers - 1} of the text model, or of the vision tower",
            hint="leave model.lora.layers out, or name targets that lie in these layers.",
        )
    return tuple(found)


def robovlms_targets(lora: LoraConfig, adapted: Sequence[str]) -> dict[str, object]:
    """The same in the keys of RoboVLMs' later fork, by dotted path; nothing for what upstream's code does without them.

    Args:
        adapted: of `adapted_modules`.
    """
    key = "train_setup.lora_target_modules"
    if lora.targets in ("none", "all") and lora.layers is None:
        return {}
    if lora.targets == "all" and isinstance(lora.layers, int):
        return {"train_setup.lora_decoder_layers": lora.layers}
    if lora.layers is not None:
        return {key: list(adapted)}  # as peft names what is adapted
    if isinstance(lora.targets, tuple):
        return {key: list(lora.targets)}
    return {key: {"text": TEXT, "vision": VISION}.get(lora.targets, lora.targets)}


def _matched(names: Sequence[str], targets: str | tuple[str, ...], layers: list[int] | None = None) -> list[str]:
    asked = peft.LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets), layers_to_transform=layers
    )
    return [name for name in names if check_target_module_exists(asked, name)]


def _of_layers(found: list[str], targets: str | tuple[str, ...], layers: list[int]) -> list[str]:
    """Those in the layers of these numbers, of text model and vision tower alike, as peft's `layers_to_transform` has it."""
    within = set(_matched(found, LEAVES if isinstance(targets, str) else targets, layers))
    return [name for name in found if name in within]


def _of_last_layers(found: list[str], count: int, depth: int) -> list[str]:
    """Those in the last `count` layers of the text model."""
    if count > depth:
        raise ConfigError(
            "model.lora.layers are more than the text model has",
            got=count,
            expected=f"at most {depth}",
            hint="count from the last layer; leave it out for all of them.",
        )
    layers = ((name, _TEXT_LAYER.match(name)) for name in found)
    return [name for name, layer in layers if layer is not None and int(layer[1]) >= depth - count]


def _refuse_idle(targets: str | tuple[str, ...], found: list[str], linears: tuple[str, ...]) -> None:
    """A misspelt target adapts less than was meant, and nothing would say so."""
    if isinstance(targets, str):
        idle = [] if found else [targets]
    else:
        idle = [
            target for target in targets if not any(name == target or name.endswith(f".{target}") for name in found)
        ]
    if not idle:
        return
    names = dict.fromkeys([*(name.rpartition(".")[2] for name in linears), "all", "text", "vision", "none", *linears])
    near = [each for target in idle for each in difflib.get_close_matches(target, names, n=_NEAR)]
    raise ConfigError(
        f"model.lora.targets match nothing: {', '.join(map(repr, idle))}",
        got=_shown(targets),
        expected=", ".join(LEAVES) + f", a path like {linears[0]}, or one expression that matches whole paths",
        hint=f"did you mean {', '.join(dict.fromkeys(near))}?"
        if near
        else "a list is of names or ends of paths; a text is one regular expression.",
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
