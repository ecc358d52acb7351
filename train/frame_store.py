"""Decoded and resized frames on disk, made once per episode file: epochs read 150 kB per frame instead of inflating 3 MB.

One uncompressed `.npy` per episode, memory-mapped, named by everything that decides its content: the episode's hash, the schema it was read
as (which decides the colour order), size and filter. Files appear complete or not at all; damaged ones are made again; processes that
prepare the same store take turns, file by file. The resize is the robot's (episodes/resize.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock

from bundle.atomic import disk_errors, publish_file
from bundle.errors import EpisodeError
from episodes.layout import Schema
from episodes.reader import EpisodeWarning, open_episode
from episodes.resize import ResizeFilter, squash
from train.episode_set import TrainingEpisode

_HEADER_BYTES = 128  # numpy pads its header to a multiple of 64; this one always fits


class FrameStore:
    """Gives resized frames of episodes; picklable, holds nothing open.

    Args:
        folder: made when needed.
        size: s, the model's image size.
        resize: filter.
        cameras: of the policy, in its order; more than one gives frames [C, s, s, 3] instead of [s, s, 3].
    """

    def __init__(
        self, folder: Path, *, size: int, resize: ResizeFilter, cameras: tuple[str, ...] = ("static",)
    ) -> None:
        self.folder = folder
        self.size = size
        self.resize: ResizeFilter = resize
        self.cameras = cameras

    def prepare(self, episodes: Sequence[TrainingEpisode], progress: Callable[[int], None] | None = None) -> None:
        """Make what is missing.

        Args:
            progress: called after each episode with the number of its frames.

        Raises:
            EpisodeError: a frame is damaged, or the file is not the one that was opened; names them.
            StorageError: the disk is full, or refuses.
        """
        for episode in episodes:
            self.frames(episode)
            if progress is not None:
                progress(len(episode))

    def frames(self, episode: TrainingEpisode) -> np.memmap[Any, np.dtype[np.uint8]]:
        """All frames, read-only uint8 [T, s, s, 3] RGB, or [T, C, s, s, 3] of several cameras; made first where missing or damaged.

        Raises:
            EpisodeError, StorageError: see prepare.
        """
        path = self._path(episode)
        found = _open(path, self._shape(episode))
        if found is None:
            with disk_errors(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self.folder / ".frames.lock")
                lock.acquire()
            try:
                found = _open(path, self._shape(episode))  # made by another process meanwhile
                if found is None:
                    self._make(path, episode)
                    found = np.lib.format.open_memmap(path, mode="r")
            finally:
                lock.release()
        return found

    def bytes_needed(self, episodes: Sequence[TrainingEpisode]) -> int:
        """Disk space that `prepare` will take: that of the files which are missing or damaged."""
        shapes = ((self._path(episode), self._shape(episode)) for episode in episodes)
        return sum(_HEADER_BYTES + int(np.prod(shape)) for path, shape in shapes if _open(path, shape) is None)

    def _shape(self, episode: TrainingEpisode) -> tuple[int, ...]:
        several = (len(self.cameras),) if len(self.cameras) > 1 else ()
        return (len(episode), *several, self.size, self.size, 3)

    def _path(self, episode: TrainingEpisode) -> Path:
        several = "".join(f"-{camera}" for camera in self.cameras) if len(self.cameras) > 1 else ""
        return self.folder / f"{episode.sha256}-{episode.schema}-{self.size}-{self.resize}{several}.npy"

    def _make(self, path: Path, episode: TrainingEpisode) -> None:
        """Frame by frame through `write`, not through a memory map, where a full disk would kill the process."""
        temporary = path.with_name(f".{path.name}.tmp")  # the lock is held, so it is nobody else's
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape(episode)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EpisodeWarning)  # said when the episodes were first read
            schema = None if episode.schema == "lerobot" else cast(Schema, episode.schema)
            recording = open_episode(episode.path, schema=schema)
        try:
            with recording, disk_errors(path), temporary.open("wb") as file:
                if len(recording) != len(episode):
                    raise EpisodeError(
                        f"{episode.path} has changed since this run began",
                        got=f"{len(recording)} frames",
                        expected=f"{len(episode)}",
                        hint="start again when nothing writes to the episodes any more.",
                    )
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(len(recording)):
                    for frame in recording.views(index, self.cameras):
                        file.write(squash(frame, self.size, self.resize).tobytes())
            publish_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _open(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]] | None:
    """The file if its header and size are right; anything else counts as missing."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = array.shape == shape and array.dtype == np.uint8 and size == _HEADER_BYTES + array.nbytes
    return array if whole else None
