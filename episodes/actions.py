"""The recorded actions of an episode: their names, their checks, and their nine discrete classes.

An action is [linear_x, linear_y, angular_z] as it was commanded (x forward, y to the left, both in the recorder's
units, where +-1.15 is full speed). The rule on lengths is strict: action i was commanded while frame i was seen, so
there are exactly as many actions as frames. With one too many or too few nobody can tell which end is shifted, and a
shift by one frame trains a policy that is late; such a file is refused, not trimmed.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from episodes.container import has_link, read_texts, reading, require_dataset
from episodes.layout import ACTION_CLASSES, ACTIONS, EVENT_TYPES
from episodes.storage import read_values

ACTION_NAMES = ("linear_x", "linear_y", "angular_z")
CLASS_NAMES = (
    "stop",
    "forward",
    "backward",
    "left",
    "right",
    "forward_left",
    "forward_right",
    "backward_left",
    "backward_right",
)
CLASS_THRESHOLD = 0.3
# Class by (sign of linear_x, sign of linear_y) + 1 each; rows backward, none, forward; columns right, none, left.
_CLASS_TABLE = np.array([[8, 2, 7], [4, 0, 3], [6, 1, 5]], dtype=np.int64)


def classify_actions(actions: npt.NDArray[np.float32], threshold: float = CLASS_THRESHOLD) -> npt.NDArray[np.int64]:
    """Class of each action, int64 [T], an index into CLASS_NAMES; a component counts if it exceeds `threshold`."""
    signs = np.where(np.abs(actions[:, :2]) > threshold, np.sign(actions[:, :2]), 0).astype(np.int64) + 1
    classes: npt.NDArray[np.int64] = _CLASS_TABLE[signs[:, 0], signs[:, 1]]
    return classes


def default_event_types(actions: npt.NDArray[np.float32]) -> tuple[str, ...]:
    """What the recorder writes: `episode_start`, then `stop_action` for zero, `start_action` for others."""
    later = ("start_action" if moves else "stop_action" for moves in np.any(actions[1:] != 0, axis=1))
    return ("episode_start", *later)


def read_actions(file: h5py.File, path: Path, frames: int) -> npt.NDArray[np.float32]:
    """The actions as float32 [T, A] with T = `frames` and A = 2 or 3.

    Raises:
        EpisodeError: missing, wrong dtype or shape, another length than the images, not finite, or never written.
    """
    dataset = require_dataset(file, ACTIONS, path)
    shape = dataset.shape
    if dataset.dtype.kind != "f" or shape is None or len(shape) != 2 or shape[1] not in (2, 3):
        raise EpisodeError(
            f"{path}: {ACTIONS} does not hold velocity commands",
            got=f"{dataset.dtype} {shape}",
            expected=f"float32 (T, 3) of {', '.join(ACTION_NAMES)} (or (T, 2) without the last)",
            hint="convert the episode with episodes.writer.write_episode, or leave it out.",
        )
    _require_length(path, ACTIONS, shape[0], frames)
    # float64 beyond the range of float32 becomes inf, which the check below reports by its index.
    with reading(path, ACTIONS), np.errstate(over="ignore"):
        actions: npt.NDArray[np.float32] = np.asarray(read_values(dataset, path), dtype=np.float32)
    finite = np.isfinite(actions)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise EpisodeError(
            f"{path}: action {row} is not finite",
            got=f"{ACTION_NAMES[column]} = {actions[row, column]} ({int((~finite).sum())} such values in all)",
            expected="finite velocities",
            hint="leave the episode out; a single NaN in a batch destroys the weights in training.",
        )
    return actions


def read_event_types(file: h5py.File, path: Path, frames: int) -> tuple[str, ...] | None:
    """The event type of each action, or None where the file has none."""
    if not has_link(file, EVENT_TYPES):
        return None
    texts = read_texts(require_dataset(file, EVENT_TYPES, path), path)
    _require_length(path, EVENT_TYPES, len(texts), frames)
    return texts


def read_action_classes(file: h5py.File, path: Path, frames: int) -> npt.NDArray[np.int64] | None:
    """The stored discrete classes, int64 [T], or None where the file has none. Not compared with the actions."""
    if not has_link(file, ACTION_CLASSES):
        return None
    dataset = require_dataset(file, ACTION_CLASSES, path)
    if dataset.dtype.kind not in "iu" or dataset.shape is None or len(dataset.shape) != 1:
        raise EpisodeError(
            f"{path}: {ACTION_CLASSES} does not hold class numbers",
            got=f"{dataset.dtype} {dataset.shape}",
            expected="int64 (T,)",
            hint=f"delete {ACTION_CLASSES}; episodes.actions.classify_actions computes the classes from the actions.",
        )
    _require_length(path, ACTION_CLASSES, dataset.shape[0], frames)
    with reading(path, ACTION_CLASSES):
        return np.asarray(read_values(dataset, path), dtype=np.int64)


def _require_length(path: Path, name: str, length: int, frames: int) -> None:
    if length == frames:
        return
    relation = "fewer" if length < frames else "more"
    raise EpisodeError(
        f"{path}: there are {relation} {name} than images",
        got=f"{length} {name} for {frames} images",
        expected=f"{frames}: entry i belongs to frame i",
        hint="the recording was cut off; which frame belongs to which action cannot be told: leave the episode out.",
    )
