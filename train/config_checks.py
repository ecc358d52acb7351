"""From plain data to a checked RunConfig: unknown keys, values out of range, and settings that contradict each other.

A misspelt key that is silently ignored costs a night of training, so every unknown key is an error that names the nearest known one, and a
setting that would have no effect beside another is refused. Knows nothing about files.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from bundle.errors import ConfigError
from bundle.prompt_template import is_template
from episodes.reader import CAMERAS
from train.action_classes import AXES, ClassTable, classes_of_model
from train.file_names import OTHER, PATHS
from train.run_config import LoraConfig, RunConfig, SourceConfig
from train.told import told_problems

_TABLE = "docs/training-config.md lists every key with its meaning and default."
_ADVICE_CUTOFF = 0.6
_ELSEWHERE_CUTOFF = 0.75

Problem = tuple[str, object, str]  # key, got, expected


def convert(values: dict[str, Any], *, origin: str) -> RunConfig:
    """Plain data to a checked config.

    Args:
        origin: what to call the data in messages, usually its file.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing one, a value out of its range, or settings that contradict
            each other; names the path of the key.
    """
    _refuse_unknown(values, RunConfig, "", origin)
    _refuse_infinite(values, origin)
    try:
        config = msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        where = place.rstrip("`").lstrip(".")
        raise ConfigError(
            f"{origin}: `{where}` is not usable" if where else f"{origin} is not a usable training config",
            got=text,
            hint=_TABLE,
        ) from None
    problems = list(_contradictions(config))
    if problems:
        raise _contradicting(problems, origin)
    return config


def require_key(path: str, *, origin: str) -> Any:
    """The declared type of the setting at a dotted path.

    Raises:
        ConfigError: there is no such setting; names the nearest one.
    """
    kind: Any = RunConfig
    above = ""
    for name in path.split("."):
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        if name not in fields:
            raise _unknown(name, above, kind, None, origin)
        kind = fields[name]
        above += f"{name}."
    return kind


def nearest(key: str, known: list[str]) -> str | None:
    """The known key that `key` was probably meant to be."""
    found = difflib.get_close_matches(key, known, n=1, cutoff=_ADVICE_CUTOFF)
    return found[0] if found else None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _refuse_unknown(values: Any, kind: Any, path: str, origin: str) -> None:
    """The nearest known key is worth more than msgspec's message, so unknown keys are found first."""
    if not isinstance(values, dict):
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            raise _unknown(key, path, kind, value, origin)
        if _is_struct(fields[key]):
            _refuse_unknown(value, fields[key], f"{path}{key}.", origin)
        elif key == "sources" and isinstance(value, list):
            for index, source in enumerate(value):
                _refuse_unknown(source, SourceConfig, f"{path}{key}[{index}].", origin)


def _unknown(key: str, path: str, kind: Any, value: Any, origin: str) -> ConfigError:
    siblings = [field.name for field in msgspec.structs.fields(kind)] if _is_struct(kind) else []
    near = _suggestion(key, path, siblings)
    return ConfigError(
        f"{origin}: unknown key `{path}{key}`",
        got=None if value is None else "a section" if isinstance(value, dict) else repr(value),
        expected=", ".join(siblings) or f"nothing below `{path.rstrip('.')}`",
        hint=f"did you mean `{near}`?" if near else _TABLE,
    )


def _suggestion(key: str, path: str, siblings: list[str]) -> str | None:
    """A sibling of nearly that name, else a key of that name elsewhere."""
    near = nearest(key, siblings)
    if near is not None:
        return path + near
    everywhere: dict[str, str] = {}
    for name, place in _all_keys(RunConfig, ""):
        everywhere.setdefault(name, place)
    found = difflib.get_close_matches(key, everywhere, n=1, cutoff=_ELSEWHERE_CUTOFF)
    return everywhere[found[0]] if found else None


def _all_keys(kind: Any, path: str) -> Iterator[tuple[str, str]]:
    """(name, dotted path) of every setting and section."""
    for field in msgspec.structs.fields(kind):
        yield field.name, path + field.name
        if _is_struct(field.type):
            yield from _all_keys(field.type, f"{path}{field.name}.")


