"""The external data of a stage: one file that weights stream into, one at a time, so that no second copy of them is ever in memory.

Knows what fp16 can hold and nothing about graphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from export.ops import Make

FP16_MAX = 65504.0
# Weight offsets are page-aligned so that runtimes can map them without copying.
_PAGE = 4096


@dataclass(frozen=True)
class Stored:
    """Where a weight lies in the file, and as what."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """The external data of a stage, shared by its graphs; hashed while it is written.

    A weight is made, written and dropped; asking for a name again returns where it lies. Use as a context manager.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._progress = progress
        self._stored: dict[str, Stored] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, make: Make, dtype: str) -> Stored:
        """Store a weight as `dtype` unless it is there; as float32 if it holds a value that fp16 would make infinite."""
        if name in self._stored:
            return self._stored[name]
        array = _to_array(make(), dtype)
        self._write(b"\0" * (-self.bytes % _PAGE))
        stored = Stored(str(array.dtype), tuple(array.shape), self.bytes, array.nbytes)
        self._write(array.reshape(-1).view(np.uint8).data)
        self._stored[name] = stored
        if self._progress is not None:
            self._progress(array.nbytes)
        return stored

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None, "used outside its `with` block"
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def _to_array(tensor: torch.Tensor, dtype: str) -> NDArray[np.generic]:
    if dtype == "float16" and tensor.numel() and float(tensor.abs().max()) > FP16_MAX:
        dtype = "float32"
    array: NDArray[np.generic] = tensor.to(getattr(torch, dtype)).contiguous().numpy()
    return array
