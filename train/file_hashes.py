"""Hashes of episode files, remembered between runs: reading 500 recordings of 26-120 MB again takes minutes.

A file counts as unchanged while its path, size and modification time (in nanoseconds) are. The memory is a cache: a damaged one is
forgotten, never an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bundle.atomic import disk_errors, write_bytes
from bundle.errors import EpisodeError
from bundle.hashing import sha256_file

_NAME = "file-hashes.json"
_SAVE_EVERY = 50  # so that an interrupted first run has not read for nothing
_SHA256 = re.compile(r"[0-9a-f]{64}")


def hash_files(
    paths: Sequence[Path], cache: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[Path, str]:
    """Hex sha256 of each file.

    Args:
        cache: folder of the memory; None remembers nothing.
        progress: called with (files done, files in all).

    Raises:
        EpisodeError: a file cannot be read.
        StorageError: the memory cannot be written.
    """
    memory = {} if cache is None else _read(cache / _NAME)
    found: dict[Path, str] = {}
    unsaved = 0
    try:
        for done, path in enumerate(paths, start=1):
            key, state = _state(path)
            known = memory.get(key)
            if known is None or known[:2] != state:
                memory[key] = known = [*state, _hash(path)]
                unsaved += 1
            found[path] = str(known[2])
            if cache is not None and unsaved >= _SAVE_EVERY:
                _write(cache, memory)
                unsaved = 0
            if progress is not None:
                progress(done, len(paths))
    finally:
        if cache is not None and unsaved:
            _write(cache, memory)
    return found


def _state(path: Path) -> tuple[str, list[object]]:
    try:
        facts = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return str(path.resolve()), [facts.st_size, facts.st_mtime_ns]


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> EpisodeError:
    return EpisodeError(
        f"{path} cannot be read",
        got=error.strerror or error,
        expected="an episode file",
        hint="check that the disk with the recordings is mounted and healthy.",
    )


def _read(path: Path) -> dict[str, list[object]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: entry for key, entry in values.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    match entry:
        case [int(), int(), str(text)]:
            return _SHA256.fullmatch(text) is not None
        case _:
            return False


def _write(cache: Path, memory: dict[str, list[object]]) -> None:
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    write_bytes(cache / _NAME, json.dumps(memory, indent=0, sort_keys=True).encode())
