from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from bundle.errors import CameraError, FrameError
from runtime.cameras import grabber as module
from runtime.cameras.base import Camera, EndOfFrames, Frame
from runtime.cameras.grabber import FrameGrabber
from runtime.robot_file import SimulatedCamera
from tests.runtime.cameras.scripted import LIMIT_S, Notes, ScriptedCamera, fresh, wait_until

CONFIG = SimulatedCamera(colour_order="rgb")
Started = Callable[[Camera], tuple[FrameGrabber, Notes]]


@pytest.fixture
def started() -> Iterator[Started]:
    made: list[FrameGrabber] = []

    def start(camera: Camera) -> tuple[FrameGrabber, Notes]:
        notes = Notes()
        made.append(FrameGrabber(camera, CONFIG, on_note=notes.append))
        made[-1].start()
        return made[-1], notes

    yield start
    for one in made:
        one.close()


def test_the_newest_frame_is_handed_out(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, notes = started(camera)
    assert grabber.latest() is None
    frames = [fresh() for _ in range(5)]
    camera.put(*frames)

    wait_until(lambda: grabber.statistics.taken == 5, "five frames")

    assert grabber.latest() is frames[-1]
    assert grabber.wait_newer(frames[3], 0) is frames[4]
    assert grabber.wait_newer(frames[4], 0.01) is None
    grabber.close()
    grabber.close()
    assert grabber.latest() is frames[-1]
    assert not notes
    assert (camera.opened, camera.closed) == (1, 1)


def test_waiting_ends_when_a_newer_frame_comes(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, _ = started(camera)
    camera.put(fresh())
    first = grabber.wait_newer(None, LIMIT_S)
    later = fresh()
    threading.Timer(0.05, camera.put, [later]).start()

    assert grabber.wait_newer(first, LIMIT_S) is later


def test_waiting_ends_when_the_grabber_is_closed(started: Started) -> None:
    grabber, _ = started(ScriptedCamera())
    threading.Timer(0.05, grabber.close).start()
    begun = time.monotonic()

    assert grabber.wait_newer(None, LIMIT_S) is None
    assert time.monotonic() - begun < LIMIT_S / 2


def test_a_refused_frame_does_not_become_the_newest(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, _ = started(camera)
    good = fresh(stamp=5.0)
    again = Frame(good.pixels, good.captured_s + 0.001, 6.0)
    camera.put(good, fresh(stamp=5.0), again, fresh(stamp=4.0), fresh(captured_s=1e12, stamp=7.0))

    wait_until(lambda: sum(grabber.statistics.refused.values()) == 4, "four refusals")

    assert grabber.latest() is good
    assert grabber.statistics.refused == {
        "duplicate stamp": 1,
        "repeated": 1,
        "stamp went backwards": 1,
        "from the future": 1,
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CameraError("the cable is out", got="nothing", hint="plug it in"), "the cable is out (got nothing)"),
        (ZeroDivisionError("a driver's bug"), "ZeroDivisionError: a driver's bug"),
    ],
)
def test_a_lost_camera_is_opened_again_and_noted_once_each(started: Started, error: Exception, words: str) -> None:
    camera = ScriptedCamera()
    camera.close_errors = [OSError("it does not close either")]
    grabber, notes = started(camera)
    camera.put(fresh())
    before = grabber.wait_newer(None, LIMIT_S)
    camera.open_errors = [CameraError("not there", hint="wait")] * 2
    camera.put(error)
    wait_until(lambda: camera.opened >= 4, "the camera is opened again")
    camera.put(fresh())

    assert grabber.wait_newer(before, LIMIT_S) is not None
    wait_until(lambda: len(notes) == 2, "two notes")
    assert notes.kinds == ["camera lost", "camera back"]
    assert notes[0].text == words
    assert grabber.statistics.reconnects == 1
    assert grabber.statistics.last_error == "not there"


def test_a_damaged_frame_is_left_out_and_the_camera_kept(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, notes = started(camera)
    camera.put(fresh(), FrameError("half a picture", hint="none"), good := fresh())

    wait_until(lambda: grabber.latest() is good, "the frame after the damaged one")

    assert grabber.statistics.refused == {"damaged": 1}
    assert grabber.statistics.last_error == "half a picture"
    assert isinstance(grabber.error, FrameError)
    assert (camera.opened, notes) == (1, [])


def test_nothing_but_damaged_frames_is_noted_and_reconnects(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_S", 0.2)
    monkeypatch.setattr(module, "_REFUSED_S", 0.05)
    camera = ScriptedCamera()
    damaged = FrameError("half a picture", hint="none")

    def read(timeout_s: float) -> Frame | None:
        raise damaged

    camera.read = read  # type: ignore[method-assign]
    _, notes = started(camera)
    wait_until(lambda: camera.opened >= 2, "a second attempt")

    assert notes.kinds[:2] == ["frames refused", "camera lost"]
    assert notes[0].text.startswith("damaged; no good one for ")


def test_a_camera_that_is_not_there_at_first_is_waited_for(started: Started) -> None:
    camera = ScriptedCamera()
    camera.open_errors = [CameraError("there is no camera /dev/video9", hint="plug it in")]
    camera.put(fresh())

    grabber, notes = started(camera)

    assert grabber.wait_newer(None, LIMIT_S) is not None
    wait_until(lambda: notes.kinds == ["camera lost", "camera back"], "two notes")


def test_pauses_between_attempts_grow_and_are_bounded(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.05)
    camera = ScriptedCamera()
    camera.open_errors = [OSError("no")] * 8
    begun = time.monotonic()
    started(camera)

    wait_until(lambda: camera.opened == 8, "eight attempts")

    assert time.monotonic() - begun > 0.01 + 0.02 + 0.04 + 4 * 0.05


def test_the_end_of_a_recording(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, notes = started(camera)
    last = fresh()
    camera.put(last, EndOfFrames())
    wait_until(lambda: grabber.ended, "the end")

    assert grabber.wait_newer(None, LIMIT_S) is last  # still to be had
    begun = time.monotonic()
    assert grabber.wait_newer(last, LIMIT_S) is None  # at once
    assert time.monotonic() - begun < LIMIT_S / 2
    wait_until(lambda: notes.kinds == ["camera ended"], "the note")
    assert grabber.statistics.ended
    assert camera.closed == 1


def test_silence_reconnects(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_S", 0.1)
    camera = ScriptedCamera()
    grabber, notes = started(camera)

    wait_until(lambda: camera.opened >= 2, "a second attempt")

    assert notes.kinds == ["camera lost"]
    assert "none came" in notes[0].text
    assert grabber.statistics.last_error.startswith("no good picture for ")


def test_darkness_is_noted_but_does_not_reconnect(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_S", 1.0)
    monkeypatch.setattr(module, "_REFUSED_S", 0.05)
    camera = ScriptedCamera()
    grabber, notes = started(camera)
    stop = threading.Event()

    def night() -> None:
        while not stop.wait(0.005):
            camera.put(Frame(fresh().pixels * 0, time.monotonic()))

    thread = threading.Thread(target=night)
    thread.start()
    try:
        wait_until(lambda: grabber.statistics.refused.get("too dark", 0) > 250, "more than a second of dark frames")
    finally:
        stop.set()
        thread.join()

    assert [(note.kind, note.text.partition(";")[0]) for note in notes][:1] == [("frames refused", "too dark")]
    assert notes.kinds.count("frames refused") == 1
    assert camera.opened == 1


def test_silence_after_darkness_reconnects(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_S", 0.1)
    camera = ScriptedCamera()
    camera.put(Frame(fresh().pixels * 0, time.monotonic()))
    started(camera)

    wait_until(lambda: camera.opened >= 2, "a second attempt")


def test_a_camera_that_hangs_hangs_nobody_else(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HANGS_S", 0.1)
    monkeypatch.setattr(module, "_JOIN_S", 0.1)
    camera, release = ScriptedCamera(), threading.Event()
    grabber, notes = started(camera)
    good = fresh()

    def hang() -> None:
        release.wait(LIMIT_S)

    camera.put(good, hang)
    wait_until(lambda: grabber.wait_newer(good, 0.02) is None and notes, "a note")

    assert grabber.latest() is good
    assert notes.kinds == ["camera hangs"]
    assert notes[0].text.startswith("read() has not returned for ")
    begun = time.monotonic()
    grabber.close()
    assert time.monotonic() - begun < LIMIT_S / 2
    assert notes.kinds == ["camera hangs", "camera hangs"]
    release.set()
    wait_until(lambda: camera.closed, "the camera is closed after all")


def test_a_hang_that_ends_is_followed_by_camera_back(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HANGS_S", 0.05)
    camera, release = ScriptedCamera(), threading.Event()
    grabber, notes = started(camera)
    camera.put(lambda: fresh() if release.wait(LIMIT_S) else None)
    wait_until(lambda: grabber.latest() is None and notes, "a note")
    release.set()

    wait_until(lambda: notes.kinds == ["camera hangs", "camera back"], "it is back")


def test_who_fails_to_take_a_note_stops_nothing(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(note: object) -> None:
        raise RuntimeError("not now")

    camera = ScriptedCamera()
    grabber = FrameGrabber(camera, CONFIG, on_note=refuse)
    grabber.start()
    try:
        camera.put(OSError("lost"), fresh())
        assert grabber.wait_newer(None, LIMIT_S) is not None
    finally:
        grabber.close()
    assert "a note was not taken: camera lost" in caplog.text


def test_the_rate_is_that_of_good_frames(started: Started) -> None:
    camera = ScriptedCamera()
    grabber, _ = started(camera)
    assert grabber.statistics.fps == 0
    for _ in range(10):
        time.sleep(0.02)
        camera.put(fresh())
    wait_until(lambda: grabber.statistics.taken == 10, "ten frames")

    assert 0 < grabber.statistics.fps < 500
    assert grabber.statistics.connected
    grabber.close()
    assert not grabber.statistics.connected
