"""A base directory from a RoboVLMs checkpoint, so that training on released RoboVLMs weights is training on one more Kosmos-2 directory.

Of the checkpoint either the vision-language part is taken, adapters merged, as the lab's code does for `pretrained_vlm_path`; or the whole
policy, as RoboVLMs does for `model_load_path`: then head, action token and, where the run has the same ones, adapters stand beside the
weights, for train/trainable.py to start from. Written once, with config and tokenizer of the Kosmos-2 directory; everything downstream
(hashes, small checkpoints, export) then needs no special case.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from bundle.atomic import disk_errors, exclusive, staged_directory
from bundle.errors import CheckpointError, ConfigError
from bundle.hashing import sha256_file
from train.base import base_weights, read_base_config
from train.checkpoint import LoadedPolicy, load
from train.checkpoint_file import RawCheckpoint, read_raw
from train.config import read_json
from train.keys import lora_modules, map_keys
from train.lora_targets import adapted_modules
from train.run_config import BaseConfig, LoraConfig

START_NAME = "start.safetensors"
_STORY_NAME = "story.json"
_NAME_DIGITS = 16
_COPIED = ("config.json", "tokenizer.json")
_LISTED = 5


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    Attributes:
        base: the directory with the weights of Kosmos-2.
        weights, weights_sha256: the checkpoint that they are from, and the hash of its bytes; None for Kosmos-2 itself.
        story: what was taken of it, in one sentence.
    """

    base: Path
    weights: Path | None = None
    weights_sha256: str | None = None
    story: str | None = None


def starting_point(base: BaseConfig, lora: LoraConfig, *, root: Path, folder: Path) -> StartingPoint:
    """What a config starts from; a directory is made of a checkpoint now unless it exists.

    Args:
        root: where relative paths start.
        folder: where such directories are kept.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read strictly.
        BaseWeightsError: it is only what was trained, and not on the weights of `base.model`.
        StorageError: the disk is full.
    """
    model = root / base.model
    if base.weights is None:
        return StartingPoint(model)
    weights = root / base.weights
    digest = sha256_file(weights)
    kept = lora if base.take == "policy" else None
    target = folder / f"{weights.stem}-{_key(digest, weights, model, kept)}"
    if not (target / _STORY_NAME).exists():
        _make(target, weights, model, kept)
    return StartingPoint(target, weights, digest, json.loads((target / _STORY_NAME).read_text(encoding="utf-8")))


def _make(target: Path, weights: Path, model: Path, lora: LoraConfig | None) -> None:
    """The directory; with adapters of the run, the whole policy is taken."""
    state, start, story = _backbone(weights, model) if lora is None else _policy(weights, model, lora)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target):
            if (target / _STORY_NAME).exists():  # another process has made it meanwhile
                return
            with staged_directory(target) as staging:
                for name in _COPIED:
                    if (model / name).exists():
                        shutil.copyfile(model / name, staging / name)
                save_file(_plain(state), staging / "model.safetensors", {"format": "pt"})
                if start:
                    save_file(_contiguous(start), staging / START_NAME)
                (staging / _STORY_NAME).write_text(json.dumps(story), encoding="utf-8")


def _key(digest: str, weights: Path, model: Path, lora: LoraConfig | None) -> str:
    """Hash of all that decides the directory's content; weights of `model` fill in what a checkpoint leaves out.

    A config beside the checkpoint says how strongly its adapters act, so correcting it is another directory.
    """
    files = [*(model / name for name in _COPIED), *sorted(model.glob("model*.safetensors"))]
    hashes = [digest, *(sha256_file(path) if path.exists() else "" for path in files)]
    if beside := _config_beside(weights):
        hashes.append(beside)
    if lora is not None:
        hashes.append(msgspec.json.encode(lora).decode())
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:_NAME_DIGITS]


def _config_beside(weights: Path) -> str | None:
    """The training config that a checkpoint without its own is read with; None where there is none, or none that can be read."""
    found = (path for path in (weights.with_suffix(".json"), weights.parent / "config.json") if path.exists())
    try:
        return json.dumps(read_json(next(found)), sort_keys=True)
    except (StopIteration, ConfigError):
        return None


