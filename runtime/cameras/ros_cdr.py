"""Reads sensor_msgs/Image and CompressedImage from CDR, the form in which DDS carries them.

By hand, because a general reader makes a Python number of each of three million bytes. Both byte orders; alignment counts from behind the
four bytes of the header. Whatever does not fit is an error and reads nothing out of bounds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bundle.errors import FrameError

_LONGEST_TEXT = 4096


@dataclass
class Time:
    """builtin_interfaces/Time."""

    sec: int
    nanosec: int


@dataclass
class Header:
    """std_msgs/Header."""

    stamp: Time
    frame_id: str


@dataclass
class Image:
    """sensor_msgs/Image."""

    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: memoryview


@dataclass
class CompressedImage:
    """sensor_msgs/CompressedImage."""

    header: Header
    format: str
    data: memoryview


def read_image(cdr: bytes) -> Image:
    """Decode an Image; its data stays where it is.

    Raises:
        FrameError: these bytes are none.
    """
    reader = _Reader(cdr)
    header = reader.header()
    height, width, encoding = reader.number("I"), reader.number("I"), reader.text()
    return Image(header, height, width, encoding, reader.number("B"), reader.number("I"), reader.bytes())


def read_compressed_image(cdr: bytes) -> CompressedImage:
    """Decode a CompressedImage; its data stays where it is.

    Raises:
        FrameError: these bytes are none.
    """
    reader = _Reader(cdr)
    return CompressedImage(reader.header(), reader.text(), reader.bytes())


class _Reader:
    def __init__(self, cdr: bytes) -> None:
        if len(cdr) < 4 or cdr[0] != 0 or cdr[1] not in (0, 1):
            raise self._malformed(f"a header of {cdr[:4].hex(' ')}")
        self._order = "<" if cdr[1] else ">"
        self._body = memoryview(cdr)[4:]
        self._at = 0

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._at += -self._at % size
        if self._at + size > len(self._body):
            raise self._malformed("cut short")
        value: int = struct.unpack_from(self._order + kind, self._body, self._at)[0]
        self._at += size
        return value

    def bytes(self) -> memoryview:
        length = self.number("I")
        if length > len(self._body) - self._at:
            raise self._malformed(f"{length} bytes announced, {len(self._body) - self._at} there")
        self._at += length
        return self._body[self._at - length : self._at]

    def text(self) -> str:
        raw = self.bytes()
        if len(raw) > _LONGEST_TEXT:
            raise self._malformed(f"a text of {len(raw)} bytes")
        return bytes(raw).rstrip(b"\0").decode("utf-8", "replace")

    def header(self) -> Header:
        return Header(Time(self.number("i"), self.number("I")), self.text())

    def _malformed(self, got: str) -> FrameError:
        return FrameError(
            "a picture on a ROS topic cannot be read",
            got=got,
            expected="sensor_msgs/Image or CompressedImage in CDR",
            hint="look at `message` in the robot file, and at the type that `ros2 topic info -v` shows.",
        )
