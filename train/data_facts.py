"""What the episodes of a run are like, in numbers: parts, action statistics, classes, sides, instructions.

Judges nothing; train/preflight_checks.py does. Reads no image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from train.action_classes import ClassTable
from train.episode_set import TrainingEpisode
from train.windows import window_starts


@dataclass(frozen=True)
class PartFacts:
    """The training or the validation part.

    Attributes:
        episodes, frames, windows: numbers.
        short: episodes with fewer frames than a window.
        kinds: kind -> episodes.
        sides: left, right or none -> episodes.
    """

    episodes: int
    frames: int
    windows: int
    short: int
    kinds: dict[str, int]
    sides: dict[str, int]


@dataclass(frozen=True)
class AxisFacts:
    """One column of the training actions, in physical units.

    Attributes:
        clipped: share of values outside the action range.
        zero: share of values that are exactly 0.
    """

    name: str
    minimum: float
    maximum: float
    mean: float
    std: float
    clipped: float
    zero: float


@dataclass(frozen=True)
class InstructionFacts:
    """One text.

    Attributes:
        tokens: of the whole prompt.
        unknown: tokens that stand for something the tokenizer does not know.
        train, val: episodes that are told so.
    """

    text: str
    tokens: int
    unknown: int
    train: int
    val: int


def part_facts(episodes: Sequence[TrainingEpisode], *, window: int) -> PartFacts:
    """Count a part; `window` is W."""
    return PartFacts(
        episodes=len(episodes),
        frames=sum(len(episode) for episode in episodes),
        windows=sum(len(window_starts(len(episode), window)) for episode in episodes),
        short=sum(len(episode) < window for episode in episodes),
        kinds=dict(sorted(Counter(episode.kind for episode in episodes).items())),
        sides=dict(sorted(Counter(episode.side for episode in episodes).items())),
    )


def axis_facts(
    episodes: Sequence[TrainingEpisode], names: Sequence[str], action_range: tuple[float, float]
) -> tuple[AxisFacts, ...]:
    """Statistics of each column over all frames.

    Args:
        names: of the A columns.
        action_range: physical values of -1 and +1.
    """
    values = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    low, high = np.float32(action_range[0]), np.float32(action_range[1])
    return tuple(
        AxisFacts(
            name=name,
            minimum=float(column.min()),
            maximum=float(column.max()),
            mean=float(column.mean()),
            std=float(column.std()),
            clipped=float(np.mean((column < low) | (column > high))),
            zero=float(np.mean(column == 0)),
        )
        for name, column in zip(names, values.T, strict=True)
    )


def class_facts(episodes: Sequence[TrainingEpisode], names: Sequence[str], table: ClassTable) -> dict[str, int]:
    """Frames that are labelled as each class."""
    classes = np.concatenate([table.labels(episode.actions, names) for episode in episodes])
    counts = np.bincount(classes, minlength=len(table))
    return {name: int(count) for name, count in zip(table.names, counts, strict=True)}


def instruction_facts(
    train: Sequence[TrainingEpisode], val: Sequence[TrainingEpisode], prompts: Mapping[str, Sequence[int]], unknown: int
) -> tuple[InstructionFacts, ...]:
    """Each instruction of the episodes, most frequent first.

    Args:
        prompts: instruction -> token ids of its whole prompt.
        unknown: the id of the token for what a tokenizer does not know.
    """
    trained = Counter(episode.instruction for episode in train)
    validated = Counter(episode.instruction for episode in val)
    return tuple(
        InstructionFacts(text, len(ids := list(prompts[text])), ids.count(unknown), trained[text], validated[text])
        for text, _ in (trained + validated).most_common()
    )
