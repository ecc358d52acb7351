"""A flight recording opens as an episode: its pictures, its actions in the policy's numbers, cut where they do not belong together."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("mcap")
pytest.importorskip("h5py")

from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer

from bundle.errors import EpisodeError, RecordingError
from episodes.reader import EpisodeWarning, open_episode
from episodes.recording import open_recording, recording_names, split_recording
from episodes.recording_events import read_run
from runtime.cameras.base import Frame
from runtime.events import Decision, Event, Note
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.recordings import (
    GO_LEFT,
    GO_RIGHT,
    PERIOD_S,
    cut_off,
    decision,
    drive,
    end_of_run,
    pictures,
    published,
    record,
    run_info,
    until,
)

START_S = 1000.0


def decided(events: list[Event]) -> NDArray[np.float32]:
    return np.array([event.values[0] for event in events if isinstance(event, Decision)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six decisions, one instruction. Not to be changed."""
    return record(tmp_path_factory.mktemp("plain"), [*drive(6, START_S), end_of_run(START_S + 6 * PERIOD_S)])


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.mcap"
    path.write_bytes(plain.read_bytes())
    return path


def test_as_an_episode(plain: Path) -> None:
    events = drive(6, START_S)
    with open_episode(plain) as episode:
        assert (episode.schema, episode.path, len(episode)) == ("recording", Path(f"{plain}#0"), 6)
        assert (episode.instruction, episode.instruction_source) == (GO_LEFT, "stored")
        assert episode.action_names == ("linear_x", "linear_y")
        assert episode.actions.dtype == np.float32
        np.testing.assert_allclose(episode.actions, decided(events), atol=1e-6)
        assert episode.fps == pytest.approx(1 / PERIOD_S)
        assert (episode.event_types, episode.action_classes) == (None, None)
        assert episode.attributes["robot"] == "test-base"
        assert episode.attributes["actions"] == "published"
        for frame, pixels in zip(episode.frames(), pictures(6), strict=True):
            assert (frame.shape, frame.dtype) == (pixels.shape, np.uint8)
            assert np.abs(frame.astype(int) - pixels).mean() < 4
        jpeg = episode.jpeg(2)
        assert jpeg is not None
        assert jpeg[:2] == b"\xff\xd8"
        with pytest.raises(IndexError):
            episode.frame(6)
    with pytest.raises(ValueError, match="is closed"):
        episode.frame(0)
    with pytest.raises(ValueError, match="is closed"):
        episode.jpeg(0)


@pytest.mark.parametrize("name", ["run.mcap", "run.mcap#0", "RUN.MCAP", "RUN.MCAP#0"])
def test_names(plain: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name.partition("#")[0]).write_bytes(plain.read_bytes())
    with open_episode(tmp_path / name) as episode:
        assert len(episode) == 6


def test_split_recording(tmp_path: Path) -> None:
    assert split_recording(Path("a/run.mcap#12")) == (Path("a/run.mcap"), 12)
    assert split_recording(Path("a/run.mcap")) == (Path("a/run.mcap"), None)
    assert split_recording(Path("a/run.h5")) is None
    assert split_recording(Path("a/run.mcap#x")) is None
    odd = tmp_path / "run.mcap#1"
    odd.write_text("a file of that name")
    assert split_recording(odd) is None


def test_what_was_published_is_not_what_was_decided(tmp_path: Path) -> None:
    events = drive(5, START_S)
    # Safety let a third of it through.
    sent = [
        replace(event, twist=replace(event.twist, linear_x=event.twist.linear_x / 3))
        if not isinstance(event, Decision)
        else event
        for event in events
    ]
    path = record(tmp_path, sent)
    expected = decided(events)
    with open_recording(path, actions="decided") as episode:
        np.testing.assert_array_equal(episode.actions, expected)
        assert episode.attributes["actions"] == "decided"
    with open_recording(path) as episode:
        np.testing.assert_allclose(episode.actions, expected * np.float32([1 / 3, 1]), atol=1e-6)


