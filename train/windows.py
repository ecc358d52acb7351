"""Windows over an episode, the action chunks that a policy should predict in them, and the scale of these actions.

A window is W frames in a row; at each of them the policy predicts the n actions from that frame on, so all W positions are supervised,
as upstream. A window is used as long as its frames exist: actions beyond the end of the episode are masked, not invented. Knows nothing
about files, images or batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError
from train.episode_set import TrainingEpisode
from train.run_config import DataConfig


def window_starts(length: int, window: int) -> range:
    """First frames of the windows of an episode of `length` frames: all full ones, or 0 alone where it is shorter than one.

    Raises:
        ValueError: `length` or `window` is less than 1.
    """
    if min(length, window) < 1:
        raise ValueError(f"length and window must be at least 1, not {length} and {window}")
    return range(max(length - window, 0) + 1)


def action_chunks(
    actions: NDArray[np.float32], start: int, window: int, chunk: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What should be predicted in the window that starts at frame `start`.

    A window that is longer than the episode is padded at its end, where a causal head has already given what counts.

    Args:
        actions: [T, A].
        start: 0 <= start < T.
        window: W.
        chunk: n.

    Returns:
        Targets float32 [W, n, A], target (w, k) being action start + w + k, and their mask bool [W, n], False (and the target 0) where
        there is no such action.
    """
    if not 0 <= start < len(actions):
        raise ValueError(f"a window cannot start at {start} in an episode of {len(actions)} frames")
    index = start + np.arange(window)[:, None] + np.arange(chunk)[None, :]
    mask = index < len(actions)
    targets = np.where(mask[..., None], actions[np.minimum(index, len(actions) - 1)], np.float32(0))
    return targets.astype(np.float32, copy=False), mask


def normalize_actions(actions: NDArray[np.float32], minimum: float, maximum: float) -> NDArray[np.float32]:
    """Physical values to [-1, 1], float32 of the same shape: clipped to the range, then 2 (x - min) / (max - min) - 1."""
    clipped = np.clip(actions.astype(np.float64), minimum, maximum)
    return (2 * (clipped - minimum) / (maximum - minimum) - 1).astype(np.float32)


def resolve_action_range(data: DataConfig, episodes: Sequence[TrainingEpisode]) -> tuple[float, float]:
    """The physical values that become -1 and +1: those of the config, or for `auto` the largest absolute action, symmetrically.

    Args:
        episodes: of the training part; validation must not decide the scale.

    Raises:
        ConfigError: `auto`, and no action differs from zero.
    """
    if data.action_range != "auto":
        return data.action_range
    largest = max((float(np.abs(episode.actions).max(initial=0.0)) for episode in episodes), default=0.0)
    if not largest > 0:
        raise ConfigError(
            "data.action_range cannot be found from the data",
            got=f"only zeros in {', '.join(data.actions)} of {len(episodes)} training episodes",
            expected="a robot that moves",
            hint="check that data.actions names the axes that the robot uses, or set data.action_range.",
        )
    largest = float(f"{largest:.7g}")  # 1.15, and not the 1.149999976158142 that a float32 makes of it
    return -largest, largest
