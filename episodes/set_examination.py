"""Compares the examined episodes of a set: what no single file shows, and what training on all of them would meet.

A policy trained on files of two colour orders, two frame rates or nearly one side only learns that too. Files that have errors do not
count, except in their number. Reads no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from episodes.actions import CLASS_NAMES
from episodes.colour_order import compare_colours, is_split
from episodes.findings import Examination, Problem
from episodes.instruction import sides_in_text

_SAME_RATE = 1.1  # as in training: a chunk of n actions means another length of time at another rate
_BALANCED = 2.0  # episodes of the more frequent side for each of the other


@dataclass(frozen=True)
class SetSummary:
    """A set of episodes in numbers; all but the first two count only episodes without errors.

    Attributes:
        episodes, unusable: in all; those with errors.
        frames, seconds, bytes: seconds of episodes whose frame rate is known.
        schemas, sizes, rates, instructions: value -> episodes; sizes as "HxW", rates rounded to 0.1 fps.
        sides: left, right or none -> episodes; by the instruction, else by the actions.
        left_frames, right_frames: frames that go sideways.
        classes: frames of each of the nine classes.
        advice: what to do before training on the set.
    """

    episodes: int
    unusable: int
    frames: int
    seconds: float
    bytes: int
    schemas: dict[str, int]
    sizes: dict[str, int]
    rates: dict[str, int]
    instructions: dict[str, int]
    sides: dict[str, int]
    left_frames: int
    right_frames: int
    classes: dict[str, int]
    advice: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def examine_set(episodes: Sequence[Examination]) -> tuple[tuple[Examination, ...], SetSummary]:
    """The episodes with the problems that show by comparison added, and the summary."""
    comparisons = compare_colours([episode.bands for episode in episodes])
    split = is_split(comparisons)
    judged = []
    for episode, comparison in zip(episodes, comparisons, strict=True):
        if comparison is not None and comparison.suspect and not split:
            text = (
                f"red and blue look swapped (confidence {comparison.confidence}): distance to the other files "
                f"{comparison.as_read:.0f} grey levels as read, {comparison.swapped:.0f} after swapping"
            )
            hint = "look at a frame; if it is so, --repair --swap-colour on this file alone mends it."
            episode = replace(episode, problems=(*episode.problems, Problem("colour_order", "warning", text, hint)))
        judged.append(episode)
    return tuple(judged), _summary(judged, split)


def _summary(episodes: Sequence[Examination], split: bool) -> SetSummary:
    usable = [episode for episode in episodes if not episode.errors]
    schemas = Counter(str(episode.schema) for episode in usable)
    sizes = Counter(f"{episode.height}x{episode.width}" for episode in usable)
    rates = Counter("unknown" if episode.fps is None else f"{episode.fps:.1f}" for episode in usable)
    sides = Counter(_side(episode) for episode in usable)
    advice = []
    if split:
        advice.append(
            "About half of the episodes look swapped in red and blue against the other half; nobody can tell from the "
            "files which half is right. Look at a frame of each."
        )
    if len(schemas) > 1:
        advice.append(
            f"{_counted(schemas)}: schemas differ in colour order and often in the robot's task; training wants a source "
            "of each in its config."
        )
    if len(sizes) > 1:
        advice.append(f"{_counted(sizes)}: all are squashed to one square, so shapes differ between these sizes.")
    known = [episode.fps for episode in usable if episode.fps is not None]
    if known and max(known) > _SAME_RATE * min(known):
        advice.append(f"{_counted(rates)} fps: an action chunk lasts another time at each rate; train on one.")
    if len(usable) > 1 and (sides["left"] or sides["right"]):
        more, fewer = sorted(("left", "right"), key=lambda side: -sides[side])
        if sides[more] > _BALANCED * sides[fewer]:
            advice.append(
                f"{sides[more]} episodes go {more}, {sides[fewer]} go {fewer}: the policy can ignore the instruction. "
                "Record the other side, or mirror in training."
            )
    if assumed := sum(episode.instruction_source != "stored" for episode in usable):
        advice.append(
            f"{assumed} of {len(usable)} episodes store no instruction: --repair --out DIR writes copies with it."
        )
    if unusable := len(episodes) - len(usable):
        advice.append(f"{unusable} of {len(episodes)} episodes have errors: training refuses them, so leave them out.")
    return SetSummary(
        episodes=len(episodes),
        unusable=len(episodes) - len(usable),
        frames=sum(episode.frames for episode in usable),
        seconds=sum(episode.frames / episode.fps for episode in usable if episode.fps is not None),
        bytes=sum(episode.bytes or 0 for episode in usable),
        schemas=dict(schemas),
        sizes=dict(sizes),
        rates=dict(rates),
        instructions=dict(Counter(episode.instruction for episode in usable if episode.instruction is not None)),
        sides={side: sides[side] for side in ("left", "right", "none")},
        left_frames=sum(episode.left for episode in usable),
        right_frames=sum(episode.right for episode in usable),
        classes={name: sum(episode.classes.get(name, 0) for episode in usable) for name in CLASS_NAMES},
        advice=tuple(advice),
    )


def _side(episode: Examination) -> str:
    """left, right or none: by the one side that the instruction names, else by the actions."""
    told = sides_in_text(episode.instruction or "")
    if len(told) == 1:
        return next(iter(told))
    return "left" if episode.left > episode.right else "right" if episode.right > episode.left else "none"


def _counted(values: Counter[str]) -> str:
    return ", ".join(f"{count} x {value}" for value, count in values.most_common())
