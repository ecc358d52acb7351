"""The keys of a RoboVLMs state dict in their order, for any policy.

Follows RoboVLMs (8adc1d2) and its 2-DoF fork (8d65987) key by key: Lightning's `model.` prefix, the embedding a second time as
`lm_head`, and with LoRA the whole backbone a second time below `model.model.base_model.model`, sharing its storages. Knows shapes, not
values; train/keys.py reads such names back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ForConditionalGeneration

from train.action_head import ActionHead
from train.config import HeadSpec
from train.vision_resampler import VisionResampler

PeftNaming = Literal["new", "old"]

_EMBEDDING = "text_model.model.embed_tokens.weight"
_TIED = "text_model.lm_head"
_ALIAS = "model.model.base_model.model."


@dataclass(frozen=True)
class Key:
    """One entry of a state dict: its key in the file, its canonical name (see train.keys), its shape.

    Keys with the same name are one tensor under several names, and share its storage.
    """

    raw: str
    name: str
    shape: torch.Size


def linear_modules(kosmos: nn.Module) -> tuple[str, ...]:
    """Paths of every Linear but the tied language-model head: what upstream adapts."""
    found = (name for name, module in kosmos.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name in found if name not in (_TIED, "lm_head"))


def layout_keys(
    kosmos: Kosmos2Config,
    head: HeadSpec,
    *,
    chunk: int,
    rank: int | None,
    adapted: Collection[str] | None = None,
    peft: PeftNaming = "new",
    resampler: bool = False,
) -> list[Key]:
    """The state dict of a policy, in the file's order. Works on the meta device: the real Kosmos-2 costs no memory.

    Args:
        rank: of the adapters; None without LoRA.
        adapted: paths of adapted modules; None means all that upstream adapts.
        resampler: whether RoboVLMs' own resampler is there.
    """
    width = kosmos.text_config.embed_dim
    with torch.device("meta"):
        model = Kosmos2ForConditionalGeneration(kosmos)
        action_head = ActionHead(head, width=width, chunk=chunk).state_dict()
        extra = VisionResampler(width, latents=kosmos.latent_query_num).state_dict() if resampler else {}
    modules = set(linear_modules(model) if adapted is None else adapted) if rank is not None else set()
    backbone = _backbone_keys(model, peft, modules, rank or 0)
    keys = [Key("model.action_token", "action_token", torch.Size([width]))]
    keys += [Key(f"model.backbone.{key.raw}", f"backbone.{key.name}", key.shape) for key in backbone]
    keys += [
        Key(f"model.vision_resampler.{name}", f"vision_resampler.{name}", value.shape) for name, value in extra.items()
    ]
    keys += [Key(f"model.act_head.{name}", f"act_head.{name}", tensor.shape) for name, tensor in action_head.items()]
    if rank is not None:
        keys += [Key(f"{_ALIAS}{key.raw}", f"backbone.{key.name}", key.shape) for key in backbone]
    return keys


def _backbone_keys(kosmos: nn.Module, peft: PeftNaming, adapted: Collection[str], rank: int) -> list[Key]:
    """Keys below `backbone.`; adapted modules are wrapped as peft does it."""
    keys = []
    for name, tensor in kosmos.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module == _TIED:
            keys.append(Key(name, _EMBEDDING, tensor.shape))
        elif module not in adapted:
            keys.append(Key(name, name, tensor.shape))
        else:
            keys.append(Key(f"{module}.base_layer.{leaf}" if peft == "new" else name, name, tensor.shape))
            if leaf == "bias":
                outputs, inputs = kosmos.get_parameter(f"{module}.weight").shape
                for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    raw = f"{module}.lora_{side}.default.weight"
                    keys.append(Key(raw, f"{module}.lora_{side}.weight", torch.Size(shape)))
    return keys
