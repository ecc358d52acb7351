"""Rewrites an episode as JPEG-compressed V5 with its instruction inside; the original is only read.

What is mended: a missing instruction, frames stored raw, a colour order known to be wrong, and, if asked, an end
that cannot be read. What is not mended: frames missing in the middle. A policy learns from the time between frames, and an
episode that jumps teaches it a wrong one; so such a file is refused, as is everything else that `open_episode` refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from episodes.attributes import read_timestamps
from episodes.container import open_container, reading
from episodes.reader import Episode, EpisodeWarning, open_episode
from episodes.writer_v5 import write_episode_v5

QUALITY = 95
_LONGEST_ATTRIBUTE = 16_384  # HDF5 has no room for more than 64 KiB of attributes


@dataclass(frozen=True)
class RepairOptions:
    """How to rewrite.

    Attributes:
        instruction: what the robot was told, where no instruction is stored; by default what the file name says.
        swap_colour: exchange red and blue, for files that are known to be in the other colour order.
        drop_corrupt: leave out frames at the end that cannot be read, together with their actions.
    """

    instruction: str | None = None
    swap_colour: bool = False
    drop_corrupt: bool = False


@dataclass(frozen=True)
class Repaired:
    """What was written.

    Attributes:
        path: the new file.
        frames: in it.
        dropped: frames left out at the end.
        copied: frames were JPEG already and were stored as they are, without another loss.
    """

    path: Path
    frames: int
    dropped: int
    copied: bool


def plan_repairs(paths: Sequence[Path], folder: Path, *, force: bool) -> tuple[Path, ...]:
    """The file in `folder` that each of `paths` becomes; made before the first is written, so that none is written in vain.

    Raises:
        EpisodeError: two would get one name, one would replace an original, or one exists and `force` is not set.
    """
    targets = tuple(folder / f"{path.stem}.h5" for path in paths)
    originals = {path.resolve() for path in paths}
    taken: dict[Path, Path] = {}
    for path, target in zip(paths, targets, strict=True):
        if target.resolve() in originals:
            raise EpisodeError(
                f"repairing {path} would replace the original {target}",
                expected="a folder without the originals",
                hint="choose another --out; originals are never touched.",
            )
        if target in taken:
            raise EpisodeError(
                f"two episodes would become {target}",
                got=f"{taken[target]} and {path}",
                expected="different file names",
                hint="repair them into different folders, or rename one.",
            )
        taken[target] = path
        if target.exists() and not force:
            raise EpisodeError(
                f"{target} exists",
                expected="a name that is free",
                hint="choose another --out, or replace it with --force.",
            )
    return targets


def repair(path: Path, target: Path, options: RepairOptions) -> Repaired:
    """Write `target` from `path`; it appears complete or not at all.

    Raises:
        EpisodeError: the episode cannot be used, has no instruction, or has unreadable frames that may not be left out.
        StorageError: the disk is full or refuses to write.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # what is assumed gets stored, and can be read there
        episode = open_episode(path)
    with episode:
        episode.refuse_hand("the repair")
        instruction = _instruction(episode, options)
        length = _readable_length(episode, drop=options.drop_corrupt)
        copied = not options.swap_colour and episode.jpeg(0) is not None
        stamps = _timestamps(path, len(episode), episode.fps)
        kept = slice(0, length)
        write_episode_v5(
            target,
            _frames(episode, length, copied=copied, swap=options.swap_colour),
            episode.actions[kept],
            instruction=instruction,
            timestamps=None if stamps is None else stamps[kept],
            jpeg_quality=QUALITY,
            event_types=None if episode.event_types is None else episode.event_types[kept],
            action_classes=None if episode.action_classes is None else episode.action_classes[kept],
            attributes=_attributes(episode, length, options),
        )
        return Repaired(target, length, len(episode) - length, copied)


def _instruction(episode: Episode, options: RepairOptions) -> str:
    """The stored one, else the given one, else what the file name says."""
    given = (options.instruction or "").strip()
    if episode.instruction_source != "stored" and given:
        return given
    if episode.instruction is None:
        raise EpisodeError(
            f"{episode.path} has no instruction",
            got="none stored, and the file name does not name one side",
            expected="what the robot was told",
            hint="pass --instruction TEXT, for files that were told the same.",
        )
    return episode.instruction


def _readable_length(episode: Episode, *, drop: bool) -> int:
    """The number of frames up to the last one that can be read. Those before it are read when they are written."""
    for length in range(len(episode), 0, -1):
        try:
            episode.frame(length - 1)
        except EpisodeError:
            if not drop:
                raise
        else:
            return length
    raise EpisodeError(
        f"{episode.path}: no frame can be read",
        expected="at least one",
        hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
    )


def _frames(episode: Episode, length: int, *, copied: bool, swap: bool) -> Iterator[npt.NDArray[np.uint8] | bytes]:
    size: tuple[int, ...] | None = None
    for index in range(length):
        try:
            frame = episode.frame(index)
        except EpisodeError as error:
            raise EpisodeError(
                f"{episode.path}: frame {index} of {len(episode)} is corrupt, and later ones are not",
                got=error.got,
                expected="unreadable frames at the end only",
                hint="leave the episode out: without a frame in the middle, the time between frames is wrong.",
            ) from error
        size = size or frame.shape
        if frame.shape != size:
            raise EpisodeError(
                f"{episode.path}: the frames differ in size",
                got=f"frame {index} has {frame.shape[0]}x{frame.shape[1]}",
                expected=f"{size[0]}x{size[1]}, as frame 0",
                hint="the file was put together from several recordings; leave the episode out.",
            )
        stored = episode.jpeg(index) if copied else None
        yield stored if stored is not None else np.ascontiguousarray(frame[..., ::-1]) if swap else frame


def _timestamps(path: Path, frames: int, fps: float | None) -> npt.NDArray[np.float64] | None:
    """The recorded ones, else regular ones at the known frame rate."""
    with open_container(path) as file, reading(path, "its time stamps"):
        stored = read_timestamps(file, frames, path)
    if stored is not None:
        return stored
    return None if fps is None else np.arange(frames) / fps


def _attributes(episode: Episode, length: int, options: RepairOptions) -> dict[str, str | int | float | bool]:
    """Those of the original that are single values, corrected for the length, and where the file comes from."""
    kept = {
        _storable(name): _storable(value) if isinstance(value, str) else value
        for name, value in episode.attributes.items()
        if isinstance(value, (str, int, float, bool)) and len(str(value)) < _LONGEST_ATTRIBUTE
    }
    if "num_frames" in kept:
        kept["num_frames"] = length
    duration = kept.get("total_duration")
    if isinstance(duration, (int, float)):
        kept["total_duration"] = duration * length / len(episode)
    kept["repaired_from"] = _storable(f"{episode.schema} {episode.path.name}")
    if options.swap_colour:
        kept["colour_swapped"] = True
    return kept


def _storable(text: str) -> str:
    """What HDF5 takes as text: no NUL, and UTF-8 (names of files need not be)."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
