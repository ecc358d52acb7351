"""Which adapters a lab's config asks for, as the code that reads it hands its keys to peft.

The 2-DoF fork passes `lora_target_modules` on as it is; without it, every Linear but the language-model head is adapted, as upstream. The
lab's later code has `lora_decoder_layers` as well: it counts from the last text layer, and only where no targets are named.
"""

from __future__ import annotations

from typing import Any

from train.config import LoraSpec
from train.lora_targets import EVERY_LINEAR, TEXT, VISION
from train.robovlms_keys import LabConfig

_SETUP = "train_setup."
_HEAD = ("lm_head", "text_model.lm_head")  # its output is used by nobody, so an adapter on it learns nothing


def lora_settings(lab: LabConfig, lora: LoraSpec) -> dict[str, Any]:
    """The settings of `model.lora`.

    Raises:
        ConfigError: a key has a value that the lab's code refuses, too.
    """
    for key in ("lora_r", "lora_alpha", "lora_dropout"):
        lab.get(_SETUP + key)
    targets, layers = _targets(lab)
    settings = {
        "targets": targets,
        "r": lora.r,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "bias": lab.get(_SETUP + "lora_bias", "none"),
    }
    return settings if layers is None else {**settings, "layers": layers}


def _targets(lab: LabConfig) -> tuple[str | tuple[str, ...], int | None]:
    """Targets, and of how many of the last text layers."""
    targets = lab.get(_SETUP + "lora_target_modules")
    layers = lab.get(_SETUP + "lora_decoder_layers", -1)
    if targets is None:
        if layers != -1 and layers < 1:
            raise lab.unusable(_SETUP + "lora_decoder_layers", expected="-1 for all of them, or at least 1")
        return "all", None if layers == -1 else layers
    if layers != -1:
        lab.assume(
            f"without effect: train_setup.lora_decoder_layers {layers}; the lab's code reads it only where "
            "train_setup.lora_target_modules is null (model.lora.layers sets it here)"
        )
    if isinstance(targets, str):
        if not targets:
            raise lab.unusable(_SETUP + "lora_target_modules", expected="names, or one regular expression")
        known = {EVERY_LINEAR: "all", TEXT: "text", VISION: "vision"}
        return known.get(targets.lower() if targets.lower() == EVERY_LINEAR else targets, targets), None
    names = tuple(name for name in targets if name not in _HEAD)
    if not names:
        raise lab.unusable(_SETUP + "lora_target_modules", expected="names of Linears of Kosmos-2")
    if len(names) < len(targets):
        lab.assume("train_setup.lora_target_modules: lm_head gets no adapter; nothing of it reaches an action")
    return names, None
