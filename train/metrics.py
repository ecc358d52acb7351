"""Measures of predicted actions against recorded ones, on plain arrays; intervals by resampling episodes.

Frames of an episode are alike, so the unit that is resampled is the episode: intervals over frames would be several times too narrow.
All measures are sums over frames divided by their number, so one matrix product gives every resample. Knows nothing about policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from episodes.actions import CLASS_NAMES, CLASS_THRESHOLD, classify_actions
from train.action_classes import AXES, THRESHOLDS, ClassTable

SIDES = ("left", "none", "right")
RESAMPLES = 2000
_COVERAGE = (2.5, 97.5)
_PLANE = ("linear_x", "linear_y")


@dataclass(frozen=True)
class Estimate:
    """A measure over a set of episodes, with its 95 % interval, or None where there are too few episodes for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class Sums:
    """What one episode adds to every measure.

    Attributes:
        frames: T.
        squares, absolutes: float64 [A], summed over frames.
        signs: int64 [A], frames in which an axis goes the right way: up, down, or neither.
        directions: int64 [C, C], recorded by predicted: a class head's own classes, else nine directions; all zeros without a linear axis,
            which have no directions.
        sides: int64 [3, 3], recorded by predicted.
    """

    frames: int
    squares: NDArray[np.float64]
    absolutes: NDArray[np.float64]
    signs: NDArray[np.int64]
    directions: NDArray[np.int64]
    sides: NDArray[np.int64]


@dataclass(frozen=True)
class Measures:
    """A set of episodes, measured.

    Attributes:
        frames, episodes: numbers.
        rmse, mae: per axis, in its unit.
        constant_rmse: per axis, of the best constant prediction: the recorded standard deviation.
        sign_accuracy: per axis, share of frames in which it goes the right way: up, down, or neither.
        direction_accuracy: share of frames with the right class, or one of nine directions; NaN without a linear axis.
        majority: the commonest recorded direction and its share: what naming it always would score; NaN without a linear axis.
        directions, sides: summed confusion matrices, recorded by predicted.
        names: of the rows and columns of `directions`.
    """

    frames: int
    episodes: int
    rmse: tuple[Estimate, ...]
    mae: tuple[Estimate, ...]
    constant_rmse: tuple[float, ...]
    sign_accuracy: tuple[Estimate, ...]
    direction_accuracy: Estimate
    majority: tuple[str, float]
    directions: NDArray[np.int64]
    sides: NDArray[np.int64]
    names: tuple[str, ...] = CLASS_NAMES


def episode_sums(
    predicted: NDArray[np.float32],
    recorded: NDArray[np.float32],
    axes: Sequence[str],
    *,
    classes: ClassTable | None = None,
    threshold: float = CLASS_THRESHOLD,
) -> Sums:
    """What an episode adds.

    Args:
        predicted, recorded: [T, A], physical units.
        axes: names of the columns; directions are of linear_x and linear_y, one that is missing counting as 0.
        classes: of a class head, instead of the nine directions.
        threshold: up to which a component of a direction does not count, in the axes' units.
    """
    error = predicted.astype(np.float64) - recorded
    # Of a class head, each axis by its own: turns are slower numbers than drives.
    own = {} if classes is None else dict(zip(AXES, THRESHOLDS, strict=True))
    still = np.array([own.get(name, threshold) for name in axes])
    signs = (_signs(predicted, still) == _signs(recorded, still)).sum(axis=0)
    count = len(CLASS_NAMES) if classes is None else len(classes)
    confusion = np.zeros((count, count), np.int64)
    if has_directions(axes):
        pair = [
            classify_actions(planar(values, axes), threshold) if classes is None else classes.labels(values, axes)
            for values in (recorded, predicted)
        ]
        np.add.at(confusion, tuple(pair), 1)
    lateral = [planar(values, axes)[:, 1] for values in (predicted, recorded)]
    sides = left_right_confusion(*lateral, threshold=threshold)
    return Sums(len(error), (error**2).sum(axis=0), np.abs(error).sum(axis=0), signs, confusion, sides)


