"""Replay of a recorded episode: what would the policy have done, and how far is that from what the robot did?

The policy sees the episode's frames in order, as it would on the robot; step 0 of each chunk is compared with the recorded action of the
same frame. Knows nothing about files' layouts (episodes/) and drives nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import EpisodeError
from bundle.manifest import Preprocessing
from bundle.prompt_template import told
from episodes.reader import Episode, open_episode
from runtime.policy import Policy
from runtime.preprocess import resize


@dataclass(frozen=True)
class Replay:
    """The outcome of one replay.

    Attributes:
        instruction: what the policy was told.
        axes: names of the compared columns: those that both policy and episode have.
        units: their units.
        predicted, recorded: float32 [T, len(axes)], physical units.
        timing: milliseconds per section, each float64 [T].
    """

    instruction: str
    axes: tuple[str, ...]
    units: tuple[str, ...]
    predicted: NDArray[np.float32]
    recorded: NDArray[np.float32]
    timing: dict[str, NDArray[np.float64]]

    @property
    def rmse(self) -> NDArray[np.float64]:
        """Root mean square error per axis."""
        error = self.predicted.astype(np.float64) - self.recorded
        result: NDArray[np.float64] = np.sqrt(np.mean(error**2, axis=0))
        return result

    def as_json(self) -> dict[str, Any]:
        """Plain data: everything above, percentiles for the timing."""
        return {
            "instruction": self.instruction,
            "frames": len(self.predicted),
            "axes": [
                {"name": name, "unit": unit, "rmse": float(rmse)}
                for name, unit, rmse in zip(self.axes, self.units, self.rmse, strict=True)
            ],
            "predicted": self.predicted.tolist(),
            "recorded": self.recorded.tolist(),
            "timing_ms": {
                section: {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
                for section, values in self.timing.items()
            },
        }


def replay(
    policy: Policy, episode: Episode, *, instruction: str | None = None, advance: Callable[[], None] = lambda: None
) -> Replay:
    """Run the policy over an episode from a reset.

    Args:
        instruction: overrides the episode's.
        advance: called after each frame.

    Raises:
        EpisodeError: no instruction anywhere, no common action axis, a hand camera the episode lacks, or a damaged frame.
        PromptError, BackendError: see Policy.
    """
    said = told(policy.manifest.prompt.template, instruction, episode.instruction)
    if said is None:
        raise EpisodeError(
            f"{episode.path} has no instruction",
            expected="one stored, or left/right in the name",
            hint="pass --instruction '...'.",
        )
    manifest = policy.manifest
    cameras = manifest.preprocessing.cameras
    episode.require_cameras(cameras)
    axes = tuple(name for name in manifest.action.names if name in episode.action_names)
    if not axes:
        raise EpisodeError(
            f"{episode.path} and the policy have no action in common",
            got=", ".join(episode.action_names),
            expected=", ".join(manifest.action.names),
            hint="state the policy's axes when building: --action-names linear_x linear_y",
        )
    policy.reset(said)
    predicted: list[NDArray[np.float32]] = []
    timing: dict[str, list[float]] = {}
    columns = [manifest.action.names.index(name) for name in axes]
    for index in range(len(episode)):
        views = dict(zip(cameras, episode.views(index, cameras), strict=True))
        chunk = policy.step(views["static"], hand=views.get("hand"))
        predicted.append(chunk.values[0, columns])
        for section, milliseconds in chunk.timing.items():
            timing.setdefault(section, []).append(milliseconds)
        advance()
    return Replay(
        instruction=said,
        axes=axes,
        units=tuple(manifest.action.units[column] for column in columns),
        predicted=np.array(predicted),
        recorded=episode.actions[:, [episode.action_names.index(name) for name in axes]],
        timing={section: np.array(values) for section, values in timing.items()},
    )


@dataclass(frozen=True)
class ResizedEpisode:
    """An episode as the policy sees it.

    Attributes:
        frames: uint8 [T, cameras, s, s, 3], resized as `Policy.step` does.
        actions: float32 [T, A], as recorded.
        action_names: names of the A columns.
        instruction: what the robot was told, or None.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.float32]
    action_names: tuple[str, ...]
    instruction: str | None


def read_resized(path: Path, preprocessing: Preprocessing, size: int, *, limit: int | None = None) -> ResizedEpisode:
    """Read the first `limit` frames of an episode (by default all).

    Raises:
        EpisodeError: see open_episode; or a camera is missing.
    """
    with open_episode(path) as episode:
        episode.require_cameras(preprocessing.cameras)
        count = len(episode) if limit is None else min(limit, len(episode))
        views = (episode.views(index, preprocessing.cameras) for index in range(count))
        frames = np.array([[resize(view, preprocessing, size) for view in each] for each in views])
        return ResizedEpisode(frames, episode.actions[:count], episode.action_names, episode.instruction)