def test_the_last_command_before_the_next_decision_counts(tmp_path: Path) -> None:
    frames = [Frame(pixels, START_S + index * PERIOD_S) for index, pixels in enumerate(pictures(3))]
    path = record(
        tmp_path,
        [
            decision(0, frames[0], [[9, 9]]),  # before anything was sent
            decision(1, frames[1], [[9, 9]]),
            published(START_S + PERIOD_S + 0.05, 0.1, 0.0),
            published(START_S + PERIOD_S + 0.10, 0.2, -0.1),
            published(START_S + 2 * PERIOD_S + 0.01, 0.3, 0.0),  # the third has begun, but is not there yet
            decision(2, frames[2], [[9, 9]]),
            published(START_S + 2 * PERIOD_S + 0.05, 0.4, 0.1),
            end_of_run(START_S + 2 * PERIOD_S + 0.06),  # comes from nobody's decision
            published(START_S + 9, 0.4, 0.4),
        ],
    )
    with open_recording(path) as episode:
        np.testing.assert_allclose(episode.actions, [[0, 0], [0.6, 0], [0.8, -0.2]], atol=1e-6)
        assert not np.signbit(episode.actions[0]).any()


def test_a_robot_that_was_stopped_did_not_move(tmp_path: Path) -> None:
    path = record(tmp_path, [decision(0, Frame(pictures(1)[0], START_S), [[1, 1]]), end_of_run(START_S + 0.1)])
    with open_recording(path) as episode:
        np.testing.assert_array_equal(episode.actions, [[0, 0]])
        assert episode.fps is None


@pytest.mark.parametrize(
    "robot",
    [
        None,
        {},
        {"axes": {}},
        {"axes": {"linear_x": {"field": "linear_x", "gain": 0, "invert": False}}},
        {"axes": {"linear_x": {"field": "sideways", "gain": 1, "invert": False}}},
        {"axes": {"linear_x": {"field": "linear_x", "gain": "much", "invert": False}}},
        {"axes": {name: {"field": "linear_x", "gain": 1, "invert": False} for name in ("linear_x", "linear_y")}},
        {"axes": [1]},
        [],
    ],
)
def test_settings_that_do_not_tell_the_axes(tmp_path: Path, robot: object) -> None:
    path = record(tmp_path, drive(2, START_S), info=run_info(settings=json.dumps({"robot": robot})))
    with pytest.raises(
        RecordingError, match=r'(?s)does not tell how linear_x became a velocity.*hint: .*actions="decided"'
    ):
        open_episode(path)
    open_recording(path, actions="decided").close()


@pytest.mark.parametrize("settings", ["", "{", "[]", "null", "{}"])
def test_settings_that_are_none(tmp_path: Path, settings: str) -> None:
    path = record(tmp_path, drive(2, START_S), info=run_info(settings=settings))
    with pytest.raises(RecordingError, match="does not tell how"):
        open_episode(path)


def test_a_decision_that_is_not_finite(tmp_path: Path) -> None:
    frame = Frame(pictures(1)[0], START_S)
    path = record(tmp_path, [decision(0, frame, [[0.5, math.nan]]), published(START_S + 0.1, 0, 0)])
    with pytest.raises(RecordingError, match=r"action 0 is not finite\n  got:      linear_y = nan"):
        open_recording(path, actions="decided")
    open_recording(path).close()  # what was sent is fine


# --- pieces -------------------------------------------------------------------------------------------------------------------


def note(at_s: float, kind: str) -> Note:
    return Note(at_s, kind, "a line")


SECOND_S = START_S + 3 * PERIOD_S
FOLLOWING: dict[str, Callable[[], list[Event]]] = {
    "another instruction": lambda: drive(3, SECOND_S, instruction=GO_RIGHT, first=3),
    "reset": lambda: [note(SECOND_S - 0.01, "reset"), *drive(3, SECOND_S, first=3)],
    "instruction given": lambda: [note(SECOND_S - 0.01, "instruction"), *drive(3, SECOND_S, first=3)],
    "history forgotten": lambda: [note(SECOND_S, "history"), *drive(3, SECOND_S, first=3)],
    "decision failed": lambda: [note(SECOND_S - 0.01, "policy"), *drive(3, SECOND_S, first=3)],
    "decision not recorded": lambda: drive(3, SECOND_S, first=4),
    "pause": lambda: drive(3, SECOND_S + 1.2, first=3),
}


@pytest.mark.parametrize("why", FOLLOWING)
def test_pieces(tmp_path: Path, why: str) -> None:
    path = record(tmp_path, [*drive(3, START_S), *FOLLOWING[why]()])
    assert recording_names(path) == [Path(f"{path}#0"), Path(f"{path}#1")]
    with pytest.raises(RecordingError, match=r"(?s)holds 2 episodes.*hint: name one: '.*\.mcap#0' to '.*\.mcap#1'"):
        open_episode(path)
    with open_episode(f"{path}#0") as first, open_episode(f"{path}#1") as second:
        assert (len(first), len(second)) == (3, 3)
        assert first.attributes["ended_by"] == why
        assert second.attributes["ended_by"] == "end of the file"
        assert first.instruction == GO_LEFT
        assert second.instruction == (GO_RIGHT if why == "another instruction" else GO_LEFT)
        np.testing.assert_allclose(second.actions, decided(drive(3, 0)), atol=1e-6)
        assert second.fps == pytest.approx(1 / PERIOD_S)
    with pytest.raises(RecordingError, match=r"has no episode 2\n  got:      2 episodes"):
        open_episode(f"{path}#2")


