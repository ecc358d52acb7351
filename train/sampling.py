"""What is seen when: the windows of an epoch in their order, cut into optimizer steps and dealt to processes.

Everything is a function of (seed, epoch), so a run resumes exactly from (epoch, step) without any generator's state, and the number of
processes does not change what a step is made of. In an epoch all windows of an episode share one view (mirrored or not, which colours),
because windows overlap: frames that look alike are encoded once. Knows nothing about files or pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from train.draws import draw_number, draw_uniform
from train.run_config import AugmentConfig, LoopConfig
from train.told import Told, draw_told
from train.windows import window_starts


@dataclass(frozen=True)
class View:
    """How an episode is seen.

    Attributes:
        episode: index into the tuple of episodes.
        mirrored: image, lateral actions and words.
        draw: the number that decides colours, blur and crop; None leaves them as recorded.
        told: other words than the episode's instruction, which may ask for other actions; None is as recorded.
    """

    episode: int
    mirrored: bool
    draw: int | None
    told: Told | None = None


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + W - 1` of a view."""

    view: View
    start: int


MicroBatch = tuple[Window, ...]
Step = tuple[MicroBatch, ...]


def epoch_plan(
    lengths: Sequence[int],
    loop: LoopConfig,
    augment: AugmentConfig,
    *,
    window: int,
    epoch: int,
    words: Sequence[Sequence[str]] = (),
) -> list[Step]:
    """The optimizer steps of an epoch, each of `accumulate` micro-batches of `batch_size` windows.

    Every window of every episode comes exactly once; only the last micro-batch and the last step may be smaller. Runs of
    `windows_per_episode` consecutive windows stay together, and the runs are shuffled.

    Args:
        lengths: frames of each training episode.
        window: W.
        epoch: from 0.
        words: of each episode, the sentences of which an epoch tells one; none where it has its instruction alone.
    """
    views = epoch_views(len(lengths), loop.seed, augment, epoch=epoch, words=words)
    runs: list[tuple[int, MicroBatch]] = []
    for view, length in zip(views, lengths, strict=True):
        starts = window_starts(length, window)
        for first in starts[:: loop.windows_per_episode]:
            run = tuple(
                Window(
                    replace(view, told=draw_told(augment, loop.seed, epoch, view.episode, start) or view.told), start
                )
                for start in starts[first : first + loop.windows_per_episode]
            )
            runs.append((draw_number("order", loop.seed, epoch, view.episode, first), run))
    runs.sort(key=lambda run: (run[0], run[1][0].view.episode, run[1][0].start))
    windows = [each for _, run in runs for each in run]
    batches = [tuple(windows[at : at + loop.batch_size]) for at in range(0, len(windows), loop.batch_size)]
    return [tuple(batches[at : at + loop.accumulate]) for at in range(0, len(batches), loop.accumulate)]


def steps_per_epoch(lengths: Sequence[int], loop: LoopConfig, *, window: int) -> int:
    """len(epoch_plan(...)), which is the same in every epoch."""
    windows = sum(len(window_starts(length, window)) for length in lengths)
    return math.ceil(math.ceil(windows / loop.batch_size) / loop.accumulate)


def epoch_views(
    episodes: int, seed: int, augment: AugmentConfig, *, epoch: int, words: Sequence[Sequence[str]] = ()
) -> tuple[View, ...]:
    """How each episode is seen in an epoch.

    The shares are kept in each epoch to less than one episode, and exactly in the mean, rather than left to chance episode by episode.
    """
    mirrored = _chosen(episodes, augment.mirror, "mirror", seed, epoch)
    changed = _chosen(episodes, augment.share if augment.changes_pixels else 0.0, "change", seed, epoch)
    return tuple(
        View(
            index,
            index in mirrored,
            draw_number("view", seed, epoch, index) if index in changed else None,
            _worded(words[index] if words else (), seed, epoch, index),
        )
        for index in range(episodes)
    )


def _worded(words: Sequence[str], *key: int) -> Told | None:
    return Told(words[draw_number("wording", *key) % len(words)]) if words else None


def _chosen(episodes: int, share: float, what: str, seed: int, epoch: int) -> frozenset[int]:
    """Which episodes belong to the share in this epoch."""
    count = math.floor(share * episodes + draw_uniform(what, seed, epoch))
    ranked = sorted(range(episodes), key=lambda index: draw_number(what, seed, epoch, index))
    return frozenset(ranked[:count])


def shard(step: Step, rank: int, world: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of a step that process `rank` of `world` works on.

    All processes get the same number, as those that exchange gradients must; where a step does not divide, empty ones fill up.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
    own = step[rank::world]
    return own + ((),) * (math.ceil(len(step) / world) - len(own))
