"""Merged weights, one tensor at a time.

LoRA is folded in fp32 by exact module path: W + (alpha / r) B A. Nothing is merged before it is asked for and nothing is kept after, so
an 8 GB checkpoint passes through a few hundred megabytes of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.base import tensors_sha256

STAGES = ("vision", "language", "action_head")
_STAGE_PREFIXES = {
    "vision": ("backbone.vision_model.", "backbone.image_to_text_projection.", "vision_resampler."),
    # What a head is told is added to the feature.
    "language": ("backbone.text_model.model.layers.", "backbone.text_model.model.layer_norm.", "act_head.instr_proj."),
    "action_head": ("act_head.",),
    "embedding": ("backbone.text_model.model.embed_tokens.", "action_token"),
}


@dataclass(frozen=True)
class MergedWeights:
    """Read access to a checkpoint's weights with adapters folded in.

    Attributes:
        state: canonical name -> tensor.
        scaling: alpha / r; 0 where there are no adapters.
        dtype: of the merge and of everything returned; float64 for proofs of exactness.
    """

    state: Mapping[str, Tensor]
    scaling: float
    dtype: torch.dtype = torch.float32

    def tensor(self, name: str) -> Tensor:
        """A plain parameter by its canonical name."""
        return self.state[name].to(self.dtype)

    def weight(self, module: str) -> Tensor:
        """The merged [out, in] weight of a Linear, by its path."""
        weight = self.tensor(f"{module}.weight")
        down = self.state.get(f"{module}.lora_A.weight")
        if down is None:
            return weight
        up = self.tensor(f"{module}.lora_B.weight")
        return weight + self.scaling * (up @ down.to(self.dtype))

    def bias(self, module: str) -> Tensor:
        """The bias of a Linear or LayerNorm."""
        return self.tensor(f"{module}.bias")


def stage_names(state: Mapping[str, Tensor], stage: str) -> list[str]:
    """Canonical names of the tensors that a stage (or `embedding`) is made of, sorted."""
    return sorted(name for name in state if _owner(name) == stage)


def _owner(name: str) -> str | None:
    """The first part whose prefixes fit."""
    return next((part for part, prefixes in _STAGE_PREFIXES.items() if name.startswith(prefixes)), None)


def stage_bytes(state: Mapping[str, Tensor], stage: str) -> int:
    """Source bytes of a stage, adapters included."""
    return sum(state[name].nbytes for name in stage_names(state, stage))


def stage_sha256(weights: MergedWeights, stage: str, progress: Callable[[int], None] | None = None) -> str:
    """Hash of what a stage is merged from: its tensors, adapters and scale. Equal hash, equal merged weights."""
    names = stage_names(weights.state, stage)
    digest = tensors_sha256({name: weights.state[name] for name in names}, progress)
    adapted = any(".lora_" in name for name in names)
    return f"{digest}:{weights.scaling}" if adapted else digest