@pytest.mark.parametrize("kind", ["camera", "robot", "halt", "recorder"])
def test_other_notes_cut_nothing(tmp_path: Path, kind: str) -> None:
    path = record(tmp_path, [*drive(3, START_S), note(SECOND_S - 0.01, kind), *drive(3, SECOND_S, first=3)])
    with open_episode(path) as episode:
        assert len(episode) == 6


def test_a_picture_that_is_missing_cuts(tmp_path: Path) -> None:
    events = drive(6, START_S)
    path = record(tmp_path, events)
    third = read_run(path).decisions[2].picture_ns
    copied = tmp_path / "without.mcap"
    _copy(path, copied, CompressionType.NONE, leave_out=third)
    assert len(recording_names(copied)) == 2
    with open_episode(f"{copied}#0") as first, open_episode(f"{copied}#1") as second:
        assert (len(first), len(second)) == (2, 3)
        assert first.attributes["ended_by"] == "picture not recorded"
        np.testing.assert_allclose(second.actions, decided(events)[3:], atol=1e-6)


def test_one_picture_for_two_decisions(tmp_path: Path) -> None:
    frame = Frame(pictures(1)[0], START_S)
    second = replace(decision(1, frame, [[1, 1]]), started_s=START_S + 0.1, finished_s=START_S + 0.12)
    with open_recording(record(tmp_path, [decision(0, frame, [[0, 0]]), second]), actions="decided") as episode:
        assert len(episode) == 2
        np.testing.assert_array_equal(episode.frame(0), episode.frame(1))


# --- files that others wrote, and files that are damaged -----------------------------------------------------------------------


def _copy(
    source: Path, target: Path, compression: CompressionType, *, leave_out: int | None = None, **options: bool
) -> None:
    """As another program would write it."""
    with source.open("rb") as old, target.open("wb") as new:
        reader, writer = make_reader(old), Writer(new, compression=compression, chunk_size=20_000, **options)
        writer.start(profile="ros2", library="somebody")
        for metadata in reader.iter_metadata():
            writer.add_metadata(metadata.name, metadata.metadata)
        channels = {}
        for schema, channel, message in reader.iter_messages():
            if channel.topic not in channels:
                number = writer.register_schema(schema.name, schema.encoding, schema.data)
                channels[channel.topic] = writer.register_channel(channel.topic, channel.message_encoding, number)
            if not (channel.topic == "/camera/image/compressed" and message.log_time == leave_out):
                writer.add_message(channels[channel.topic], message.log_time, message.data, message.publish_time)
        writer.finish()


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize("use_chunking", [True, False])
def test_a_copy_that_another_program_wrote(
    plain: Path, tmp_path: Path, compression: CompressionType, use_chunking: bool
) -> None:
    copied = tmp_path / "copy.mcap"
    _copy(plain, copied, compression, use_chunking=use_chunking)
    with open_episode(plain) as expected, open_episode(copied) as episode:
        np.testing.assert_array_equal(episode.actions, expected.actions)
        for index in (5, 0, 3):
            assert episode.jpeg(index) == expected.jpeg(index)


def test_a_bag_that_is_no_flight_recording(tmp_path: Path) -> None:
    path = tmp_path / "bag.mcap"
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start(profile="ros2", library="rosbag2")
        channel = writer.register_channel("/scan", "cdr", writer.register_schema("a/msg/B", "ros2msg", b"int32 x\n"))
        writer.add_message(channel, 1, b"\0\1\0\0\1\0\0\0", 1)
        writer.finish()
    with pytest.raises(
        EpisodeError, match=r"(?s)is an MCAP file, but no flight recording\n  got:      topics /scan.*hint: "
    ):
        open_episode(path)


