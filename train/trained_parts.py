"""What a training config says was trained, held against what a checkpoint really holds, and the base that it was trained on.

A base directory fills in what a small checkpoint leaves out. Where that was trained, or belongs to another base, the policy would be
another one, and parity could not tell: its reference would be made of the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bundle.errors import BaseWeightsError, CheckpointError
from train.adapter_merge import adapted_embeddings, with_adapter
from train.adapter_recipe import AdapterRecipe

_LISTED = 6
_EMBEDDING = "backbone.text_model.model.embed_tokens.weight"
_PROJECTION = "image_to_text_projection."
_TUNED = "tune_mm_projector"  # upstream does not know this key
_LAYER = re.compile(r"^backbone\.text_model\.model\.layers\.(\d+)\.")
_CLOSE = 1e-3  # of the largest change that an adapter makes
_DEVIATIONS = 6  # of what unrelated differences would give by chance


def check_held(
    setup: Mapping[str, Any],
    recipe: AdapterRecipe | None,
    filled: Collection[str],
    *,
    layers: int,
    adapted: Collection[str],
    origin: str,
) -> None:
    """Refuse a checkpoint whose trained weights would come from the base.

    Args:
        setup: `train_setup`.
        filled: canonical names that the base gave.
        layers: of the text model.
        adapted: paths of the modules with adapters.

    Raises:
        CheckpointError: lists what the config says was trained and the file does not hold.
    """
    missing = sorted(name for name in filled if _was_trained(name, setup, recipe, layers, adapted))
    if missing:
        raise CheckpointError(
            f"{origin} does not hold all that its config says was trained",
            got=f"{len(missing)} trained tensors missing: {_some(missing)}",
            expected="everything that trained; the base directory's weights are those before training",
            hint="save them as well (state_dict() of the whole model), or correct train_setup if they did not train.",
        )


def _was_trained(
    name: str, setup: Mapping[str, Any], recipe: AdapterRecipe | None, layers: int, adapted: Collection[str]
) -> bool:
    if name == _EMBEDDING:
        return bool(setup.get("train_text_embedding", False))
    if name.startswith(f"backbone.{_PROJECTION}") and bool(setup.get(_TUNED, False)):
        return True
    if recipe is not None:
        if not name.endswith(".bias") or recipe.bias == "none":
            return False
        return recipe.bias == "all" or name.removeprefix("backbone.").removesuffix(".bias") in adapted
    if name.startswith("backbone.vision_model."):
        return bool(setup.get("train_vision", False))
    if bool(setup.get("freeze_backbone", True)):
        return False
    last = setup.get("train_decoder_layers", -1)
    if not isinstance(last, int) or last <= 0:
        return True
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= layers - last


def check_base(
    setup: Mapping[str, Any],
    state: Mapping[str, Tensor],
    origin_weights: Mapping[str, Tensor],
    recipe: AdapterRecipe,
    adapted: Collection[str],
    filled: Collection[str],
    *,
    origin: str,
    folder: object,
) -> str | None:
    """Hold the frozen weights under adapters against the base directory's; what was found, in a sentence, or None.

    Args:
        setup: `train_setup`: parts that trained beside their adapters differ from any base, and tell nothing.
        state: canonical name -> tensor, adapters unmerged.
        origin_weights: of the base directory.
        adapted: paths of adapted Linears.
        filled: canonical names that the base directory gave.

    Raises:
        CheckpointError: the adapters are already merged into the weights beside them.
        BaseWeightsError: another base than the one that fills in what the file leaves out.
    """
    if recipe.residual is not None and any(f"backbone.{module}.weight" in filled for module in adapted):
        raise BaseWeightsError(
            f"the adapters of {origin} go with a changed base, which the file does not hold",
            got=f"init_lora_weights {recipe.residual!r}, and weights of {folder}",
            expected="the residual base weights that this initialisation left, in the file",
            hint="save the whole state_dict, or convert the adapter: peft's save_pretrained has path_initial_model_for_weight_conversion.",
        )
    modules = (*adapted, *adapted_embeddings(state))
    own = [module for module in modules if f"backbone.{module}.weight" not in filled]
    other = [
        module for module in own if not _trained_beside(module, setup) and not _same(state, origin_weights, module)
    ]
    merged = [module for module in other if _holds_adapter(state, origin_weights, recipe, module)]
    if merged:
        raise CheckpointError(
            f"the adapters of {origin} are already merged into the weights beside them",
            got=f"{len(merged)} of {len(own)} adapted weights are those of {folder} plus their adapter: {_some(merged)}",
            expected="base weights and adapters apart: together they would count twice",
            hint="save after unmerge_adapter(); or delete the lora_ keys and set train_setup.lora_enable to false.",
        )
    if other and filled:
        raise BaseWeightsError(
            f"{folder} is not the base of {origin}",
            got=f"{len(other)} of {len(own)} frozen weights that both hold differ, and {len(filled)} would be taken from it",
            expected="the base that the adapters were trained on",
            hint="pass that base with --base DIR; the run's vlm.pretrained_model_name_or_path or pretrained_vlm_path names it.",
        )
    if other:
        return (
            f"{len(other)} frozen weights are not those of {folder}: the file's own are used, as it holds all of them"
        )
    return None


def _trained_beside(module: str, setup: Mapping[str, Any]) -> bool:
    """Whether a Linear trains along with the adapter on it: the fork thaws the projection again, our trainer the vision tower too."""
    if module.startswith(_PROJECTION):
        return bool(setup.get(_TUNED, False))
    return module.startswith("vision_model.") and bool(setup.get("train_vision", False))


def _same(state: Mapping[str, Tensor], base: Mapping[str, Tensor], module: str) -> bool:
    name = f"backbone.{module}.weight"
    own, theirs = state[name], base.get(name)
    if theirs is None or theirs.shape != own.shape:
        return theirs is None
    return torch.equal(own, theirs.to(own.dtype))


def _holds_adapter(state: Mapping[str, Tensor], base: Mapping[str, Tensor], recipe: AdapterRecipe, module: str) -> bool:
    """Whether a weight is the base's with the adapter that stands beside it, as far as its precision can tell.

    What rounding leaves of a small change is noise on a single number, so all of them together decide: they have to differ from the
    base as the adapter says, by about as much, beyond chance, and by nothing more than rounding.
    """
    name = f"backbone.{module}.weight"
    theirs, own = base.get(name), state[name].float()
    if theirs is None or theirs.shape != own.shape:
        return False
    theirs = theirs.float()
    merged = with_adapter(theirs, state, module, recipe.scaling(module))
    if merged is None:
        return False
    change, found = merged - theirs, own - theirs
    size, both = float(change.double().square().sum()), float((change.double() * found).sum())
    if not 0.5 * size < both < 1.5 * size:
        return False
    chance = (size * float(found.double().square().sum()) / own.numel()) ** 0.5
    eps = _precision(own, state[name].dtype)
    rounding = 2 * eps * (own.abs() + theirs.abs()) + (_CLOSE + 4 * eps) * change.abs().max()
    return both > _DEVIATIONS * chance and bool(((found - change).abs() <= rounding).all())


def _precision(values: Tensor, written: torch.dtype) -> float:
    """eps of the shortest type that holds these numbers: a file may be fp32 and its numbers not."""
    narrow = (kind for kind in (torch.bfloat16, torch.float16) if torch.equal(values.to(kind).float(), values))
    return torch.finfo(next(narrow, written)).eps


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
