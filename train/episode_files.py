"""Which files the sources of a config mean, and in which order.

Looks at names only, except that a LeRobot dataset is asked how many episodes it has; what is in the files is the business of
train/episode_set.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bundle.errors import ConfigError, EpisodeError
from episodes.lerobot import episode_names, is_lerobot, split_name
from train.run_config import SourceConfig

_SUFFIXES = frozenset({".h5", ".hdf5"})


def find_files(sources: Sequence[SourceConfig], *, root: Path) -> list[tuple[Path, SourceConfig]]:
    """The episode files of each source, in natural order (`episode_2` before `episode_10`) within it.

    A LeRobot dataset stands for its episodes, `FOLDER#0`, `FOLDER#1`, ...

    Args:
        root: where relative paths start.

    Raises:
        ConfigError: a pattern matches nothing, two sources share a file, two files share a name, or a dataset cannot be opened.
    """
    found: dict[Path, tuple[Path, SourceConfig, int]] = {}
    names: dict[str, Path] = {}
    for number, source in enumerate(sources):
        files = {_real(path): path for pattern in source.files for path in _matches(pattern, root)}
        for real, path in sorted(files.items(), key=lambda item: _natural(item[1])):
            if real in found:
                raise ConfigError(
                    f"{path} belongs to two of data.sources",
                    got=f"sources {found[real][2]} and {number}",
                    expected="each file in one source",
                    hint="narrow the patterns in `files` of one of them.",
                )
            if path.name in names:
                raise ConfigError(
                    f"two episodes are called {path.name}",
                    got=f"{names[path.name].parent} and {path.parent}",
                    expected="different file names: a split and a run's record name episodes by them",
                    hint="rename one of the files; if they are copies, leave one out.",
                )
            found[real] = (path, source, number)
            names[path.name] = path
    return [(path, source) for path, source, _ in found.values()]


def _matches(pattern: str, root: Path) -> list[Path]:
    """Existing episode files of one entry of `files`."""
    given = Path(pattern).expanduser()
    path = root / given
    if path.is_file() or split_name(path) is not None:
        return [path]
    # The root is no pattern: brackets in its name are brackets.
    base, rest = (Path(given.anchor), given.relative_to(given.anchor)) if given.is_absolute() else (root, given)
    entries = [path] if path.is_dir() else list(base.glob(str(rest)))
    files: list[Path] = []
    for entry in entries:
        if is_lerobot(entry):
            files += _episodes(entry)
            continue
        inside = entry.iterdir() if entry.is_dir() else (entry,)
        files += [file for file in inside if file.suffix.lower() in _SUFFIXES and file.is_file()]
    if not files:
        deeper = path.is_dir() and any(file.suffix.lower() in _SUFFIXES for file in path.rglob("*"))
        raise ConfigError(
            f"no episodes match `{pattern}` in data.sources",
            got=f"nothing ending in .h5 or .hdf5 at {path}",
            expected="a file, a folder of episodes, a LeRobot dataset, or a glob",
            hint=f'the files are in subfolders: write "{pattern.rstrip("/")}/**/*.h5".'
            if deeper
            else f"relative paths start at the config's folder, {root}; check that the disk is mounted.",
        )
    return files


def _episodes(folder: Path) -> list[Path]:
    """The episodes of a LeRobot dataset."""
    try:
        return episode_names(folder)
    except EpisodeError as error:
        raise ConfigError(error.what, got=error.got, expected=error.expected, hint=error.hint) from error


def _real(path: Path) -> Path:
    """`path` without links; FOLDER#INDEX is no file, so its folder is looked at."""
    part = split_name(path)
    return path.resolve() if part is None else Path(f"{part[0].resolve()}#{part[1]}")


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sorts digits as numbers."""
    parts = re.split(r"(\d+)", str(path))
    return [(text, int(number or 0)) for text, number in zip(parts[::2], [*parts[1::2], ""], strict=True)]
