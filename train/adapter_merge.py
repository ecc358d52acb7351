"""Adapters that are more than W + (alpha / r) B A, folded into the weights when a checkpoint is read.

rsLoRA, patterns, DoRA, adapters with biases and adapted embeddings are merged by peft's formulas in fp32, and each merged Linear is held
against peft's own layer on a few inputs, so that a wrong formula or scale cannot pass. Plain adapters stay as they are: the reference runs
them through peft, and parity compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from bundle.errors import CheckpointError, UnsupportedPolicyError
from train.adapter_recipe import AdapterRecipe

_ROOT = "backbone."
_PART = re.compile(r"^backbone\.(.+)\.(lora_A\.weight|lora_A\.bias|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)$")
_EMBEDDING = re.compile(r"^backbone\.(.+)\.lora_embedding_A$")
_TIED = "text_model.lm_head"
_TOLERANCE = 1e-4  # of the largest output; fp32 sums in another order
_PROBES = 2


@dataclass(frozen=True)
class _Adapter:
    """The parts of one module's adapter; absent ones are None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    magnitude: Tensor | None


def check_kinds(state: Mapping[str, Tensor], *, origin: str) -> None:
    """Refuse adapters on anything but Linears and embeddings.

    Raises:
        UnsupportedPolicyError: names the module.
    """
    for name, tensor in state.items():
        match = _PART.match(name)
        if match is not None and match[1] == _TIED:
            raise UnsupportedPolicyError(
                f"{origin} has an adapter on {match[1]}, whose weight is also that of the word embedding",
                got=name,
                expected="adapters on what actions pass through",
                hint="leave lm_head out of the target modules; the adapter has no part in actions, so its keys may be deleted.",
            )
        if match is not None and match[2] == "lora_A.weight" and tensor.dim() != 2:
            raise UnsupportedPolicyError(
                f"{origin} has an adapter on {match[1]}, which is a convolution",
                got=f"lora_A of shape {list(tensor.shape)}",
                expected="adapters on Linears and embeddings",
                hint="merge it with peft's merge_and_unload and save the merged weights.",
            )


def needs_folding(state: Mapping[str, Tensor], recipe: AdapterRecipe) -> bool:
    """Whether what the file holds is more than plain adapters."""
    return not recipe.plain or any(
        ".lora_magnitude_vector" in name
        or ".lora_embedding_" in name
        or name.endswith((".lora_A.bias", ".lora_B.bias"))
        for name in state
    )


def fold(state: dict[str, Tensor], recipe: AdapterRecipe, *, origin: str) -> tuple[str, ...]:
    """Merge every adapter into the weights of `state`, in place; the paths of what was adapted.

    Raises:
        CheckpointError: a part of an adapter, or the weight that it goes with, is missing or misshapen.
    """
    adapters = {module: _take(state, module, recipe, origin) for module in _modules(state)}
    for module, adapter in adapters.items():
        weight = state[f"{_ROOT}{module}.weight"].float()
        bias = state.get(f"{_ROOT}{module}.bias")
        merged, merged_bias = _merged(weight, bias, adapter, recipe.scaling(module))
        _check_with_peft(module, weight, bias, adapter, recipe, merged, merged_bias, origin)
        state[f"{_ROOT}{module}.weight"] = merged
        if merged_bias is not None:
            state[f"{_ROOT}{module}.bias"] = merged_bias
    return (*adapters, *_fold_embeddings(state, recipe, origin))


