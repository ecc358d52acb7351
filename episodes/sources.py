"""Which episodes the arguments of a command mean: files, folders, globs, and LeRobot datasets, whose episodes are FOLDER#INDEX.

Looks at names only, except that a LeRobot dataset is asked how many episodes it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bundle.errors import EpisodeError
from episodes.lerobot import episode_names, is_lerobot, split_name

_SUFFIXES = frozenset({".h5", ".hdf5"})


def find_sources(arguments: Sequence[str]) -> tuple[Path, ...]:
    """The episodes of `arguments` in natural order, each once.

    Raises:
        EpisodeError: an argument matches nothing, or a LeRobot dataset is damaged or not of version 3.
    """
    found: dict[Path, list[Path]] = {}
    for argument in arguments:
        for path in matching(argument):
            if path.resolve() not in found:
                found[path.resolve()] = episode_names(path) if is_lerobot(path) else [path]
    # FOLDER and FOLDER#3 may both be given.
    return tuple(dict.fromkeys(path for paths in sorted(found.values(), key=_first) for path in paths))


def matching(argument: str, root: Path = Path()) -> list[Path]:
    """Files and LeRobot folders that `argument` means, unsorted.

    Args:
        root: where relative paths start.

    Raises:
        EpisodeError: there are none.
    """
    try:
        given = Path(argument).expanduser()
        path = root / given
        # The root is no pattern: brackets in its name are brackets. Nor is a name that exists.
        base, rest = (Path(given.anchor), given.relative_to(given.anchor)) if given.is_absolute() else (root, given)
        entries = [path] if path.exists() or split_name(path) is not None else list(base.glob(str(rest)))
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:  # ~nobody, a**b, a NUL, a name too long
        raise EpisodeError(
            f"{argument!r} is neither a path nor a pattern",
            got=error,
            expected="episode files, folders of them, globs, or LeRobot dataset folders",
            hint="** stands for whole folders: 'recordings/**/*.h5'.",
        ) from None
    found: list[Path] = []
    for entry in entries:
        if (entry == path and not entry.is_dir()) or is_lerobot(entry):
            found.append(entry)  # what is named is meant, whatever its suffix
        else:
            found += [file for file in (entry.iterdir() if entry.is_dir() else (entry,)) if _is_episode(file)]
    if not found:
        raise EpisodeError(
            f"no episodes match {argument!r}",
            got="nothing ending in .h5 or .hdf5" if entries else "no such file or folder",
            expected="episode files, folders of them, globs, or LeRobot dataset folders",
            hint=_where_else(argument, path),
        )
    return found


def _where_else(argument: str, path: Path) -> str:
    """A hint for an argument that means no episode."""
    if path.is_dir() and any(file.suffix.lower() in _SUFFIXES for file in path.rglob("*")):
        return f'the files are in subfolders: pass "{argument.rstrip("/")}/**/*.h5".'
    if path.is_dir() and any(path.glob("*.mcap")):
        return (
            "there are flight recordings: name each .mcap, or make episodes of them, python episodes/from_recording.py"
        )
    return "check the path and that the disk with the recordings is mounted."


def _is_episode(file: Path) -> bool:
    """By its name. A link that leads nowhere is one: who opens it is to say so, rather than nobody."""
    return file.suffix.lower() in _SUFFIXES and (file.is_file() or (file.is_symlink() and not file.exists()))


def natural(path: Path) -> list[tuple[str, int]]:
    """Sorts digits as numbers: `episode_2` before `episode_10`."""
    parts = re.split(r"(\d+)", str(path))
    return [(text, int(number or 0)) for text, number in zip(parts[::2], [*parts[1::2], ""], strict=True)]


def _first(paths: Sequence[Path]) -> list[tuple[str, int]]:
    return natural(paths[0]) if paths else []
