"""Writes an HDF5 file that appears under its name complete or not at all, even on a full disk or when killed.

The file grows as a hidden `.NAME.*.partial` sibling (same file system, and not matched by `*.h5`), is fsynced and
then renamed.

libhdf5 cannot be trusted with a full disk: when the flush at its close fails, it keeps a half-closed file and crashes
the whole process at the next touch (https://github.com/h5py/h5py/issues/914). So it never sees the failure here: it
writes into a `_Sink`, which keeps what the disk refuses in memory until HDF5 has closed in peace; then StorageError
is raised and the partial file removed.

Knows nothing about episodes.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from bundle.errors import StorageError


@dataclass(frozen=True)
class Draft:
    """A file that is being written. `file` is the h5py file; `check` tells early that the disk refuses."""

    path: Path
    file: h5py.File
    _sink: _Sink = field(repr=False)

    def check(self) -> None:
        """Raise StorageError if a write has failed. Call it after each large write: refused data piles up in memory."""
        self._sink.check(self.path)


@contextmanager
def atomic_hdf5(path: Path) -> Iterator[Draft]:
    """Write `path` in the block; it replaces an older file of that name when the block ends without an exception.

    Raises:
        StorageError: the disk is full, or the folder cannot be written. Exceptions of the block pass through unchanged.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _storage_error(path, error) from error
    try:
        try:
            sink = _Sink(descriptor)
            with h5py.File(sink, "w") as file:
                yield Draft(path, file, sink)
            sink.check(path)
            with _naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _naming(path):
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    # The file is complete by now; a network file system that cannot sync folders must not turn that into a failure.
    with suppress(OSError):
        _fsync_folder(path.parent)


class _Sink:
    """The file-like object under HDF5: never fails to write; keeps the first error and what was not written since."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self._refused: list[tuple[int, bytes]] = []
        self._error: BaseException | None = None

    def check(self, path: Path) -> None:
        if isinstance(self._error, OSError):
            raise _storage_error(path, self._error) from self._error
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        block = bytes(data)
        start, self._position = self._position, self._position + len(block)
        if self._error is None:
            try:
                self._write_all(start, block)
                return len(block)
            except BaseException as error:  # also a Ctrl-C that lands here: HDF5 would crash on it as on a full disk
                self._error = error
        self._refused.append((start, block))
        return len(block)

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + len(target)
        stored = os.pread(self._descriptor, len(target), start)
        target[:] = stored + bytes(len(target) - len(stored))
        for offset, block in self._refused:
            low, high = max(offset, start), min(offset + len(block), stop)
            if low < high:
                target[low - start : high - start] = block[low - offset : high - offset]
        self._position = stop
        return len(target)

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = os.fstat(self._descriptor).st_size
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int) -> int:
        if self._error is None:
            try:
                os.ftruncate(self._descriptor, size)
            except BaseException as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Nothing is buffered here; durability comes from the fsync at the end."""

    def _write_all(self, start: int, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            written = os.pwrite(self._descriptor, rest, start)
            start, rest = start + written, rest[written:]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    hints = {
        errno.ENOSPC: "free some space on that disk, or write to another one.",
        errno.EDQUOT: "your quota is used up: delete files, or write to another disk.",
        errno.EFBIG: "the file system or the process (ulimit -f) limits the size of a file.",
        errno.ENOENT: f"create the folder first: mkdir -p {path.parent}",
        errno.EROFS: "the disk is mounted read-only; remount it, or write to another one.",
    }
    return StorageError(
        f"{path} could not be written; no file was left under that name that was not there before",
        got=f"{type(error).__name__}: {error.strerror or error}",
        expected="a folder that may be written, with room for the whole file",
        hint=hints.get(error.errno or 0, "check that the folder exists and that you may write to it."),
    )


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
