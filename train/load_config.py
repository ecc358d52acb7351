"""Reads the config of a run: TOML, the same keys as JSON, or a lab's RoboVLMs JSON; parents, overrides, and where paths start.

A config may name a `parent` whose settings it changes. Relative paths start at the folder of the file that states them; those of a
RoboVLMs config, which means the folder that training was started in, are also looked for above it. Checks values through
train/config_checks.py; whether files exist is for the preflight.
"""

from __future__ import annotations

import datetime
import json
import sys
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from bundle.errors import ConfigError
from bundle.reading_limits import check_plain, read_bytes
from train.config import read_chain
from train.config_checks import convert, require_key
from train.ledger_record import flat
from train.robovlms_config import Notes, from_robovlms, is_robovlms
from train.run_config import RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LoadedConfig", "Notes", "load_run_config"]

_EXAMPLE = "see docs/training-config.md for what it may say."
_ANYBODYS = frozenset(
    {"name", "model", "loss", "optimizer", "output"}
)  # keys that configs of other programs have as well
_SHOWN = 8
_ABOVE = 4  # folders above a RoboVLMs config in which its relative paths may start


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where it came from.

    Attributes:
        config: the checked settings.
        root: where relative paths start: the config file's folder.
        notes: what a RoboVLMs config says that is not used, or not certain; empty for our own.
        files: the config and its parents.
    """

    config: RunConfig
    root: Path
    notes: Notes = field(default_factory=Notes)
    files: tuple[Path, ...] = ()

    def key(self, setting: str) -> str:
        """What a setting is called where it was written: a RoboVLMs config has names of its own."""
        return dict(self.notes.names).get(setting, setting)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config with its parents, apply overrides, and check the result.

    Args:
        path: .toml, or .json of either kind.
        overrides: `section.key=value` each; the value as in TOML, quotes around texts being optional; nothing after `=` unsets an
            optional setting.

    Raises:
        ConfigError: a file is missing or not what its suffix says, parents form a circle, a key is unknown, or a value unusable.
        UnsupportedPolicyError: a RoboVLMs config asks for what jetvla does not train.
    """
    values, notes, files = _read(path, ())
    origin = str(path)
    for override in overrides:
        _apply(values, override)
        notes = _without_names(notes, (override.partition("=")[0].strip(),))
        origin = f"{path} with {', '.join(overrides)}"
    return LoadedConfig(convert(values, origin=origin), path.parent, notes, files)


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Notes, tuple[Path, ...]]:
    """The settings of a file over those of its parents, as plain data, with relative paths as `children[0]`'s folder sees them."""
    if path.resolve() in children:
        raise ConfigError(
            f"{path} inherits from itself",
            got=" -> ".join(str(child) for child in (*children, path.resolve())),
            hint="remove one `parent` from the circle.",
        )
    values = _read_file(path)
    if path.suffix == ".json" and _means_robovlms(path, values):
        return _read_robovlms(path)
    parent = values.pop("parent", None)
    if parent is None:
        return values, Notes(), (path.resolve(),)
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: `parent` is not usable", got=repr(parent), expected="a path", hint=_EXAMPLE)
    folder = path.parent / Path(parent).parent
    inherited, notes, files = _read(path.parent / parent, (*children, path.resolve()))
    if folder.resolve() != path.parent.resolve():
        _each_path(inherited, lambda text: str(Path(parent).parent / text))
    return _merge(inherited, values), _without_names(notes, flat(values)), (path.resolve(), *files)


def _without_names(notes: Notes, settings: Container[str]) -> Notes:
    """Settings that were stated here are called by their own names again."""
    return replace(notes, names=tuple(pair for pair in notes.names if pair[0] not in settings))


def _means_robovlms(path: Path, values: dict[str, Any]) -> bool:
    """Whether a JSON config is RoboVLMs', by its own keys or, if they are not ours, by those of its parents."""
    if is_robovlms(values):
        return True
    ours = {item.name for item in msgspec.structs.fields(RunConfig)}
    return "parent" in values and not values.keys() - {"parent"} <= ours and is_robovlms(read_chain(path)[0])


