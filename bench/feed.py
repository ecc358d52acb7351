"""Frames for a measurement: those of a recorded episode at its camera's size, decoded beforehand and shown in turn.

Decoding is the camera's work, not the policy's, so it happens before the first step. Without an episode the frames are drawn, and the
result says so: a picture's content does not change how long a step takes, its size does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError, EpisodeError
from bundle.manifest import Manifest
from bundle.prompt_template import RAW, told

_AT_MOST_BYTES = 512 * 2**20  # of frames in memory
_DRAWN = 16
_SAID = "Navigate to the gray basket on the left"


@dataclass(frozen=True)
class Recorded:
    """What was recorded with the frames.

    Attributes:
        episode: its name.
        fps: frames per second, or None if no file told.
        actions: float32 [T, A], physical units.
        names: of the A columns.
    """

    episode: str
    fps: float | None
    actions: NDArray[np.float32]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """What a policy is shown.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB, at least one.
        instruction: what it is told.
        about: where the frames come from.
        recorded: with them; None for drawn frames.
    """

    frames: NDArray[np.uint8]
    instruction: str
    about: str
    recorded: Recorded | None = None

    def frame(self, step: int) -> NDArray[np.uint8]:
        """[H, W, 3] of a step, from the beginning again at the end."""
        frame: NDArray[np.uint8] = self.frames[step % len(self.frames)]
        return frame


def episode_feed(path: Path, *, instruction: str | None = None, template: str = RAW) -> Feed:
    """The frames of an episode, as many as fit into half a gigabyte.

    Raises:
        EpisodeError: see open_episode; no instruction; no frames.
        ConfigError: h5py is not installed.
    """
    try:
        from episodes.reader import open_episode  # needs h5py, which a robot that only drives does not
    except ImportError as error:
        raise ConfigError("reading episodes needs h5py", got=error, hint="pip install 'jetvla[data]'") from None
    with open_episode(path) as episode:
        if len(episode) == 0:
            raise EpisodeError(f"{path} has no frames", expected="at least one", hint="choose another episode.")
        first = episode.frame(0)
        count = min(len(episode), max(1, _AT_MOST_BYTES // first.nbytes))
        frames = np.empty((count, *first.shape), np.uint8)
        for index in range(count):
            frames[index] = episode.frame(index)
        said = told(template, instruction, episode.instruction or _SAID)
        recorded = Recorded(path.name, episode.fps, episode.actions[:count], episode.action_names)
        return Feed(frames, said or "", f"{path.name}, {count} frames, schema {episode.schema}", recorded)


def drawn_feed(manifest: Manifest, *, height: int = 720, width: int = 1280, instruction: str | None = None) -> Feed:
    """A block that moves over a gradient, for where there is no episode."""
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    empty = np.stack(np.broadcast_arrays(rows[:, None], columns, 128.0), axis=-1).astype(np.uint8)
    frames = np.repeat(empty[None], _DRAWN, axis=0)
    side = min(height, width) // 4
    for index, frame in enumerate(frames):
        left = (width - side) * index // _DRAWN
        frame[height // 2 : height // 2 + side, left : left + side] = 230
    known = next((each.text for each in manifest.prompt.instructions), None)
    said = told(manifest.prompt.template, instruction, known or _SAID)
    return Feed(frames, said or "", f"{_DRAWN} drawn frames, no episode given")
