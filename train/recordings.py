"""Opens and hashes the recordings of a run, whether they are files or parts of LeRobot datasets.

A dataset describes all its episodes in a few tables, so it is opened once and not for each of them; nothing of it stays open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.errors import EpisodeError
from episodes.layout import Schema
from episodes.lerobot import open_lerobot, split_name
from episodes.reader import Episode, open_episode
from train.file_hashes import hash_files

if TYPE_CHECKING:
    from episodes.lerobot_reader import LeRobotDataset  # needs pyarrow, which is an extra


class Recordings:
    """Remembers the datasets that it has opened.

    Args:
        cameras: that every recording must have.
    """

    def __init__(self, cameras: Sequence[str] = ("static",)) -> None:
        self._cameras = cameras
        self._datasets: dict[Path, LeRobotDataset] = {}

    def open(self, path: Path, *, schema: Schema | None) -> Episode:
        """As `open_episode`.

        Raises:
            EpisodeError: see open_episode; or a camera is missing, or a schema is stated for a LeRobot dataset.
        """
        episode = self._open(path, schema)
        try:
            episode.require_cameras(self._cameras)
        except EpisodeError:
            episode.close()
            raise
        return episode

    def _open(self, path: Path, schema: Schema | None) -> Episode:
        part = split_name(path)
        if part is None:
            return open_episode(path, schema=schema)
        if schema is not None:
            raise EpisodeError(
                f"{path} belongs to a LeRobot dataset",
                got=f"schema {schema}",
                expected="no schema: that of a dataset is known",
                hint="leave `schema` out of the config's source, or make a source of the dataset alone.",
            )
        return self._dataset(part[0]).episode(part[1])

    def hash(
        self, paths: Sequence[Path], cache: Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[Path, str]:
        """Hex sha256 of each recording: of a file's bytes, or see LeRobotDataset.sha256.

        Args:
            cache: folder that remembers hashes of files between runs.
            progress: called with (recordings done, recordings in all).

        Raises:
            EpisodeError: a file cannot be read.
            StorageError: the memory cannot be written.
        """
        parts = {path: part for path in paths if (part := split_name(path)) is not None}
        files = [path for path in paths if path not in parts]
        report = progress or (lambda done, total: None)
        hashes = hash_files(files, cache, lambda done, _: report(done, len(paths)))
        videos = {video for folder, index in parts.values() for video in self._dataset(folder).video_files(index)}
        of_videos = hash_files(sorted(videos), cache)
        for done, (path, (folder, index)) in enumerate(parts.items(), start=len(files) + 1):
            hashes[path] = self._dataset(folder).sha256(index, of_videos.__getitem__)
            report(done, len(paths))
        return hashes

    def _dataset(self, folder: Path) -> LeRobotDataset:
        if folder not in self._datasets:
            self._datasets[folder] = open_lerobot(folder)
        return self._datasets[folder]