def _read_file(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as plain data."""
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(
            f"{path} is no training config", got=path.suffix or "no suffix", expected=".toml or .json", hint=_EXAMPLE
        )
    kind = path.suffix[1:].upper()
    try:
        text = read_bytes(path).decode()
        values = tomllib.loads(text) if kind == "TOML" else json.loads(text)
        check_plain(values, origin=str(path), error=ConfigError, hint=_EXAMPLE)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", expected="a training config", hint="correct the path.") from None
    except (ValueError, OSError, RecursionError) as error:  # both parsers' errors, and that of UTF-8, are ValueErrors
        raise ConfigError(f"{path} is not {kind}", got=error, expected="a training config", hint=_EXAMPLE) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is no training config", got=type(values).__name__, expected="an object", hint=_EXAMPLE
        )
    ours = {item.name for item in msgspec.structs.fields(RunConfig)}
    if path.suffix == ".json" and not (values.keys() & (ours | {"parent"}) - _ANYBODYS) and not is_robovlms(values):
        raise ConfigError(
            f"{path} is neither a training config of jetvla nor one of RoboVLMs",
            got=f"the keys {', '.join(list(values)[:_SHOWN])}",
            expected="base and data, or robovlm_name, act_head and train_setup",
            hint="a script of its own probably reads this file; only policies of RoboVLMs' kind are trained here.",
        )
    return values


def _read_robovlms(path: Path) -> tuple[dict[str, Any], Notes, tuple[Path, ...]]:
    values, files = read_chain(path)
    settings, notes = from_robovlms(values, origin=str(path))
    found: list[str] = []

    def locate(text: str) -> str:
        """Where a relative path leads: from the config's folder if it can, else from a folder above, or the working directory."""
        fixed = text.split("*", 1)[0].rpartition("/")[0] if "*" in text else text
        above = path.resolve().parents
        for folder in (path.parent, *above[1 : _ABOVE + 1], Path.cwd()):
            if (folder / fixed).exists():
                if folder != path.parent:
                    found.append(f"{text} was found in {folder}")
                    return str(folder / text)
                break
        return text

    _each_path(settings, locate, outputs=False)
    return settings, replace(notes, assumed=(*notes.assumed, *dict.fromkeys(found))), files


def _each_path(values: dict[str, Any], change: Callable[[str], str], *, outputs: bool = True) -> None:
    """Apply `change` in place to every relative path in settings; to those of inputs only, unless `outputs`."""

    def inside(section: object, keys: tuple[str, ...]) -> None:
        if isinstance(section, dict):
            for key in keys:
                if isinstance(section.get(key), str) and not Path(section[key]).expanduser().is_absolute():
                    section[key] = change(section[key])

    inside(values.get("base"), ("model", "weights"))
    inside(values.get("data"), ("split",))
    if outputs:
        inside(values.get("output"), ("runs", "cache"))
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(source.get("files"), list):
            source["files"] = [
                change(text) if isinstance(text, str) and not Path(text).expanduser().is_absolute() else text
                for text in source["files"]
            ]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `above` winning; sections are merged, lists replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place."""
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise ConfigError(
            f"the override {override!r} is not usable", expected="key=value, e.g. loop.epochs=3", hint=_EXAMPLE
        )
    kind = require_key(key, origin=f"override {override}")
    *above, leaf = key.split(".")
    section = values
    for name in above:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"override {override}: `{name}` is no section in the config", got=repr(section), hint=_EXAMPLE
            )
    section[leaf] = _value(text, kind)


def _value(text: str, kind: Any) -> Any:
    """What stands after `=`: a TOML value, else a plain word; a text setting takes numbers, dates and the like as they are written."""
    options = _options(kind)
    if not text and type(None) in options:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    value = parsed["value"] if parsed.keys() == {"value"} else text
    if isinstance(value, datetime.date | datetime.time) or (
        str in options and not isinstance(value, str | list | dict)
    ):
        return text
    return value


def _options(kind: Any) -> tuple[Any, ...]:
    """The plain types that an annotation allows."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _options(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(kind) for option in _options(part))
    return (kind,)