def _backbone(weights: Path, model: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Of any file of weights the vision-language part, whatever head it had."""
    raw = read_raw(weights)
    names = map_keys(raw.state).names
    adapted = lora_modules(names)
    # How strongly adapters of any kind act, and on which weights, stands in its config.
    if any(".lora_" in name for name in names) or raw.kind == "jetvla":
        loaded = _load(weights, model)
        return _merged(loaded), {}, _told(f"the vision-language part of {weights.name}", len(adapted), merged=True)
    state = {name: tensor for name, tensor in _unaliased(raw).items() if name.startswith("backbone.")}
    origin = base_weights(model)
    _check(raw, state, origin)
    filled = [name for name in origin if name not in state]
    state = {**{name: origin[name] for name in filled}, **state}
    rest = f", {len(filled)} tensors that it lacks from {model.name}" if filled else ""
    return (
        {name: tensor.float() for name, tensor in state.items()},
        {},
        f"the vision-language part of {weights.name}{rest}",
    )


def _policy(weights: Path, model: Path, lora: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The whole policy; adapters go on as adapters where the run has the same ones, else they are merged."""
    loaded = _load(weights, model)
    found = loaded.policy.spec.lora
    start = {name: tensor for name, tensor in loaded.state.items() if not name.startswith("backbone.")}
    what = f"all of {weights.name}: head, action token and the vision-language part"
    if found is None:
        return _merged(loaded), start, what
    asked = set(adapted_modules(read_base_config(model), lora))
    same = asked == set(loaded.policy.adapted) and (lora.r, lora.alpha) == (found.r, found.alpha)
    told = _told(what, len(loaded.policy.adapted), merged=not same)
    if not same:
        return _merged(loaded), start, told
    adapters = {name: tensor for name, tensor in loaded.state.items() if ".lora_" in name}
    plain = {name: tensor for name, tensor in loaded.state.items() if name.startswith("backbone.")}
    return {name: plain[name] for name in plain.keys() - adapters.keys()}, {**start, **adapters}, told


def _told(what: str, adapters: int, *, merged: bool) -> str:
    if not adapters:
        return what
    return f"{what}, {adapters} adapters " + ("merged into it" if merged else "going on as they are")


def _load(weights: Path, model: Path) -> LoadedPolicy:
    # Packing concerns rows, not weights.
    return load(weights, base=model, packing="upstream", x_attn_causal=False)


def _merged(loaded: LoadedPolicy) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in loaded.state.items() if name.startswith("backbone.")}
    lora = loaded.policy.spec.lora
    for module in lora_modules(state):
        down = state.pop(f"backbone.{module}.lora_A.weight")
        up = state.pop(f"backbone.{module}.lora_B.weight")
        assert lora is not None
        with torch.no_grad():
            weight = state[f"backbone.{module}.weight"]
            state[f"backbone.{module}.weight"] = weight + lora.scaling * (up @ down)
    return state


def _unaliased(raw: RawCheckpoint) -> dict[str, Tensor]:
    """Each weight under its canonical name; alias keys must agree."""
    state: dict[str, Tensor] = {}
    for name, raw_names in map_keys(raw.state).names.items():
        first, *others = (raw.state[each] for each in raw_names)
        if any(other.data_ptr() != first.data_ptr() and not torch.equal(other, first) for other in others):
            raise CheckpointError(
                f"{raw.path.name} gives one parameter two values",
                got=name,
                hint="the alias keys disagree, so the file was edited or saved halfway; re-export it from training.",
            )
        state[name] = first
    return state


def _check(raw: RawCheckpoint, state: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> None:
    """What is there is Kosmos-2's, of the directory's shapes, and finite."""
    if not state:
        raise CheckpointError(
            f"{raw.path.name} holds no weights of Kosmos-2",
            got=_some(raw.state),
            expected="text_model, vision_model and image_to_text_projection",
            hint="pass a checkpoint of a Kosmos-2 policy of RoboVLMs or its fork.",
        )
    unknown = [name for name in state if name not in origin]
    wrong = [
        f"{name} {list(tensor.shape)}, not {list(origin[name].shape)}"
        for name, tensor in state.items()
        if name in origin and tensor.shape != origin[name].shape
    ]
    odd = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    odd += [
        name
        for name, tensor in state.items()
        if name not in odd and not torch.isfinite(tensor.sum(dtype=torch.float64))
    ]
    problems = {"unknown": unknown, "misshapen": wrong, "not finite numbers": odd}
    if any(problems.values()):
        raise CheckpointError(
            f"the weights of {raw.path.name} are not those of a Kosmos-2 like base.model",
            got="; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names),
            expected=f"some of the {len(origin)} tensors of base.model, of the same shapes",
            hint="a checkpoint of another base, or a damaged one, is the usual cause.",
        )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As Hugging Face names them."""
    return _contiguous({name.removeprefix("backbone."): tensor for name, tensor in state.items()})


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")
