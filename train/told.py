"""Windows that are told something else than what was recorded, and whose actions are then what those words ask for.

What they see stays as recorded, so that only the words can tell what to do: words that are obeyed must be heard. A share of the windows is
told to stop; a share of the rest to go sideways or to turn in place, to the left and to the right alike. Functions of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from episodes.instruction import sides_in_text
from train.action_classes import AXES, DIRECTIONS, ClassTable
from train.augmentation import mirror_text
from train.draws import draw_number, draw_uniform
from train.run_config import AugmentConfig

# m/s, m/s, rad/s: of the lab's loader, where a window is told to go sideways or to turn.
_SPEEDS = (0.0, 0.6, 0.2)


@dataclass(frozen=True)
class Told:
    """Words, and the motion that they ask for.

    Attributes:
        words: an instruction.
        motion: a key of train.action_classes.DIRECTIONS; None is what was recorded, in other words.
    """

    words: str
    motion: str | None = None

    def action(self, names: Sequence[str]) -> NDArray[np.float32]:
        """What is to be done at every frame, float32 [A] in m/s and rad/s; `names` are of the A columns, others are 0."""
        assert self.motion is not None
        parts = {axis: sign * speed for axis, sign, speed in zip(AXES, DIRECTIONS[self.motion], _SPEEDS, strict=True)}
        return np.array([parts.get(name, 0.0) for name in names], np.float32)


def draw_told(augment: AugmentConfig, *window: int) -> Told | None:
    """What a window is told, if it is one that is told something.

    Args:
        window: seed, epoch, episode and first frame.
    """
    if draw_uniform("stop", *window) < augment.stop:
        motion, words = "Stop", augment.stop_words
    elif draw_uniform("steer", *window) < augment.steer:
        steered = list(_steered(augment).items())
        motion, words = steered[draw_number("motion", *window) % len(steered)]
    else:
        return None
    return Told(words[draw_number("words", *window) % len(words)], motion)


def told_texts(augment: AugmentConfig) -> tuple[str, ...]:
    """Every instruction that a window may be told."""
    steered = [text for words in _steered(augment).values() for text in words] if augment.steer > 0 else []
    return (*(augment.stop_words if augment.stop > 0 else ()), *steered)


def told_problems(
    augment: AugmentConfig, names: Sequence[str], classes: ClassTable | None
) -> Iterator[tuple[str, object, str]]:
    """(key, got, expected) of what cannot be told.

    Args:
        names: of the columns that are learned.
        classes: of a class head.
    """
    if augment.stop > 0 and not all(text.strip() for text in augment.stop_words or [""]):
        yield "augment.stop_words", list(augment.stop_words), "at least one sentence, none of them empty"
    if augment.steer == 0:
        return
    if not _steered(augment):
        yield "augment.steer", augment.steer, "0, or sentences in augment.slide_words or augment.turn_words"
    for key, axis in (("slide_words", "linear_y"), ("turn_words", "angular_z")):
        words: tuple[str, ...] = getattr(augment, key)
        if not all(sides_in_text(text) == {"left"} and sides_in_text(mirror_text(text)) == {"right"} for text in words):
            yield (
                f"augment.{key}",
                list(words),
                "sentences that name the left side and no other; mirrored they are for the right",
            )
        elif words and axis not in names:
            yield f"augment.{key}", list(words), f"[], since data.actions has no {axis}"
    if classes is not None:
        for motion in _steered(augment):
            if not any(classes.values[_label(motion, classes)]):
                yield "augment.steer", augment.steer, f"0: no class is {motion}, nor is it relabelled as one that moves"


def told_classes(augment: AugmentConfig, classes: ClassTable) -> frozenset[str]:
    """The classes that told windows are labelled as."""
    motions = (*(("Stop",) if augment.stop > 0 else ()), *(_steered(augment) if augment.steer > 0 else ()))
    return frozenset(classes.names[_label(motion, classes)] for motion in motions)


def _label(motion: str, classes: ClassTable) -> int:
    return int(classes.labels(Told("", motion).action(AXES), AXES))


def _steered(augment: AugmentConfig) -> dict[str, tuple[str, ...]]:
    """Words for each motion to a side."""
    left = {"L": augment.slide_words, "TurnL": augment.turn_words}
    right = {"R": augment.slide_words, "TurnR": augment.turn_words}
    words = {**left, **{motion: tuple(map(mirror_text, texts)) for motion, texts in right.items()}}
    return {motion: texts for motion, texts in words.items() if texts}