def adapted_embeddings(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Paths below `backbone.` of the embeddings that have adapters, sorted."""
    return tuple(sorted(match[1] for name in state if (match := _EMBEDDING.match(name))))


def with_adapter(weight: Tensor, state: Mapping[str, Tensor], module: str, scaling: float) -> Tensor | None:
    """A weight in fp32 with the adapter of `module` that stands in `state`; None where that does not fit it."""
    prefix = f"{_ROOT}{module}."
    down, up = state.get(f"{prefix}lora_A.weight"), state.get(f"{prefix}lora_B.weight")
    if down is None or up is None:
        down, up = state.get(f"{prefix}lora_embedding_B"), state.get(f"{prefix}lora_embedding_A")
        down, up = (None, None) if down is None or up is None else (down.T, up.T)
    magnitude = state.get(f"{prefix}lora_magnitude_vector")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        return None
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or (magnitude is not None and len(magnitude) != len(weight)):
        return None
    adapter = _Adapter(down.float(), up.float(), None, None if magnitude is None else magnitude.float())
    return _merged(weight.float(), None, adapter, scaling)[0]


def _modules(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(sorted({match[1] for name in state if (match := _PART.match(name))}))


def _take(state: dict[str, Tensor], module: str, recipe: AdapterRecipe, origin: str) -> _Adapter:
    """The parts of a module's adapter, taken out of the state, and checked."""
    prefix = f"{_ROOT}{module}."
    parts: dict[str, Tensor | None] = {
        name: None if (found := state.pop(prefix + name, None)) is None else found.float()
        for name in ("lora_A.weight", "lora_A.bias", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
    }
    wanted = ["lora_A.weight", "lora_B.weight"]
    wanted += ["lora_magnitude_vector"] if recipe.dora else []
    wanted += ["lora_B.bias"] if recipe.lora_bias else []
    missing = [name for name in wanted if parts[name] is None]
    if f"{prefix}weight" not in state:
        missing.append("weight")
    down, up, magnitude = parts["lora_A.weight"], parts["lora_B.weight"], parts["lora_magnitude_vector"]
    if missing or down is None or up is None or parts["lora_A.bias"] is not None:
        raise CheckpointError(
            f"the adapter of {module} in {origin} is not whole",
            got=f"no {', '.join(missing)}" if missing else "a bias of lora_A, which peft does not have",
            expected=", ".join([*wanted, "weight"]),
            hint="save the whole adapter, or correct the config: it says what adapters have.",
        )
    rank, weight = recipe.rank(module), state[f"{prefix}weight"]
    bias = parts["lora_B.bias"]
    shapes = {
        "lora_A.weight": (down, (rank, weight.shape[1])),
        "lora_B.weight": (up, (weight.shape[0], rank)),
        "lora_B.bias": (bias, (weight.shape[0],)),
        "lora_magnitude_vector": (magnitude, (weight.shape[0],)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{module}.{name} in {origin} does not fit its config",
                got=list(tensor.shape),
                expected=list(shape),
                hint="r and rank_pattern are those of another run: a wrong rank is a wrong scale; pass the right config.",
            )
    return _Adapter(down, up, bias, magnitude)


def _merged(weight: Tensor, bias: Tensor | None, adapter: _Adapter, scaling: float) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that compute the same as base and adapter together; DoRA rescales each row to its magnitude."""
    merged = weight + scaling * (adapter.up @ adapter.down)
    if adapter.magnitude is not None:
        merged = merged * (adapter.magnitude / merged.norm(dim=1)).unsqueeze(1)
    if adapter.bias is None:
        return merged, None if bias is None else bias.float()
    added = scaling * adapter.bias
    return merged, added if bias is None else bias.float() + added


def _check_with_peft(
    module: str,
    weight: Tensor,
    bias: Tensor | None,
    adapter: _Adapter,
    recipe: AdapterRecipe,
    merged: Tensor,
    merged_bias: Tensor | None,
    origin: str,
) -> None:
    """Compare with what peft's own layer computes with the unmerged parts."""
    with torch.device("meta"):
        holder: Any = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)})
    config = LoraConfig(
        r=recipe.rank(module),
        lora_alpha=recipe.module_alpha(module),
        use_rslora=recipe.rslora,
        use_dora=adapter.magnitude is not None,
        lora_bias=adapter.bias is not None,
        target_modules=["layer"],
    )
    holder["layer"].weight = nn.Parameter(weight)
    if bias is not None:
        holder["layer"].bias = nn.Parameter(bias.float())
    inject_adapter_in_model(config, holder)
    layer = holder["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight = nn.Parameter(adapter.down)
        layer.lora_B["default"].weight = nn.Parameter(adapter.up)
        if adapter.bias is not None:
            layer.lora_B["default"].bias = nn.Parameter(adapter.bias)
        if adapter.magnitude is not None:
            layer.lora_magnitude_vector["default"].weight = nn.Parameter(adapter.magnitude)
        inputs = torch.randn(_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = layer.eval()(inputs)
        got = nn.functional.linear(inputs, merged, merged_bias)
        error, size = float((got - expected).abs().max()), float(expected.abs().max())
    if not error <= _TOLERANCE * max(size, 1e-6):
        raise CheckpointError(
            f"merging the adapter of {module} in {origin} does not give what peft computes",
            got=f"an error of {error:.3g} in outputs up to {size:.3g}",
            expected=f"at most {_TOLERANCE:g} of them",
            hint="this is a fault of jetvla, or of another version of peft: please report it with the adapter's config.",
        )


def _fold_embeddings(state: dict[str, Tensor], recipe: AdapterRecipe, origin: str) -> tuple[str, ...]:
    """Adapted embeddings: W + scaling (B A)^T."""
    modules = adapted_embeddings(state)
    for module in modules:
        prefix = f"{_ROOT}{module}."
        down, up = state.pop(f"{prefix}lora_embedding_A"), state.pop(f"{prefix}lora_embedding_B", None)
        weight = state.get(f"{prefix}weight")
        if up is None or weight is None or (up.shape[0], down.shape[1]) != (weight.shape[1], weight.shape[0]):
            raise CheckpointError(
                f"the adapter of {module} in {origin} is not whole",
                got="no lora_embedding_B"
                if up is None
                else "no weight"
                if weight is None
                else f"shapes {list(down.shape)}, {list(up.shape)}",
                expected="lora_embedding_A, lora_embedding_B and the weight that they go with",
                hint="save the whole adapter.",
            )
        delta = recipe.scaling(module) * (up.float() @ down.float()).T
        state[f"{prefix}weight"] = weight.float() + delta
    return modules
