"""The base model a policy stands on: its dimensions, its tokenizer, and its weights where the checkpoint lacks them.

A base is a Hugging Face directory (config.json, optionally tokenizer.json and model.safetensors). Labs' configs name it by absolute paths
of another machine, so it is also looked for near the checkpoint; dimensions of the real Kosmos-2 need no directory at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Kosmos2Config

from bundle.errors import BaseWeightsError, ConfigError
from bundle.hashing import sha256_arrays
from train.keys import canonical

_REAL_WIDTHS = {"vision": 1024, "text": 2048}
_LISTED = 3


@dataclass(frozen=True)
class Base:
    """A located base model.

    Attributes:
        folder: the Hugging Face directory, or None if none was found.
        kosmos: dimensions; from config.json, else those of microsoft/kosmos-2-patch14-224.
        searched: config files that were looked for before this one, and would have won.
    """

    folder: Path | None
    kosmos: Kosmos2Config
    searched: tuple[Path, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """tokenizer.json, if the directory has one."""
        path = None if self.folder is None else self.folder / "tokenizer.json"
        return path if path is not None and path.exists() else None


def find_base(checkpoint: Path, *, explicit: Path | None, written: str | None, state: Mapping[str, Tensor]) -> Base:
    """Locate the base of a checkpoint.

    Args:
        checkpoint: searched beside it and two folders above.
        explicit: the user's --base; nothing else is tried then.
        written: `vlm.pretrained_model_name_or_path` of the config.
        state: canonical weights, to recognise the real Kosmos-2 when no directory is found.

    Raises:
        BaseWeightsError: --base has no config.json, or none was found and the widths are not Kosmos-2's.
    """
    if explicit is not None:
        if not (explicit / "config.json").exists():
            raise BaseWeightsError(
                f"{explicit} is not a base model",
                got="no config.json",
                expected="a Hugging Face Kosmos-2 directory",
                hint="pass the folder that holds config.json and tokenizer.json with --base.",
            )
        return Base(explicit, read_base_config(explicit))
    searched: list[Path] = []
    for folder in _places(checkpoint, written):
        if (folder / "config.json").exists() and _is_kosmos(folder / "config.json"):
            return Base(folder, read_base_config(folder), tuple(searched))
        searched.append(folder / "config.json")
    widths = {
        "vision": state.get("backbone.vision_model.model.embeddings.class_embedding"),
        "text": state.get("backbone.text_model.model.layer_norm.weight"),
    }
    found = {name: None if tensor is None else tensor.shape[0] for name, tensor in widths.items()}
    if found != _REAL_WIDTHS:
        folders = list(dict.fromkeys(str(path.parent) for path in searched))
        absent = ", ".join(folders[:_LISTED]) or "no folder to look in"
        raise BaseWeightsError(
            f"the base model of {checkpoint.name} was not found",
            got=f"no Kosmos-2 in {absent}; widths in the checkpoint {found if any(found.values()) else 'unknown'}",
            expected=f"that directory, or the widths of microsoft/kosmos-2-patch14-224 {_REAL_WIDTHS}",
            hint="pass the Kosmos-2 directory (config.json, tokenizer.json) with --base DIR.",
        )
    return Base(None, Kosmos2Config(), tuple(searched))


def base_weights(folder: Path) -> dict[str, Tensor]:
    """Canonical name -> tensor of every weight in a base directory, memory-mapped.

    Raises:
        BaseWeightsError: no safetensors, or damaged ones.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BaseWeightsError(
            f"{folder} holds no weights",
            expected="model.safetensors",
            hint="the checkpoint stores only what was trained; download the whole Kosmos-2 directory (pickled .bin files are not read).",
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[canonical(name)] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BaseWeightsError(f"{path} is damaged", got=error, hint="download the file again.") from None
    return tensors


def tensors_sha256(state: Mapping[str, Tensor], progress: Callable[[int], None] | None = None) -> str:
    """Hash of named tensors, sorted by name, independent of the file they came from (bfloat16 is hashed by its bits)."""

    def arrays() -> object:
        for name in sorted(state):
            tensor = state[name].detach().contiguous()
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            yield f"{name}:{tensor.dtype}", bits.numpy()

    return sha256_arrays(arrays(), progress)  # type: ignore[arg-type]


def _places(checkpoint: Path, written: str | None) -> list[Path]:
    if written is None:
        return []
    name = Path(written)
    near = [checkpoint.parent, *list(checkpoint.resolve().parents)[1:3], Path.cwd()]
    return (
        [name]
        if name.is_absolute() and name.exists()
        else [folder / part for folder in near for part in (name, name.name)]
    )


def _is_kosmos(path: Path) -> bool:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type")) == "kosmos-2"
    except (ValueError, AttributeError, OSError):
        return False


def read_base_config(folder: Path) -> Kosmos2Config:
    """The dimensions in a base directory.

    Raises:
        ConfigError: no config.json of a Kosmos-2.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if values.get("model_type") != "kosmos-2":
            raise ValueError(f"model_type {values.get('model_type')!r}")
        return Kosmos2Config.from_dict(values)
    except Exception as error:  # Hugging Face validates configs with exception types of its own
        raise ConfigError(
            f"{folder / 'config.json'} is not a Kosmos-2 config",
            got=error,
            expected="model_type 'kosmos-2'",
            hint="pass the directory of microsoft/kosmos-2-patch14-224 with --base.",
        ) from None
