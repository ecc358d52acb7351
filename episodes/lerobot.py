"""LeRobot v3 datasets: opens one for reading, and exports HDF5 episodes as one.

The door to the modules `lerobot_*`, which need pyarrow and av: those are an extra (`pip install "jetvla[lerobot]"`), so they are imported
only when a dataset is really opened or written. What is here works without them.

A dataset is a folder that holds many episodes. One of them is named `FOLDER#INDEX`, and `episodes.reader.open_episode` opens such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.errors import EpisodeError
from episodes.lerobot_info import INFO, read_info

if TYPE_CHECKING:
    from episodes.lerobot_reader import LeRobotDataset

_NAME = re.compile(r"(?s)(.+)#(\d+)")
_EXTRA = ("pyarrow", "av")


def is_lerobot(folder: Path) -> bool:
    """Whether `folder` is a LeRobot dataset of any version."""
    return (folder / INFO).is_file()


def episode_names(folder: Path) -> list[Path]:
    """`FOLDER#0`, `FOLDER#1`, ...: one for each episode that the dataset says it has.

    Raises:
        EpisodeError: meta/info.json is damaged, or the dataset is not of version 3.
    """
    return [Path(f"{folder}#{index}") for index in range(read_info(folder).episodes)]


def split_name(path: Path) -> tuple[Path, int] | None:
    """The folder and index of `FOLDER#INDEX`, or None where `path` is anything else."""
    match = _NAME.fullmatch(str(path))
    if match is None or path.exists() or not is_lerobot(Path(match[1])):
        return None
    return Path(match[1]), int(match[2])


def open_lerobot(folder: str | Path, *, camera: str | None = None) -> LeRobotDataset:
    """Open a dataset and check what it says about itself; reads no frame.

    Args:
        camera: the image or video feature to read, for example "observation.images.front"; may be left out where there is one only.

    Raises:
        EpisodeError: not a LeRobot v3 dataset, damaged or incomplete, several cameras and none chosen, or pyarrow or av is missing.
    """
    with _extra():
        from episodes.lerobot_reader import open_dataset

        return open_dataset(Path(folder), camera)


def export_lerobot(
    paths: Sequence[str | Path], folder: str | Path, *, fps: float | None = None, video: bool = False
) -> Path:
    """Write HDF5 episodes as a LeRobot v3 dataset, which appears complete or not at all.

    Warns once (EpisodeWarning) if instructions had to be taken from file names.

    Args:
        paths: the episodes, in the order that they get in the dataset.
        folder: of the dataset; it must not exist, or be empty.
        fps: frames per second; by default that of the episodes. LeRobot knows whole numbers only.
        video: store H.264 instead of JPEG files inside the tables; smaller, but frames lose detail.

    Returns:
        `folder`.

    Raises:
        EpisodeError: an episode cannot be read or has no instruction, they differ in axes, frame size or rate, the folder is not empty,
            or pyarrow or av is missing.
        StorageError: the disk is full or refuses.
        BundleLockedError: another process is writing into this folder.
    """
    with _extra():
        from episodes.lerobot_writer import write_dataset

        write_dataset([Path(path) for path in paths], Path(folder), fps=fps, video=video)
    return Path(folder)


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in _EXTRA:
            raise
        raise EpisodeError(
            "LeRobot datasets need packages that are not installed",
            got=f"no module {error.name}",
            expected=" and ".join(_EXTRA),
            hint='pip install "jetvla[lerobot]"',
        ) from error
