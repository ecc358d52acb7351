"""The policy's own error against recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bundle.manifest import Action
from calib.own_error import OwnError, own_error
from calib.sample import Stretch
from calib.trial import Held
from episodes.reader import open_episode
from episodes.synthetic import write_synthetic

ACTION = Action(
    head="velocities", names=("linear_x", "linear_y", "unused_z"), units=("m/s", "m/s", "rad/s"), normalized=True,
    minimum=-1.15, maximum=1.15, mu=None, class_names=(), class_values=(),
)  # fmt: skip
NOTHING = np.zeros(0, np.uint8)


def test_it_is_the_distance_of_the_command_for_now_in_physical_units(tmp_path: Path) -> None:
    """By axis, over all frames of all stretches; axes that no recording has are left out."""
    paths = [write_synthetic(tmp_path, "v1", side=side, seed=0, height=24, width=32) for side in ("left", "right")]
    held, references = [], {}
    for path, start, off in ((paths[0], 2, 0.02), (paths[1], 0, 0.06)):
        with open_episode(path) as episode:
            names, actions = episode.action_names, episode.actions[start : start + 10]
        each = Held(Stretch(path, start, start + 10, "go"), path.name, NOTHING)
        head = np.full((10, 3, 3), 9.0, np.float32)  # later steps of a chunk are no command for now
        for column, name in enumerate(ACTION.names[:2]):
            head[:, 0, column] = actions[:, names.index(name)] / 1.15 + (off if column else 0)
        held.append(each)
        references[each.key] = head
    x, y = own_error(held, references, ACTION)
    assert x == OwnError("linear_x", "m/s", pytest.approx(0, abs=1e-6))  # type: ignore[arg-type]
    assert y == OwnError("linear_y", "m/s", pytest.approx(1.15 * np.sqrt((0.02**2 + 0.06**2) / 2), rel=1e-4))  # type: ignore[arg-type]
