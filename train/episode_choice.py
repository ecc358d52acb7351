"""How often each episode of a source is trained on, by shares of the groups that file names say. A function of the seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from train.draws import draw_number
from train.episode_set import TrainingEpisode
from train.file_names import family_of, path_type_of
from train.run_config import SourceConfig


def weighted(
    episodes: Sequence[TrainingEpisode], sources: Sequence[SourceConfig], *, seed: int
) -> tuple[TrainingEpisode, ...]:
    """The episodes of an epoch: those of a source with shares as often as these say, the others once.

    A group gets its share of the number of the source's episodes, rounded; one that has more is drawn from without repetition, one that
    has fewer repeats each as evenly as possible. A group that the shares do not name is left out.
    """
    chosen: list[TrainingEpisode] = []
    for number, source in enumerate(sources):
        own = [episode for episode in episodes if episode.source == number]
        for shares, group_of in ((source.path_shares, path_type_of), (source.family_shares, family_of)):
            if shares:
                own = _resampled(own, shares, group_of, seed)
        chosen += own
    return tuple(chosen)


def _resampled(
    episodes: Sequence[TrainingEpisode], shares: Mapping[str, float], group_of: Callable[[str], str], seed: int
) -> list[TrainingEpisode]:
    groups: defaultdict[str, list[TrainingEpisode]] = defaultdict(list)
    for episode in episodes:
        groups[group_of(episode.stem)].append(episode)
    chosen = []
    for name in sorted(groups):
        wanted = round(len(episodes) * shares.get(name, 0.0))
        drawn = sorted(groups[name], key=lambda episode: draw_number("share", seed, episode.name))
        chosen += (drawn * math.ceil(wanted / len(drawn)))[:wanted]
    return sorted(chosen, key=list(episodes).index)
