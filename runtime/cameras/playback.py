"""Recordings as cameras: a video file, or a recorded episode, each played at its own pace.

As with a camera, whoever reads late misses pictures. The place is kept when a recording is closed and opened again; after the end it
begins anew.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CameraError, FrameError, JetvlaError
from runtime.cameras.base import EndOfFrames, Frame
from runtime.cameras.opencv import load_cv2
from runtime.cameras.orientation import upright
from runtime.robot_file import EpisodeCamera as EpisodeConfig
from runtime.robot_file import VideoCamera as VideoConfig

_DEFAULT_FPS = 6.0  # of the episodes that tell none


class Pace:
    """When each picture of a recording is due, by time.monotonic()."""

    def __init__(self, fps: float, first: int) -> None:
        self._period_s = 1 / fps
        self._first = first
        self._start_s = time.monotonic()

    def due_s(self, index: int) -> float:
        """When picture `index` is to be shown."""
        return self._start_s + (index - self._first) * self._period_s

    def wait(self, index: int, timeout_s: float) -> bool:
        """Wait until picture `index` is due; false if it is not within `timeout_s`."""
        ahead = self.due_s(index) - time.monotonic()
        time.sleep(max(0.0, min(ahead, timeout_s)))
        return ahead <= timeout_s

    def newest(self, index: int) -> int:
        """The last picture that is due by now, `index` at least."""
        return max(index, self._first + math.floor((time.monotonic() - self._start_s) / self._period_s))


class VideoCamera:
    """A video file, read by OpenCV; see Camera."""

    def __init__(self, config: VideoConfig) -> None:
        self._config = config
        self._cv2 = load_cv2("video")
        self._capture: Any = None
        self._index = 0  # of the next picture; goes on counting where the video loops
        self._decoded = 0  # pictures of the file so far
        self._pace = Pace(1, 0)
        self._fps = 1.0

    def open(self) -> None:
        """Open the file.

        Raises:
            CameraError: it is missing, no video, or tells no rate.
        """
        self.close()
        path = Path(self._config.path)
        if not path.is_file():
            raise CameraError(f"there is no video {path}", hint="write its path into the robot file.")
        capture = self._cv2.VideoCapture(str(path))
        fps = capture.get(self._cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            capture.release()
            raise CameraError(
                f"{path} cannot be played",
                got=f"{fps:g} pictures a second" if capture.isOpened() else "no video that OpenCV knows",
                expected="a video file",
                hint="play it with another player; ffmpeg -i IN -c:v libx264 OUT.mp4 makes a common one of it.",
            )
        self._capture, self._fps = capture, fps
        for _ in range(self._decoded):  # by counting: seeking is not exact to the picture
            capture.grab()
        self._pace = Pace(fps, self._index)

    def read(self, timeout_s: float) -> Frame | None:
        """The picture that is due.

        Raises:
            CameraError: it is not open, or a picture has another size.
            EndOfFrames: the video is over.
        """
        if self._capture is None:
            raise CameraError("the video is not open", hint="open it first.")
        if not self._pace.wait(self._index, timeout_s):
            return None
        newest, good = self._pace.newest(self._index), False
        while not good:
            if not self._capture.grab():
                self._over()
                return None
            self._decoded += 1
            self._index += 1
            if self._index > newest:
                good, pixels = self._capture.retrieve()
        shown = self._index - 1
        rgb = np.ascontiguousarray(pixels[..., ::-1])  # OpenCV decodes to BGR
        return Frame(upright(rgb, self._config), self._pace.due_s(shown), shown / self._fps)

    def close(self) -> None:
        """Close the file."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _over(self) -> None:
        decoded, self._decoded = self._decoded, 0
        if not self._config.loop or not decoded:
            self._index = 0
            raise EndOfFrames
        self.open()


class EpisodeCamera:
    """A recorded episode, or a flight recording; see Camera."""

    def __init__(self, config: EpisodeConfig) -> None:
        self._config = config
        try:
            from episodes.instruction import EpisodeWarning
            from episodes.reader import open_episode
        except ImportError as error:
            raise CameraError(
                "a camera of kind episode needs what reads episodes", got=error, hint="pip install 'jetvla[data]'"
            ) from None
        self._open_episode = open_episode
        self._warning = EpisodeWarning
        self._episode: Any = None
        self._index = 0
        self._pace = Pace(1, 0)
        self._fps = 1.0

    def open(self) -> None:
        """Open the file.

        Raises:
            CameraError: see episodes.reader.open_episode.
        """
        self.close()
        try:
            with warnings.catch_warnings():  # about an instruction that is missing, which is not for a camera to tell
                warnings.simplefilter("ignore", self._warning)
                self._episode = self._open_episode(self._config.path)
                self._episode.require_cameras((self._config.view,))
        except JetvlaError as error:
            raise CameraError(error.what, got=error.got, expected=error.expected, hint=error.hint) from None
        self._fps = float(self._config.fps or self._episode.fps or _DEFAULT_FPS)
        self._pace = Pace(self._fps, self._index)

    def read(self, timeout_s: float) -> Frame | None:
        """The picture that is due.

        Raises:
            FrameError: the picture is damaged.
            CameraError: it is not open, or the picture has another size.
            EndOfFrames: the episode is over.
        """
        if self._episode is None:
            raise CameraError("the episode is not open", hint="open it first.")
        if not self._pace.wait(self._index, timeout_s):
            return None
        shown, length = self._pace.newest(self._index), len(self._episode)
        if shown >= length and not self._config.loop:
            shown = length - 1
            if self._index > shown:
                self._index = 0
                raise EndOfFrames
        self._index = shown + 1
        try:
            pixels: NDArray[np.uint8] = self._episode.frame(shown % length, self._config.view)
        except JetvlaError as error:
            raise FrameError(error.what, got=error.got, expected=error.expected, hint=error.hint) from None
        return Frame(upright(pixels, self._config), self._pace.due_s(shown), shown / self._fps)

    def close(self) -> None:
        """Close the file."""
        if self._episode is not None:
            self._episode.close()
            self._episode = None
