"""What a run knows about its policy that no lab checkpoint records: it travels in the checkpoint's config, under `jetvla`.

Packing, masking, resize filter, scaling and the text around the instruction decide what the weights mean, and none of them can be told
from the weights. A checkpoint that our trainer wrote says them all, so that export and evaluation need not ask. Knows nothing about where
configs are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from bundle.errors import ConfigError
from bundle.manifest import Packing

SECTION = "jetvla"
_MOST_FPS = 1000.0
_MOST_ACTION = 1e6  # no robot's speed, in any unit
_LONGEST_PROMPT = 1 << 16


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts of a run.

    Attributes:
        packing, x_attn_causal: see train.policy.Conventions.
        resize, pixel_norm: the preprocessing of every frame.
        action_names: columns of the policy's actions that were learned from recorded axes, in order.
        action_minimum, action_maximum: physical values of -1 and +1.
        fps: frames per second of the episodes, or None if no file told; the window means nothing at another cadence.
        base_sha256: hash of the base directory's weights.
        prompt_template: text around the instruction; None in files that do not say, which have the usual one.
        pad_prompt_to: tokens that every prompt was padded to; None for its own length.
        classes: of a class head, in order, each as `name=vx,vy[,wz]`; None in files that do not say, and for other heads.
        relabel: motions whose frames were labelled as another class; matters to another training alone.
    """

    packing: Packing
    x_attn_causal: bool
    resize: Literal["bicubic", "bilinear", "letterbox"]
    pixel_norm: Literal["clip", "none"]
    action_names: tuple[str, ...]
    action_minimum: float
    action_maximum: float
    fps: float | None
    base_sha256: str
    prompt_template: str | None = None
    pad_prompt_to: int | None = None
    classes: tuple[str, ...] | None = None
    relabel: dict[str, str] = {}


def training_facts(config: Mapping[str, Any]) -> TrainingFacts | None:
    """The facts in a checkpoint's config, or None if another trainer wrote it.

    Raises:
        ConfigError: a section that is damaged or of a newer jetvla.
    """
    section = config.get(SECTION)
    if section is None:
        return None
    try:
        facts = msgspec.convert(section, TrainingFacts)
        _check_ranges(facts)
        return facts
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the checkpoint's `{SECTION}` section is not usable",
            got=error,
            expected=", ".join(field.name for field in msgspec.structs.fields(TrainingFacts)),
            hint="it was edited, or written by a newer jetvla.",
        ) from None


def _check_ranges(facts: TrainingFacts) -> None:
    """Refuse numbers that no run has: they would reach the robot as its cadence and its speeds."""
    fps, low, high = facts.fps, facts.action_minimum, facts.action_maximum
    if fps is not None and not 0 < fps <= _MOST_FPS:
        raise msgspec.ValidationError(f"fps {fps:g} is not in (0, {_MOST_FPS:g}]")
    if not -_MOST_ACTION <= low < high <= _MOST_ACTION:
        raise msgspec.ValidationError(f"action_minimum {low:g} and action_maximum {high:g} are no range of actions")
    if facts.pad_prompt_to is not None and not 0 < facts.pad_prompt_to <= _LONGEST_PROMPT:
        raise msgspec.ValidationError(f"pad_prompt_to {facts.pad_prompt_to} is no length of a prompt")
