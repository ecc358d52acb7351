"""Names of parameters: from the many layouts of lab checkpoints to one canonical name each.

Lightning prefixes `model.`; DeepSpeed, DataParallel, FSDP, torch.compile and activation checkpointing put a word of their own into paths;
with LoRA the whole backbone appears a second time as `model.model.base_model.model.*`; peft since 0.6 wraps adapted layers in
`base_layer`, and its own files begin with `base_model.model.`. Canonical names are `action_token`, `act_head.*` and `backbone.*` as Hugging
Face names Kosmos-2, with the parts of adapters (`lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector`, ...) beside `weight` and `bias`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# What torch.compile, FSDP, activation checkpointing, DeepSpeed and DataParallel put into the path of what they wrap.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
# The last one is of the fork's later trainer, which puts peft's model in the backbone's place.
_ALIASES = ("model.base_model.model.", "base_model.model.", "backbone.base_model.model.")
_ADAPTER = re.compile(r"\.(lora_[AB])\.([^.]+)\.(weight|bias)$")
_UNNAMED = re.compile(r"\.lora_magnitude_vector\.weight$")
_LONE = re.compile(r"\.(lora_embedding_[AB]|lora_magnitude_vector)\.([^.]+)(?:\.weight)?$")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.")
_BACKBONE_ROOTS = ("text_model.", "vision_model.", "image_to_text_projection.")

# What losses alone are computed with: upstream's CLIP of the clip-norm loss, the lab's heads for box and place of a target, and its
# weights of losses. Inference never enters them.
_LOSSES = re.compile(r"^(clip_norm_head\.|grounding_bbox_head\.|grounding_coarse_head\.|loss_balance_(?:logits|ema)$)")
# Not weights of the policy: recomputed tables, the unused language-model head (tied to the embedding), training-loss buffers, and the
# second name that upstream gives to the action head.
_IGNORED = (
    re.compile(r"(^|\.)position_ids$"),
    re.compile(r"\.embed_positions\.weights$"),
    re.compile(r"^lm_head\."),
    re.compile(r"^backbone\.text_model\.lm_head\.weight$"),
    re.compile(r"\.original_module\."),  # what a module was before `modules_to_save` trained it
    _LOSSES,
    re.compile(r"^act_head\.(class_weights_tensor|target_class_prior_tensor)$"),
)


@dataclass(frozen=True)
class KeyMap:
    """How raw keys are used.

    Attributes:
        names: canonical name -> the raw keys that claim it, first occurrence first.
        ignored: raw keys that hold nothing the policy needs.
        adapters: adapter names seen in LoRA keys.
    """

    names: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    adapters: frozenset[str]


def canonical(raw: str) -> str:
    """The canonical name of one raw key (also for base weights, which have no `backbone.` prefix)."""
    name = _WRAPPERS.sub("", raw)
    if name.startswith("model.") and not name.startswith(_ALIASES):
        name = name.removeprefix("model.")
    for alias in _ALIASES:
        if name.startswith(alias):
            name = "backbone." + name.removeprefix(alias)
    if name.startswith(_BACKBONE_ROOTS):
        name = "backbone." + name
    name = name.replace(".base_layer.", ".")
    name = _SAVED.sub(".", name)
    name = _ADAPTER.sub(r".\1.\3", name)
    return _LONE.sub(r".\1", _UNNAMED.sub(".lora_magnitude_vector", name))


def map_keys(raw_keys: Iterable[str]) -> KeyMap:
    """Sort raw keys into canonical names and ignorable ones."""
    names: dict[str, list[str]] = {}
    ignored: list[str] = []
    adapters: set[str] = set()
    for raw in raw_keys:
        adapters |= _adapter_names(raw)
        name = canonical(raw)
        if any(pattern.search(name) for pattern in _IGNORED):
            ignored.append(raw)
        else:
            names.setdefault(name, []).append(raw)
    return KeyMap({name: tuple(keys) for name, keys in names.items()}, tuple(ignored), frozenset(adapters))


def loss_modules(raw_keys: Iterable[str]) -> Counter[str]:
    """Modules among raw keys that losses alone are computed with, and how many tensors each has."""
    found = (_LOSSES.match(canonical(raw)) for raw in raw_keys)
    return Counter(match[1].removesuffix(".") for match in found if match)


def _adapter_names(raw: str) -> set[str]:
    """The name of the adapter that a raw key belongs to, if it says one."""
    if match := _ADAPTER.search(raw) or (None if _UNNAMED.search(raw) else _LONE.search(raw)):
        return {match[2]}
    return {match[1]} if (match := _SAVED.search(raw)) else set()


def lora_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Paths below `backbone.` of the modules that have adapters, sorted; adapters elsewhere are not ours to apply."""
    root, suffix = "backbone.", ".lora_A.weight"
    ours = (name for name in names if name.startswith(root) and name.endswith(suffix))
    return tuple(sorted(name.removeprefix(root).removesuffix(suffix) for name in ours))