def measure(
    episodes: Sequence[Sums],
    recorded: Sequence[NDArray[np.float32]],
    *,
    names: tuple[str, ...] = CLASS_NAMES,
    seed: int = 0,
) -> Measures:
    """Sums of episodes (at least one) to measures.

    Args:
        recorded: [T, A] of each, for the constant baseline.
        names: of the directions.
        seed: of the resampling.
    """
    frames = np.array([each.frames for each in episodes], np.float64)
    squares = np.stack([each.squares for each in episodes])
    absolutes = np.stack([each.absolutes for each in episodes])
    directions = np.sum([each.directions for each in episodes], axis=0)
    signs = np.stack([each.signs for each in episodes]).astype(np.float64)
    correct = np.array([np.trace(each.directions) for each in episodes], np.float64)
    weights = _resamples(len(episodes), seed)
    by_class = directions.sum(axis=1)
    commonest, classified = int(by_class.argmax()), int(by_class.sum())
    return Measures(
        frames=int(frames.sum()),
        episodes=len(episodes),
        rmse=tuple(_estimate(column, frames, weights, root=True) for column in squares.T),
        mae=tuple(_estimate(column, frames, weights) for column in absolutes.T),
        constant_rmse=tuple(float(value) for value in np.concatenate(recorded).astype(np.float64).std(axis=0)),
        sign_accuracy=tuple(_estimate(column, frames, weights) for column in signs.T),
        direction_accuracy=_estimate(correct, frames, weights) if classified else Estimate(math.nan),
        majority=(names[commonest], float(by_class[commonest] / classified) if classified else math.nan),
        directions=directions,
        sides=np.sum([each.sides for each in episodes], axis=0),
        names=names,
    )


def left_right_confusion(
    predicted: NDArray[np.float32], recorded: NDArray[np.float32], *, threshold: float = CLASS_THRESHOLD
) -> NDArray[np.int64]:
    """How often each side was taken for which: int64 [3, 3], recorded by predicted, in the order of SIDES.

    Args:
        predicted, recorded: [T] lateral velocities, positive to the left; within `threshold` counts as none.
    """
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (_sides(recorded, threshold), _sides(predicted, threshold)), 1)
    return confusion


def has_directions(axes: Sequence[str]) -> bool:
    """Whether any axis moves in the plane: without one, every frame would count as a correct stop."""
    return not set(_PLANE).isdisjoint(axes)


def planar(actions: NDArray[np.float32], axes: Sequence[str]) -> NDArray[np.float32]:
    """linear_x and linear_y [T, 2] of actions [T, A]; an axis that is not there is 0."""
    result = np.zeros((len(actions), 2), np.float32)
    for column, name in enumerate(_PLANE):
        if name in axes:
            result[:, column] = actions[:, list(axes).index(name)]
    return result


def _sides(lateral: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    return np.where(lateral > threshold, 0, np.where(lateral < -threshold, 2, 1)).astype(np.int64)


def _signs(values: NDArray[np.float32], threshold: NDArray[np.float64]) -> NDArray[np.float32]:
    signs: NDArray[np.float32] = np.where(np.abs(values) > threshold, np.sign(values), 0).astype(np.float32)
    return signs


def _resamples(episodes: int, seed: int) -> NDArray[np.float64] | None:
    """How often each episode comes in each resample [R, E]; None for a single one, which says nothing about others."""
    if episodes < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(episodes, np.full(episodes, 1 / episodes), size=RESAMPLES)
    return drawn.astype(np.float64)


def _estimate(
    sums: NDArray[np.float64], frames: NDArray[np.float64], weights: NDArray[np.float64] | None, *, root: bool = False
) -> Estimate:
    value = float(sums.sum() / frames.sum())
    if weights is None:
        return Estimate(value**0.5 if root else value)
    low, high = (float(edge) for edge in np.percentile((weights @ sums) / (weights @ frames), _COVERAGE))
    return Estimate(value**0.5, low**0.5, high**0.5) if root else Estimate(value, low, high)
