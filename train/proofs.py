"""Proofs about parameters: which train, and that all others are bit for bit what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bundle.errors import TrainingError
from train.base import tensors_sha256


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind: layers of a stack count together."""

    name: str
    tensors: int
    values: int


def trained_groups(module: nn.Module) -> tuple[ParameterGroup, ...]:
    """What trains, grouped by part, largest first."""
    return groups_of({name: p.numel() for name, p in module.named_parameters() if p.requires_grad})


def groups_of(sizes: Mapping[str, int]) -> tuple[ParameterGroup, ...]:
    """Parameters by part, largest first; `sizes` has the number of values of each, by name."""
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for name, size in sizes.items():
        part = _part(name)
        tensors[part] += 1
        values[part] += size
    return tuple(ParameterGroup(name, tensors[name], count) for name, count in values.most_common())


def frozen_sha256(module: nn.Module) -> str:
    """Hash of every parameter that does not train."""
    return tensors_sha256({name: p.detach().cpu() for name, p in module.named_parameters() if not p.requires_grad})


def check_frozen(module: nn.Module, before: str) -> None:
    """Compare with the hash of before training.

    Raises:
        TrainingError: a frozen parameter has changed.
    """
    after = frozen_sha256(module)
    if after != before:
        raise TrainingError(
            "a frozen parameter changed in training",
            got=after,
            expected=before,
            hint="the checkpoints of this run do not describe what was trained: do not use them, and please report this.",
        )


def _part(name: str) -> str:
    root = next(
        (part for part in ("vision_model", "image_to_text_projection", "text_model", "act_head") if part in name), name
    )
    if ".lora_" in name:
        return f"{root} adapters"
    return root if root != "text_model" or "embed_tokens" not in name else "text embedding"
