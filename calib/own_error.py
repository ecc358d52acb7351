"""How far the floating-point policy itself is from the recordings: the scale on which INT8's difference is large or small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Action
from calib.candidates import opened
from calib.trial import Held
from runtime.actions import denormalize


class OwnError(msgspec.Struct, frozen=True):
    """Root mean square difference between the command for now and what was recorded at that frame, in the axis' unit."""

    axis: str
    unit: str
    rmse: float


def own_error(
    held: Sequence[Held], references: Mapping[str, NDArray[np.float32]], action: Action
) -> tuple[OwnError, ...]:
    """Over all frames of these stretches, for the axes that recordings and policy share.

    Args:
        references: what the floating-point head gives, float32 [T, n, A], by stretch.

    Raises:
        EpisodeError: a file is gone or damaged.
    """
    differences: dict[str, list[NDArray[np.float64]]] = {}
    for each in held:
        commands = denormalize(references[each.key][:, 0], action).astype(np.float64)
        with opened(each.stretch.source) as episode:
            recorded = episode.actions[each.stretch.start : each.stretch.stop].astype(np.float64)
            for column, name in enumerate(action.names):
                if name in episode.action_names:
                    difference = commands[:, column] - recorded[:, episode.action_names.index(name)]
                    differences.setdefault(name, []).append(difference)
    return tuple(
        OwnError(name, unit, float(np.sqrt(np.mean(np.concatenate(differences[name]) ** 2))))
        for name, unit in zip(action.names, action.units, strict=True)
        if name in differences
    )
