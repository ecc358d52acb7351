"""Reading checkpoint files: bytes to named tensors and a config, without running any code of theirs.

Pickles are read as plain data (train/plain_pickle.py) and tensors are memory-mapped: an 8 GB file costs address space, not memory.
jetvla's own small format is safetensors: adapter, head and action token, with the hash of the base that they belong to. Whatever the file
is, reading it stays within bundle/reading_limits.py. Knows nothing about what keys mean.
"""

from __future__ import annotations

import json
import os
import string
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors.torch import save
from torch import Tensor

from bundle.atomic import write_bytes
from bundle.errors import CheckpointError
from bundle.reading_limits import check_plain, check_regular_file, open_regular, parse_json
from train.peft_folder import is_peft_folder, read_adapter, rest_of
from train.plain_pickle import ForbiddenGlobalError, Foreign, TensorRef
from train.safetensors_file import read_safetensors
from train.torch_file import map_tensors, read_torch_file

SMALL_FORMAT = "jetvla-policy/1"
_RECORDED = ("base_sha256", "packing", "x_attn_causal", "prompt_template", "pad_prompt_to")
_LISTED = 12
_LONGEST_NAME = 512
_NO_TEXT = "name the checkpoint itself; its config lies beside it or goes into --config. git lfs pull gets what git keeps elsewhere."
_CUT = "copy it again and compare sizes; a disk that filled up during training leaves such files."
_LOOKED_AT = 64  # bytes at the start, which tell text from anything else


@dataclass(frozen=True)
class RawCheckpoint:
    """What a file holds, before names are interpreted.

    Attributes:
        path: the file.
        kind: `lightning`, `torch`, `jetvla`, or `peft` for its folder.
        state: raw key -> tensor, memory-mapped where the format allows.
        config: the training config found inside, or None.
        not_tensors: keys of the state dict whose values are no tensors.
        recorded: facts that only jetvla's own format records (base_sha256, packing, x_attn_causal, prompt_template, pad_prompt_to).
        adapter: peft's adapter_config.json, where the adapter is a folder of its own.
    """

    path: Path
    kind: Literal["lightning", "torch", "jetvla", "peft"]
    state: dict[str, Tensor]
    config: dict[str, Any] | None
    not_tensors: tuple[str, ...] = ()
    recorded: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None


def read_raw(path: Path) -> RawCheckpoint:
    """Read a file's tensors and config without running any code in it.

    Raises:
        CheckpointError: missing, truncated, a directory, not a checkpoint, or a pickle that wants to run code.
    """
    if is_peft_folder(path):
        adapter, tensors = read_adapter(path)
        rest = read_raw(rest_of(path))
        return replace(rest, path=path, kind="peft", state={**tensors, **rest.state}, adapter=adapter)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory", expected="one file", hint=_hint_for_folder(path))
    check_regular_file(path, error=CheckpointError)
    raw = _read_small(path) if path.suffix == ".safetensors" else _read_torch(path)
    if raw.config is not None:
        check_plain(raw.config, origin=f"the training config in {path}", error=CheckpointError)
    return raw


def _hint_for_folder(path: Path) -> str:
    """What somebody who names a folder probably means."""
    for folder in (path / "checkpoints", path):
        for name in ("last.safetensors", "last.ckpt", "policy.pt"):
            if (folder / name).is_file():
                return f"name the checkpoint in it: {folder / name}"
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        return "it holds a model without a policy: name a run's checkpoint, and this folder with --base."
    return "a DeepSpeed checkpoint is merged by its own zero_to_fp32.py: python zero_to_fp32.py DIR policy.pt"


def write_small(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], recorded: Mapping[str, str]
) -> None:
    """Write jetvla's small format atomically.

    Raises:
        StorageError: the disk is full.
    """
    metadata = small_metadata(config, recorded)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in state.items()}, metadata))


def small_metadata(config: Mapping[str, Any], recorded: Mapping[str, str]) -> dict[str, str]:
    """What stands in the header of jetvla's small format beside the tensors."""
    return {"format": SMALL_FORMAT, "config": json.dumps(config, default=str), **recorded}


