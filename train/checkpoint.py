"""From a checkpoint to the reference policy, strictly and without copying the weights.

Every key is used or reported; a missing, unknown or misshapen one is an error that lists it, because `strict=False` is how labs have
deployed policies on wrong weights. How files are read safely is in train/checkpoint_file.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from transformers import Kosmos2Config

from bundle.errors import BaseWeightsError, CheckpointError, ConfigError, UnsupportedPolicyError
from bundle.manifest import Packing
from bundle.prompt_template import UPSTREAM, is_template
from train.adapter_merge import check_kinds, fold, needs_folding
from train.adapter_recipe import AdapterRecipe, recipe_of_peft, recipe_of_setup
from train.base import Base, base_weights, find_base, tensors_sha256
from train.checkpoint_file import RawCheckpoint, read_raw, write_small
from train.config import LoraSpec, PolicySpec, policy_spec, read_chain
from train.facts import TrainingFacts, training_facts
from train.keys import KeyMap, canonical, lora_modules, map_keys
from train.peft_folder import CONFIG_NAME as ADAPTER_CONFIG
from train.policy import Conventions, KosmosPolicy
from train.reading_memory import available_bytes, check_memory, check_shared, reading_need
from train.trained_parts import check_base, check_held

T = TypeVar("T")
_LISTED = 12
VISION_RESAMPLER = "vision_resampler."
_HEADS_BY_PART = {
    "act_head.actions.": "LSTMDecoder (one arm column and a gripper, where act_head.action_dim is 2)",
    "act_head.velocities.": "MobileVLALSTMDecoder",
    "act_head.logits.": "MobileVLAClassificationDecoder",
}
_MAX_PROMPT = 2048  # Kosmos-2's max_position_embeddings
_MOST_ADAPTED = 2000  # Kosmos-2 has 294 Linears


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy with the story of its weights.

    Attributes:
        policy: in eval mode, fp32, gradients off.
        raw: the file it came from.
        base: dimensions and tokenizer.
        config: the training config used, `parent` chain resolved.
        config_files: the files it was read from; none if it was inside the checkpoint.
        state: canonical name -> fp32 tensor of everything the policy uses.
        ignored: raw keys that hold nothing it needs (tied heads, buffers).
        from_base: canonical names taken from the base directory.
        base_sha256: hash of the base directory's weights; None when nothing was taken from it.
        folded: paths of modules whose adapters were merged on reading, because they are more than W + (alpha / r) B A.
        remark: a sentence about the base that one should know, or None.
    """

    policy: KosmosPolicy
    raw: RawCheckpoint
    base: Base
    config: dict[str, Any]
    config_files: tuple[Path, ...]
    state: dict[str, Tensor]
    ignored: tuple[str, ...]
    from_base: tuple[str, ...]
    base_sha256: str | None
    folded: tuple[str, ...] = ()
    remark: str | None = None

    @property
    def adapted(self) -> tuple[str, ...]:
        """Paths of all modules that the checkpoint has adapters for."""
        return self.policy.adapted or self.folded

    @property
    def idle(self) -> tuple[str, ...]:
        """Canonical names of weights that the policy's packing never comes to."""
        if self.policy.resamples:
            return ()
        return tuple(name for name in self.state if name.startswith(VISION_RESAMPLER))

    @property
    def facts(self) -> TrainingFacts | None:
        """What our own trainer recorded of the run; None for checkpoints of other trainers."""
        return training_facts(self.config)


def load_policy(
    path: str | Path, *, base: str | Path | None = None, packing: Packing | Literal["auto"] = "auto"
) -> KosmosPolicy:
    """Read a policy in eval mode: torch, adapter form, fp32. See `load` for everything else about it."""
    return load(Path(path), base=None if base is None else Path(base), packing=packing).policy


