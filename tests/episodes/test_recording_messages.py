"""Our CDR is the one that others read and write, and bytes that are none are told as such."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from bundle.errors import RecordingError
from episodes.recording_messages import (
    COMMAND,
    DECISION,
    IMAGE,
    NOTE,
    SAFETY,
    TOPICS,
    decode,
    definition,
    encode,
    nanoseconds_of,
    stamp,
)

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NUMBERS = st.floats(allow_nan=False)
SINGLES = st.floats(width=32, allow_nan=False)
TIMES = st.fixed_dictionaries({"sec": st.integers(0, 2**31 - 1), "nanosec": st.integers(0, 999_999_999)})
HEADERS = st.fixed_dictionaries({"stamp": TIMES, "frame_id": TEXTS})
VECTORS = st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS, "z": NUMBERS})
TWISTS = st.fixed_dictionaries({"linear": VECTORS, "angular": VECTORS})
VALUES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    IMAGE: st.fixed_dictionaries({"header": HEADERS, "format": TEXTS, "data": st.binary(max_size=40)}),
    COMMAND: st.fixed_dictionaries({"header": HEADERS, "twist": TWISTS}),
    DECISION: st.fixed_dictionaries(
        {
            "header": HEADERS,
            "number": st.integers(0, 2**64 - 1),
            "instruction": TEXTS,
            "picture": TIMES,
            "pictured": st.booleans(),
            "started": TIMES,
            "finished": TIMES,
            "missed": st.booleans(),
            "names": st.lists(TEXTS, max_size=3).map(tuple),
            "units": st.lists(TEXTS, max_size=3).map(tuple),
            "steps": st.integers(0, 2**32 - 1),
            "values": st.lists(SINGLES, max_size=5).map(tuple),
            "timing_names": st.lists(TEXTS, max_size=3).map(tuple),
            "timing_ms": st.lists(NUMBERS, max_size=3).map(tuple),
        }
    ),
    SAFETY: st.fixed_dictionaries(
        {
            "header": HEADERS,
            "level": TEXTS,
            "reasons": st.lists(TEXTS, max_size=3).map(tuple),
            "wanted": TWISTS,
            "frame_age_s": NUMBERS,
            "action_age_s": NUMBERS,
        }
    ),
    NOTE: st.fixed_dictionaries(
        {
            "stamp": TIMES,
            "level": st.integers(0, 255),
            "name": TEXTS,
            "msg": TEXTS,
            "file": TEXTS,
            "function": TEXTS,
            "line": st.integers(0, 2**32 - 1),
        }
    ),
}
MESSAGES = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))


@pytest.fixture(scope="module")
def store() -> Any:
    """ROS 2 Humble's types, and ours from the text that stands in every file."""
    found = get_typestore(Stores.ROS2_HUMBLE)
    for kind in (DECISION, SAFETY):
        found.register(get_types_from_msg(definition(kind).split("=" * 80)[0], kind))
    return found


@pytest.mark.parametrize("kind", [IMAGE, COMMAND, NOTE])
def test_definitions_are_those_of_ros(kind: str) -> None:
    own = get_types_from_msg(definition(kind), kind)
    humble = get_typestore(Stores.ROS2_HUMBLE)
    for name, fields in own.items():
        assert humble.fielddefs[name] == fields


def test_every_topic_has_a_definition_of_its_own_and_of_what_is_inside() -> None:
    for kind in TOPICS.values():
        text = definition(kind)
        assert "builtin_interfaces/Time" in text
        assert text.count("MSG: builtin_interfaces/Time\n") == 1


@given(MESSAGES)
def test_round_trip(message: tuple[str, dict[str, Any]]) -> None:
    kind, values = message
    assert decode(kind, encode(kind, values)) == values


@given(MESSAGES)
def test_another_program_reads_the_same(store: Any, message: tuple[str, dict[str, Any]]) -> None:
    kind, values = message
    data = encode(kind, values)
    read = store.deserialize_cdr(data, kind)
    _same(read, values)
    # It writes the same bytes too, but for padding at the very end.
    written = bytes(store.serialize_cdr(read, kind))
    assert written[: len(data)] == data
    assert not any(written[len(data) :])


def _same(read: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        found = getattr(read, name)
        if isinstance(value, dict):
            _same(found, value)
        elif isinstance(value, bytes):
            assert bytes(found) == value
        elif isinstance(value, tuple):
            assert tuple(np.asarray(found).tolist()) == value
        else:
            assert found == value


def test_what_is_not_finite_stays() -> None:
    zero = {"x": 0.0, "y": 0.0, "z": 0.0}
    header = {"stamp": stamp(5), "frame_id": ""}
    values = {
        "header": header,
        "level": "stop",
        "reasons": (),
        "wanted": {"linear": zero | {"x": math.nan}, "angular": zero},
    }
    read = decode(SAFETY, encode(SAFETY, values | {"frame_age_s": math.inf, "action_age_s": -math.inf}))
    assert math.isnan(read["wanted"]["linear"]["x"])
    assert (read["frame_age_s"], read["action_age_s"]) == (math.inf, -math.inf)


def test_texts_that_cannot_be_stored_as_they_are() -> None:
    values = dict.fromkeys(("name", "file", "function"), "") | {"stamp": stamp(0), "level": 0, "line": 0}
    assert decode(NOTE, encode(NOTE, values | {"msg": "a\0b\ud800c"}))["msg"] == "a b?c"


@given(MESSAGES, st.data())
def test_cut_or_spoilt_bytes_are_told_or_read_as_something(
    message: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    kind, values = message
    stored = bytearray(encode(kind, values))
    if data.draw(st.booleans()):
        del stored[data.draw(st.integers(0, len(stored) - 1)) :]
    else:
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RecordingError):
        decode(kind, bytes(stored))


def test_a_cut_message_is_refused() -> None:
    whole = encode(
        COMMAND,
        {
            "header": {"stamp": stamp(1), "frame_id": "a"},
            "twist": {part: dict.fromkeys("xyz", 0.0) for part in ("linear", "angular")},
        },
    )
    for length in range(len(whole)):
        with pytest.raises(RecordingError, match="are no geometry_msgs/msg/TwistStamped"):
            decode(COMMAND, whole[:length])


@given(st.integers(0, 2**31 * 10**9 - 1))
def test_stamps(time_ns: int) -> None:
    assert nanoseconds_of(stamp(time_ns)) == time_ns