def _read_small(path: Path) -> RawCheckpoint:
    metadata, state = read_safetensors(path)
    if metadata.get("format") != SMALL_FORMAT:
        raise CheckpointError(
            f"{path} is not a jetvla policy",
            got=metadata.get("format", "no format"),
            expected=SMALL_FORMAT,
            hint=f"it is a part of peft's folder: pass {path.parent}"
            if path.with_name("adapter_config.json").exists()
            else "pass the training checkpoint, or a file that jetvla saved.",
        )
    config = parse_json(metadata.get("config", ""), origin=f"the config in {path}", error=CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} is damaged", got=f"config {config!r}", expected="a JSON object", hint="copy the file again."
        )
    recorded = {key: metadata[key] for key in _RECORDED if key in metadata}
    return RawCheckpoint(path, "jetvla", state, config, recorded=recorded)


def _not_a_checkpoint(path: Path, file: BinaryIO, problem: Exception) -> CheckpointError:
    """A text was never one; what else cannot be read may have been."""
    text = ""
    with suppress(OSError):  # what cannot be read at all is no text
        text = os.pread(file.fileno(), _LOOKED_AT, 0).decode("ascii", errors="replace")
    size = path.stat().st_size
    is_text = bool(text) and all(each in string.printable for each in text)
    return CheckpointError(
        f"{path} is truncated or not a checkpoint",
        got=f"{size} bytes of text: {text.splitlines()[0]!r}..." if is_text else f"{size} bytes; {problem}",
        expected="a complete file written by torch.save or Lightning",
        hint=_NO_TEXT if is_text else _CUT,
    )


def _read_torch(path: Path) -> RawCheckpoint:
    with open_regular(path, error=CheckpointError) as file:
        try:
            found = read_torch_file(path, file)
        except ForbiddenGlobalError as error:
            raise CheckpointError(
                f"{path} wants to run code",
                got=error,
                expected="tensors and plain data",
                hint="jetvla never unpickles code; re-save with torch.save({'state_dict': model.state_dict()}, FILE).",
            ) from None
        except (ValueError, OSError, struct.error) as error:
            raise _not_a_checkpoint(path, file, error) from None
        described = _state_dict(path, found.content)
        others = tuple(name for name, value in described.items() if not isinstance(value, TensorRef))
        references = {name: value for name, value in described.items() if isinstance(value, TensorRef)}
        if not references:
            raise CheckpointError(
                f"{path} holds an empty state_dict", got=0, expected="weights", hint="the run saved nothing."
            )
        try:
            tensors = map_tensors(found, file, references)
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is damaged",
                got=error,
                expected="numbers as they were written, and tensors that lie inside them",
                hint="copy it again and compare sha256sum with where it comes from.",
            ) from None
    content = found.content
    hyper = content.get("hyper_parameters")
    config = hyper.get("configs") if isinstance(hyper, dict) else None
    kind: Literal["lightning", "torch"] = "lightning" if "pytorch-lightning_version" in content else "torch"
    return RawCheckpoint(path, kind, tensors, config if isinstance(config, dict) else None, others)


def _state_dict(path: Path, content: object) -> dict[str, object]:
    """Raw key -> description of a tensor, or what else stands there.

    Raises:
        CheckpointError: there is none, a key is no name, or a tensor is of a kind that is not read.
    """
    for key in ("state_dict", "model_state_dict"):
        state = content.get(key) if isinstance(content, dict) else None
        if isinstance(state, dict):
            break
    else:
        found = sorted(map(str, content))[:_LISTED] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no policy",
            got=found,
            expected="`state_dict` or `model_state_dict`",
            hint="pass the training checkpoint.",
        )
    odd = [name for name in state if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable()]
    if odd:
        raise CheckpointError(
            f"{path} holds keys that are no names",
            got=f"{len(odd)}: {ascii(odd[0])[:_LONGEST_NAME]}",
            expected=f"printable names of at most {_LONGEST_NAME} characters",
            hint="copy it again; torch never writes such keys.",
        )
    foreign = [f"{name} ({value.name})" for name, value in state.items() if isinstance(value, Foreign)]
    if foreign:
        more = f" and {len(foreign) - _LISTED} more" if len(foreign) > _LISTED else ""
        raise CheckpointError(
            f"{path} holds tensors of a kind that is not read",
            got=", ".join(foreign[:_LISTED]) + more,
            expected="dense tensors of floating-point numbers, with their data",
            hint="quantized, sparse and meta tensors are turned into dense ones before saving: dequantize(), to_dense(); a meta tensor has "
            "no numbers at all.",
        )
    return state
