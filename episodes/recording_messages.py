"""The messages of a flight recording: their ROS 2 definitions, and their bytes (CDR), from one table.

All are CDR, also the two of our own: a file that mixes CDR with JSON is no ROS bag (`rosbags` refuses one with a JSON schema). The
definitions travel inside the file, so Foxglove, Rerun and `rosbags` show and plot every field with no package of ours installed.

Recorder (runtime/recorder) and reader (episodes/recording_events.py) both use this, so what one writes the other reads. Plain CDR as DDS
has it: little-endian, a 4-byte header, every number aligned to its size. Knows nothing about files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

from bundle.errors import RecordingError

IMAGE, COMMAND, DECISION, SAFETY, NOTE = (
    "sensor_msgs/msg/CompressedImage",
    "geometry_msgs/msg/TwistStamped",
    "jetvla_msgs/msg/Decision",
    "jetvla_msgs/msg/Safety",
    "rcl_interfaces/msg/Log",
)
TOPICS = {
    "/camera/image/compressed": IMAGE,
    "/cmd_vel": COMMAND,
    "/policy/decision": DECISION,
    "/safety": SAFETY,
    "/notes": NOTE,
}
TOPIC_OF = {kind: topic for topic, kind in TOPICS.items()}

_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "builtin_interfaces/msg/Time": (("int32", "sec"), ("uint32", "nanosec")),
    "std_msgs/msg/Header": (("builtin_interfaces/msg/Time", "stamp"), ("string", "frame_id")),
    "geometry_msgs/msg/Vector3": (("float64", "x"), ("float64", "y"), ("float64", "z")),
    "geometry_msgs/msg/Twist": (("geometry_msgs/msg/Vector3", "linear"), ("geometry_msgs/msg/Vector3", "angular")),
    IMAGE: (("std_msgs/msg/Header", "header"), ("string", "format"), ("uint8[]", "data")),
    COMMAND: (("std_msgs/msg/Header", "header"), ("geometry_msgs/msg/Twist", "twist")),
    # `picture` is the stamp of the image decided on, `pictured` whether it is in the file. values: steps x names, row after row.
    DECISION: (
        ("std_msgs/msg/Header", "header"),
        ("uint64", "number"),
        ("string", "instruction"),
        ("builtin_interfaces/msg/Time", "picture"),
        ("bool", "pictured"),
        ("builtin_interfaces/msg/Time", "started"),
        ("builtin_interfaces/msg/Time", "finished"),
        ("bool", "missed"),
        ("string[]", "names"),
        ("string[]", "units"),
        ("uint32", "steps"),
        ("float32[]", "values"),
        ("string[]", "timing_names"),
        ("float64[]", "timing_ms"),
    ),
    # wanted: NaN where nothing was wanted; ages: infinite where there is none.
    SAFETY: (
        ("std_msgs/msg/Header", "header"),
        ("string", "level"),
        ("string[]", "reasons"),
        ("geometry_msgs/msg/Twist", "wanted"),
        ("float64", "frame_age_s"),
        ("float64", "action_age_s"),
    ),
    NOTE: (
        ("builtin_interfaces/msg/Time", "stamp"),
        ("uint8", "level"),
        ("string", "name"),
        ("string", "msg"),
        ("string", "file"),
        ("string", "function"),
        ("uint32", "line"),
    ),
}
INFO, WARN = 20, 30
_CONSTANTS = {NOTE: "byte DEBUG=10\nbyte INFO=20\nbyte WARN=30\nbyte ERROR=40\nbyte FATAL=50\n"}
_NUMBERS = {"bool": "?", "uint8": "B", "int32": "i", "uint32": "I", "uint64": "Q", "float32": "f", "float64": "d"}
_HEADER = b"\x00\x01\x00\x00"  # CDR, little-endian
_SEPARATOR = "=" * 80


@cache
def definition(kind: str) -> str:
    """The ROS 2 text of a message and of those inside it, as MCAP wants it ("ros2msg")."""
    inner: list[str] = []
    _nested(kind, inner)
    parts = [_text(kind), *(f"{_SEPARATOR}\nMSG: {name.replace('/msg/', '/')}\n{_text(name)}" for name in inner)]
    return "".join(parts)


def encode(kind: str, values: Mapping[str, Any]) -> bytes:
    """A message as CDR.

    Args:
        values: by field; nested messages are mappings, arrays any sequence, uint8[] bytes.

    Raises:
        KeyError, TypeError, ValueError, struct.error: a value is missing or does not fit its field.
    """
    out = bytearray(_HEADER)
    _encode(kind, values, out)
    return bytes(out)


def decode(kind: str, data: bytes) -> dict[str, Any]:
    """The values of a message, the inverse of `encode`; arrays come as tuples, uint8[] as bytes.

    Raises:
        RecordingError: the bytes are not such a message.
    """
    try:
        if data[:4] != _HEADER:
            raise ValueError(f"header {data[:4].hex()}")
        values, _ = _decode(kind, data, len(_HEADER))
    except (struct.error, ValueError, IndexError) as error:
        raise RecordingError(
            f"{len(data)} bytes are no {kind}",
            got=error,
            expected="little-endian CDR as the flight recorder writes it",
            hint="the recording is damaged, or another program wrote these messages: leave it out.",
        ) from None
    return values


def stamp(nanoseconds: int) -> dict[str, int]:
    """A builtin_interfaces/Time; its seconds have 32 bits."""
    return {"sec": nanoseconds // 1_000_000_000, "nanosec": nanoseconds % 1_000_000_000}


def nanoseconds_of(time: Mapping[str, int]) -> int:
    """The inverse of `stamp`."""
    return time["sec"] * 1_000_000_000 + time["nanosec"]


def _nested(kind: str, found: list[str]) -> None:
    for type_name, _ in _FIELDS[kind]:
        if "/" in type_name and type_name not in found:
            found.append(type_name)
            _nested(type_name, found)


def _text(kind: str) -> str:
    lines = (f"{type_name.replace('/msg/', '/')} {name}\n" for type_name, name in _FIELDS[kind])
    return _CONSTANTS.get(kind, "") + "".join(lines)


def _pad(position: int, size: int) -> int:
    """Where a number of `size` bytes may start; counted from the end of the header."""
    return position + -(position - len(_HEADER)) % size


def _align(out: bytearray, size: int) -> None:
    out += bytes(_pad(len(out), size) - len(out))


def _encode(kind: str, values: Mapping[str, Any], out: bytearray) -> None:
    for type_name, name in _FIELDS[kind]:
        value = values[name]
        if type_name in _FIELDS:
            _encode(type_name, value, out)
        elif type_name.endswith("[]"):
            _encode_array(type_name[:-2], value, out)
        else:
            _encode_one(type_name, value, out)


def _encode_one(type_name: str, value: Any, out: bytearray) -> None:
    if type_name == "string":
        text = value.encode("utf-8", "replace").replace(b"\0", b" ") + b"\0"
        _encode_one("uint32", len(text), out)
        out += text
    else:
        code = _NUMBERS[type_name]
        _align(out, struct.calcsize(code))
        out += struct.pack(f"<{code}", value)


def _encode_array(type_name: str, values: Any, out: bytearray) -> None:
    _encode_one("uint32", len(values), out)
    if type_name == "string":
        for value in values:
            _encode_one("string", value, out)
    elif type_name == "uint8":
        out += values
    elif len(values):
        code = _NUMBERS[type_name]
        _align(out, struct.calcsize(code))
        out += struct.pack(f"<{len(values)}{code}", *values)


def _decode(kind: str, data: bytes, position: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    for type_name, name in _FIELDS[kind]:
        if type_name in _FIELDS:
            values[name], position = _decode(type_name, data, position)
        elif type_name.endswith("[]"):
            values[name], position = _decode_array(type_name[:-2], data, position)
        else:
            values[name], position = _decode_one(type_name, data, position)
    return values, position


def _decode_one(type_name: str, data: bytes, position: int) -> tuple[Any, int]:
    if type_name == "string":
        length, position = _decode_one("uint32", data, position)
        if length == 0 or position + length > len(data):
            raise ValueError(f"a text of {length} bytes at byte {position}")
        return data[position : position + length - 1].decode("utf-8"), position + length
    code = _NUMBERS[type_name]
    position = _pad(position, struct.calcsize(code))
    return struct.unpack_from(f"<{code}", data, position)[0], position + struct.calcsize(code)


def _decode_array(type_name: str, data: bytes, position: int) -> tuple[Any, int]:
    count, position = _decode_one("uint32", data, position)
    if count > len(data) - position:
        raise ValueError(f"{count} elements at byte {position}")
    if type_name == "string":
        texts = []
        for _ in range(count):
            text, position = _decode_one("string", data, position)
            texts.append(text)
        return tuple(texts), position
    if type_name == "uint8":
        return data[position : position + count], position + count
    if count == 0:
        return (), position
    code = _NUMBERS[type_name]
    position = _pad(position, struct.calcsize(code))
    return struct.unpack_from(f"<{count}{code}", data, position), position + count * struct.calcsize(code)
