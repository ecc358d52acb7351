"""Reads a lab's RoboVLMs config key by key, checks types, and remembers what was read, what has no effect, and what nobody knows.

Which keys there are is in train/robovlms_key_table.py; a key that it lacks is probably a typing error.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bundle.errors import ConfigError, UnsupportedPolicyError
from train.robovlms_key_table import (
    ACTS,
    DATASET_ACTS,
    DATASET_NO_EFFECT,
    DATASET_REFUSED,
    DATASETS,
    NO_EFFECT,
    NUMBER,
    REFUSED,
    TEXTS,
    WHOLE,
    is_comment,
)

_SECTIONS_READ = frozenset({"act_head", "train_setup", "vlm", "trainer", "jetvla", *DATASETS})
_INDEX = re.compile(r"\[\d+\]")
_CUTOFF = 0.75


@dataclass(frozen=True)
class Notes:
    """What became of the keys that did not become settings.

    Attributes:
        ignored: known keys without effect here, by dotted path.
        assumed: sentences: where the original run may have been another one than the config says, or ours will be.
        unknown: keys that RoboVLMs does not know, with the known key that may have been meant.
        names: settings of ours by dotted path, and the key of this config that each was read from, where messages need it.
    """

    ignored: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()


class LabConfig:
    """A lab's config, read key by key; remembers what was read.

    Args:
        values: the config, parents merged.
        origin: what to call it in messages.

    Raises:
        ConfigError: a known key has a value of the wrong type.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values = values
        self.origin = origin
        self._leaves = dict(_leaves(values, ""))
        self._read: set[str] = {"parent"}  # followed when the file was read
        self._assumed: list[str] = []
        self._names: dict[str, str] = {}
        for path, value in self._leaves.items():
            kind = _kind(path)
            if kind is not None and value is not None and not _fits(value, kind):
                raise self.unusable(path, expected=kind)

    def get(self, path: str, default: Any = None) -> Any:
        """The value; null counts as absent."""
        self._read.add(path)
        value = self._leaves.get(path)
        return default if value is None else value

    def has(self, path: str) -> bool:
        """Whether the key is there, null included."""
        return path in self._leaves

    def require(self, path: str) -> Any:
        """The value.

        Raises:
            ConfigError: there is none.
        """
        value = self.get(path)
        if value is None:
            raise self.unusable(path, expected=_kind(path))
        return value

    def require_all(self, *paths: str) -> None:
        """See that all of them have a value.

        Raises:
            ConfigError: names every one that has none.
        """
        missing = [path for path in paths if self.get(path) is None]
        if len(missing) > 1:
            raise ConfigError(
                f"{self.origin}: {', '.join(f'`{path}`' for path in missing)} are missing",
                expected="; ".join(f"{path}: {_kind(path)}" for path in missing),
                hint="RoboVLMs' trainer needs them, too: add them, or name the config that has them as `parent`.",
            )
        for path in missing:
            self.require(path)

    def assume(self, sentence: str) -> None:
        """Note that something is not as the config says, or cannot be known from it."""
        self._assumed.append(sentence)

    def name(self, setting: str, key: str) -> None:
        """Note which key of this config a setting of ours was read from."""
        self._names[setting] = key

    def unusable(self, path: str, *, expected: object) -> ConfigError:
        """The error for a key whose value, or absence, cannot be worked with."""
        value = self._leaves.get(path)
        misspelt = [key for key, near in self._unknown() if near == path]
        return ConfigError(
            f"{self.origin}: `{path}` is not usable",
            got="nothing" if value is None else repr(value),
            expected=expected,
            hint=f"did you mean {path} by `{misspelt[0]}`?" if misspelt else "correct the value.",
        )

    def datasets(self, key: str) -> tuple[str, ...]:
        """Paths of the objects under train_dataset or val_dataset: one, or the items of a list."""
        value = self._values.get(key)
        if isinstance(value, list):
            return tuple(f"{key}[{index}]" for index in range(len(value)))
        return () if value is None else (key,)

    def dataset(self, path: str) -> Mapping[str, Any]:
        """The object at a path of `datasets`; reads none of its keys."""
        key, bracket, index = path.partition("[")
        value = self._values[key]
        found: Mapping[str, Any] = value[int(index.rstrip("]"))] if bracket else value
        return found

    def refuse(self, *others: tuple[str, object, str]) -> None:
        """Refuse all that asks for what jetvla does not do, at once.

        Args:
            others: (path, value, what is trained instead), found by looking at several keys.

        Raises:
            UnsupportedPolicyError: names every key.
        """
        found = list(others)
        for path in self._leaves:
            key, dataset = _of_dataset(path)
            rule = (DATASET_REFUSED if dataset else REFUSED).get(key)
            if rule is None or path.startswith("val_dataset"):
                continue
            value = self.get(path)
            if value is not None and not rule.harmless(value):
                found.append((path, value, rule.instead))
        if not found:
            return
        first, value, instead = found[0]
        more = "".join(f"; and {path} = {other!r}, for which: {rule}" for path, other, rule in found[1:])
        raise UnsupportedPolicyError(
            f"{self.origin}: {first} = {value!r}, which jetvla does not train",
            expected=f"{instead}{more}",
            hint="change the key if the policy can do without; nothing was written.",
        )

    def notes(self) -> Notes:
        """What was not read, and what was assumed."""
        unknown = self._unknown()
        strange = {path for path, _ in unknown}
        ignored = tuple(path for path in self._leaves if path not in self._read | strange)
        texts = tuple(path if near is None else f"{path}: did you mean {near}?" for path, near in unknown)
        return Notes(ignored, tuple(self._assumed), texts, tuple(self._names.items()))

    def _unknown(self) -> list[tuple[str, str | None]]:
        """Keys that RoboVLMs does not know, each with the nearest one that it does."""
        strange = (path for path in self._leaves if _kind(path) is None and why_no_effect(path) is None)
        return [(path, _nearest(path)) for path in strange]


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key; sections that nobody reads, and those that nobody knows, are one leaf."""
    for key, value in section.items():
        path = f"{prefix}{key}"
        items = value if path in DATASETS and isinstance(value, list) else [value]
        if path in _SECTIONS_READ and value is not None and all(isinstance(item, dict) for item in items):
            for index, item in enumerate(items):
                yield from _leaves(item, f"{path}[{index}]." if items is value else f"{path}.")
        else:
            yield path, value


def _kind(path: str) -> str | None:
    """The type of a known key that means something."""
    key, dataset = _of_dataset(path)
    acts, refused = (DATASET_ACTS, DATASET_REFUSED) if dataset else (ACTS, REFUSED)
    return acts.get(key) or (refused[key].kind if key in refused else None)


def why_no_effect(path: str) -> str | None:
    """Why a key has no effect, or None if it is not known to have none."""
    key, dataset = _of_dataset(path)
    if is_comment(key.rpartition(".")[2]):
        return "a comment"
    return (DATASET_NO_EFFECT if dataset else NO_EFFECT).get(key)


def _of_dataset(path: str) -> tuple[str, bool]:
    """The key as the tables have it, and whether it is one of a dataset's."""
    plain = _INDEX.sub("", path)
    section, _, key = plain.partition(".")
    return (key, True) if section in DATASETS and key else (plain, False)


