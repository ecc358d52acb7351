"""Pages of a mapped file are given back, and nothing is lost."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from runtime.backends import mapped_weights
from runtime.backends.mapped_weights import release

SIZE = 8 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "with a space.onnx.data"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def resident(path: Path) -> int:
    return sum(mapping.resident for mapping in mapped_weights._mappings(path))


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_pages_are_given_back_and_come_back(file: Path, flags: int) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapping:
        before = mapping[:]
        assert resident(file) == SIZE
        assert release(file) == SIZE
        assert resident(file) == 0
        assert mapping[:] == before == file.read_bytes()
        assert resident(file) == SIZE


def test_of_a_memmap_too(file: Path) -> None:
    array = np.memmap(file, np.uint8, "r")
    total = int(array.sum(dtype=np.int64))
    assert release(file) == SIZE
    assert resident(file) == 0
    assert int(array.sum(dtype=np.int64)) == total


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_may_be_written_is_left_alone(file: Path, mode: str) -> None:
    array = np.memmap(file, np.uint8, mode)  # type: ignore[call-overload]
    array[:] = 7
    assert release(file) == 0
    assert resident(file) == SIZE
    assert (array == 7).all()


def test_what_was_written_is_left_alone(file: Path) -> None:
    """A private copy of a page is lost for good, also where nobody may write to it any more."""
    smaps = (
        b"7f0000000000-7f0000002000 r--p 00000000 fe:00 5    /a\nRss:     8 kB\nAnonymous:   4 kB\nSwap:  0 kB\n"
        b"7f0000003000-7f0000004000 r--p 00000000 fe:00 5    /a\nRss:     0 kB\nAnonymous:   0 kB\nSwap:  4 kB\n"
        b"7f0000005000-7f0000006000 r--s 00000000 fe:00 6    /b\nRss:     4 kB\nAnonymous:   0 kB\n"
        b"7f0000007000-7f0000008000 rw-p 00000000 00:00 0 \nRss:     4 kB\nAnonymous:   4 kB\n"
    )
    first, second = mapped_weights._parse(smaps, (0xFE, 0, 5))
    assert (first.start, first.length, first.resident, first.copied) == (0x7F0000000000, 0x2000, 8192, 4096)
    assert (second.resident, second.copied) == (0, 4096)


def test_where_there_is_nothing_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert release(file) == 0  # not mapped
    assert release(file.with_name("absent")) == 0
    monkeypatch.setattr(mapped_weights, "_SMAPS", Path("/proc/absent"))
    array = np.memmap(file, np.uint8, "r")
    array.sum()
    assert release(file) == 0
