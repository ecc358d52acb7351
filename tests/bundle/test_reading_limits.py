"""Whatever a file holds or is, reading it ends, within the budget, in plain data or a typed error."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle import reading_limits
from bundle.errors import ConfigError, InputFileError
from bundle.reading_limits import (
    check_plain,
    check_regular_file,
    is_there,
    open_regular,
    parse_json,
    read_json,
    read_limited,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=30,
)


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a named pipe"), (Path.mkdir, "a directory"), (make_socket, "a socket")],
    ids=["pipe", "directory", "socket"],
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    path = tmp_path / "config.json"
    make(path)
    for read in (check_regular_file, open_regular, read_json, lambda each: read_limited(each, 10)):
        with pytest.raises(InputFileError, match=f"config.json is {kind}"):
            read(path)


def test_a_device_behind_a_link_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a device"):
        read_json(tmp_path / "config.json", error=ConfigError)


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": [1, 2.5, null]}', encoding="utf-8")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": [1, 2.5, None]}


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    monkeypatch.setattr(reading_limits, "check_regular_file", lambda *_, **__: None)
    with pytest.raises(InputFileError, match="exchanged"):
        open_regular(path)


@pytest.mark.parametrize("name", ["nul\0byte", "x" * 5000, "\ud800", "gone"])
def test_a_text_that_is_no_path_leads_nowhere(tmp_path: Path, name: str) -> None:
    assert not is_there(tmp_path / name)
    with pytest.raises(InputFileError) as caught:
        check_regular_file(tmp_path / name)
    assert len(str(caught.value)) < 6000
    assert "\0" not in caught.value.what


def test_what_lacks_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}", encoding="utf-8")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputFileError, match=r"cannot be opened\n  got:      .*Permission denied"):
        read_json(path)


def test_a_file_at_the_limit_is_read_and_one_beyond_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_limited(path, 100) == b"x" * 100
    with pytest.raises(InputFileError, match="more than 99 bytes\n  expected: at most 99"):
        read_limited(path, 99)


def test_a_file_whose_size_is_not_told_is_bounded_all_the_same() -> None:
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(InputFileError, match="too large"):
        read_limited(Path("/proc/self/maps"), 50)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ("[" * 65 + "]" * 65, "is nested too deeply"),
        ('{"a":' * 900 + "1" + "}" * 900, "is nested too deeply"),
        ("1" * 100_000, "is not JSON\n  got:      an integer of 100000 digits"),
        ("-" + "1" * 41, "is not JSON"),
        ("[" + "[]," * 250_000 + "0]", "holds too many values"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        ('{"a": 1}x', "is not JSON"),
    ],
    ids=["open", "deep", "65", "objects", "digits", "41", "many", "empty", "cut", "not utf-8", "trailing"],
)
def test_absurd_json_is_refused(text: str | bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json {what}"):
        parse_json(text, origin="config.json", error=ConfigError)


@given(PLAIN)
def test_plain_data_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value), origin="x") == value


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_typed_error(text: bytes) -> None:
    with contextlib.suppress(InputFileError):
        parse_json(text, origin="x")


def test_lists_of_lists_are_counted_as_they_are_written_out() -> None:
    laughs: list[Any] = ["lol"]
    for _ in range(60):
        laughs = [laughs, laughs]
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(InputFileError, match="too many values"):
        check_plain(laughs, origin="x")
    with pytest.raises(InputFileError, match="is nested too deeply"):
        check_plain(circle, origin="x")


@pytest.mark.parametrize("value", [1 << 400_000, {1 << 200: 1}, [(-(10**40),)]], ids=["value", "key", "inside"])
def test_integers_that_cannot_be_printed_are_refused(value: object) -> None:
    with pytest.raises(InputFileError, match=r"an integer beyond all use\n  got:      \d+ bits"):
        check_plain(value, origin="x")


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}', '["\\ud83dx"]'])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(InputFileError, match=r"holds a text that is none\n  got:      '.*\\ud"):
        parse_json(text, origin="x")
    assert parse_json('"\\ud83d\\ude00 é"', origin="x") == "\U0001f600 é"