def load(
    path: Path,
    *,
    base: Path | None = None,
    config: Path | None = None,
    packing: Packing | Literal["auto"] = "auto",
    x_attn_causal: bool | None = None,
    prompt_template: str | None = None,
    pad_prompt_to: int | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> LoadedPolicy:
    """Read a checkpoint strictly.

    Args:
        path: Lightning `.ckpt`, `.pt` with `state_dict` or `model_state_dict`, jetvla's `.safetensors`, or peft's folder.
        base: Hugging Face Kosmos-2 directory; needed when the checkpoint lacks base weights or the directory cannot be found.
        config: RoboVLMs JSON; by default the one inside the checkpoint, else config.json beside it.
        packing: layout of a row. `auto` is `upstream` for upstream's policies, and an error for the fork's.
        x_attn_causal: whether the resampler was trained causal (transformers 4.52 to 5.0 with sdpa). None assumes not, and says so.
        prompt_template, pad_prompt_to: text around an instruction and length of every prompt (0 for its own), as stated by the user; None
            is what the file records, else what the lab's code does with the config.
        announce: told what loading will take of the memory, before it is taken.

    Raises:
        CheckpointError: unreadable, unsafe, larger than the free memory, or keys missing, unknown, contradictory, misshapen or not finite.
        BaseWeightsError: the base is missing or is another one than recorded.
        ConfigError: no usable config, or one that contradicts the weights.
        UnsupportedPolicyError: a variant jetvla does not build.
    """
    raw = read_raw(path)
    settings, config_files = _find_config(raw, config)
    spec, facts = policy_spec(settings), training_facts(settings)
    raw = _with_facts(raw, facts)
    spec = _with_prompt(spec, raw, prompt_template, pad_prompt_to)
    keys = map_keys(raw.state)
    state = _unaliased(raw, keys)
    check_kinds(state, origin=path.name)
    located = find_base(path, explicit=base, written=spec.base_path, state=state)
    setup: dict[str, Any] = settings["train_setup"]
    recipe = _recipe(raw, spec, setup)
    folding = recipe is not None and needs_folding(state, recipe)
    if raw.adapter is not None and recipe is not None:
        spec = replace(spec, lora=LoraSpec(recipe.r, recipe.alpha))
    adapted = lora_modules(keys.names) if folding else _check_adapters(path, spec, keys, state)
    conventions = decide_conventions(raw, spec, packing=packing, x_attn_causal=x_attn_causal)
    if folding:
        spec = replace(spec, lora=None)

    _check_told(path, spec, settings, located.kosmos)
    policy = _empty_policy(spec, located.kosmos, conventions, () if folding else adapted)
    expected = map_keys(policy.state_dict()).names
    _check_values(raw, expected)
    from_base, base_sha256 = _fill_from_base(raw, located, state, expected)
    if raw.kind != "jetvla" or "base_sha256" not in raw.recorded:
        # What our small files leave out is the base's, and that is proved.
        layers = located.kosmos.text_config.layers
        check_held(setup, recipe, from_base, layers=layers, adapted=adapted, origin=path.name)
    check_shared(state, origin=path.name)
    need = reading_need(state, (f"backbone.{module}.weight" for module in adapted) if folding else ())
    check_memory(need, origin=path.name, available=available_bytes())
    announce(f"loading takes {need}")
    remark = _check_base(path, located, setup, state, recipe, adapted, from_base)
    folded = fold(state, recipe, origin=path.name) if recipe is not None and folding else ()
    _check_names(path, state, policy, expected)
    state = {name: tensor.float() for name, tensor in state.items()}
    _check_finite(path, state)
    assigned = {expected[name][0]: tensor for name, tensor in state.items()}
    policy.load_state_dict(assigned, strict=True, assign=True)
    materialize_tables(policy.backbone)
    policy.requires_grad_(False).eval()
    ignored = keys.ignored + raw.not_tensors
    return LoadedPolicy(
        policy, raw, located, settings, config_files, state, ignored, from_base, base_sha256, folded, remark
    )


def _recipe(raw: RawCheckpoint, spec: PolicySpec, setup: Mapping[str, Any]) -> AdapterRecipe | None:
    """How the checkpoint's adapters are scaled: by peft's own config where there is one, else by the lab's.

    Raises:
        ConfigError: both are there and contradict each other.
    """
    if raw.adapter is None:
        return recipe_of_setup(setup) if spec.lora is not None else None
    recipe = recipe_of_peft(raw.adapter, origin=f"{raw.path.name}/{ADAPTER_CONFIG}")
    if spec.lora is not None and (spec.lora.r, spec.lora.alpha) != (recipe.r, recipe.alpha):
        raise ConfigError(
            f"the training config and peft's config of {raw.path.name} disagree about the adapters",
            got=f"lora_r {spec.lora.r}, lora_alpha {spec.lora.alpha:g}",
            expected=f"r {recipe.r}, lora_alpha {recipe.alpha:g}, as {ADAPTER_CONFIG} says",
            hint="this is the config of another run; pass the right one with --config.",
        )
    return recipe


def _check_base(
    path: Path,
    located: Base,
    setup: Mapping[str, Any],
    state: Mapping[str, Tensor],
    recipe: AdapterRecipe | None,
    adapted: tuple[str, ...],
    from_base: tuple[str, ...],
) -> str | None:
    """Whether file, adapters and base directory belong together; see train.trained_parts.check_base."""
    if recipe is None or located.folder is None or not any(located.folder.glob("model*.safetensors")):
        return None
    origin = base_weights(located.folder)
    return check_base(setup, state, origin, recipe, adapted, from_base, origin=path.name, folder=located.folder)


def _with_prompt(spec: PolicySpec, raw: RawCheckpoint, template: str | None, pad_to: int | None) -> PolicySpec:
    """Text and length of prompts: stated by the user, recorded in the file, or by the config - in this order.

    Raises:
        ConfigError: a template with other braces.
        CheckpointError: a recorded length that is none.
    """
    if "prompt_template" in raw.recorded:
        lengths = {str(length): length for length in range(_MAX_PROMPT + 1)}
        length = _recorded(raw, "pad_prompt_to", lengths) if "pad_prompt_to" in raw.recorded else 0
        text = raw.recorded["prompt_template"]
        spec = replace(spec, prompt_template=text, pad_to=length or None, prompt_source="recorded")
    if template is not None:
        if not is_template(template):
            raise ConfigError(
                "the prompt template is not usable",
                got=repr(template),
                expected="a text with {instruction} in it once (or not at all), and no other braces",
                hint=f"for example --prompt-template {UPSTREAM!r}",
            )
        spec = replace(spec, prompt_template=template, prompt_source="stated by the user")
    if pad_to is not None:
        spec = replace(spec, pad_to=pad_to or None)
        if template is None:
            spec = replace(spec, prompt_source=f"{spec.prompt_source}; padding stated by the user")
    return spec


def decide_conventions(
    raw: RawCheckpoint, spec: PolicySpec, *, packing: Packing | Literal["auto"], x_attn_causal: bool | None
) -> Conventions:
    """Packing and resampler masking: stated by the user, recorded in the file, or inferred - in this order.

    Raises:
        ConfigError: the fork's policy without a stated packing, or a layout that the packing does not define.
    """
    chosen: Packing
    if packing != "auto":
        chosen, source = packing, "stated by the user"
    elif "packing" in raw.recorded:
        chosen, source = _recorded(raw, "packing", {name: name for name in get_args(Packing)}), "recorded"
    elif spec.fork:
        raise ConfigError(
            f"{raw.path.name} comes from the 2-DoF fork, and nothing in it tells how its rows were packed",
            got="packing auto",
            expected="--packing upstream, or --packing fork_overwrite",
            hint="fork_overwrite if training ran on an unpatched transformers (the log says `pixel_values` ValueError; the decoder "
            "then saw no words of the instruction); upstream if RoboVLMs' modeling_kosmos2.py was installed.",
        )
    else:
        chosen, source = "upstream", "inferred: upstream's trainer has no other layout"
    if chosen == "fork_overwrite" and (spec.hand_camera or spec.head.latent > 1):
        raise ConfigError(
            "packing fork_overwrite is not defined for a hand camera or latent > 1",
            got=f"use_hand_rgb {spec.hand_camera}, latent {spec.head.latent}",
            hint="the fork has neither; use --packing upstream.",
        )
    if x_attn_causal is not None:
        return Conventions(chosen, source, x_attn_causal, "stated by the user")
    if "x_attn_causal" in raw.recorded:
        causal = _recorded(raw, "x_attn_causal", {"true": True, "false": False})
        return Conventions(chosen, source, causal, "recorded")
    return Conventions(
        chosen, source, False, "assumed: the pinned transformers 4.41 of both codes has no causal resampler"
    )


def _recorded(raw: RawCheckpoint, key: str, meanings: Mapping[str, T]) -> T:
    """A recorded fact, by its exact spelling."""
    value = raw.recorded[key]
    if value not in meanings:
        raise CheckpointError(
            f"{raw.path.name} records an unknown {key}",
            got=repr(value),
            expected=", ".join(meanings),
            hint="the file was edited, or written by a newer jetvla; state it on the command line instead.",
        )
    return meanings[value]


def save_small(loaded: LoadedPolicy, path: Path) -> None:
    """Write jetvla's small format: what the base lacks, plus the base's hash, config and conventions.

    Raises:
        CheckpointError: the policy has no base directory with weights to refer to.
        StorageError: the disk is full.
    """
    if loaded.base.folder is None:
        raise BaseWeightsError(
            "a small checkpoint needs a base directory",
            got="none",
            hint="load with base=DIR that holds model.safetensors.",
        )
    origin = base_weights(loaded.base.folder)
    own = {
        name: tensor
        for name, tensor in loaded.state.items()
        if name not in origin or not torch.equal(origin[name].float(), tensor)
    }
    conventions = loaded.policy.conventions
    recorded = {
        "base_sha256": tensors_sha256(origin),
        "packing": conventions.packing,
        "x_attn_causal": "true" if conventions.x_attn_causal else "false",
        "prompt_template": loaded.policy.spec.prompt_template,
        "pad_prompt_to": str(loaded.policy.spec.pad_to or 0),
    }
    config = loaded.config
    if loaded.folded:  # what is written has no adapters any more
        config = {**config, "train_setup": {**config["train_setup"], "lora_enable": False}}
    write_small(path, own, config, recorded)


def _with_facts(raw: RawCheckpoint, facts: TrainingFacts | None) -> RawCheckpoint:
    """What our trainer recorded in the config counts as recorded in the file."""
    if facts is None:
        return raw
    known = {"packing": facts.packing, "x_attn_causal": "true" if facts.x_attn_causal else "false"}
    if facts.prompt_template is not None:
        known |= {"prompt_template": facts.prompt_template, "pad_prompt_to": str(facts.pad_prompt_to or 0)}
    return replace(raw, recorded={"base_sha256": facts.base_sha256, **known, **raw.recorded})


def _find_config(raw: RawCheckpoint, explicit: Path | None) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The training config, and the files that it was read from or that would have won had they been there."""
    if explicit is not None:
        return read_chain(explicit)
    if raw.config is not None:
        return raw.config, ()
    beside = (
        [raw.path / "config.json"]
        if raw.adapter is not None
        else [raw.path.with_suffix(".json"), raw.path.parent / "config.json"]
    )
    for index, candidate in enumerate(beside):
        if candidate.exists():
            settings, files = read_chain(candidate)
            return settings, (*beside[:index], *files)
    raise ConfigError(
        f"{raw.path.name} carries no training config",
        got="no hyper_parameters.configs, no " + " or ".join(candidate.name for candidate in beside) + " beside it",
        hint="pass the RoboVLMs JSON of the run with --config.",
    )


def _unaliased(raw: RawCheckpoint, keys: KeyMap) -> dict[str, Tensor]:
    """First occurrence of each canonical name; two names with different values are an error, not a coin toss."""
    if len(keys.adapters) > 1:
        raise CheckpointError(
            f"{raw.path.name} holds several adapters",
            got=", ".join(sorted(keys.adapters)),
            expected="one",
            hint="save the checkpoint with the adapter that should be deployed only.",
        )
    state = {}
    conflicts = []
    for name, raw_names in keys.names.items():
        first, *others = (raw.state[raw_name] for raw_name in raw_names)
        state[name] = first
        conflicts += [
            name for other in others if other.data_ptr() != first.data_ptr() and not torch.equal(other, first)
        ]
    if conflicts:
        raise CheckpointError(
            f"{raw.path.name} gives one parameter two values",
            got=_some(conflicts),
            hint="the alias keys disagree, so the file was edited or saved halfway; re-export it from training.",
        )
    return state


def _check_adapters(path: Path, spec: PolicySpec, keys: KeyMap, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    adapted = lora_modules(keys.names)
    if bool(adapted) != (spec.lora is not None):
        raise ConfigError(
            f"config and weights of {path.name} disagree about LoRA",
            got=f"{len(adapted)} adapted modules in the weights",
            expected=f"lora_enable {spec.lora is not None}",
            hint="this is the config of another run; pass the right one with --config.",
        )
    if len(adapted) > _MOST_ADAPTED:
        raise CheckpointError(
            f"{path.name} holds adapters for more modules than any policy has",
            got=len(adapted),
            expected=f"at most {_MOST_ADAPTED}",
            hint="take the file from where it was written.",
        )
    if spec.lora is not None:
        ranks = {state[f"backbone.{module}.lora_A.weight"].shape[0] for module in adapted}
        if ranks != {spec.lora.r}:
            raise ConfigError(
                f"config and weights of {path.name} disagree about the LoRA rank",
                got=f"{sorted(ranks)} in the weights",
                expected=f"lora_r {spec.lora.r}",
                hint="the merge scale is alpha / r, so a wrong config would silently scale every adapter; pass the right --config.",
            )
    return adapted


def _empty_policy(
    spec: PolicySpec, kosmos: Kosmos2Config, conventions: Conventions, adapted: tuple[str, ...]
) -> KosmosPolicy:
    """The policy on the meta device, which holds shapes and no data."""
    try:
        with torch.device("meta"):
            return KosmosPolicy(spec, kosmos, conventions, adapted)
    except Exception as error:  # torch, peft and Hugging Face each raise types of their own
        raise ConfigError(
            "no policy can be built from this config and base",
            got=error,
            expected="dimensions that fit each other, and adapters on Linears",
            hint="a wrong --base or --config is the usual cause.",
        ) from None


def _fill_from_base(
    raw: RawCheckpoint, located: Base, state: dict[str, Tensor], expected: Mapping[str, object]
) -> tuple[tuple[str, ...], str | None]:
    """Add missing backbone weights from the base directory; returns their names and the directory's hash."""
    missing = tuple(sorted(name for name in expected if name not in state and name.startswith("backbone.")))
    missing = tuple(name for name in missing if ".lora_" not in name)
    if not missing:
        return (), None
    if located.folder is None:
        raise BaseWeightsError(
            f"{raw.path.name} lacks {len(missing)} base weights",
            got=_some(missing),
            expected="a base directory to take them from",
            hint="pass the Kosmos-2 directory with --base DIR.",
        )
    origin = base_weights(located.folder)
    digest = tensors_sha256(origin)
    recorded = raw.recorded.get("base_sha256")
    if recorded is not None and recorded != digest:
        raise BaseWeightsError(
            f"{located.folder} is not the base of {raw.path.name}",
            got=digest,
            expected=recorded,
            hint="the adapter means nothing on other weights; find the base that the run recorded.",
        )
    taken = tuple(name for name in missing if name in origin)
    state.update({name: origin[name] for name in taken})
    return taken, digest


def _check_values(raw: RawCheckpoint, expected: Mapping[str, object]) -> None:
    """Refuse a weight that is no tensor: left out, it would be filled in from the base."""
    odd = [name for name in raw.not_tensors if canonical(name) in expected]
    if odd:
        raise CheckpointError(
            f"{raw.path.name} holds weights that are no tensors",
            got=_some(odd),
            expected="tensors",
            hint="the file was edited or saved by other code than state_dict(); take it from where it was written.",
        )


def _check_names(
    path: Path, state: Mapping[str, Tensor], policy: KosmosPolicy, expected: Mapping[str, tuple[str, ...]]
) -> None:
    shapes = {name: tuple(policy.get_parameter(raw[0]).shape) for name, raw in expected.items()}
    problems = []
    missing = sorted(set(shapes) - set(state))
    if missing:
        problems.append(f"missing {_some(missing)}")
    unknown = sorted(set(state) - set(shapes))
    if unknown:
        problems.append(f"unknown {_some(unknown)}")
    wrong = [
        f"{name} {list(state[name].shape)}, not {list(shape)}"
        for name, shape in sorted(shapes.items())
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        problems.append(f"misshapen {_some(wrong)}")
    if odd := sorted(f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()):
        problems.append(f"not floating point {_some(odd)}")
    if problems:
        raise CheckpointError(
            f"the weights of {path.name} do not fit its config and base",
            got="; ".join(problems),
            expected=f"exactly the {len(shapes)} parameters of {policy.spec.head.kind} on this base",
            hint=_other_head(unknown) or _not_told(missing) or "a wrong --base or --config is the usual cause.",
        )


def _check_told(path: Path, spec: PolicySpec, settings: Mapping[str, Any], kosmos: Kosmos2Config) -> None:
    """Whether what the head is told is the prompt.

    Raises:
        UnsupportedPolicyError: it is something else, which the file does not hold.
    """
    stated, width = settings["act_head"].get("instr_in_features"), kosmos.text_config.embed_dim
    if spec.head.told and stated != width:
        raise UnsupportedPolicyError(
            f"{path.name} uses act_head.instr_in_features = {stated!r}, which jetvla does not build",
            expected=f"{width}, the width of this base's word embeddings, whose mean the head is told",
            hint="embeddings of another width stand in a file of the lab's loader: it would take that file at every reset. "
            "Nothing was written.",
        )


def _other_head(unknown: list[str]) -> str | None:
    """The hint where the file has another head than its config says: some of the lab's code calls upstream's head by the fork's name."""
    for part, kind in _HEADS_BY_PART.items():
        if any(name.startswith(part) for name in unknown):
            return f"these are the weights of {kind}: pass a config that says so in act_head.type, with --config."
    return None


def _not_told(missing: list[str]) -> str | None:
    """The hint where the run's code did not know of heads that are told the instruction."""
    if missing and all(name.startswith("act_head.instr_proj.") for name in missing):
        return "if the code of the run did not know act_head.instr_in_features, pass a config without the key, with --config."
    return None


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    # The sum of a tensor is finite only if all of it is, and costs one pass and no memory.
    bad = sorted(name for name, tensor in state.items() if not torch.isfinite(tensor.sum(dtype=torch.float64)))
    if bad:
        raise CheckpointError(
            f"{path.name} holds NaN or infinite weights",
            got=_some(bad),
            expected="finite numbers",
            hint="training diverged; take an earlier checkpoint.",
        )


def materialize_tables(kosmos: torch.nn.Module) -> None:
    """Recompute what Hugging Face keeps in non-persistent buffers, which building on the meta device leaves empty."""
    model: Any = kosmos
    vision = model.vision_model.model.embeddings
    vision.position_ids = torch.arange(vision.num_positions).expand((1, -1))
    positions = model.text_model.model.embed_positions
    del positions.weights
    positions.make_weights(positions.num_positions + positions.offset, positions.embedding_dim, positions.padding_idx)


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)}: " + ", ".join(names[:_LISTED]) + more
