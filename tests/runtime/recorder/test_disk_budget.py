"""The oldest go first; the current one, one that somebody writes, and what is not ours never."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest

pytest.importorskip("mcap")

from runtime.recorder.disk_budget import make_room, next_number, recording_name, recordings
from tests.recordings import drive, record


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [record(tmp_path, drive(2, time.monotonic())) for _ in range(3)]


def test_names_sort_by_number_whatever_the_clock_said(tmp_path: Path, three: list[Path]) -> None:
    # The clock was wrong, then right: the newest has the oldest date.
    late = three[0].with_name("000003-test-base-19700101-000002.mcap")
    three[2].rename(late)
    part = three[0].with_name("000001-test-base-20990101-000000.001.mcap")
    part.write_bytes(three[0].read_bytes())
    assert [stored.path for stored in recordings(tmp_path)] == [three[0], part, three[1], late]
    assert next_number(tmp_path) == 4


def test_names() -> None:
    assert recording_name(7, "omni base #2/é", "20260715-173157", 0) == "000007-omni-base-2-20260715-173157.mcap"
    assert recording_name(7, "///", "20260715-173157", 12) == "000007-robot-20260715-173157.012.mcap"
    assert recording_name(1234567, "a", "20260715-173157", 1000) == "1234567-a-20260715-173157.1000.mcap"


@pytest.mark.parametrize("robot", ["a.b", "x#1", "00-20260101-000000", "r" * 200])
def test_every_name_is_known_again(tmp_path: Path, three: list[Path], robot: str) -> None:
    path = three[0].rename(tmp_path / recording_name(42, robot, "20260715-173157", 3))
    assert [(s.number, s.part) for s in recordings(tmp_path) if s.path == path] == [(42, 3)]


def test_the_oldest_go_until_the_rest_fits(tmp_path: Path, three: list[Path]) -> None:
    sizes = [path.stat().st_size for path in three]
    assert make_room(tmp_path, None, sum(sizes)) == []
    assert make_room(tmp_path, None, sum(sizes) - 1) == [three[0]]
    assert make_room(tmp_path, None, 0) == three[1:]
    assert make_room(tmp_path, None, 0) == []


def test_the_current_stays_and_so_does_one_that_somebody_writes(tmp_path: Path, three: list[Path]) -> None:
    with three[1].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert make_room(tmp_path, three[0], 0) == [three[2]]
    assert three[0].exists()
    assert three[1].exists()


def test_what_is_not_ours_neither_counts_nor_goes(tmp_path: Path, three: list[Path]) -> None:
    foreign = tmp_path / three[0].name.replace("000001", "000000")
    foreign.write_bytes(three[0].read_bytes().replace(b"jetvla flight", b"rosbag2 light"))
    link = tmp_path / three[0].name.replace("000001", "000009")
    link.symlink_to(three[0])
    folder = tmp_path / three[0].name.replace("000001", "000008")
    folder.mkdir()
    assert [stored.path for stored in recordings(tmp_path)] == three
    assert make_room(tmp_path, None, 0) == three
    assert foreign.exists()
    assert folder.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert recordings(missing) == []
    assert next_number(missing) == 1
    assert make_room(missing, None, 0) == []
