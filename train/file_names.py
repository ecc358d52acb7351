"""Which files and episodes a source's filters keep.

The rules are those of the lab's loader, which reads from a file's name what its path is like.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.run_config import SourceConfig

PATHS = ("left", "right", "straight")
OTHER = "other"
_STRAIGHT_SPEED = 0.3  # m/s: slower, or more than this to a side, is not driving straight ahead


def path_type_of(stem: str) -> str:
    """`straight`, `left`, `right` or `other`, by the first of these words that a file's name holds."""
    return next((word for word in ("straight", "left", "right") if word in stem), OTHER)


def family_of(stem: str) -> str:
    """What stands between `_target_` and `_path` in a file's name, such as `left_straight`; `other` where nothing does."""
    _, target, rest = stem.partition("_target_")
    family, path, _ = rest.partition("_path")
    return family if target and path else OTHER


def path_of(stem: str) -> str:
    """`left`, `right` or `straight`, the first that stands right before `_path` in a file's name; `other` where none does."""
    return next((word for word in PATHS if f"{word}_path" in stem), OTHER)


def named(stem: str, source: SourceConfig) -> bool:
    """Whether a source's filters by name keep a file."""
    if any(word in stem for word in source.exclude):
        return False
    return not source.families or family_of(stem) in source.families


def is_straight(actions: NDArray[np.float32], names: Sequence[str]) -> bool:
    """Whether every action [T, A] drives straight ahead; `names` are of its columns, of which one that is missing counts as 0."""
    columns = [
        actions[:, list(names).index(axis)] if axis in names else np.zeros(len(actions), np.float32)
        for axis in ("linear_x", "linear_y")
    ]
    return bool(np.all((columns[0] >= _STRAIGHT_SPEED) & (np.abs(columns[1]) <= _STRAIGHT_SPEED)))
