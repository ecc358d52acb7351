"""Variations of a checkpoint file: what labs do to theirs, and what disks and strangers do to them."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint

# Two instructions of the 2-DoF data; they differ in one word.
GO_LEFT = "Navigate to the gray basket on the left"
GO_RIGHT = "Navigate to the gray basket on the right"

Edit = Callable[[dict[str, Any]], object]
Variant = Callable[[Edit], Path]
MakeSynthetic = Callable[[SyntheticOptions], SyntheticFiles]


def make_once(folders: pytest.TempPathFactory) -> MakeSynthetic:
    """Options to files; equal options give the same files, so tests must not change them."""
    made: dict[SyntheticOptions, SyntheticFiles] = {}

    def make(options: SyntheticOptions) -> SyntheticFiles:
        if options not in made:
            made[options] = make_checkpoint(folders.mktemp("checkpoint"), options)
        return made[options]

    return make


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's whole content."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def rewrite(source: Path, target: Path, edit: Edit) -> Path:
    """Save `source` again as `target` after `edit` has changed its content in place."""
    content = read(source)
    edit(content)
    torch.save(content, target)
    return target


def configs(content: dict[str, Any]) -> dict[str, Any]:
    """The training config inside a Lightning file's content."""
    config: dict[str, Any] = content["hyper_parameters"]["configs"]
    return config


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers with a storage of its own for each key."""
    return {name: tensor.clone() for name, tensor in state.items()}


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    """A disk on which no file gets larger than `count` bytes: writes beyond fail as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
