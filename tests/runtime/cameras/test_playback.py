from __future__ import annotations

import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.errors import CameraError
from episodes.writer import write_episode
from runtime.cameras.base import Camera, EndOfFrames, Frame
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.select import open_camera
from runtime.robot_file import EpisodeCamera, VideoCamera
from tests.runtime.cameras.scripted import LIMIT_S, wait_until

COUNT, FPS = 6, 20.0


def picture(number: int) -> NDArray[np.uint8]:
    """Red on the left; its number as the brightness of the right."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 0] = 220
    pixels[:, 32:] = 40 * number + 10
    return pixels


def number_of(frame: Frame) -> int:
    return round((float(frame.pixels[:, 40:].mean()) - 10) / 40)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (64, 48))
    for number in range(COUNT):
        writer.write(np.ascontiguousarray(picture(number)[..., ::-1]))
    writer.release()
    return path


@pytest.fixture
def episode(tmp_path: Path) -> Path:
    frames = (picture(number) for number in range(COUNT))
    return write_episode(tmp_path / "drive.h5", frames, np.zeros((COUNT, 3)), instruction="go", fps=FPS)


def configs(video: Path, episode: Path, **settings: object) -> list[VideoCamera | EpisodeCamera]:
    return [
        VideoCamera(**{"path": str(video), "colour_order": "rgb"} | settings),  # type: ignore[arg-type]
        EpisodeCamera(**{"path": str(episode), "colour_order": "rgb"} | settings),  # type: ignore[arg-type]
    ]


def all_of(camera: Camera) -> list[Frame]:
    frames: list[Frame] = []
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            frame = camera.read(0.25)
        except EndOfFrames:
            return frames
        frames += [frame] if frame else []
    raise AssertionError("it did not end")


def test_a_recording_plays_in_order_at_its_pace_and_ends(video: Path, episode: Path) -> None:
    for config in configs(video, episode):
        camera = open_camera(config)
        camera.open()
        begun = time.monotonic()
        frames = all_of(camera)

        numbers = [number_of(frame) for frame in frames]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == COUNT - 1 or isinstance(config, VideoCamera)
        assert time.monotonic() - begun >= (COUNT - 1) / FPS - 0.001
        assert frames[0].pixels[10, 10, 0] > 180 > 60 > frames[0].pixels[10, 10, 2]
        assert all(frame.source_stamp_s == pytest.approx(number_of(frame) / FPS) for frame in frames)
        assert frames[0].captured_s <= time.monotonic()
        camera.close()
        camera.close()


def test_whoever_reads_late_misses_pictures(video: Path, episode: Path) -> None:
    for config in configs(video, episode):
        camera = open_camera(config)
        camera.open()
        time.sleep(3.5 / FPS)

        frame = camera.read(0.25)

        assert frame is not None
        assert number_of(frame) >= 3
        assert time.monotonic() - frame.captured_s < LIMIT_S / 2
        camera.close()


def test_a_loop_does_not_end_and_time_goes_on(video: Path, episode: Path) -> None:
    for config in configs(video, episode, loop=True, frozen_after_s=0):
        grabber = FrameGrabber(open_camera(config), config)
        grabber.start()
        try:
            wait_until(
                lambda grabber=grabber: (frame := grabber.latest()) and frame.source_stamp_s > 2.2 * COUNT / FPS,
                "loops",
            )  # type: ignore[misc]
            assert not grabber.ended
            assert grabber.statistics.refused.keys() <= {"repeated"}
        finally:
            grabber.close()


def test_a_grabber_tells_that_it_has_ended(video: Path, episode: Path) -> None:
    for config in configs(video, episode):
        grabber = FrameGrabber(open_camera(config), config)
        grabber.start()
        wait_until(lambda grabber=grabber: grabber.ended, "the end")  # type: ignore[misc]
        grabber.close()
        assert grabber.statistics.taken >= 1


def test_rotation_size_and_swapped_colours(video: Path, episode: Path) -> None:
    for config in configs(video, episode, rotate=90, width=64, height=48, colour_order="bgr"):
        camera = open_camera(config)
        camera.open()
        frame = camera.read(1.0)
        assert frame is not None
        assert frame.pixels.shape == (64, 48, 3)
        assert frame.pixels[10, 10, 2] > 180  # the left is on top now, and its red was taken for blue
        camera.close()
    for config in configs(video, episode, width=65):
        camera = open_camera(config)
        camera.open()
        with pytest.raises(CameraError, match=r"(?s)another size.*64 x 48.*65 x any"):
            camera.read(1.0)
        camera.close()


def test_the_place_is_kept_when_it_is_opened_again(video: Path, episode: Path) -> None:
    for config in configs(video, episode):
        camera = open_camera(config)
        camera.open()
        first = camera.read(1.0)
        assert first is not None
        camera.close()
        camera.open()
        second = camera.read(1.0)
        assert second is not None
        assert number_of(second) > number_of(first)
        all_of(camera)
        camera.close()
        camera.open()
        again = camera.read(1.0)  # after the end it begins anew
        assert again is not None
        assert number_of(again) < COUNT - 1
        camera.close()


def test_the_rate_of_an_episode_can_be_set(episode: Path) -> None:
    camera = open_camera(EpisodeCamera(path=str(episode), colour_order="rgb", fps=200))
    camera.open()
    frame = all_of(camera)[-1]
    assert frame.source_stamp_s == pytest.approx((COUNT - 1) / 200)
    camera.close()


def test_an_episode_without_an_instruction_gives_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "episode_20251106_120000_1box_hori_left_core_medium.h5"
    write_episode(path, [picture(1)], np.zeros((1, 3)), instruction=None, fps=FPS)
    camera = open_camera(EpisodeCamera(path=str(path), colour_order="rgb"))
    camera.open()
    camera.close()


def test_files_that_are_missing_or_something_else(tmp_path: Path) -> None:
    text = tmp_path / "text.avi"
    text.write_text("no video")
    for path, message in ((tmp_path / "none.avi", "there is no video"), (text, "cannot be played")):
        with pytest.raises(CameraError, match=message):
            open_camera(VideoCamera(path=str(path), colour_order="rgb")).open()
    for path in (tmp_path / "none.h5", text):
        with pytest.raises(CameraError, match=r"(?s)hint:"):
            open_camera(EpisodeCamera(path=str(path), colour_order="rgb")).open()


def test_reading_before_opening(video: Path, episode: Path) -> None:
    for config in configs(video, episode):
        with pytest.raises(CameraError, match="not open"):
            open_camera(config).read(0)


def test_without_h5py(episode: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "episodes.reader", None)
    with pytest.raises(CameraError, match=r"jetvla\[data\]"):
        open_camera(EpisodeCamera(path=str(episode), colour_order="rgb"))
