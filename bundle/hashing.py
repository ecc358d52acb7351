"""Content hashes of files and tensors.

sha256 because OpenSSL runs it on the CPU's own instructions (x86 SHA-NI, Armv8 crypto: 1-2 GB/s a core) and because users can
check a file with `sha256sum`. hashlib releases the interpreter lock on large buffers, so callers may hash files in threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.reading_limits import check_regular_file

_CHUNK_BYTES = 8 << 20


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read in 8 MiB pieces; `progress` gets the size of each piece.

    Raises:
        InputFileError: a pipe or a device, which never ends.
        OSError: it cannot be read.
    """
    if path.exists():
        check_regular_file(path)
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def content_files(path: Path) -> tuple[Path, ...]:
    """The file itself, or the files of a folder (not of folders in it), sorted by name."""
    return tuple(sorted(each for each in path.iterdir() if each.is_file())) if path.is_dir() else (path,)


def content_bytes(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return sum(each.stat().st_size for each in content_files(path))


def sha256_content(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file; of a folder, that of its files' names and hashes."""
    if not path.is_dir():
        return sha256_file(path, progress)
    lines = [f"{sha256_file(each, progress)}  {each.name}\n" for each in content_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_arrays(
    arrays: Iterable[tuple[str, NDArray[np.generic]]], progress: Callable[[int], None] | None = None
) -> str:
    """Hex sha256 over (name, dtype, shape, bytes) of each array, in the order given; independent of any file format."""
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if progress is not None:
            progress(array.nbytes)
    return digest.hexdigest()