def _nearest(path: str) -> str | None:
    """The known key that was probably meant: nearly that name in the section, else that very name elsewhere."""
    section, _, leaf = path.rpartition(".")
    plain = _INDEX.sub("", section)
    known = (
        [*DATASET_ACTS, *DATASET_REFUSED] if plain in DATASETS else [key.rpartition(".")[2] for key in _below(plain)]
    )
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=_CUTOFF)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    return next((key for key in (*ACTS, *REFUSED) if key.rpartition(".")[2] == leaf), None)


def _below(section: str) -> list[str]:
    return [key for key in (*ACTS, *REFUSED) if key.rpartition(".")[0] == section]


def _fits(value: object, kind: str) -> bool:
    match kind:
        case "a whole number":
            return isinstance(value, int) and not isinstance(value, bool)
        case "a finite number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "a text":
            return isinstance(value, str)
        case "true or false":
            return isinstance(value, bool)
        case "a list of numbers":
            return isinstance(value, list) and all(_fits(item, NUMBER) for item in value)
        case "a list of texts":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "a text or a whole number":
            return isinstance(value, str) or _fits(value, WHOLE)
        case "a text or a list of texts":
            return isinstance(value, str) or _fits(value, TEXTS)
        case "a whole number, a list of them, or a text":
            return isinstance(value, str) or all(
                _fits(item, WHOLE) for item in (value if isinstance(value, list) else [value])
            )
        case _:
            return isinstance(value, dict)
