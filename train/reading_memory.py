"""What loading a checkpoint takes from the machine's memory, known from headers and said before it is taken.

Numbers that are fp32 in their file stay there: their pages are the kernel's, which it drops and reads again at will. Numbers of
another type are copied to fp32, merged adapters are new numbers, and those copies have to fit. A machine that lends more than it has
ends some process in the middle of its work, and not always this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bundle.errors import CheckpointError

_FLOAT = 4
_AT_ONCE = 4  # copies of one weight while its adapter is merged and compared with peft's
_SHARED_BYTES = 256 << 20
_UNLIMITED = 1 << 60  # what cgroups of version 1 call no limit
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file", "active_file")


@dataclass(frozen=True)
class ReadingNeed:
    """Bytes: `mapped` of files, which need not stay; `copied`, which must fit."""

    mapped: int
    copied: int

    def __str__(self) -> str:
        return f"{_size(self.copied)} of memory, {_size(self.mapped)} stay in their files"


def reading_need(state: Mapping[str, Tensor], merged: Iterable[str] = ()) -> ReadingNeed:
    """What a state needs as fp32.

    Args:
        state: canonical name -> tensor as it stands in its file.
        merged: names of the weights that adapters will be merged into.
    """
    own = [tensor for tensor in state.values() if tensor.dtype != torch.float32]
    weights = [_FLOAT * state[name].numel() for name in merged if name in state]
    copied = sum(_FLOAT * tensor.numel() for tensor in own) + sum(weights) + _AT_ONCE * max(weights, default=0)
    return ReadingNeed(sum(tensor.nbytes for tensor in state.values()), copied)


def check_memory(need: ReadingNeed, *, origin: str, available: int | None) -> None:
    """Refuse what the machine does not have.

    Args:
        available: bytes; None where that is not known.

    Raises:
        CheckpointError: less is available than is needed.
    """
    if available is not None and need.copied > available:
        raise CheckpointError(
            f"loading {origin} needs more memory than this machine has free",
            got=f"{_size(available)} available",
            expected=f"{_size(need.copied)} for copies in fp32, beside {_size(need.mapped)} that stay in their files",
            hint="end other programs, raise the container's memory limit, or use a larger machine; what is saved as fp32 needs no copy.",
        )


def check_shared(state: Mapping[str, Tensor], *, origin: str) -> None:
    """Refuse tensors that claim one another's numbers: together they are larger than the file, and nothing but a forgery has them.

    Args:
        state: canonical name -> tensor; names that mean the same are one by then.

    Raises:
        CheckpointError: more than a quarter of a gigabyte is claimed twice.
    """
    claimed, held, end = 0, 0, 0
    for start, length in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in state.values()):
        claimed += length
        held += max(0, start + length - max(start, end))
        end = max(end, start + length)
    if claimed - held > _SHARED_BYTES:
        raise CheckpointError(
            f"the tensors of {origin} share their numbers",
            got=f"{_size(claimed)} of tensors in {_size(held)} of numbers",
            expected="numbers of its own for each parameter",
            hint="no trainer writes that; take the file from where it was written.",
        )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be taken now without ending a process: of the machine, and of the control groups that this process is in.

    Args:
        root: of the file system that holds proc and sys.
    """
    found = [_group_free(folder, names) for folder, names in _groups(root)]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    known = [count for count in found if count is not None]
    return min(known, default=None)


def _groups(root: Path) -> Iterable[tuple[Path, tuple[str, ...]]]:
    """Folders of the process's control groups and of those around them, with the names of their files and entries."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        files = _VERSION_1 if controllers else _VERSION_2
        inner = top / name.lstrip("/")
        for folder in (inner, *inner.parents):  # a container sees its own group as the top
            if folder.is_relative_to(top):
                yield folder, files


def _group_free(folder: Path, names: tuple[str, ...]) -> int | None:
    limit, used = _number(folder / names[0]), _number(folder / names[1])
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    entries = (line.split() for line in _lines(folder / "memory.stat"))
    pages = sum(int(entry[1]) for entry in entries if entry[0] in names[2:])  # the kernel gives them back
    return max(0, limit - used + pages)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
