"""Records what the reference policy does: torch, adapters unmerged, fp32, the whole window re-run from zero for every frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bundle.recording import Episode, ReferenceStep
from train.policy import KosmosPolicy, ReferenceStream


def record_reference(
    policy: KosmosPolicy,
    episodes: Sequence[Episode],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    advance: Callable[[], None],
) -> list[list[ReferenceStep]]:
    """Run the reference over the episodes; about a frame's full forward each."""
    record = []
    for episode in episodes:
        stream = ReferenceStream(policy, np.array(episode.token_ids), np.array(episode.mask), mean=mean, std=std)
        steps = []
        for frames in episode.frames:
            steps.append(stream.step(frames))
            advance()
        record.append(steps)
    return record