def _refuse_infinite(values: Any, origin: str, path: str = "") -> None:
    """TOML knows inf and nan; no setting does, and a comparison lets infinity pass."""
    if isinstance(values, float) and not math.isfinite(values):
        raise ConfigError(f"{origin}: `{path}` is not usable", got=values, expected="a finite number", hint=_TABLE)
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_infinite(value, origin, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            _refuse_infinite(value, origin, f"{path}[{index}]")


def _contradicting(problems: list[Problem], origin: str) -> ConfigError:
    name, got, expected = problems[0]
    if len(problems) == 1:
        return ConfigError(f"{origin}: `{name}` is not usable", got=got, expected=expected, hint=_TABLE)
    lines = [f"\n    {name} = {got}; expected {expected}" for name, got, expected in problems]
    return ConfigError(f"{origin}: {len(problems)} settings are not usable", got="".join(lines), hint=_TABLE)


def _contradictions(config: RunConfig) -> Iterator[Problem]:
    """What one field cannot know of another."""
    try:
        table = classes_of_model(config.model)
    except ConfigError as error:
        yield "model.classes", error.got, str(error.expected)
        return
    yield from _data_problems(config, table)
    yield from _model_problems(config)
    if config.base.take == "policy" and config.base.weights is None:
        yield "base.take", '"policy"', "base.weights with it: a checkpoint to take the policy from"
    yield from _loss_problems(config, len(table))
    yield from told_problems(config.augment, config.data.actions, table if config.model.head == "classes" else None)


def _data_problems(config: RunConfig, table: ClassTable) -> Iterator[Problem]:
    data = config.data
    if not data.sources or not all(source.files for source in data.sources):
        yield "data.sources", "none", "at least one source with files"
    for index, source in enumerate(data.sources):
        if source.words.keys() - {*PATHS, OTHER} or not all(map(_says_something, source.words.values())):
            yield (
                f"data.sources[{index}].words",
                dict(source.words),
                "sentences for some of left, right, straight, other",
            )
    if not data.actions or len(set(data.actions)) != len(data.actions):
        yield "data.actions", ", ".join(data.actions) or "none", "different names, at least one"
    if tuple(sorted(data.cameras)) not in (("static",), CAMERAS):
        yield "data.cameras", ", ".join(data.cameras) or "none", "static, or hand and static"
    if len(data.cameras) > 1 and config.model.packing == "fork_overwrite":
        yield "data.cameras", ", ".join(data.cameras), "static: fork_overwrite is not defined for a hand camera"
    if data.action_range != "auto" and not data.action_range[0] < data.action_range[1]:
        yield "data.action_range", list(data.action_range), "minimum < maximum"
    if not 0 < data.val_share < 1 and data.split is None:
        yield "data.val_share", data.val_share, "more than 0 and less than 1"
    if not is_template(data.prompt_template):
        got = repr(data.prompt_template)
        yield "data.prompt_template", got, "a text with {instruction} in it once (or not at all), and no other braces"
    if config.model.head == "classes":
        wanted = AXES if table.hears_turns else AXES[:2]
        if data.actions != wanted:
            yield "data.actions", ", ".join(data.actions), f"{', '.join(wanted)}: the classes are theirs"


def _says_something(sentences: tuple[str, ...]) -> bool:
    return bool(sentences) and all(text.strip() for text in sentences)


def _loss_problems(config: RunConfig, count: int) -> Iterator[Problem]:
    loss, head = config.loss, config.model.head
    if head == "classes":
        if isinstance(loss.class_weights, tuple) and (len(loss.class_weights) != count or not any(loss.class_weights)):
            yield "loss.class_weights", f"{len(loss.class_weights)} weights", f"{count}, not all of them 0"
        if (loss.prior_weight > 0 or loss.class_prior) and (
            len(loss.class_prior) != count or not any(loss.class_prior)
        ):
            yield "loss.class_prior", f"{len(loss.class_prior)} shares", f"{count}, not all of them 0"
    else:
        stated = {
            "loss.class_weights": isinstance(loss.class_weights, tuple),
            "loss.label_smoothing": loss.label_smoothing > 0,
            "loss.class_prior": bool(loss.class_prior) or loss.prior_weight > 0,
        }
        for key, wrong in stated.items():
            if wrong:
                yield key, "stated", 'model.head = "classes" with it'
    if loss.non_forward != 1 and head != "velocities":
        yield "loss.non_forward", loss.non_forward, 'model.head = "velocities" with it'


def _model_problems(config: RunConfig) -> Iterator[Problem]:
    model, least = config.model, len(config.data.actions) + 1
    if model.head == "actions_gripper":
        if model.action_dim is not None and model.action_dim < least:
            yield "model.action_dim", model.action_dim, f"at least {least}: the actions and a gripper"
    elif model.action_dim is not None:
        yield "model.action_dim", model.action_dim, f"nothing: the head {model.head} decides it"
    for key in ("classes", "relabel"):
        if getattr(model, key) and model.head != "classes":
            yield f"model.{key}", ", ".join(getattr(model, key)), 'model.head = "classes" with it'
    if model.instruction_in_head and model.head != "classes":
        yield "model.instruction_in_head", "true", 'model.head = "classes" with it'
    if model.packing == "fork_overwrite" and model.latent > 1:
        yield "model.latent", model.latent, "1: fork_overwrite is not defined for more"
    if model.packing == "fork_overwrite" and model.vision_resampler:
        yield "model.vision_resampler", "true", "false: under fork_overwrite the image tokens are Kosmos-2's own"
    if not model.freeze_backbone and model.lora.targets != "none":
        yield "model.freeze_backbone", "false", 'model.lora.targets = "none" with it: adapters leave the base frozen'
    yield from _target_problems(model.lora)
    if model.train_decoder_layers is not None and model.freeze_backbone:
        yield "model.train_decoder_layers", model.train_decoder_layers, "freeze_backbone = false with it"


def _target_problems(lora: LoraConfig) -> Iterator[Problem]:
    """Whether targets match something is found where the model is known: train/lora_targets.py."""
    targets = lora.targets
    if lora.layers is not None and targets == "none":
        yield "model.lora.layers", lora.layers, 'nothing beside model.lora.targets = "none"'
    if isinstance(targets, tuple):
        return
    try:
        re.compile(targets)
    except re.error as error:
        yield "model.lora.targets", f"{targets!r}: {error}", "one regular expression, or a list of names"
