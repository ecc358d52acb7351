"""A policy judged on recorded episodes, a checkpoint and a bundle by the same numbers.

Each episode is played from a reset, frame by frame, as on the robot. The action for now is compared with the recorded one in physical
units: errors per axis, directions against the commonest one, a table per instruction, and the error of later chunk steps against what
was recorded later. Optionally everything is done again with left and right swapped in the words: a policy that does no worse then does
not listen. Knows nothing about printing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError, ConfigError, EpisodeError
from bundle.prompt_template import told
from episodes.actions import CLASS_NAMES
from episodes.reader import Episode, EpisodeWarning, open_episode
from episodes.sources import find_sources
from train.action_classes import ClassTable, classes_of_action
from train.augmentation import other_words
from train.metrics import Estimate, Measures, Sums, episode_sums, has_directions, measure
from train.predictors import Predictor
from train.split import SPLIT_NAME, read_split


@dataclass(frozen=True)
class Played:
    """One episode as it was played.

    Attributes:
        name: of the file.
        instruction: what the policy was told.
        predicted, recorded: float32 [T, A] of the common axes, physical units.
        horizon: float64 [n, A], squared errors of chunk step k against the action k frames later, summed over frames.
        sums: what it adds to the measures.
    """

    name: str
    instruction: str
    predicted: NDArray[np.float32]
    recorded: NDArray[np.float32]
    horizon: NDArray[np.float64]
    sums: Sums

    @property
    def rmse(self) -> float:
        """Over all axes."""
        return float(np.sqrt(np.mean((self.predicted.astype(np.float64) - self.recorded) ** 2)))


@dataclass(frozen=True)
class Evaluation:
    """The outcome.

    Attributes:
        description: what was judged.
        axes, units: of the compared columns.
        episodes: as played.
        measures: over all.
        by_instruction: the same per instruction.
        horizon_rmse: float64 [n, A]: how well chunk step k foretells the action k frames later; NaN beyond the longest episode.
        swapped: direction accuracy (NaN without a linear axis), and mean absolute change of the action, with left and right swapped in
            the words; None if not asked.
    """

    description: str
    axes: tuple[str, ...]
    units: tuple[str, ...]
    episodes: tuple[Played, ...]
    measures: Measures
    by_instruction: dict[str, Measures]
    horizon_rmse: NDArray[np.float64]
    swapped: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """Plain data of everything but the predictions."""
        return {
            "policy": self.description,
            "axes": list(self.axes),
            "units": list(self.units),
            **self._measures(self.measures),
            "by_instruction": {text: self._measures(found) for text, found in self.by_instruction.items()},
            "horizon_rmse": [[None if np.isnan(v) else float(v) for v in row] for row in self.horizon_rmse],
            "swapped_words": None
            if self.swapped is None
            else {
                "direction_accuracy": None if math.isnan(self.swapped[0]) else self.swapped[0],
                "mean_change": self.swapped[1],
            },
            "episode_rmse": {played.name: played.rmse for played in self.episodes},
        }

    def _measures(self, found: Measures) -> dict[str, Any]:
        def plain(estimate: Estimate) -> dict[str, float | None]:
            return {"value": estimate.value, "low": estimate.low, "high": estimate.high}

        return {
            "frames": found.frames,
            "episodes": found.episodes,
            "rmse": {axis: plain(value) for axis, value in zip(self.axes, found.rmse, strict=True)},
            "mae": {axis: plain(value) for axis, value in zip(self.axes, found.mae, strict=True)},
            "constant_rmse": dict(zip(self.axes, found.constant_rmse, strict=True)),
            "sign_accuracy": {axis: plain(value) for axis, value in zip(self.axes, found.sign_accuracy, strict=True)},
            "direction_accuracy": plain(found.direction_accuracy) if has_directions(self.axes) else None,
            "majority": {"direction": found.majority[0], "accuracy": found.majority[1]}
            if has_directions(self.axes)
            else None,
            "directions": found.directions.tolist(),
            "direction_names": list(found.names),
            "sides": found.sides.tolist(),
        }


def episode_paths(patterns: Sequence[str], *, split: Path | None, part: str) -> tuple[Path, ...]:
    """The files of patterns (paths, folders, globs), or those of them that a split file puts into one part.

    Raises:
        EpisodeError: nothing matches.
        ConfigError: none is in that part.
    """
    found = find_sources(patterns)
    if split is None:
        return found
    names = set(read_split(split).val if part == "val" else read_split(split).train)
    chosen = tuple(path for path in found if path.name in names)
    if not chosen:
        raise ConfigError(
            f"none of the episodes is in the {part} part of {split}",
            got=", ".join(path.name for path in found[:3]),
            expected=", ".join(sorted(names)[:3]),
            hint="pass the episodes that the run was trained with.",
        )
    return chosen


def trained_on(policy: Path, paths: Sequence[Path]) -> tuple[int, Path] | None:
    """How many of the episodes the run of a checkpoint was trained on, and its split; None for a policy of which that is not known."""
    split = policy.absolute().parent.parent / SPLIT_NAME
    try:
        names = set(read_split(split).train)
    except ConfigError:
        return None
    return sum(path.name in names for path in paths), split


def evaluate(
    predictor: Predictor,
    paths: Sequence[Path],
    *,
    instruction: str | None = None,
    swap_words: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Judge a policy.

    Args:
        instruction: instead of the episodes' own.
        swap_words: play everything a second time with other words.
        advance: called after each pass over an episode.

    Raises:
        EpisodeError: no instruction, no common axis, a camera too few, or a damaged frame.
        BackendError: a prediction is not finite.
    """
    played, other = [], []
    axes: tuple[str, ...] | None = None
    classes = classes_of_action(predictor.action) if predictor.action.head == "classes" else None
    for path in paths:
        with _opened(path) as episode:
            episode.require_cameras(predictor.cameras)
            predictor.check_rate(episode.fps)
            common = _common_axes(episode, predictor, axes)
            axes = common
            said = _told(episode, instruction, predictor.template)
            played.append(_play(predictor, episode, said, common, classes))
            advance()
            if swap_words:
                other.append(_play(predictor, episode, other_words(said), common, classes))
                advance()
    assert axes is not None, "at least one episode"
    groups: dict[str, list[Played]] = {}
    for each in played:
        groups.setdefault(each.instruction, []).append(each)
    return Evaluation(
        description=predictor.description,
        axes=axes,
        units=tuple(predictor.action.units[predictor.action.names.index(axis)] for axis in axes),
        episodes=tuple(played),
        measures=_measures(played, classes),
        by_instruction={text: _measures(group, classes) for text, group in sorted(groups.items())},
        horizon_rmse=_horizon(played),
        swapped=_swapped(played, other) if swap_words else None,
    )


