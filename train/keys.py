"""Names of parameters: from the many layouts of lab checkpoints to one canonical name each.

Lightning prefixes `model.`, DeepSpeed `_forward_module.`, DataParallel `module.`; with LoRA the whole backbone appears a second time as
`model.model.base_model.model.*`; peft since 0.6 wraps adapted layers in `base_layer`. Canonical names are `action_token`,
`act_head.*` and `backbone.*` as Hugging Face names Kosmos-2, with `lora_A.weight` / `lora_B.weight` beside `weight` and `bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_WRAPPERS = ("_forward_module.", "module.")
_ALIAS = "model.base_model.model."
_ADAPTER = re.compile(r"\.(lora_[AB])\.([^.]+)\.weight$")
_BACKBONE_ROOTS = ("text_model.", "vision_model.", "image_to_text_projection.")

# Not weights of the policy: recomputed tables, the unused language-model head (tied to the embedding), training-loss buffers, the
# second name that upstream gives to the action head, and the CLIP of its clip-norm loss, which inference never enters.
_IGNORED = (
    re.compile(r"(^|\.)position_ids$"),
    re.compile(r"\.embed_positions\.weights$"),
    re.compile(r"^lm_head\."),
    re.compile(r"^backbone\.text_model\.lm_head\.weight$"),
    re.compile(r"^clip_norm_head\."),
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
    name = raw
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    if name.startswith("model.") and not name.startswith(_ALIAS):
        name = name.removeprefix("model.")
    if name.startswith(_ALIAS):
        name = "backbone." + name.removeprefix(_ALIAS)
    if name.startswith(_BACKBONE_ROOTS):
        name = "backbone." + name
    name = name.replace(".base_layer.", ".")
    return _ADAPTER.sub(r".\1.weight", name)


def map_keys(raw_keys: Iterable[str]) -> KeyMap:
    """Sort raw keys into canonical names and ignorable ones."""
    names: dict[str, list[str]] = {}
    ignored: list[str] = []
    adapters: set[str] = set()
    for raw in raw_keys:
        if match := _ADAPTER.search(raw):
            adapters.add(match.group(2))
        name = canonical(raw)
        if any(pattern.search(name) for pattern in _IGNORED):
            ignored.append(raw)
        else:
            names.setdefault(name, []).append(raw)
    return KeyMap({name: tuple(keys) for name, keys in names.items()}, tuple(ignored), frozenset(adapters))


def lora_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Paths below `backbone.` of the modules that have adapters, sorted; adapters elsewhere are not ours to apply."""
    root, suffix = "backbone.", ".lora_A.weight"
    ours = (name for name in names if name.startswith(root) and name.endswith(suffix))
    return tuple(sorted(name.removeprefix(root).removesuffix(suffix) for name in ours))