def test_a_recording_of_another_format(copy: Path) -> None:
    data = copy.read_bytes()
    copy.write_bytes(data.replace(b"format\1\0\0\x001", b"format\1\0\0\x009"))
    with pytest.raises(RecordingError, match=r"has another format\n  got:      9\n  expected: 1"):
        open_episode(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no MCAP file\n  got:      an empty file"),
        (b"\x89HDF\r\n\x1a\n", "is no MCAP file"),
        (b"\x89MCAP0\r\n", "no flight recording"),
        (b"\x89MCAP0\r\n" + bytes(5000), "no flight recording"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=message):
        open_episode(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"(?s)cannot read .*missing\.mcap.*No such file"):
        open_episode(tmp_path / "missing.mcap")
    with pytest.raises(RecordingError, match="cannot read"):
        open_episode(tmp_path / "missing.mcap#3")
    (tmp_path / "folder.mcap").mkdir()
    with pytest.raises(RecordingError, match="Is a directory"):
        open_episode(tmp_path / "folder.mcap")


def test_a_run_that_decided_nothing(tmp_path: Path) -> None:
    path = record(tmp_path, [published(START_S, 0, 0)])
    with pytest.raises(RecordingError, match=r"is empty(?s:.*)0 decisions, 1 commands"):
        open_episode(path)
    with pytest.raises(RecordingError, match="is empty"):
        open_episode(f"{path}#0")


def test_a_recording_without_its_end_is_read_and_told(copy: Path) -> None:
    cut_off(copy)
    with pytest.warns(EpisodeWarning, match="has no end: the recorder was killed, or is still writing$") as caught:
        episode = open_episode(copy)
    assert caught[0].filename == __file__
    with episode:
        assert len(episode) == 6
        assert episode.frame(5).shape == (24, 32, 3)
    with copy.open("ab") as file:
        file.write(b"\6" + b"\0" * 6)
    with pytest.warns(EpisodeWarning, match="the last 7 bytes are left out"):
        open_episode(copy).close()


def test_damage_in_a_finished_file_is_an_error(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    with open_episode(copy) as episode:
        jpeg = episode.jpeg(3)
    assert jpeg is not None
    data[data.index(jpeg) + 200] ^= 4
    copy.write_bytes(data)
    with pytest.raises(RecordingError, match=r"(?s)is damaged at byte \d+ of \d+.*wrong checksum.*hint: copy it again"):
        open_episode(copy)


def test_a_picture_that_is_no_jpeg(copy: Path) -> None:
    with open_episode(copy) as episode:
        jpeg = episode.jpeg(3)
        assert jpeg is not None
        data = copy.read_bytes()
        copy.write_bytes(data.replace(jpeg, b"x" * len(jpeg)))  # after it was checked
        assert episode.frame(2).size
        with pytest.raises(
            EpisodeError, match=r"#0: frame 3 of 6 is corrupt\n  got:      \d+ bytes that are no JPEG image"
        ):
            episode.frame(3)
        os.truncate(copy, 100)
        with pytest.raises(EpisodeError, match="frame 2 of 6 is corrupt"):
            episode.frame(2)


def test_a_picture_in_another_format_than_the_recorder_writes(copy: Path) -> None:
    """A picture that ROS calls `rgb8; jpeg compressed rgb8` has red and blue exchanged."""
    with open_episode(copy) as episode:
        jpeg = episode.jpeg(3)
        assert jpeg is not None
        data = copy.read_bytes()
        at = data.rindex(b"jpeg\0", 0, data.index(jpeg))
        copy.write_bytes(data[:at] + b"bgr8" + data[at + 4 :])  # after it was checked
        with pytest.raises(EpisodeError, match=r"#0: frame 3 of 6 is corrupt\n  got:      format 'bgr8'"):
            episode.frame(3)


@pytest.mark.parametrize("finished", [True, False])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_or_spoilt_file_is_read_as_far_as_it_is_good_or_refused(
    plain: Path, tmp_path: Path, finished: bool, data: st.DataObject
) -> None:
    path = tmp_path / "run.mcap"
    path.write_bytes(plain.read_bytes())
    if not finished:
        cut_off(path)
    stored = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del stored[data.draw(st.integers(0, len(stored) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3), label="spoilt")):
        if stored:
            stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        with suppress(EpisodeError):
            for name in recording_names(path):
                with suppress(EpisodeError), open_recording(name, actions="decided") as episode:
                    assert 1 <= len(episode) <= 6
                    list(episode.frames())


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), sync_s=0.0)
    recorder.start(run_info())
    for event in drive(4, time.monotonic()):
        recorder.take(event)
    until(lambda: len(recorder._queue) == 0 and recorder.status.confirmed > 5000)
    (path,) = tmp_path.glob("*.mcap")

    def frames() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EpisodeWarning)
            try:
                with open_recording(path) as episode:
                    return len(episode)
            except RecordingError:
                return 0

    until(lambda: frames() == 4)
    recorder.close()
    with open_episode(path) as episode:
        assert len(episode) == 4
