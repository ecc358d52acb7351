"""Episodes for tests of training data: small files of every schema, and episodes without a file."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from episodes.reader import EpisodeWarning
from episodes.synthetic import SyntheticSchema, write_synthetic
from episodes.writer import write_episode
from train.episode_set import TrainingEpisode, read_episodes
from train.run_config import DataConfig, Kind, SourceConfig

HEIGHT, WIDTH = 24, 32
LEFT = "Navigate to the gray basket on the left"
RIGHT = "Navigate to the gray basket on the right"


def episode(
    name: str,
    *,
    kind: Kind = "real",
    instruction: str = LEFT,
    length: int = 12,
    actions: NDArray[np.float32] | None = None,
    names: tuple[str, ...] = ("linear_x", "linear_y"),
    sha256: str | None = None,
) -> TrainingEpisode:
    """An episode whose file is never opened; its content hash is that of its name."""
    values = np.ones((length, len(names)), np.float32) if actions is None else actions
    content = sha256 or hashlib.sha256(name.encode()).hexdigest()
    return TrainingEpisode(Path(name), kind, "v1", content, instruction, values, 6.0, names)


def write_v1(folder: Path, name: str, *, length: int = 6, instruction: str | None = LEFT, fps: float = 6.0) -> Path:
    """A V1 file whose frame i is filled with 10 i, and whose actions are (0.1 i, -0.01 i, 0.001 i)."""
    frames = (np.full((HEIGHT, WIDTH, 3), 10 * index, np.uint8) for index in range(length))
    actions = np.arange(length)[:, None] * np.array([[0.1, -0.01, 0.001]])
    return write_episode(folder / name, frames, actions, instruction=instruction, fps=fps)


def write_schema(folder: Path, schema: SyntheticSchema, *, seed: int = 0, length: int = 12) -> Path:
    """A drawn episode of a schema; even seeds go left."""
    side = "right" if seed % 2 else "left"
    return write_synthetic(folder, schema, side=side, seed=seed, height=HEIGHT, width=WIDTH, length=length)


def read(folder: Path, *, actions: tuple[str, ...] = ("linear_x", "linear_y")) -> tuple[TrainingEpisode, ...]:
    """All episodes of a folder with one source per file, so that schemas may mix."""
    sources = tuple(SourceConfig(files=(path.name,)) for path in sorted(folder.glob("*.h5")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        return read_episodes(DataConfig(sources=sources, actions=actions), folder)
