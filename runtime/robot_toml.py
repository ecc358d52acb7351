"""Reads robot files and limits files, and answers a slip with what was meant; writes them for programs that make their own robot."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args

import msgspec

from bundle.errors import ConfigError
from bundle.reading_limits import read_bytes
from runtime.commands.base import TWIST_FIELDS
from runtime.robot_file import (
    SCHEMA,
    Axis,
    AxisLimits,
    CameraConfig,
    ColourOrder,
    CommandConfig,
    LimitsFile,
    RobotFile,
    Strategy,
    Strict,
)

_T = TypeVar("_T", RobotFile, LimitsFile)


def load_robot_file(path: Path) -> RobotFile:
    """Read a robot file.

    Raises:
        ConfigError: missing, not TOML, or a key unknown, missing, mistyped or out of range.
    """
    return _load(
        path,
        RobotFile,
        "robot file",
        "start from runtime/deploy/reference-robot.toml; docs/robot.md explains every key.",
    )


def load_limits_file(path: Path) -> LimitsFile:
    """Read a limits file; whether it tightens is runtime/limits.py's business.

    Raises:
        ConfigError: see load_robot_file.
    """
    return _load(path, LimitsFile, "limits file", "docs/robot.md has an example.")


def to_toml(robot: RobotFile) -> str:
    """A robot file that load_robot_file reads back as the same."""
    tables: dict[str, object] = msgspec.to_builtins(robot)
    return "".join(f"{key} = {_toml(value)}\n" for key, value in tables.items() if value is not None)


def _toml(value: object) -> str:
    """One value, tables inline; TOML has no null, so keys without a value are left out."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + "}"
    return json.dumps(value)  # strings, numbers and booleans are the same in both


def _load(path: Path, kind: type[_T], what: str, hint: str) -> _T:
    try:
        text = read_bytes(path)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}", got=error.strerror, hint=hint) from None
    try:
        loaded = msgspec.toml.decode(text, type=kind)
    except msgspec.ValidationError as error:
        got = _with_axis(text, kind, error)
        raise ConfigError(f"{path} is not a {what}", got=got, expected=_expected(got), hint=hint) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", got=error, hint=f"true and false are lower case. {hint}") from None
    if loaded.schema != SCHEMA:
        raise ConfigError(f"{path} has another schema version", got=loaded.schema, expected=SCHEMA, hint=hint)
    return loaded


def _with_axis(text: bytes, kind: type[RobotFile] | type[LimitsFile], error: msgspec.ValidationError) -> str:
    """The message; msgspec does not say which of the axes it is about."""
    axes = msgspec.toml.decode(text).get("axes")
    for name, table in axes.items() if isinstance(axes, dict) else ():
        try:
            msgspec.convert(table, Axis if kind is RobotFile else AxisLimits)
        except msgspec.ValidationError as found:
            place = str(found) if "`$" in str(found) else f"{found} - at `$`"
            return place.replace("`$", f"`$.axes.{name}")
    return str(error)


def _expected(message: str) -> str | None:
    """What could have been meant, where that is a short list."""
    if unknown := re.search(r"unknown field `([^`]+)`", message):
        close = difflib.get_close_matches(unknown[1], _KEYS, n=1)
        return f"did you mean {close[0]}?" if close else None
    place = re.search(r"at `\$\.([^`]+)`", message)
    if place is None or "nvalid" not in message:
        return None
    for key, choices in _CHOICES.items():
        if place[1].endswith(key):
            return ", ".join(map(str, choices))
    return None


def _structs(kind: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _structs(below)


_KEYS = sorted({key for kind in _structs(Strict) for key in kind.__struct_fields__})
_CHOICES: dict[str, tuple[object, ...]] = {
    "camera.kind": tuple(kind.__struct_config__.tag for kind in get_args(CameraConfig)),
    "commands.kind": tuple(kind.__struct_config__.tag for kind in get_args(CommandConfig)),
    "field": TWIST_FIELDS,
    "rotate": (0, 90, 180, 270),
    "colour_order": get_args(ColourOrder),
    "strategy": get_args(Strategy),
}
