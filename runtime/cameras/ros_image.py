"""From ROS's sensor_msgs/Image and CompressedImage to pixels, whatever brought the message.

Rows may be padded (`step`), encodings name their colour order, and the robot file states one too: where the two contradict each other,
one of them is wrong, and guessing which would make a picture that looks almost right. What a compressed picture's `format` says is taken as
ROS's own decoder takes it (compressed_image_transport).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CameraError, FrameError
from bundle.reading_limits import PICTURE_PIXELS
from episodes.pictures import SIGNATURES
from runtime.cameras.base import Frame
from runtime.cameras.jpeg import decode_from
from runtime.cameras.orientation import upright
from runtime.cameras.source_clock import SourceClock
from runtime.robot_file import Ros2ServiceCamera, Ros2TopicCamera

_TYPES = {"image": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}


class Stamp(Protocol):
    """builtin_interfaces/Time."""

    sec: int
    nanosec: int


def stamp_s(stamp: Stamp) -> float | None:
    """Seconds; None for zero, which is a stamp that nobody set."""
    return stamp.sec + stamp.nanosec * 1e-9 if stamp.sec or stamp.nanosec else None


def check_types(published: Collection[str], config: Ros2TopicCamera) -> None:
    """Nobody publishes what is read: a topic that carries something else would be waited for as for a camera that is off.

    Args:
        published: types on the topic, as ROS names them.

    Raises:
        CameraError: there are some, and none is that of the robot file.
    """
    read = _TYPES[config.message]
    if published and read not in published:
        other = next((name for name, kind in _TYPES.items() if kind in published), None)
        raise CameraError(
            f"the topic {config.topic} carries something else than the robot file says",
            got=", ".join(sorted(published)),
            expected=read,
            hint=f'write message = "{other}" under [camera].' if other else "`topic` under [camera] is another one.",
        )


def frame_of(
    message: Any, config: Ros2TopicCamera | Ros2ServiceCamera, origin: str, clock: SourceClock, arrival_s: float
) -> Frame:
    """A message of either type as a frame.

    Args:
        message: has the fields of sensor_msgs/Image, or of CompressedImage (told by its `format`).
        origin: topic or service, for errors.

    Raises:
        FrameError: the picture is damaged.
        CameraError: it is not as configured.
    """
    stamp = stamp_s(message.header.stamp)
    if hasattr(message, "format"):
        pixels = compressed_pixels(message, origin)
    else:
        pixels = raw_pixels(message, config.colour_order, origin)
    return Frame(upright(pixels, config), clock.captured_s(stamp, arrival_s), stamp)


def compressed_pixels(message: Any, origin: str) -> NDArray[np.uint8]:
    """The picture in a sensor_msgs/CompressedImage as uint8 [H, W, 3] RGB.

    `format` is `jpeg` or `png`, or `ENCODING; jpeg compressed ORDER`: what was compressed, and in which order an encoder got it that takes
    BGR. Where ORDER is not bgr, red and blue are exchanged in the file, and are put back here.

    Raises:
        FrameError: it is damaged.
        CameraError: another format, or an encoding that is no 8-bit picture of colours or greys.
    """
    text = str(message.format)
    encoding, told, how = (part.strip() for part in text.partition(";"))
    named = not text.strip() or any(kind in text.lower() for kind in ("jpeg", "jpg", "png"))
    if "compresseddepth" in text.lower() or (not named and not bytes(message.data[:8]).startswith(SIGNATURES)):
        raise _unread(text, origin)
    as_bgr = "compressed bgr" in how
    if told and (encoding not in _CHANNELS if not as_bgr else "16" in encoding or "32" in encoding):
        raise _unread(text, origin)
    pixels = decode_from(bytes(message.data), origin)
    is_grey = np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 1], pixels[..., 2])
    if told and ((encoding == "mono8" and not is_grey) or (encoding.startswith("bayer") and is_grey)):
        raise _unread(f"{text} with a picture of {'greys' if is_grey else 'colours'}", origin)
    return pixels if as_bgr or not told or encoding == "mono8" else pixels[..., ::-1]


def _unread(got: str, origin: str) -> CameraError:
    return CameraError(
        f"{origin} has a format that is not read here",
        got=repr(got)[:120],
        expected=f"jpeg or png, or ENCODING; jpeg compressed bgr8 with one of {', '.join(_CHANNELS)}",
        hint="take the topic of the colour picture (image_proc makes one of a Bayer pattern), and mono8 where the camera gives 16 bits.",
    )


def raw_pixels(message: Any, colour_order: str, origin: str) -> NDArray[np.uint8]:
    """The pixels of a sensor_msgs/Image as they lie in it: uint8 [H, W, 3] in its own colour order, which must be `colour_order`.

    Grey becomes three equal channels; the alpha channel is dropped.

    Raises:
        FrameError: sizes that do not fit each other.
        CameraError: another encoding, or another colour order.
    """
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    channels = _CHANNELS.get(encoding)
    if channels is None:
        raise CameraError(
            f"{origin} has an encoding that is not read here",
            got=repr(encoding)[:80],
            expected=", ".join(_CHANNELS),
            hint="set the camera node to rgb8 or bgr8, or take its compressed topic.",
        )
    if encoding != "mono8" and not encoding.startswith(colour_order):
        raise CameraError(
            f"{origin} has another colour order than the robot file says",
            got=encoding,
            expected=f"{colour_order}8",
            hint=f'write colour_order = "{encoding[:3]}" into the robot file, and look at the picture with --doctor.',
        )
    data = np.frombuffer(message.data, np.uint8)
    fits = height > 0 and width > 0 and step >= width * channels and len(data) >= step * height
    if not fits or height * width > PICTURE_PIXELS:
        raise FrameError(
            f"{origin} sent a picture whose numbers do not fit each other",
            got=f"{width} x {height} {encoding}, {step} bytes a row, {len(data)} bytes",
            expected=f"at least {channels} bytes a pixel, and a row of that many for each line",
            hint="this is a bug of the node that sends it.",
        )
    rows = data[: step * height].reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    return np.repeat(rows, 3, axis=2) if channels == 1 else rows[..., :3]
