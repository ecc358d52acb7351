"""The table of all settings, made of the docstrings and annotations of train/run_config.py, so that it cannot be out of date.

docs/training-config.md is its output:  python train/run_config_table.py > docs/training-config.md
"""

from __future__ import annotations

import inspect
import re
import typing
from types import NoneType, UnionType
from typing import Any, Literal

import msgspec

from train.robovlms_key_table import ACTS, DATASET_ACTS, DATASET_NO_EFFECT, DATASET_REFUSED, NO_EFFECT, REFUSED
from train.run_config import RunConfig, SourceConfig

_DATASET = "*_dataset"
_LAB_INTRO = """## Keys of RoboVLMs configs

What a key of RoboVLMs, its 2-DoF fork or the lab's navigation package does when its config is trained here. A key acts as the code acts
that reads it there; one that would change what is learned, and that jetvla does not do, is refused, all of them at once. Keys that are in
no row are read by none of these trainers: they are listed as unknown, with the key that may have been meant. Keys that start with an
underscore, or are called `comment`, are comments.
"""
_INTRO = """# Training config: every key

A run is described by a TOML file (or JSON with the same keys). `python train/finetune.py CONFIG` reads it; a setting that is not in the
file has the default below, and an unknown one is an error that names the nearest known key.

- Relative paths start at the folder of the config file that states them.
- `parent = "other.toml"` takes over the settings of another config; the file's own win, sections are merged, lists are replaced.
- On the command line `--set section.key=value` overrides; quotes around texts are optional, and `--set base.weights=` unsets an optional
  setting.
- A RoboVLMs config (`.json` with `robovlm_name`, `act_head` or `train_setup`) is read too. What it says that has no effect, or cannot be
  known from it, is listed before the first step. It may be the `parent` of a TOML file.

A complete config is short:

```toml
name = "left-right-lora"

[base]
model = "../kosmos-2-patch14-224"

[data]
sources = [{files = ["../episodes/*.h5"]}]

[model.lora]
targets = "text"
```

This page is made from the code: `python train/run_config_table.py > docs/training-config.md`.
"""


def config_table() -> str:
    """docs/training-config.md as it should be."""
    return "\n".join([_INTRO, *_sections(RunConfig, ""), *_lab_keys()])


def _lab_keys() -> list[str]:
    """The fate of every key of a RoboVLMs config, dataset sections once."""
    acts = {**ACTS, **{f"{_DATASET}.{key}": kind for key, kind in DATASET_ACTS.items()}}
    refused = {**REFUSED, **{f"{_DATASET}.{key}": rule for key, rule in DATASET_REFUSED.items()}}
    nothing = {**NO_EFFECT, **{f"{_DATASET}.{key}": why for key, why in DATASET_NO_EFFECT.items()}}
    rows = [f"| `{key}` | acts | {kind} |" for key, kind in acts.items()]
    rows += [
        f"| `{key}` | refused, if set | {rule.kind}; trained is: {rule.instead} |" for key, rule in refused.items()
    ]
    rows += [f"| `{key}` | no effect | {why} |" for key, why in nothing.items()]
    return ["\n".join([_LAB_INTRO, "| key | fate | value, or why |", "|---|---|---|", *sorted(rows), ""])]


def _sections(kind: type[msgspec.Struct], path: str) -> list[str]:
    """A heading, text and table for the struct, then the same for those inside it."""
    fields = msgspec.structs.fields(kind)
    inner = [(field.name, struct) for field in fields if (struct := _struct(field.type)) is not None]
    own = [field for field in fields if not isinstance(field.type, type) or not issubclass(field.type, msgspec.Struct)]
    meanings = _meanings(kind)
    rows = [f"| `{field.name}` | {_values(field.type)} | {_default(field)} | {meanings[field.name]} |" for field in own]
    title = f"`[{path}]`" if path else "Top level"
    if kind is SourceConfig:
        title = f"`[[{path}]]`, any number of them"
    table = ["| key | values | default | meaning |", "|---|---|---|---|", *rows]
    found = ["\n".join([f"## {title}", "", _summary(kind), "", *table, ""])]
    for name, struct in inner:
        found += _sections(struct, f"{path}.{name}" if path else name)
    return found


def _struct(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct of a section, or of the items of a list of sections."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else (annotation,)
    return next((each for each in options if isinstance(each, type) and issubclass(each, msgspec.Struct)), None)


def _summary(kind: type[msgspec.Struct]) -> str:
    return inspect.getdoc(kind).split("\n\n")[0]  # type: ignore[union-attr] # a struct without a docstring fails the test


def _meanings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What the docstring's `Attributes` say of each field; `a, b: text` says it of both."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    joined = re.sub(r"\n {8,}", " ", listed)
    found: dict[str, str] = {}
    for line in joined.splitlines():
        names, colon, text = line.strip().partition(": ")
        if colon:
            found |= {name: text.replace("|", "\\|") for name in names.split(", ")}
    return found


def _values(annotation: Any) -> str:
    """What may stand there, in words."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{_values(options[0])}{_bounds(options[1])}"
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin in (typing.Union, UnionType):
        return " or ".join(_values(option) for option in options if option is not NoneType)
    if origin is tuple:
        words = [_values(option) for option in options if option is not Ellipsis]
        # "list of numbers >= 0"
        return "list of " + re.sub(r"^\w+", r"\g<0>s", words[0]) if Ellipsis in options else f"[{', '.join(words)}]"
    if origin is dict:
        return f"section of {_values(options[1])}"
    if _struct(annotation) is not None:
        return "section"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return names[annotation]


def _bounds(meta: msgspec.Meta) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(meta, name):g}" for name, sign in signs.items() if getattr(meta, name) is not None]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(field: Any) -> str:
    if field.default_factory is dict:
        return "none"
    if field.default is msgspec.NODEFAULT:
        return "required" if field.default_factory is msgspec.NODEFAULT else "none"
    if field.default is None or field.default == ():
        return "none"
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) or "none"
    return f"`{value}`"


if __name__ == "__main__":
    print(config_table(), end="")
