"""Reading checkpoint files: bytes to named tensors and a config, without running any code of theirs.

Pickles go through torch's weights-only unpickler and are memory-mapped: an 8 GB file costs address space, not memory. jetvla's own
small format is safetensors: adapter, head and action token, with the hash of the base that they belong to. Knows nothing about
what keys mean.
"""

from __future__ import annotations

import json
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bundle.atomic import write_bytes
from bundle.errors import CheckpointError
from train.peft_folder import is_peft_folder, read_adapter, rest_of

SMALL_FORMAT = "jetvla-policy/1"
_RECORDED = ("base_sha256", "packing", "x_attn_causal", "prompt_template", "pad_prompt_to")
_LISTED = 12
# Data that Lightning and labs put beside weights; constructing them runs no code of the file's choosing.
_HARMLESS: list[Any] = [pathlib.PosixPath, pathlib.PurePosixPath]
# How torch's unpickler says that a file names code: "... GLOBAL os.system ...".
_CODE = re.compile(r"GLOBAL (\S+)")


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
        raise CheckpointError(
            f"{path} is a directory",
            expected="one file",
            hint="a DeepSpeed checkpoint is merged by its own zero_to_fp32.py: python zero_to_fp32.py DIR policy.pt",
        )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", expected="a checkpoint file", hint="correct the path.")
    if path.suffix == ".safetensors":
        return _read_small(path)
    content = _unpickle(path)
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
    others = tuple(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds an empty state_dict", got=0, expected="weights", hint="the run saved nothing."
        )
    hyper = content.get("hyper_parameters")
    config = hyper.get("configs") if isinstance(hyper, dict) else None
    kind: Literal["lightning", "torch"] = "lightning" if "pytorch-lightning_version" in content else "torch"
    return RawCheckpoint(path, kind, tensors, config if isinstance(config, dict) else None, others)


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
    return {"format": SMALL_FORMAT, "config": json.dumps(config), **recorded}


def _read_small(path: Path) -> RawCheckpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged", got=error, hint="copy the file again.") from None
    if metadata.get("format") != SMALL_FORMAT:
        raise CheckpointError(
            f"{path} is not a jetvla policy",
            got=metadata.get("format", "no format"),
            expected=SMALL_FORMAT,
            hint="pass the training checkpoint, or a file that jetvla saved.",
        )
    try:
        config = json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError) as error:
        config = error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} is damaged", got=f"config {config!r}", expected="a JSON object", hint="copy the file again."
        )
    recorded = {key: metadata[key] for key in _RECORDED if key in metadata}
    return RawCheckpoint(path, "jetvla", state, config, recorded=recorded)


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            # torch warns of pickle protocols above 2 and then refuses what it does not know.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # The error itself is advice on how to run the code after all; what happened stands in its context.
        reason = error.__context__ or error
        code = _CODE.search(str(reason))
        if code is None:
            raise _not_a_checkpoint(path, reason) from None
        raise CheckpointError(
            f"{path} wants to run code",
            got=code.group(1),
            expected="tensors and plain data",
            hint="jetvla never unpickles code; re-save with torch.save({'state_dict': model.state_dict()}, FILE).",
        ) from None
    except (
        RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, struct.error,
    ) as error:  # fmt: skip
        raise _not_a_checkpoint(path, error) from None


def _not_a_checkpoint(path: Path, error: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or not a checkpoint",
        got=f"{path.stat().st_size} bytes; {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        expected="a complete file written by torch.save or Lightning",
        hint="copy it again and compare sizes; a disk that filled up during training leaves such files.",
    )
