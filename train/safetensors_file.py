"""Safetensors files of others: the header within the budget, then tensors mapped by the library.

The library takes headers up to 100 MB and any number of tensors; the budget is tighter (bundle/reading_limits.py). That tensors lie inside
the file, without holes and overlaps, is its own check. The format has no checksums: a flipped byte in a weight cannot be seen.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bundle.errors import CheckpointError, InputFileError
from bundle.reading_limits import SAFETENSORS_HEADER_BYTES, TENSORS, open_regular, parse_json

_LENGTH_BYTES = 8


def read_safetensors(
    path: Path, *, error: type[CheckpointError] = CheckpointError, hint: str = "copy the file again."
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file.

    Args:
        error: what to raise.

    Raises:
        error: no regular file, damaged, or beyond the budget.
    """
    metadata = read_header(path, error=error, hint=hint).get("__metadata__", {})
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as problem:
        raise error(f"{path} is damaged", got=problem, hint=hint) from None
    return dict(metadata), tensors


def read_header(
    path: Path, *, error: type[CheckpointError] = CheckpointError, hint: str = "copy the file again."
) -> Mapping[str, Any]:
    """What stands before the numbers: a tensor's type, shape and place by its name, and `__metadata__`, which holds texts.

    Raises:
        error: as `read_safetensors`.
    """
    with open_regular(path, error=error, hint=hint) as file:
        try:
            length, size = int.from_bytes(file.read(_LENGTH_BYTES), "little"), file.seek(0, io.SEEK_END)
        except OSError as problem:  # files that the kernel makes up cannot all be read, or have no end
            raise error(f"{path} cannot be read", got=problem, hint=hint) from None
        if length > min(SAFETENSORS_HEADER_BYTES, size - _LENGTH_BYTES):
            raise error(
                f"{path} is damaged",
                got=f"a header of {length} bytes in a file of {size}",
                expected=f"at most {SAFETENSORS_HEADER_BYTES} bytes, inside the file",
                hint=hint,
            )
        file.seek(_LENGTH_BYTES)
        raw = file.read(length)
    try:
        header = parse_json(raw, origin="its header")
    except InputFileError as problem:
        raise error(
            f"{path} is damaged", got=f"{problem.what}: {problem.got}", expected=problem.expected, hint=hint
        ) from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise error(f"{path} is damaged", got="a header of another form", expected="tensors by name", hint=hint)
    if len(header) > TENSORS:
        raise error(f"{path} holds too many tensors", got=len(header), expected=f"at most {TENSORS}", hint=hint)
    result: Mapping[str, Any] = header
    return result
