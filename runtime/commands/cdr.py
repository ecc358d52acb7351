"""Twist and TwistStamped as the bytes that ROS 2 puts on the wire: little-endian CDR (OMG DDS-RTPS, plain CDR version 1).

For transports that have no serializer of their own, and as the one place that says what these bytes are. Alignment counts from behind the
four bytes of representation header. Knows nothing about transports.
"""

from __future__ import annotations

import struct

from bundle.errors import CommandError
from runtime.commands.base import Twist

_HEADER = b"\x00\x01\x00\x00"  # CDR_LE, no options
_TWIST = struct.Struct("<6d")
_STAMP = struct.Struct("<iII")  # seconds, nanoseconds, bytes of frame_id with its final NUL
_ALIGNMENT = 8  # of a double
_INT32_MAX = 2**31 - 1
TWIST_BYTES = len(_HEADER) + _TWIST.size
_HINT = "the sender must publish geometry_msgs/Twist (or TwistStamped) as little-endian CDR."


def encode_twist(twist: Twist) -> bytes:
    """The 52 bytes of a geometry_msgs/Twist."""
    return _HEADER + _TWIST.pack(*twist.values)


def decode_twist(data: bytes) -> Twist:
    """The reverse of encode_twist.

    Raises:
        CommandError: another length or representation.
    """
    if len(data) != TWIST_BYTES:
        raise _bad("a Twist of another length", f"{len(data)} bytes", f"{TWIST_BYTES} bytes")
    _check_header(data)
    return Twist(*_TWIST.unpack_from(data, len(_HEADER)))


def encode_twist_stamped(twist: Twist, frame_id: str, stamp_s: float) -> bytes:
    """A geometry_msgs/TwistStamped; `stamp_s` is in seconds since 1970.

    Raises:
        CommandError: `frame_id` cannot be a CDR string.
    """
    seconds, nanoseconds = stamp(stamp_s)
    text = encode_frame_id(frame_id)
    body = _STAMP.pack(seconds, nanoseconds, len(text)) + text
    return _HEADER + body + bytes(-len(body) % _ALIGNMENT) + _TWIST.pack(*twist.values)


def decode_twist_stamped(data: bytes) -> tuple[Twist, str, int, int]:
    """The reverse of encode_twist_stamped: command, frame_id, seconds, nanoseconds.

    Raises:
        CommandError: cut short, too long, another representation, or a frame_id that is no text.
    """
    _check_header(data)
    body = data[len(_HEADER) :]
    if len(body) < _STAMP.size:
        raise _bad("a TwistStamped that is cut short", f"{len(data)} bytes", "a stamp and a frame_id")
    seconds, nanoseconds, length = _STAMP.unpack_from(body)
    end = _STAMP.size + length
    start = end + -end % _ALIGNMENT
    if length < 1 or len(body) != start + _TWIST.size:
        expected = f"{len(_HEADER) + start + _TWIST.size} bytes for a frame_id of {length} bytes"
        raise _bad("a TwistStamped of another length", f"{len(data)} bytes", expected)
    try:
        frame_id = body[_STAMP.size : end - 1].decode()
    except UnicodeDecodeError as error:
        raise _bad("a frame_id that is no text", error, "UTF-8") from None
    if body[end - 1] or "\0" in frame_id:
        raise _bad("a frame_id without its one final NUL", body[_STAMP.size : end], "text, then NUL")
    return Twist(*_TWIST.unpack_from(body, start)), frame_id, seconds, nanoseconds


def stamp(stamp_s: float) -> tuple[int, int]:
    """builtin_interfaces/Time of seconds since 1970.

    Clamped to what the message can hold (0 to 2038): a broken clock must not keep a stop from being sent.
    """
    seconds = int(min(max(stamp_s, 0.0), float(_INT32_MAX)))
    fraction = min(max(stamp_s - seconds, 0.0), 0.999999999)
    return seconds, int(fraction * 1e9)


def encode_frame_id(frame_id: str) -> bytes:
    """UTF-8 with its final NUL.

    Raises:
        CommandError: it holds a NUL, or is no valid text.
    """
    try:
        text = frame_id.encode()
    except UnicodeEncodeError as error:
        raise CommandError(
            "frame_id is no valid text", got=error, hint="write a plain name into the robot file."
        ) from None
    if b"\0" in text:
        raise CommandError("frame_id holds a NUL", got=repr(frame_id), hint="write a plain name into the robot file.")
    return text + b"\0"


def _check_header(data: bytes) -> None:
    # The last two bytes are options that plain CDR leaves to the sender.
    if data[:2] != _HEADER[:2]:
        raise _bad("a message in another representation", data[:4].hex(" ") or "nothing", "00 01: CDR, little-endian")


def _bad(what: str, got: object, expected: str) -> CommandError:
    return CommandError(f"received {what}", got=got, expected=expected, hint=_HINT)
