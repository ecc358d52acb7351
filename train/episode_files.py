"""Which files the sources of a config mean, and in which order.

Looks at names only, except that a LeRobot dataset is asked how many episodes it has; what is in the files is the business of
train/episode_set.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bundle.errors import ConfigError, EpisodeError
from episodes.lerobot import episode_names, is_lerobot, split_name
from episodes.sources import matching, natural
from train.file_names import named
from train.run_config import SourceConfig


def find_files(sources: Sequence[SourceConfig], *, root: Path) -> list[tuple[Path, SourceConfig]]:
    """The episode files of each source, in natural order within it.

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
        files = {real: path for real, path in files.items() if named(path.stem, source)}
        if not files:
            raise ConfigError(
                f"data.sources[{number}] leaves out every file that it names",
                got=f"exclude {', '.join(source.exclude) or 'none'}; families {', '.join(source.families) or 'all'}",
                expected="at least one episode",
                hint="file names say what a path is like: narrow the filters, or leave the source out.",
            )
        for real, path in sorted(files.items(), key=lambda item: natural(item[1])):
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
    """Existing episodes of one entry of `files`."""
    try:
        found = matching(pattern, root)
        names = [name for path in found for name in (episode_names(path) if is_lerobot(path) else [path])]
        if not names:
            raise EpisodeError(
                f"no episodes match {pattern!r}",
                got="a LeRobot dataset without episodes",
                expected="at least one",
                hint="leave it out.",
            )
        return names
    except EpisodeError as error:
        raise ConfigError(
            f"data.sources: {error.what}",
            got=error.got,
            expected=error.expected,
            hint=f"{error.hint} Relative paths start at the config's folder, {root}.",
        ) from error


def _real(path: Path) -> Path:
    """`path` without links; FOLDER#INDEX is no file, so its folder is looked at."""
    part = split_name(path)
    return path.resolve() if part is None else Path(f"{part[0].resolve()}#{part[1]}")
