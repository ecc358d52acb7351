"""Frames of one episode inside a video of many, exact to the frame; and videos written so that this is cheap.

Frame i of an episode is the picture shown at its start + i / fps. A video can only be decoded from a key frame on, so a read seeks to
the one before and decodes up to the frame it wants; reading in order never seeks. What is written has a key frame every other frame.

Needs av. Knows nothing about tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.video.frame
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from bundle.reading_limits import FREE_VIDEO_BYTES, PICTURE_PIXELS, VIDEO_BYTES_A_BYTE, check_regular_file
from episodes.pixel_budget import PixelBudget

PIXEL_FORMAT = "yuv420p"
KEY_FRAME_EVERY = 2
_FORMATS = (("mp4", 4, b"ftyp"), ("matroska", 0, b"\x1a\x45\xdf\xa3"))
_CODECS = {"libx264": {"crf": "18", "preset": "medium"}, "mpeg4": {"qmin": "2", "qmax": "4"}}
_AHEAD_SECONDS = 2.0  # decoding this far is no slower than a seek
TOLERANCE_SECONDS = 1e-4  # between the table's time and the video's; what LeRobot itself allows
_ROUNDING = 1.01  # times are float64 made of float32
_RATE_TOLERANCE = 0.01


@dataclass
class VideoFrames:
    """Frames 0 to `count` - 1 of an episode; the file is opened at the first read.

    Attributes:
        name: of the episode, for errors.
        path: of the video.
        start: seconds into the video.
    """

    name: str
    path: Path
    start: float
    fps: float
    count: int
    _container: Any = field(default=None, repr=False)
    _decoded: Iterator[Any] = field(default_factory=lambda: iter(()), repr=False)
    _time: float | None = field(default=None, repr=False)  # of the last decoded frame
    _budget: PixelBudget = field(default_factory=lambda: PixelBudget(0), repr=False)
    _closed: bool = field(default=False, repr=False)

    def __bool__(self) -> bool:
        return not self._closed

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Frame `index` as a new uint8 [H, W, 3] RGB array.

        Raises:
            EpisodeError: the video is missing, damaged, or has no frame at that time.
        """
        wanted, half = self.start + index / self.fps, 0.5 / self.fps
        try:
            frame = self._find(wanted, half)
            if frame is not None and abs(off := float(frame.time) - wanted) > TOLERANCE_SECONDS * _ROUNDING:
                raise ValueError(
                    f"the nearest frame is {off:+.4f} s off {wanted:.4f} s, more than {TOLERANCE_SECONDS:g} s"
                )
            if frame is not None:
                _require_pixels(frame)
                if frame.is_corrupt:
                    raise ValueError("FFmpeg had to make up parts of the frame")
                if reason := self._budget.exceeded(index, 3 * frame.width * frame.height):
                    raise ValueError(reason)
            image = None if frame is None else frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            self._release()
            raise self._corrupt(index, f"{type(error).__name__}: {error}") from error
        if image is None:
            self._release()
            raise self._corrupt(index, f"no frame at {wanted:.3f} s")
        return np.ascontiguousarray(image)

    def read_jpeg(self, index: int) -> None:
        """None: frames of a video are no JPEG files."""

    def close(self) -> None:
        """Close the video."""
        self._closed = True
        self._release()

    def _find(self, wanted: float, half: float) -> Any:
        """The frame within `half` seconds of `wanted`, or None."""
        if self._container is None:
            self._container = self._opened()
        elif self._time is not None and self._time <= wanted - half <= self._time + _AHEAD_SECONDS:
            return self._decode_to(wanted, half)[0]
        if not self._container.streams.video:
            raise ValueError("no video stream")
        stream = self._container.streams.video[0]
        self._require_clock(stream)
        for back in (0.0, _AHEAD_SECONDS, wanted):
            self._container.seek(max(0, int((wanted - half - back) / stream.time_base)), stream=stream)
            self._decoded = self._container.decode(stream)
            frame, overshot = self._decode_to(wanted, half)
            if frame is not None or not overshot:
                return frame
        return None

    def _opened(self) -> Any:
        """The video, by the format that its first bytes show: what FFmpeg guesses may be a list of other files to be read."""
        try:
            size = check_regular_file(self.path, error=EpisodeError).st_size
        except EpisodeError as error:
            raise ValueError(error.what) from None
        with self.path.open("rb") as file:
            head = file.read(12)
        kinds = [kind for kind, start, mark in _FORMATS if head[start:].startswith(mark)]
        if not kinds:
            raise ValueError(f"neither MP4 nor Matroska: it begins with {head!r}")
        self._budget = PixelBudget(size, FREE_VIDEO_BYTES, VIDEO_BYTES_A_BYTE)
        container: Any = av.open(str(self.path), format=kinds[0], options={"protocol_whitelist": "file"})
        for stream in container.streams.video:
            _require_pixels(stream.codec_context)
            stream.codec_context.options = {"max_pixels": str(PICTURE_PIXELS)}
        return container

    def _require_clock(self, stream: Any) -> None:
        """Refuse a video whose rate or beginning is not the dataset's: its frames would be taken for others."""
        rate = stream.average_rate
        if rate and not abs(float(rate) / self.fps - 1) <= _RATE_TOLERANCE:
            raise ValueError(f"{float(rate):.3f} frames per second in the video, {self.fps:g} in the dataset")
        begins = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        if begins > TOLERANCE_SECONDS:
            raise ValueError(f"the video begins at {begins:.4f} s, and the dataset counts from 0")

    def _decode_to(self, wanted: float, half: float) -> tuple[Any, bool]:
        """The frame, or None and whether the very first one was too late: a seek goes by decoding time, which precedes showing."""
        first = True
        for frame in self._decoded:
            if frame.time is None:
                continue
            self._time = float(frame.time)
            if self._time > wanted + half:
                return None, first
            if self._time > wanted - half:
                return frame, False
            first = False
        return None, False

    def _release(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._decoded, self._time = None, iter(()), None

    def _corrupt(self, index: int, got: str) -> EpisodeError:
        return EpisodeError(
            f"{self.name}: frame {index} of {self.count} is corrupt",
            got=f"{self.path}: {got}",
            expected="a frame of the video",
            hint="copy the dataset again; if it is like this at its source too, leave the episode out.",
        )


class VideoWriter:
    """Writes frames of one size as H.264 in MP4 (MPEG-4 where there is no H.264 encoder); a context manager.

    Args:
        size: height and width; both even, as the pixel format wants.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        self.codec, options = next((name, options) for name, options in _CODECS.items() if _has(name))
        self._container = av.open(str(path), "w")
        stream: Any = self._container.add_stream(self.codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = PIXEL_FORMAT
        stream.gop_size = KEY_FRAME_EVERY
        stream.max_b_frames = 0  # so that frames are stored in the order in which they are shown, from time 0 on
        self._stream, self._tick = stream, Fraction(1, fps)
        self.frames = 0
        self.bytes = 0  # so far; what the encoder still holds is not counted
        self._open = True

    def add(self, frame: npt.NDArray[np.uint8], *, key: bool) -> None:
        """Append a frame, uint8 [H, W, 3] RGB; `key` makes it one at which decoding can start."""
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self.frames
        picture.time_base = self._tick
        picture.pict_type = av.video.frame.PictureType.I if key else av.video.frame.PictureType.NONE
        self._mux(self._stream.encode(picture))
        self.frames += 1

    def facts(self) -> dict[str, object]:
        """What LeRobot notes of a video."""
        return {
            "video.height": self._stream.height,
            "video.width": self._stream.width,
            "video.codec": "h264" if self.codec == "libx264" else self.codec,
            "video.pix_fmt": PIXEL_FORMAT,
            "video.is_depth_map": False,
            "video.fps": self._tick.denominator,
            "video.channels": 3,
            "has_audio": False,
        }

    def close(self) -> None:
        """Write what is left and close the file; a second time does nothing."""
        if self._open:
            self._open = False
            try:
                self._mux(self._stream.encode(None))
            finally:
                self._container.close()

    def _mux(self, packets: list[Any]) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_pixels(picture: Any) -> None:
    if picture.width * picture.height > PICTURE_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, more than {PICTURE_PIXELS}")


def _has(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
