"""A lab's config: what becomes of its classes and of the text around its instructions, with a note where the original told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bundle.errors import UnsupportedPolicyError
from train.action_classes import AXES, parse_classes
from train.config import PolicySpec
from train.robovlms_classes import class_order
from train.robovlms_keys import LabConfig
from train.robovlms_prompt import lab_prompt


@dataclass(frozen=True)
class ClassSettings:
    """What a class head adds to the settings.

    Attributes:
        settings: of the section `model`.
        axes: the recorded columns that labels are made of; empty for other heads.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()


def class_settings(lab: LabConfig, spec: PolicySpec, values: Mapping[str, Any]) -> ClassSettings:
    """The classes: `jetvla.classes`, else the order of the lab's loader.

    Raises:
        UnsupportedPolicyError: the loader's code has no order for a head of this size.
        ConfigError: `jetvla.classes` cannot be read.
    """
    lab.get("act_head.num_classes")
    for path in (*lab.datasets("train_dataset"), *lab.datasets("val_dataset")):
        lab.get(f"{path}.num_classes")
    stated, folded = lab.get("jetvla.classes"), lab.get("jetvla.relabel", {})
    width = lab.get("act_head.instr_in_features")
    if spec.head.kind != "classes":
        if width is not None:
            lab.assume("act_head.instr_in_features has no effect: class heads alone read it")
        return ClassSettings()
    hint = 'state the order that the run had in the config: "jetvla": {"classes": ["Stop", "F", "TurnL=0,0,0.5"]}'
    order = class_order(values, spec.head.outputs)
    names, relabel = (tuple(stated), folded) if stated else (order.names, order.relabel)
    if len(names) != spec.head.outputs:
        raise UnsupportedPolicyError(
            f"{lab.origin}: what the {spec.head.outputs} classes of act_head.num_classes mean must be stated",
            got=" ".join(names) or order.source,
            expected=f"{spec.head.outputs} classes in jetvla.classes",
            hint=hint,
        )
    if not stated:
        lab.assume(f"classes {' '.join(names)} ({order.source}); jetvla.classes states another order")
    if relabel and not stated:
        told = ", ".join(f"{motion} as {name}" for motion, name in relabel.items())
        lab.assume(f"classes: frames are labelled as that loader does, {told}")
    table = parse_classes(names, relabel=relabel, hint=hint)
    settings: dict[str, Any] = {"classes": names} | ({"relabel": relabel} if relabel else {})
    if spec.head.told:
        settings["instruction_in_head"] = True
        lab.assume(
            "act_head.instr_in_features: the head is told the mean of the prompt's word embeddings, padding included, as the lab's package "
            "does; where its loader finds embeddings of episodes in a file, they are not read"
        )
    return ClassSettings(settings, AXES if table.hears_turns else AXES[:2])


def prompt_settings(lab: LabConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Text and length of prompts, of the section `data`: `jetvla.prompt_template` and `jetvla.pad_prompt_to`, else the loader's."""
    for path in (*lab.datasets("train_dataset"), *lab.datasets("val_dataset")):
        for key in ("grounding_prefix", "instruction_override", "instruction_preset"):
            lab.get(f"{path}.{key}")
    template, pad_to = lab.get("jetvla.prompt_template"), lab.get("jetvla.pad_prompt_to")
    if template is not None:
        return {"prompt_template": template} | ({} if not pad_to else {"pad_prompt_to": pad_to})
    prompt = lab_prompt(values)
    if prompt.replaced is not None:
        lab.assume(
            f"{prompt.replaced}; told here is the sentence of each file, in the text {prompt.template!r} that was around it"
        )
    return {"prompt_template": prompt.template} | ({} if prompt.pad_to is None else {"pad_prompt_to": prompt.pad_to})