def _opened(path: Path) -> Episode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # the instruction that was used stands in the table
        return open_episode(path)


def _common_axes(episode: Episode, predictor: Predictor, before: tuple[str, ...] | None) -> tuple[str, ...]:
    # A class head's recordings may lack angular_z: they do not turn, as for the loader that it was trained with.
    recorded = (*episode.action_names, *(("angular_z",) if predictor.action.head == "classes" else ()))
    common = tuple(name for name in predictor.action.names if name in recorded)
    if not set(common) & set(episode.action_names):
        common = ()
    if not common or (before is not None and common != before):
        raise EpisodeError(
            f"{episode.path} has other axes than " + ("the policy" if not common else "the episodes before it"),
            got=", ".join(episode.action_names),
            expected=", ".join(before or predictor.action.names),
            hint="evaluate episodes of one robot, and state the policy's axes where they are not recorded: --action-names ...",
        )
    return common


def _told(episode: Episode, instruction: str | None, template: str) -> str:
    said = told(template, instruction, episode.instruction)
    if said is None:
        raise EpisodeError(
            f"{episode.path} has no instruction",
            expected="one stored, or left or right in the file name",
            hint="pass --instruction '...'.",
        )
    return said


def _play(
    predictor: Predictor, episode: Episode, said: str, axes: tuple[str, ...], classes: ClassTable | None
) -> Played:
    ours = [predictor.action.names.index(axis) for axis in axes]
    recorded = np.zeros((len(episode), len(axes)), np.float32)
    for column, axis in enumerate(axes):
        if axis in episode.action_names:
            recorded[:, column] = episode.actions[:, episode.action_names.index(axis)]
    predictor.reset(said)
    chunks = []
    for index in range(len(episode)):
        chunk = predictor.predict(episode.views(index, predictor.cameras))[:, ours]
        if not np.isfinite(chunk).all():
            raise BackendError(
                f"the prediction for frame {index} of {episode.path.name} is not finite",
                got=np.array2string(chunk[0]),
                expected="finite commands",
                hint="the weights or the precision of the engine are at fault: evaluate the checkpoint, or an fp32 bundle.",
            )
        chunks.append(chunk)
    stacked = np.stack(chunks)
    horizon = np.stack(
        [
            ((stacked[: max(len(recorded) - k, 0), k].astype(np.float64) - recorded[k:]) ** 2).sum(axis=0)
            for k in range(stacked.shape[1])
        ]
    )
    now = stacked[:, 0]
    return Played(episode.path.name, said, now, recorded, horizon, episode_sums(now, recorded, axes, classes=classes))


def _measures(played: Sequence[Played], classes: ClassTable | None) -> Measures:
    names = CLASS_NAMES if classes is None else classes.names
    return measure([each.sums for each in played], [each.recorded for each in played], names=names)


def _horizon(played: Sequence[Played]) -> NDArray[np.float64]:
    sums = np.sum([each.horizon for each in played], axis=0)
    counts = np.array([sum(max(len(each.recorded) - k, 0) for each in played) for k in range(len(sums))], np.float64)
    counts[counts == 0] = np.nan
    return np.asarray(np.sqrt(sums / counts[:, None]))


def _swapped(played: Sequence[Played], other: Sequence[Played]) -> tuple[float, float]:
    directions = np.sum([each.sums.directions for each in other], axis=0)
    accuracy = float(np.trace(directions) / directions.sum()) if directions.any() else math.nan
    change = np.concatenate([np.abs(a.predicted - b.predicted) for a, b in zip(played, other, strict=True)])
    return accuracy, float(change.mean())
