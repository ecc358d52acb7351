"""A base directory from a RoboVLMs checkpoint, so that training on released RoboVLMs weights is training on one more Kosmos-2 directory.

The checkpoint is read strictly, its adapters are merged, and its backbone is written once as model.safetensors with the config and
tokenizer of the Kosmos-2 directory. Everything downstream (hashes, small checkpoints, export) then needs no special case.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bundle.atomic import disk_errors, exclusive, staged_directory
from bundle.hashing import sha256_file
from train.checkpoint import LoadedPolicy, load
from train.keys import lora_modules

_NAME_DIGITS = 16
_COPIED = ("config.json", "tokenizer.json")


def robovlms_base(weights: Path, model: Path, folder: Path) -> Path:
    """The base directory made of a checkpoint's backbone; made now unless it exists.

    Args:
        weights: a checkpoint of RoboVLMs, with or without adapters.
        model: the Kosmos-2 directory whose config.json and tokenizer.json fit it.
        folder: where such directories are kept.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read strictly.
        StorageError: the disk is full.
    """
    target = folder / f"{weights.stem}-{_key(weights, model)[:_NAME_DIGITS]}"
    if (target / "model.safetensors").exists():
        return target
    # Packing concerns rows, not weights.
    loaded = load(weights, base=model, packing="upstream", x_attn_causal=False)
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(target):
            if (target / "model.safetensors").exists():  # another process has made it meanwhile
                return target
            with staged_directory(target) as staging:
                for name in _COPIED:
                    if (model / name).exists():
                        shutil.copyfile(model / name, staging / name)
                save_file(_merged(loaded), staging / "model.safetensors", {"format": "pt"})
    return target


def _key(weights: Path, model: Path) -> str:
    """Hash of all that decides the directory's content; weights of `model` fill in what a checkpoint leaves out."""
    files = [weights, *(model / name for name in _COPIED), *sorted(model.glob("model*.safetensors"))]
    hashes = [sha256_file(path) if path.exists() else "" for path in files]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


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
    return {name.removeprefix("backbone."): tensor.contiguous() for name, tensor in state.items()}
