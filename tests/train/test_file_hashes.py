"""Hashes are remembered while a file is the same, and a damaged memory is no obstacle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from bundle.errors import EpisodeError, StorageError
from train import file_hashes
from train.file_hashes import hash_files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read."""
    calls: list[Path] = []
    real = file_hashes.sha256_file
    monkeypatch.setattr(file_hashes, "sha256_file", lambda path: (calls.append(path), real(path))[1])
    return calls


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(files: list[Path], counted: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    expected = {path: sha256(path) for path in files}
    assert hash_files(files, tmp_path / "cache", lambda *done: seen.append(done)) == expected
    assert hash_files(files, tmp_path / "cache") == expected
    assert counted == files
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_read_again(files: list[Path], counted: list[Path], tmp_path: Path, change: str) -> None:
    hash_files(files, tmp_path / "cache")
    before = files[0].stat()
    files[0].write_bytes(b"other" if change == "time" else b"longer than before")
    times = before.st_mtime_ns if change == "size" else before.st_mtime_ns + 1
    os.utime(files[0], ns=(times, times))
    assert hash_files(files, tmp_path / "cache")[files[0]] == sha256(files[0])
    assert counted == [*files, files[0]]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"PATH": 3}', '{"PATH": ["a", 1, "x"]}', '{"PATH": [4, 1, "zz"]}', b"\xff\xfe"],
)
def test_a_damaged_memory_is_forgotten(files: list[Path], tmp_path: Path, content: str | bytes) -> None:
    memory = tmp_path / "cache" / "file-hashes.json"
    memory.parent.mkdir()
    text = content if isinstance(content, bytes) else content.replace("PATH", str(files[0])).encode()
    memory.write_bytes(text)
    assert hash_files(files, tmp_path / "cache")[files[0]] == sha256(files[0])
    assert json.loads(memory.read_text())[str(files[0].resolve())][2] == sha256(files[0])


def test_what_was_hashed_before_a_failure_is_remembered(files: list[Path], counted: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"missing\.h5 cannot be read"):
        hash_files([*files, tmp_path / "missing.h5"], tmp_path / "cache")
    hash_files(files, tmp_path / "cache")
    assert counted == files


def test_no_memory_without_a_folder(files: list[Path], counted: list[Path], tmp_path: Path) -> None:
    hash_files(files)
    hash_files(files)
    assert counted == files * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_a_folder_that_cannot_be_written(files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError(f"cannot write {path}", hint="free some space.")

    monkeypatch.setattr(file_hashes, "write_bytes", refuse)
    with pytest.raises(StorageError):
        hash_files(files, tmp_path / "cache")
