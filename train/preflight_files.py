"""Whether everything that a config names is there: base model, checkpoint, episodes, split, and room for the run.

Looks at names only, so it costs nothing and comes first; all that is missing is told at once. Once a run was listed as a result although
its base checkpoint had never existed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bundle.errors import ConfigError
from train.episode_files import find_files
from train.ledger import check_resumable, read_run
from train.load_config import LoadedConfig

LEDGER_NAME = "run.json"
_KOSMOS = "download the directory of microsoft/kosmos-2-patch14-224 and let {} name it."


@dataclass(frozen=True)
class Problem:
    """Something that a check found.

    Attributes:
        severity: an error stops the run before it starts.
        what: one sentence, with the numbers.
        hint: how to mend it.
    """

    severity: Literal["error", "warning"]
    what: str
    hint: str


def refuse(problems: Sequence[Problem], *, name: str) -> None:
    """Nothing, unless there is an error among the problems.

    Raises:
        ConfigError: lists all errors.
    """
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    hints = tuple(dict.fromkeys(problem.hint for problem in errors))
    if len(errors) == 1:
        raise ConfigError(errors[0].what, hint=errors[0].hint)
    raise ConfigError(
        f"{len(errors)} things stand in the way of the run {name}",
        got="".join(f"\n    {problem.what}" for problem in errors),
        hint="\n      ".join(hints),
    )


def require_files(loaded: LoadedConfig, *, resume: bool | None = None, weights: bool = True) -> None:
    """Refuse a config that names what is not there; before anything is read.

    Args:
        resume: whether the run goes on with an earlier one; None does not ask.
        weights: whether the checkpoint to start from counts: without it everything but the training can still be looked at.

    Raises:
        ConfigError: lists everything that is missing.
    """
    problems = file_problems(loaded, resume=resume)
    if not weights:
        idle = tuple(_weights(loaded))
        if all((problem.what, problem.hint) in idle for problem in problems):
            return
    refuse(problems, name=loaded.config.name)


def file_problems(loaded: LoadedConfig, *, resume: bool | None = None) -> tuple[Problem, ...]:
    """What `require_files` would complain about."""
    found = (*_base(loaded), *_data(loaded), *_output(loaded), *_earlier_run(loaded, resume))
    return tuple(Problem("error", what, hint) for what, hint in found)


def _base(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    config, root = loaded.config.base, loaded.root
    model, key = root / config.model, loaded.key("base.model")
    kosmos = _KOSMOS.format(key)
    if model.is_file():
        yield f"{key} is a file: {model}", f"{kosmos} A RoboVLMs checkpoint to start from goes into base.weights."
    elif not model.is_dir():
        yield f"{key} does not exist: {model}", kosmos
    else:
        for name in ("config.json", "tokenizer.json"):
            if not (model / name).is_file():
                yield f"{key} lacks {name}: {model}", kosmos
        if not any(model.glob("model*.safetensors")):
            pickled = any(model.glob("*.bin"))
            yield (
                f"{key} lacks model.safetensors: {model}",
                "its weights are pickled, which is not read: " + kosmos if pickled else kosmos,
            )
    yield from _weights(loaded)


def _weights(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    if (weights := missing_weights(loaded)) is not None:
        what, key = "is a folder" if weights.is_dir() else "does not exist", loaded.key("base.weights")
        hint = f"name a checkpoint file (.ckpt or .pt); without one (--set base.weights=) training starts from {loaded.key('base.model')}."
        yield f"{key} {what}: {weights}", hint


def missing_weights(loaded: LoadedConfig) -> Path | None:
    """The checkpoint to start from, if there is to be one and it is no file."""
    weights = loaded.config.base.weights
    path = None if weights is None else loaded.root / weights
    return None if path is None or path.is_file() else path


def _data(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    data, root = loaded.config.data, loaded.root
    try:
        find_files(data.sources, root=root)
    except ConfigError as error:
        yield error.what if error.got is None else f"{error.what}: {error.got}", error.hint
    if data.split is not None and not (root / data.split).is_file():
        yield f"data.split does not exist: {root / data.split}", "name a saved split, or leave data.split out."


def _output(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    output, root = loaded.config.output, loaded.root
    for key, text in (("runs", output.runs), ("cache", output.cache)):
        if text is None:
            continue
        existing = existing_parent(root / text)
        if not existing.is_dir():
            yield f"output.{key} is below a file: {existing}", f"let output.{key} name a folder."
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield f"output.{key} cannot be written: {existing}", "choose a folder that you may write to."


def _earlier_run(loaded: LoadedConfig, resume: bool | None) -> Iterator[tuple[str, str]]:
    folder = loaded.root / loaded.config.output.runs / loaded.config.name
    exists = (folder / LEDGER_NAME).exists()
    if resume is False and exists:
        yield f"a run of this name exists: {folder}", "--resume goes on with it; another `name` starts a new one."
    if resume is True and not exists:
        yield f"there is no run to resume: {folder}", "start it without --resume."
    if resume is True and exists:
        try:
            check_resumable(read_run(folder), folder)
        except ConfigError as error:
            yield f"{error.what}: {error.got}", error.hint


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
