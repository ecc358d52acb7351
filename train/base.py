"""The base model a policy stands on: its dimensions, its tokenizer, and its weights where the checkpoint lacks them.

A base is a Hugging Face directory (config.json, optionally tokenizer.json and model.safetensors). Labs' configs name it by absolute paths
of another machine, so it is also looked for near the checkpoint; dimensions of the real Kosmos-2 need no directory at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Kosmos2Config

from bundle.errors import BaseWeightsError, ConfigError, InputFileError
from bundle.hashing import sha256_arrays
from bundle.reading_limits import is_there, read_json
from train.keys import canonical
from train.safetensors_file import read_safetensors

_REAL_WIDTHS = {"vision": 1024, "text": 2048}
_LISTED = 3
_HINT = "pass the directory of microsoft/kosmos-2-patch14-224 with --base."
# Far beyond every model of this kind.
_MOST = {
    "text_config.layers": 256, "text_config.embed_dim": 1 << 16, "text_config.ffn_dim": 1 << 18, "text_config.attention_heads": 1024,
    "text_config.vocab_size": 1 << 22, "text_config.max_position_embeddings": 1 << 20,
    "vision_config.num_hidden_layers": 256, "vision_config.hidden_size": 1 << 16, "vision_config.intermediate_size": 1 << 18,
    "vision_config.num_attention_heads": 1024, "vision_config.num_channels": 16, "vision_config.image_size": 1 << 13,
    "vision_config.patch_size": 1 << 13, "latent_query_num": 1 << 12,
}  # fmt: skip
_MOST_TABLE = 1 << 26


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
        if is_there(folder / "config.json") and _is_kosmos(folder / "config.json"):
            return Base(folder, read_base_config(folder), tuple(searched))
        searched.append(folder / "config.json")
    widths = {
        "vision": state.get("backbone.vision_model.model.embeddings.class_embedding"),
        "text": state.get("backbone.text_model.model.layer_norm.weight"),
    }
    found = {name: None if tensor is None or not tensor.dim() else tensor.shape[0] for name, tensor in widths.items()}
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
        _, found = read_safetensors(path, error=BaseWeightsError, hint="download the file again.")
        tensors |= {canonical(name): tensor for name, tensor in found.items()}
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
        if name.is_absolute() and is_there(name)
        else [folder / part for folder in near for part in (name, name.name)]
    )


def _is_kosmos(path: Path) -> bool:
    try:
        values = read_json(path)
    except InputFileError:
        return False
    return isinstance(values, dict) and values.get("model_type") == "kosmos-2"


def read_base_config(folder: Path) -> Kosmos2Config:
    """The dimensions in a base directory.

    Raises:
        ConfigError: no config.json of a Kosmos-2.
    """
    values = read_json(folder / "config.json", error=ConfigError, hint=_HINT)
    try:
        if values.get("model_type") != "kosmos-2":
            raise ValueError(f"model_type {values.get('model_type')!r}")
        found = Kosmos2Config.from_dict(values)
    except Exception as error:  # Hugging Face validates configs with exception types of its own
        raise ConfigError(
            f"{folder / 'config.json'} is not a Kosmos-2 config",
            got=error,
            expected="model_type 'kosmos-2'",
            hint=_HINT,
        ) from None
    _check_dimensions(found, folder)
    return found


def _check_dimensions(kosmos: Kosmos2Config, folder: Path) -> None:
    """Refuse dimensions that no model has: building even its outline would take for ever, and its tables all memory."""
    for name, most in _MOST.items():
        section, _, leaf = name.rpartition(".")
        value = getattr(getattr(kosmos, section) if section else kosmos, leaf)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(
                f"{folder / 'config.json'} has an impossible {name}",
                got=value,
                expected=f"a whole number from 1 to {most}",
                hint=_HINT,
            )
    text = kosmos.text_config
    if text.max_position_embeddings * text.embed_dim > _MOST_TABLE:
        raise ConfigError(
            f"{folder / 'config.json'} asks for a table of positions beyond all use",
            got=f"{text.max_position_embeddings} positions of {text.embed_dim}",
            expected=f"at most {_MOST_TABLE} numbers",
            hint=_HINT,
        )
