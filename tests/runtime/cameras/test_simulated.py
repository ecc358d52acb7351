from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bundle.errors import CameraError
from runtime.cameras.base import EndOfFrames
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.select import open_camera
from runtime.cameras.simulated import DEFAULT_SIZE, FAULT_FILE_VARIABLE, LATE_S, Fault, SimulatedCamera, read_fault
from runtime.robot_file import SimulatedCamera as Config
from tests.runtime.cameras.scripted import LIMIT_S, Notes, wait_until

FAST = Config(colour_order="rgb", fps=100, frozen_after_s=0.3)


@pytest.fixture
def camera() -> SimulatedCamera:
    made = open_camera(FAST)
    assert isinstance(made, SimulatedCamera)
    made.open()
    return made


@pytest.fixture
def running(camera: SimulatedCamera) -> Iterator[tuple[FrameGrabber, Notes]]:
    notes = Notes()
    grabber = FrameGrabber(camera, FAST, on_note=notes.append)
    grabber.start()
    assert grabber.wait_newer(None, LIMIT_S) is not None
    yield grabber, notes
    camera.fault = None
    grabber.close()


def test_no_two_pictures_are_equal(camera: SimulatedCamera) -> None:
    frames = [camera.read(1.0) for _ in range(20)]

    assert all(frame is not None for frame in frames)
    assert len({frame.pixels.tobytes() for frame in frames if frame}) == 20
    assert frames[0] is not None
    assert frames[0].pixels.shape == (DEFAULT_SIZE[1], DEFAULT_SIZE[0], 3)
    assert not frames[0].pixels.flags.writeable


def test_it_keeps_its_rate_and_a_late_reader_misses_pictures() -> None:
    camera = SimulatedCamera(Config(colour_order="rgb", fps=20))
    camera.open()
    begun = time.monotonic()
    stamps = [frame.captured_s for _ in range(6) if (frame := camera.read(LIMIT_S))]

    assert len(stamps) == 6
    assert stamps[-1] - begun >= 4.5 / 20
    assert camera.read(0.0) is None
    time.sleep(0.3)
    begun = time.monotonic()
    late = camera.read(1.0)
    assert late is not None
    assert late.captured_s >= begun


@pytest.mark.parametrize(("rotate", "shape"), [(0, (60, 80, 3)), (90, (80, 60, 3))])
def test_it_has_the_configured_size(rotate: int, shape: tuple[int, ...]) -> None:
    config = Config(colour_order="bgr", rotate=rotate, width=80, height=60)  # type: ignore[arg-type]
    frame = SimulatedCamera(config).read(1.0)
    assert frame is not None
    assert frame.pixels.shape == shape


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.FREEZE, "repeated"),
        (Fault.LATE, "older than the newest"),
        (Fault.DUPLICATE, "duplicate stamp"),
        (Fault.BACKWARDS, "stamp went backwards"),
        (Fault.BLACK, "too dark"),
        (Fault.WRONG_SIZE, "wrong size"),
    ],
)
def test_a_faulty_frame_is_refused_and_the_newest_one_ages(
    running: tuple[FrameGrabber, Notes], camera: SimulatedCamera, fault: Fault, reason: str
) -> None:
    grabber, _ = running
    camera.fault = fault
    wait_until(lambda: grabber.statistics.refused.get(reason, 0) >= 3, f"refused: {reason}")
    newest = grabber.latest()
    assert newest is not None
    time.sleep(0.05)
    assert grabber.latest() is newest

    camera.fault = None

    assert grabber.wait_newer(newest, LIMIT_S) is not None


def test_a_freeze_is_noted_and_ends(running: tuple[FrameGrabber, Notes], camera: SimulatedCamera) -> None:
    grabber, notes = running
    camera.fault = Fault.FREEZE
    wait_until(lambda: "camera lost" in notes.kinds, "the note")
    camera.fault = None
    wait_until(lambda: "camera back" in notes.kinds, "it is back")

    lost = next(note for note in notes if note.kind == "camera lost")
    assert lost.text == "the same picture for more than 0.3 s"
    assert grabber.statistics.refused["frozen"] >= 1


def test_late_pictures_count_again_when_their_time_has_passed_the_newest(
    running: tuple[FrameGrabber, Notes], camera: SimulatedCamera
) -> None:
    grabber, _ = running
    camera.fault = Fault.LATE
    before = grabber.latest()
    newer = grabber.wait_newer(before, 0.2)
    while newer is not None and time.monotonic() - newer.captured_s < LATE_S / 2:  # what was on its way
        before, newer = newer, grabber.wait_newer(newer, 0.2)

    late = grabber.wait_newer(before, LIMIT_S)

    assert late is not None
    assert time.monotonic() - late.captured_s >= LATE_S


@pytest.mark.parametrize("fault", [Fault.UNPLUGGED, Fault.EXCEPTION])
def test_a_lost_camera_comes_back(running: tuple[FrameGrabber, Notes], camera: SimulatedCamera, fault: Fault) -> None:
    grabber, notes = running
    camera.fault = fault
    wait_until(lambda: notes.kinds == ["camera lost"], "it is lost")
    newest = grabber.latest()
    camera.fault = None

    assert grabber.wait_newer(newest, LIMIT_S) is not None
    wait_until(lambda: notes.kinds == ["camera lost", "camera back"], "it is back")


def test_silence_and_a_hang_let_the_newest_frame_age(
    running: tuple[FrameGrabber, Notes], camera: SimulatedCamera
) -> None:
    grabber, _ = running
    for fault in (Fault.SILENT, Fault.HANG):
        camera.fault = fault
        newest = grabber.latest()
        while (newer := grabber.wait_newer(newest, 0.3)) is not None:  # what was on its way
            newest = newer
        camera.fault = None
        assert grabber.wait_newer(newest, LIMIT_S) is not None


def test_the_end(running: tuple[FrameGrabber, Notes], camera: SimulatedCamera) -> None:
    grabber, _ = running
    camera.fault = Fault.END
    wait_until(lambda: grabber.ended, "the end")
    with pytest.raises(EndOfFrames):
        camera.read(1.0)


def test_faults_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "fault"
    monkeypatch.setenv(FAULT_FILE_VARIABLE, str(switch))
    camera = SimulatedCamera(FAST)
    camera.open()
    assert camera.read(1.0) is not None

    switch.write_text("unplugged\n")
    time.sleep(0.06)
    with pytest.raises(CameraError, match="unplugged"):
        camera.read(1.0)
    switch.unlink()
    time.sleep(0.06)

    camera.open()
    assert camera.read(1.0) is not None


def test_a_fault_file_that_names_no_fault_says_so(tmp_path: Path) -> None:
    switch = tmp_path / "fault"
    assert read_fault(switch) is None
    switch.write_text("")
    assert read_fault(switch) is None
    switch.write_text("freez")
    with pytest.raises(CameraError, match=r"(?s)names no fault.*freez.*expected: freeze, late"):
        read_fault(switch)


def test_a_hang_ends_with_its_fault(camera: SimulatedCamera) -> None:
    camera.fault = Fault.HANG
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(camera.read(0.1)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    camera.fault = None
    thread.join(LIMIT_S)

    assert results[0] is not None
    assert np.isfinite(results[0].captured_s)  # type: ignore[attr-defined]
