"""Our bytes against rosbags' own CDR, in both directions."""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore

from bundle.errors import CommandError
from runtime.commands.base import Twist
from runtime.commands.cdr import (
    TWIST_BYTES,
    decode_twist,
    decode_twist_stamped,
    encode_twist,
    encode_twist_stamped,
    stamp,
)

twists = st.builds(Twist, *[st.floats(allow_nan=False)] * 6)
any_twists = st.builds(Twist, *[st.floats()] * 6)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
stamps = st.integers(0, 2**31 - 1)


@cache
def ros() -> Any:
    return get_typestore(Stores.ROS2_HUMBLE)


def values(message: Any) -> tuple[float, ...]:
    return tuple(getattr(part, axis) for part in (message.linear, message.angular) for axis in "xyz")


def message_of(twist: Twist) -> Any:
    types = ros().types
    vector = types["geometry_msgs/msg/Vector3"]
    return types["geometry_msgs/msg/Twist"](vector(*twist.values[:3]), vector(*twist.values[3:]))


def test_a_twist_is_52_bytes_and_these() -> None:
    data = encode_twist(Twist(linear_x=1.0, angular_z=-2.0))
    assert len(data) == TWIST_BYTES == 52
    assert data.hex() == "00010000" + "000000000000f03f" + "00" * 32 + "00000000000000c0"


@given(twists)
def test_rosbags_reads_our_twist(twist: Twist) -> None:
    assert values(ros().deserialize_cdr(encode_twist(twist), "geometry_msgs/msg/Twist")) == twist.values


@given(twists)
def test_we_read_the_twist_of_rosbags(twist: Twist) -> None:
    theirs = bytes(ros().serialize_cdr(message_of(twist), "geometry_msgs/msg/Twist"))
    assert theirs == encode_twist(twist)
    assert decode_twist(theirs) == twist


@given(any_twists)
def test_no_number_is_changed_on_the_way(twist: Twist) -> None:
    data = encode_twist(twist)
    assert data[4:] == struct.pack("<6d", *twist.values)
    assert encode_twist(decode_twist(data)) == data


@given(twists, names, stamps, st.integers(0, 999))
def test_rosbags_reads_our_twist_stamped(twist: Twist, frame_id: str, seconds: int, milliseconds: int) -> None:
    data = encode_twist_stamped(twist, frame_id, seconds + milliseconds / 1000)
    read = ros().deserialize_cdr(data, "geometry_msgs/msg/TwistStamped")
    assert values(read.twist) == twist.values
    assert read.header.frame_id == frame_id
    assert read.header.stamp.sec + read.header.stamp.nanosec / 1e9 == pytest.approx(
        seconds + milliseconds / 1000, abs=1e-6
    )
    assert decode_twist_stamped(data)[:2] == (twist, frame_id)


@given(twists, names, st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1))
def test_we_read_the_twist_stamped_of_rosbags(twist: Twist, frame_id: str, seconds: int, nanoseconds: int) -> None:
    types = ros().types
    header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](seconds, nanoseconds), frame_id)
    message = types["geometry_msgs/msg/TwistStamped"](header, message_of(twist))
    theirs = bytes(ros().serialize_cdr(message, "geometry_msgs/msg/TwistStamped"))
    assert decode_twist_stamped(theirs) == (twist, frame_id, seconds, nanoseconds)


@given(st.binary(max_size=120))
def test_any_bytes_are_a_command_or_a_command_error(data: bytes) -> None:
    for decode in (decode_twist, decode_twist_stamped):
        with suppress(CommandError):
            decode(data)


@given(st.data(), names)
def test_cut_and_changed_messages_are_refused_or_read(data: st.DataObject, frame_id: str) -> None:
    whole = bytearray(encode_twist_stamped(Twist(1.0), frame_id, 5.0))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(CommandError):
        decode_twist_stamped(bytes(whole[:cut]))
    with pytest.raises(CommandError):
        decode_twist_stamped(bytes(whole) + b"\0")
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CommandError):
        decode_twist_stamped(bytes(whole))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a Twist of another length"),
        (encode_twist(Twist())[:-1], "a Twist of another length\n  got:      51 bytes\n  expected: 52 bytes"),
        (b"\0\0" + encode_twist(Twist())[2:], "in another representation\n  got:      00 00 00 00"),
    ],
)
def test_what_is_no_twist_is_told(data: bytes, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        decode_twist(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got:      nothing"),
        (b"\0\1\0\0", "cut short"),
        (b"\0\1\0\0" + struct.pack("<iII", 0, 0, 0) + bytes(4 + 48), "of another length"),
        (b"\0\1\0\0" + struct.pack("<iII", 0, 0, 2**32 - 1) + bytes(52), "of another length"),
        (b"\0\1\0\0" + struct.pack("<iII", 0, 0, 2) + b"\xff\0" + bytes(2 + 48), "no text"),
        (b"\0\1\0\0" + struct.pack("<iII", 0, 0, 2) + b"ab" + bytes(2 + 48), "without its one final NUL"),
    ],
)
def test_what_is_no_twist_stamped_is_told(data: bytes, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        decode_twist_stamped(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("frame_id", ["a\0b", "\ud800"])
def test_a_frame_id_that_cannot_be_sent_is_refused(frame_id: str) -> None:
    with pytest.raises(CommandError, match="frame_id"):
        encode_twist_stamped(Twist(), frame_id, 0.0)


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        (1.25, (1, 250_000_000)),
        (-5.0, (0, 0)),
        (2.0**31 - 1, (2**31 - 1, 0)),
        (1e12, (2**31 - 1, 999_999_999)),
    ],
)
def test_a_broken_clock_does_not_keep_a_stop_from_being_sent(clock: float, expected: tuple[int, int]) -> None:
    assert stamp(clock) == expected
    assert decode_twist_stamped(encode_twist_stamped(Twist(), "base_link", clock))[2:] == expected
