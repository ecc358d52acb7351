"""V4L2 and CSI cameras. There is no such device here, so a made-up VideoCapture stands for one; what is missing is missing for real."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from bundle.errors import CameraError
from runtime.cameras import v4l2
from runtime.cameras.csi import has_gstreamer, pipeline
from runtime.cameras.opencv import OpenCvCamera
from runtime.cameras.select import open_camera
from runtime.robot_file import CsiCamera, V4l2Camera, VideoCamera

USB = V4l2Camera(device="/dev/video0", colour_order="bgr")
BGR = np.zeros((4, 6, 3), np.uint8) + np.array([10, 20, 30], np.uint8)


class MadeUpCapture:
    """Pictures that wait in the driver come at once, others after `wait_s`."""

    def __init__(self, waiting: int = 0, wait_s: float = 0.01, stamp: Callable[[], float] = lambda: 0.0) -> None:
        self.waiting, self.wait_s, self.stamp = waiting, wait_s, stamp
        self.number = 0
        self.released = False
        self.settings: dict[int, float] = {}
        self.works = True

    def isOpened(self) -> bool:  # OpenCV's name
        return not self.released

    def set(self, prop: int, value: float) -> bool:
        self.settings[prop] = value
        return True

    def get(self, prop: int) -> float:
        return self.stamp() * 1e3 if prop == cv2.CAP_PROP_POS_MSEC else self.settings.get(prop, 0.0)

    def grab(self) -> bool:
        self.number += 1
        if self.waiting:
            self.waiting -= 1
        else:
            time.sleep(self.wait_s)
        return self.works

    def retrieve(self) -> tuple[bool, Any]:
        return True, BGR + np.uint8(self.number)

    def release(self) -> None:
        self.released = True


def camera_of(capture: MadeUpCapture, buffered: int = 4) -> OpenCvCamera:
    camera = OpenCvCamera(USB, cv2, lambda: capture, buffered=buffered)
    camera.open()
    return camera


def test_pictures_that_waited_in_the_driver_are_dropped() -> None:
    frame = camera_of(MadeUpCapture(waiting=3)).read(1.0)

    assert frame is not None
    assert frame.pixels[0, 0].tolist() == [34, 24, 14]  # the fourth, in RGB
    assert frame.source_stamp_s is None


def test_dropping_ends_even_if_the_driver_never_runs_dry() -> None:
    frame = camera_of(MadeUpCapture(waiting=10**6)).read(1.0)
    assert frame is not None
    assert frame.pixels[0, 0, 0] == 35


@pytest.mark.parametrize(("ago_s", "used"), [(0.02, True), (5.0, False), (-5.0, False)])
def test_the_drivers_stamp_counts_where_it_can_be_one(ago_s: float, used: bool) -> None:
    frame = camera_of(MadeUpCapture(stamp=lambda: time.monotonic() - ago_s)).read(1.0)

    assert frame is not None
    assert (frame.source_stamp_s is not None) is used
    assert 0 <= time.monotonic() - frame.captured_s < 5
    if used:
        assert frame.captured_s == frame.source_stamp_s


def test_a_camera_that_is_pulled_out() -> None:
    capture = MadeUpCapture()
    camera = camera_of(capture)
    capture.works = False
    with pytest.raises(CameraError, match=r"(?s)v4l2 camera is lost.*no picture.*dmesg"):
        camera.read(1.0)
    camera.close()
    camera.close()
    assert capture.released
    with pytest.raises(CameraError, match="not open"):
        camera.read(1.0)


def test_a_device_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev, names = tmp_path / "dev", tmp_path / "sys"
    for number, name in ((0, "HD Webcam"), (2, None)):
        (dev / f"video{number}").parent.mkdir(exist_ok=True)
        (dev / f"video{number}").touch()
        if name:
            (names / f"video{number}").mkdir(parents=True)
            (names / f"video{number}" / "name").write_text(name + "\n")
    found = v4l2.devices(dev, names)
    assert found == [f"{dev}/video0 (HD Webcam)", f"{dev}/video2 (?)"]
    monkeypatch.setattr(v4l2, "devices", lambda: found)

    with pytest.raises(CameraError, match=r"(?s)no camera /dev/video77.*HD Webcam.*expected: /dev/video77") as caught:
        open_camera(V4l2Camera(device="77", colour_order="bgr")).open()
    assert "by-id" in str(caught.value)


def test_no_device_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v4l2, "devices", lambda: [])
    with pytest.raises(CameraError, match="no video device at all"):
        open_camera(V4l2Camera(device="/dev/video77", colour_order="bgr")).open()


def test_a_file_that_is_no_camera(tmp_path: Path) -> None:
    (tmp_path / "video0").touch()
    with pytest.raises(CameraError, match=r"(?s)video0 cannot be opened.*fuser"):
        open_camera(V4l2Camera(device=str(tmp_path / "video0"), colour_order="bgr")).open()


def test_devices_by_number() -> None:
    assert v4l2.device_path("3") == Path("/dev/video3")
    assert v4l2.device_path("/dev/v4l/by-id/x") == Path("/dev/v4l/by-id/x")


@pytest.mark.parametrize("accepted", [True, False])
def test_size_rate_and_format_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    capture = MadeUpCapture()
    if not accepted:
        capture.set = lambda prop, value: False  # type: ignore[method-assign, assignment]
        capture.settings[cv2.CAP_PROP_FOURCC] = cv2.VideoWriter.fourcc(*"YUYV")
    fake = SimpleNamespace(**vars(cv2) | {"VideoCapture": lambda path, api: capture})
    monkeypatch.setitem(sys.modules, "cv2", fake)  # type: ignore[arg-type]
    (tmp_path / "video0").touch()
    config = V4l2Camera(device=str(tmp_path / "video0"), colour_order="bgr", width=6, height=4, fps=30, fourcc="MJPG")
    camera = open_camera(config)
    if not accepted:
        with pytest.raises(CameraError, match=r"(?s)no pixel format MJPG.*got: +YUYV.*list-formats"):
            camera.open()
        assert capture.released
        return
    camera.open()

    assert capture.settings == {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*"MJPG"),
        cv2.CAP_PROP_FRAME_WIDTH: 6,
        cv2.CAP_PROP_FRAME_HEIGHT: 4,
        cv2.CAP_PROP_FPS: 30,
    }
    assert camera.read(1.0) is not None


@pytest.mark.parametrize("config", [USB, CsiCamera(colour_order="bgr"), VideoCamera(path="x", colour_order="rgb")])
def test_without_opencv(monkeypatch: pytest.MonkeyPatch, config: V4l2Camera) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(CameraError, match=r"(?s)needs OpenCV.*pip install 'jetvla\[opencv\]'"):
        open_camera(config)


def test_csi_pipeline() -> None:
    assert pipeline(CsiCamera(colour_order="bgr", sensor=1, width=1920, height=1080, fps=60)) == (
        "nvarguscamerasrc sensor-id=1 ! "
        "video/x-raw(memory:NVMM), width=(int)1920, height=(int)1080, format=(string)NV12, framerate=(fraction)60/1 ! "
        "nvvidconv ! video/x-raw, format=(string)BGRx ! videoconvert ! video/x-raw, format=(string)BGR ! "
        "appsink drop=true max-buffers=1 sync=false"
    )
    assert "width=(int)1280, height=(int)720" in pipeline(CsiCamera(colour_order="bgr"))
    assert "(fraction)15/2" in pipeline(CsiCamera(colour_order="bgr", fps=7.5))
    assert pipeline(CsiCamera(colour_order="bgr", pipeline="videotestsrc ! appsink")) == "videotestsrc ! appsink"


def test_gstreamer_in_the_build_information() -> None:
    assert has_gstreamer("  Video I/O:\n    GStreamer:                   YES (1.20.3)\n")
    assert not has_gstreamer("    GStreamer:                   NO\n    v4l/v4l2: YES\n")


def test_an_opencv_without_gstreamer_says_so() -> None:
    if has_gstreamer(cv2.getBuildInformation()):
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(CameraError, match=r"(?s)without GStreamer.*GStreamer: NO.*python3-opencv"):
        open_camera(CsiCamera(colour_order="bgr"))


def test_a_pipeline_that_does_not_run_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    capture = MadeUpCapture()
    capture.released = True

    def video_capture(text: str, api: int) -> MadeUpCapture:
        opened.append((text, api))
        return capture

    changes = {"VideoCapture": video_capture, "getBuildInformation": lambda: "GStreamer: YES (1.20)"}
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(**vars(cv2) | changes))  # type: ignore[arg-type]
    config = CsiCamera(colour_order="bgr", sensor=2)

    with pytest.raises(CameraError, match=r"(?s)CSI camera 2 cannot be opened.*nvarguscamerasrc.*nvargus-daemon"):
        open_camera(config).open()

    assert opened == [(pipeline(config), cv2.CAP_GSTREAMER)]
