"""Gives back the pages of a weight file that a library mapped, copied and never looks at again.

OpenVINO maps a stage's weights, packs a copy of its own, and keeps the mapping: gigabytes of clean file pages that count as the
process's memory. They are dropped here; a page that somebody reads after all comes back from the file. Only what cannot lose anything
is touched: mappings without write permission in which no page was ever copied for writing. Knows nothing about ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_MADV_DONTNEED = 4
# 7f084a000000-7f0850000000 r--s 00000000 fe:00 2236580                    /path/of the file
_HEADER = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)")


@dataclass
class _Mapping:
    """A range of addresses that shows a file. `copied` is what lies in memory or swap only, and would be lost."""

    start: int
    length: int
    writable: bool
    resident: int = 0
    copied: int = 0


def release(path: Path) -> int:
    """Drop this process's clean pages of a file; returns the bytes that were resident.

    0 where nothing is mapped, and where the system has no /proc or madvise.
    """
    released = 0
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for mapping in _mappings(path):
            safe = not mapping.writable and not mapping.copied
            if safe and advise(mapping.start, mapping.length, _MADV_DONTNEED) == 0:
                released += mapping.resident
    return released


def _mappings(path: Path) -> list[_Mapping]:
    """This process's mappings of a file.

    Raises:
        OSError: the file or /proc/self/smaps cannot be looked at.
    """
    status = path.stat()
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    return list(_parse(_SMAPS.read_bytes(), wanted))


def _parse(smaps: bytes, wanted: tuple[int, int, int]) -> Iterator[_Mapping]:
    """The mappings of one file (major, minor, inode) in the text of smaps."""
    found: _Mapping | None = None
    for line in smaps.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            if found is not None:
                yield found
            start, end, major, minor = (int(header[group], 16) for group in (1, 2, 4, 5))
            own = (major, minor, int(header[6])) == wanted
            found = _Mapping(start, end - start, b"w" in header[3]) if own else None
        elif found is not None:
            name, _, value = line.partition(b":")
            if name == b"Rss":
                found.resident = int(value.split()[0]) * 1024
            elif name in (b"Anonymous", b"Swap"):
                found.copied += int(value.split()[0]) * 1024
    if found is not None:
        yield found
