"""What is taken is in the file, readable by programs that are not ours, and nothing that a disk does reaches the loop."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mcap")

from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from bundle.errors import RecordingError
from runtime.cameras.base import Frame
from runtime.events import Event, Note
from runtime.recorder import flight_recorder, recording_file
from runtime.recorder.event_queue import EventQueue
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.recordings import (
    decision,
    drive,
    end_of_run,
    pictures,
    published,
    record,
    run_info,
    until,
)


def messages(path: Path) -> list[tuple[str, Any]]:
    """Topic and content, by `rosbags`."""
    with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader:
        return [
            (connection.topic, reader.deserialize(raw, connection.msgtype)) for connection, _, raw in reader.messages()
        ]


def of(path: Path, topic: str) -> list[Any]:
    return [content for name, content in messages(path) if name == topic]


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (found,) = make_reader(file).iter_metadata()
    return found.metadata


def seconds(stamp: Any) -> float:
    return stamp.sec + stamp.nanosec / 1e9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """disk["error"] = errno.EIO: from then on the disk refuses."""
    state: dict[str, Any] = {"error": None, "attempts": 0}
    write = os.pwrite

    def refuse(descriptor: int, data: bytes, position: int) -> int:
        error = state["error"]  # the test may let go of it at any moment
        if error is None:
            return write(descriptor, data, position)
        state["attempts"] += 1
        write(descriptor, bytes(data[: len(data) // 2]), position)  # as a disk that fills up in the middle
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(recording_file.os, "pwrite", refuse)
    return state


def test_everything_is_there_for_programs_that_are_not_ours(tmp_path: Path) -> None:
    start = time.monotonic()
    events = [*drive(4, start), Note(start + 1, "camera", "lost"), end_of_run(start + 2)]
    path = record(tmp_path, events)

    assert path.name.startswith("000001-test-base-")
    counts: dict[str, int] = {}
    for topic, _ in messages(path):
        counts[topic] = counts.get(topic, 0) + 1
    assert counts == {
        "/camera/image/compressed": 4,
        "/policy/decision": 4,
        "/cmd_vel": 13,
        "/safety": 13,
        "/notes": 1,
    }

    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True, decoder_factories=[DecoderFactory()])
        assert sum(1 for _ in reader.iter_decoded_messages()) == 35
        summary = reader.get_summary()
    assert summary is not None
    assert {channel.topic for channel in summary.channels.values()} == set(counts)
    assert {schema.encoding for schema in summary.schemas.values()} == {"ros2msg"}


def test_the_numbers(tmp_path: Path) -> None:
    start = time.monotonic()
    frame = Frame(pictures(1)[0], start - 0.5)
    path = record(
        tmp_path,
        [
            decision(7, frame, [[0.25, -0.5], [1, 2]], "geh links \u2190"),
            published(start, 0.1, -0.2, level="slow", reasons=("late", "old frame"), wanted={"linear_x": 0.3}),
            end_of_run(start + 0.1),
            Note(start + 0.2, "fault", "a line"),
        ],
    )
    told = of(path, "/policy/decision")[0]
    assert (told.number, told.instruction, told.missed, told.pictured) == (7, "geh links \u2190", False, True)
    assert (told.names, told.units, told.steps) == (["linear_x", "linear_y"], ["m/s", "m/s"], 2)
    np.testing.assert_array_equal(told.values, np.float32([0.25, -0.5, 1, 2]))
    assert (told.timing_names, list(told.timing_ms)) == (["vision", "total"], [1.25, 2.5])
    assert seconds(told.finished) - seconds(told.started) == pytest.approx(0.02, abs=1e-6)

    image = of(path, "/camera/image/compressed")[0]
    assert (image.format, bytes(image.data[:2])) == ("jpeg", b"\xff\xd8")
    assert seconds(image.header.stamp) == seconds(told.picture) == seconds(told.started)

    command, last = of(path, "/cmd_vel")
    assert (command.twist.linear.x, command.twist.linear.y) == (0.1, -0.2)
    assert last.twist.linear.x == 0
    assert seconds(command.header.stamp) == pytest.approx(time.time() - time.monotonic() + start, abs=5)

    safety, ended = of(path, "/safety")
    assert (safety.level, safety.reasons, safety.wanted.linear.x) == ("slow", ["late", "old frame"], 0.3)
    assert math.isnan(safety.wanted.linear.y)
    assert (safety.frame_age_s, ended.frame_age_s) == (0.01, math.inf)

    note = of(path, "/notes")[0]
    assert (note.name, note.msg, note.level) == ("fault", "a line", 30)


def test_what_the_file_says_about_its_run(tmp_path: Path) -> None:
    said = metadata(record(tmp_path, drive(1, time.monotonic())))
    assert said["robot"] == "test-base"
    assert said["manifest_sha256"] == "ab" * 32
    assert json.loads(said["action_names"]) == ["linear_x", "linear_y"]
    assert json.loads(said["settings"])["robot"]["axes"]["linear_y"]["invert"] is True
    assert "wall clock read once" in said["clock"]
    assert {"version_jetvla", "version_mcap", "run", "part", "jpeg_quality"} <= said.keys()


def test_a_clock_that_jumps_does_not_fold_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)))
    recorder.start(run_info())
    recorder.take(published(start, 0, 0))
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    monkeypatch.setattr(time, "time", lambda: 1e-9)
    recorder.take(published(start + 1, 0, 0))
    recorder.close()
    (path,) = tmp_path.glob("*.mcap")
    first, second = (seconds(command.header.stamp) for command in of(path, "/cmd_vel"))
    assert second - first == pytest.approx(1, abs=1e-6)


def test_a_picture_that_two_decisions_share_is_stored_once(tmp_path: Path) -> None:
    start = time.monotonic()
    frame = Frame(pictures(1)[0], start)
    other = Frame(pictures(1, seed=1)[0], start)  # another picture, of the same time
    path = record(tmp_path, [decision(number, shown, [[0, 0]]) for number, shown in enumerate((frame, frame, other))])
    assert len(of(path, "/camera/image/compressed")) == 2
    a, b, c = ((told.picture.sec, told.picture.nanosec) for told in of(path, "/policy/decision"))
    assert a == b != c


def test_two_runs_get_two_numbers(tmp_path: Path) -> None:
    first, second = (record(tmp_path, drive(1, time.monotonic())) for _ in range(2))
    assert (first.name[:6], second.name[:6]) == ("000001", "000002")
    assert metadata(first)["run"] != metadata(second)["run"]


def test_a_full_file_is_followed_by_the_next(tmp_path: Path) -> None:
    lines: list[str] = []
    recorder = FlightRecorder(
        Recorder(folder=str(tmp_path), max_file_mb=0.03, max_total_gb=1), on_problem=lines.append, sync_s=0.0
    )
    recorder.start(run_info())
    start = time.monotonic()
    shared = Frame(pictures(1)[0], start)
    for index, event in enumerate(drive(80, start)):
        recorder.take(event)
        if index % 4 == 0:
            recorder.take(decision(1000 + index, shared, [[0, 0]]))
            until(lambda: len(recorder._queue) < 20)
    recorder.close()
    paths = sorted(tmp_path.glob("*.mcap"), key=lambda path: int(metadata(path)["part"]))
    assert len(paths) >= 3
    assert not lines
    total = 0
    for number, path in enumerate(paths):
        assert metadata(path)["part"] == str(number)
        assert path.name.endswith(f".{number:03d}.mcap" if number else ".mcap")
        stamps = {seconds(image.header.stamp) for image in of(path, "/camera/image/compressed")}
        told = of(path, "/policy/decision")
        # Every file has the pictures that its decisions name, also those that an earlier file has.
        assert {seconds(one.picture) for one in told} == stamps
        total += len(told)
    assert total == 160


def test_the_folder_stays_within_its_share_and_nothing_else_is_touched(tmp_path: Path) -> None:
    old = [record(tmp_path, drive(8, time.monotonic(), height=96, width=128)) for _ in range(4)]
    foreign = [tmp_path / "notes.txt", tmp_path / "holiday.mcap", tmp_path / "000000-my-bag-20260101-000000.mcap"]
    for path in foreign:
        path.write_bytes(b"x" * 50_000)
    size = old[0].stat().st_size
    limit = 6 * size
    recorder = FlightRecorder(Recorder(folder=str(tmp_path), max_total_gb=limit / 1e9, max_file_mb=1e4), sync_s=0.0)
    recorder.start(run_info())
    for event in drive(40, time.monotonic(), height=96, width=128, seed=3):
        recorder.take(event)
        until(lambda: len(recorder._queue) < 20)
        current = recorder.status.file
        ours = [path for path in tmp_path.glob("*.mcap") if path not in foreign]
        assert sum(path.stat().st_size for path in ours if path.exists()) <= limit * 1.05
        assert current is None or current.exists()
    recorder.close()
    assert all(path.exists() for path in foreign)
    assert not old[0].exists()
    kept = [path.exists() for path in old]
    assert kept == sorted(kept)  # the oldest went first


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_told_once_and_tried_again(tmp_path: Path, disk: dict[str, Any], error: int) -> None:
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append, sync_s=0.02, retry_s=0.05)
    recorder.start(run_info())
    start = time.monotonic()
    before, during, after = drive(3, start), drive(3, start + 1, first=3), drive(3, start + 2, first=6)
    for event in before:
        recorder.take(event)
    until(lambda: recorder.status.confirmed > 0 and len(recorder._queue) == 0)
    until(lambda: _settled(recorder) and _on_disk(tmp_path) == recorder.status.confirmed)
    disk["error"] = error
    for event in during:
        recorder.take(event)
    until(lambda: recorder.status.trouble and disk["attempts"] > 3 and len(recorder._queue) == 0)
    assert recorder.status.file is None
    assert os.strerror(error) in recorder.status.trouble
    disk["error"] = None
    until(lambda: recorder.status.file is not None)
    for event in after:
        recorder.take(event)
    recorder.close()

    assert len(lines) == 2, lines
    assert lines[0].startswith(f"recorder: recording stopped: {os.strerror(error)}")
    assert "driving goes on" in lines[0]
    assert "recording goes on in" in lines[1]
    lost = recorder.status.lost
    told = []
    for path in sorted(tmp_path.glob("*.mcap"), key=lambda path: int(metadata(path)["part"])):
        told += [one.number for one in of(path, "/policy/decision")]  # the broken file was repaired
    assert sorted({*told}) == told
    assert set(told) >= {0, 1, 2, 6, 7, 8}
    assert len(told) + lost.decisions == 9
    assert f"{lost}" in lines[1]


def _settled(recorder: FlightRecorder) -> bool:
    """Nothing has been confirmed for many times as long as a sync takes: what left the queue is on the disk, all of it."""
    before = recorder.status.confirmed
    time.sleep(0.4)
    return recorder.status.confirmed == before and len(recorder._queue) == 0


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mcap"))


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path: Path) -> None:
    in_the_way = tmp_path / "recordings"
    in_the_way.write_text("a file")
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(in_the_way)), on_problem=lines.append, retry_s=0.05)
    recorder.start(run_info())
    recorder.take(published(time.monotonic(), 0, 0))
    until(lambda: lines and recorder.status.lost.commands == 1)
    in_the_way.unlink()
    until(lambda: recorder.status.file is not None)
    recorder.take(published(time.monotonic(), 0.1, 0))
    recorder.close()
    (path,) = in_the_way.glob("*.mcap")
    assert [command.twist.linear.x for command in of(path, "/cmd_vel")] == [0.1]
    assert "not recorded meanwhile: 1 commands" in of(path, "/notes")[0].msg


def test_a_disk_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, released = threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        hanging.set()
        assert released.wait(60)

    monkeypatch.setattr(recording_file.os, "fdatasync", hang)
    monkeypatch.setattr(flight_recorder, "_CLOSE_S", 0.1)
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append)
    recorder.start(run_info())
    assert hanging.wait(60)
    costs = []
    frame = Frame(np.zeros((720, 1280, 3), np.uint8), time.monotonic())
    events: list[Event] = [decision(0, frame, [[0, 0]]), published(time.monotonic(), 0, 0)]
    for number in range(2000):
        begin = time.perf_counter()
        recorder.take(events[number % 2])
        costs.append(time.perf_counter() - begin)
    recorder.close()
    assert np.median(costs) < 1e-3  # microseconds; but not on every machine
    assert len(recorder._queue) <= 2000
    assert "the disk does not answer" in lines[0]
    released.set()
    assert recorder._thread is not None
    recorder._thread.join(60)
    assert not recorder._thread.is_alive()


def test_nonsense_is_told_and_costs_itself_only(tmp_path: Path) -> None:
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append)
    recorder.start(run_info())
    start = time.monotonic()
    bad: list[Any] = [
        published(math.nan, 0, 0),
        decision(0, Frame(np.zeros((4, 4), np.uint8), start), [[0, 0]]),  # type: ignore[arg-type]
        decision(1, Frame(pictures(1)[0], start), [[0, 0, 0]]),
        None,
        Note(start, 5, "text"),  # type: ignore[arg-type]
    ]
    for event in bad:
        recorder.take(event)
    recorder.take(published(start, 0.5, 0))
    recorder.close()
    (path,) = tmp_path.glob("*.mcap")
    assert [command.twist.linear.x for command in of(path, "/cmd_vel")] == [0.5]
    assert any("an event could not be recorded: ValueError" in line for line in lines)
    assert all("could not be recorded" in line or "not recorded: " in line for line in lines)
    assert recorder.status.lost.commands == 1
    assert recorder.status.lost.decisions == 2


def test_a_listener_of_ours_that_fails_ends_nothing(tmp_path: Path) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=fail)
    recorder.start(run_info())
    recorder.take(published(math.inf, 0, 0))
    recorder.take(published(time.monotonic(), 0.5, 0))
    recorder.close()
    (path,) = tmp_path.glob("*.mcap")
    assert len(of(path, "/cmd_vel")) == 1


def test_numbers_that_are_not_finite_are_recorded_as_they_were(tmp_path: Path) -> None:
    path = record(tmp_path, [decision(0, Frame(pictures(1)[0], time.monotonic()), [[math.nan, math.inf]])])
    values = of(path, "/policy/decision")[0].values
    assert math.isnan(values[0])
    assert values[1] == math.inf


def test_closing_and_starting_twice_and_never(tmp_path: Path) -> None:
    idle = FlightRecorder(Recorder(folder=str(tmp_path)))
    idle.close()
    idle.start(run_info())  # too late
    idle.take(published(0.0, 0, 0))
    assert list(tmp_path.iterdir()) == []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)))
    recorder.start(run_info())
    recorder.start(run_info())
    recorder.take(published(time.monotonic(), 0, 0))
    recorder.close()
    recorder.close()
    recorder.take(published(time.monotonic(), 0, 0))
    (path,) = tmp_path.glob("*.mcap")
    assert len(of(path, "/cmd_vel")) == 1
    assert recorder.status.file is None
    assert recorder.status.confirmed == path.stat().st_size


def test_the_library_is_absent_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mcap.writer

    monkeypatch.delattr(mcap.writer.Writer, "flush")
    with pytest.raises(RecordingError, match=r"(?s)before 1\.5.*hint: pip install --upgrade 'jetvla\[record\]'"):
        FlightRecorder(Recorder(folder=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "mcap.writer", None)
    with pytest.raises(RecordingError, match=r"(?s)needs the mcap library.*hint: pip install 'jetvla\[record\]'"):
        FlightRecorder(Recorder(folder=str(tmp_path)))


def test_losses_are_not_told_all_the_time(tmp_path: Path) -> None:
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append, sync_s=0.0)
    recorder.start(run_info())
    for _ in range(20):
        recorder.take(published(math.nan, 0, 0))
        until(lambda: len(recorder._queue) == 0)
    recorder.close()
    assert recorder.status.lost.commands == 20
    assert len(lines) <= 3  # what it is, the first, and the sum at the end
    (path,) = tmp_path.glob("*.mcap")
    assert [f"recorder: {note.msg}" for note in of(path, "/notes")] == lines


def test_an_error_of_the_recorder_itself_is_told_and_ends_only_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append)
    monkeypatch.setattr(recording_file.RecordingFile, "add", lambda *_: 1 / 0)
    recorder.start(run_info())
    recorder.take(published(time.monotonic(), 0, 0))
    until(lambda: lines)
    assert lines[0] == "recorder: recording ended for good: ZeroDivisionError: division by zero; driving goes on"
    recorder.take(published(time.monotonic(), 0, 0))
    recorder.close()
    assert "ZeroDivisionError" in recorder.status.trouble


def test_a_decision_whose_picture_was_left_out_names_no_other_picture(tmp_path: Path) -> None:
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)))
    recorder._queue = EventQueue(pictures=1)
    start = time.monotonic()
    frames = [Frame(pixels, start + number) for number, pixels in enumerate(pictures(3))]
    for number, frame in enumerate(frames):  # all wait for the start
        recorder.take(decision(number, frame, [[0, 0]]))
    recorder.start(run_info())
    until(lambda: len(recorder._queue) == 0)
    recorder.take(decision(3, frames[2], [[0, 0]]))  # now there is room for it
    recorder.close()
    (path,) = tmp_path.glob("*.mcap")
    told = of(path, "/policy/decision")
    assert [one.pictured for one in told] == [True, False, False, True]
    assert [round(seconds(one.picture) - seconds(told[0].picture), 3) for one in told] == [0, 1, 2, 2]
    stamps = [seconds(image.header.stamp) for image in of(path, "/camera/image/compressed")]
    assert stamps == [seconds(told[0].picture), seconds(told[3].picture)]
    assert recorder.status.lost.pictures == 2
    assert any("not recorded: 2 pictures" in note.msg for note in of(path, "/notes"))
