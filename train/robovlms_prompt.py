"""Which text a lab's run put around its instructions, and how long it made the prompt: what its loader's code does with the config.

Facts about public loaders. RoboVLMs and the fork's MobileVLAH5Dataset put upstream's text around and leave the length. NavDataset hands
the tokenizer the sentence of the file as it stands, or with `<grounding>` before it, or a sentence of its own lists in a text of its own,
and pads to 256 tokens: masked slots that move the action token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bundle.prompt_template import ACTION, PREFIXED, RAW, UPSTREAM
from train.robovlms_classes import NAV, dataset_of, is_v5, loader_of

NAV_PAD_TO = 256
_BY_ACTION = ("action_aware_train", "strict_action_aware")
_OVERRIDES = {"left": "left", "right": "right", "straight": "straight", "default": "other"}  # names of ours, by theirs


@dataclass(frozen=True)
class LabPrompt:
    """The text around an instruction.

    Attributes:
        template: with `{instruction}` in it.
        pad_to: tokens that every prompt is padded to; None leaves its length.
        source: where this is from.
        replaced: what the loader's code told instead of the file's sentence, in words; None where it told that.
    """

    template: str
    pad_to: int | None
    source: str
    replaced: str | None = None


def lab_prompt(config: Mapping[str, Any]) -> LabPrompt:
    """The prompt of a RoboVLMs config."""
    dataset = dataset_of(config)
    if loader_of(dataset) != NAV:
        return LabPrompt(UPSTREAM, None, "assumed: upstream's text")
    template, because, replaced = _nav(dataset)
    return LabPrompt(template, NAV_PAD_TO, f"read from the config: NavDataset, {because}", replaced)


def _nav(dataset: Mapping[str, Any]) -> tuple[str, str, str | None]:
    preset, v5 = dataset.get("instruction_preset"), is_v5(dataset)
    if preset in _BY_ACTION:
        told = (
            f"instruction_preset {preset}: a sentence that names the action of the window, drawn from lists in the code"
        )
        return ACTION if v5 else UPSTREAM, f"instruction_preset {preset}", told
    if v5 and dataset.get("instruction_override") is not None:
        missing = [name for name in _OVERRIDES if _OVERRIDES[name] not in override_words(dataset)]
        told = f"instruction_override, where it has no {', '.join(missing)}: a sentence drawn from lists in the code, by the file's name"
        return ACTION, "instruction_override", told if missing else None
    if v5 and preset == "path_type_aware":
        told = "instruction_preset path_type_aware: a sentence drawn from lists in the code, by the file's name (see data.sources.words)"
        return ACTION, f"instruction_preset {preset}", told
    if dataset.get("grounding_prefix"):
        return PREFIXED, "grounding_prefix", None
    return RAW, "no grounding_prefix", None


def override_words(dataset: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The sentences of a NavDataset's `instruction_override`, by path as data.sources.words has them; empty where they do not count."""
    override = dataset.get("instruction_override")
    if not is_v5(dataset) or dataset.get("instruction_preset") in _BY_ACTION or not isinstance(override, Mapping):
        return {}
    lists = {ours: override.get(theirs) for theirs, ours in _OVERRIDES.items()}
    return {
        name: tuple(texts)
        for name, texts in lists.items()
        if isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    }
