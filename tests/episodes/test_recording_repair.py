"""Whatever a crash leaves becomes a file that other programs find whole, and nothing good is cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("mcap")

from mcap.reader import make_reader
from mcap.stream_reader import StreamReader
from rosbags.rosbag2 import Reader

from bundle.errors import RecordingError, StorageError
from episodes import recording_repair
from episodes.recording_repair import is_finished, repair
from episodes.recording_scan import scan
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.recordings import cut_off, drive, end_of_run, run_info


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A finished recording of several chunks."""
    folder = tmp_path_factory.mktemp("whole")
    recorder = FlightRecorder(Recorder(folder=str(folder)), sync_s=0.0)
    recorder.start(run_info())
    for event in [*drive(4, 1000.0), end_of_run(1001.0)]:
        recorder.take(event)
    recorder.close()
    (path,) = folder.glob("*.mcap")
    assert len(scan(path).chunks) > 5
    return path.read_bytes()


def contents(path: Path) -> list[tuple[str, int, bytes]]:
    """All messages, by the mcap library, which checks every checksum."""
    with path.open("rb") as file:
        for _ in StreamReader(file, validate_crcs=True).records:
            pass
        file.seek(0)
        reader = make_reader(file, validate_crcs=True)
        found = [(channel.topic, message.log_time, message.data) for _, channel, message in reader.iter_messages()]
        summary = reader.get_summary()
        assert [one.name for one in reader.iter_metadata()] == ["jetvla"]
    assert summary is not None
    assert summary.statistics is not None
    assert summary.statistics.message_count == len(found)
    with Reader(path) as bag:
        assert bag.message_count == len(found)
        assert sorted((connection.topic, at, bytes(data)) for connection, at, data in bag.messages()) == sorted(found)
    return found


def test_without_its_end_everything_is_kept(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(whole)
    expected = contents(path)
    cut_off(path)
    assert not is_finished(path)
    assert repair(path)
    assert is_finished(path)
    assert contents(path) == expected
    assert not repair(path)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_anywhere(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(whole)
    everything = contents(path)
    places = [chunk.start + chunk.length for chunk in scan(path).chunks]
    first = scan(path).metadata_places[0]
    length = data.draw(st.integers(first[1] + first[2], len(whole) - 1))
    tail = data.draw(st.sampled_from([b"", bytes(700), b"\6\xff\0\0\0\0\0\0\0" + bytes(20), b"\xff" * 50]))
    path.write_bytes(whole[:length] + tail)
    assert repair(path)
    kept = contents(path)
    assert set(kept) <= set(everything)
    # Every chunk that was there to its last byte is still there, also where its indexes were torn.
    complete = sum(place <= length for place in places)
    assert len(scan(path).chunks) == complete
    assert not repair(path)


def test_a_repair_that_is_killed_can_be_repeated(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(whole)
    expected = contents(path)
    cut_off(path)
    length = path.stat().st_size
    repair(path)
    for size in range(length, path.stat().st_size, 97):
        os.truncate(path, size)
        assert repair(path)
        assert contents(path) == expected


def test_nothing_but_a_header(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(whole)
    first = scan(path).metadata_places[0]
    os.truncate(path, first[1] + first[2])
    assert repair(path)
    assert contents(path) == []


def test_a_full_disk_leaves_the_file_as_readable_as_it_was(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(whole)
    cut_off(path)
    messages = len(scan(path).messages)

    def refuse(descriptor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recording_repair.os, "fsync", refuse)
        with pytest.raises(StorageError, match="No space left"):
            repair(path)
    assert len(scan(path).messages) == messages
    repair(path)
    assert len(contents(path)) == messages


def test_what_cannot_be_repaired(whole: bytes, tmp_path: Path) -> None:
    text = tmp_path / "text.mcap"
    text.write_text("a text")
    with pytest.raises(RecordingError, match="is no MCAP file"):
        repair(text)
    assert text.read_text() == "a text"
    with pytest.raises(RecordingError, match="there is no"):
        repair(tmp_path / "missing.mcap")
    foreign = tmp_path / "foreign.mcap"
    foreign.write_bytes(whole[:-50].replace(b"\6\0\0\0jetvla", b"\6\0\0\0others"))
    with pytest.raises(RecordingError, match="is no flight recording"):
        repair(foreign)
    assert foreign.stat().st_size == len(whole) - 50
    damaged = bytearray(whole)
    damaged[5000] ^= 1
    path = tmp_path / "damaged.mcap"
    path.write_bytes(damaged)
    with pytest.raises(RecordingError, match="is damaged at byte"):
        repair(path)
    assert path.read_bytes() == damaged
