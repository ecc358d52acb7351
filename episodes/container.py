"""Opens HDF5 files that may be missing, half-written or damaged, and says which of these it is.

Robots record until the disk is full, so truncated and damaged files are an ordinary case: everything that libhdf5 can
raise on one becomes an EpisodeError here. A file can also lie without raising, and it can name other files: a dataset is
opened by `find_dataset` only, which follows links itself and has episodes/storage.py look at what it finds.

Knows nothing about images or actions; `layout` knows where those are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from h5py import h5l

from bundle.errors import EpisodeError, JetvlaError
from bundle.reading_limits import EPISODE_LINKS, EPISODE_TEXT, check_regular_file
from episodes.heap import require_sound_heap
from episodes.storage import inside, open_dataset, read_values

_HEAD_BYTES = 16  # enough to recognise a text file, a zero-filled file or another format in an error message
_LISTED_DATASETS = 20
_MOST_LISTED = 1000
_COPY_AGAIN = "if it is an episode, copy it again from the robot; if it is like this there too, it was not written whole and is lost."


def open_container(path: Path) -> h5py.File:
    """Open `path` for reading.

    Raises:
        EpisodeError: the file is missing, is not HDF5, is truncated, is being written, or cannot be read.
    """
    if not path.exists():
        raise EpisodeError(
            f"episode file not found: {path}",
            expected="one HDF5 episode file",
            hint="check the path and that the disk with the recordings is mounted.",
        )
    if path.is_dir():
        raise EpisodeError(
            f"{path} is a folder",
            expected="one HDF5 episode file",
            hint="pass the files in it, for example FOLDER/*.h5.",
        )
    try:
        check_regular_file(path, error=EpisodeError, hint="a pipe or a device holds no recording; name the file.")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if not h5py.is_hdf5(path):
            size = path.stat().st_size
            raise EpisodeError(
                f"{path} is not an HDF5 file",
                got=f"{size} bytes, starting with {head!r}" if size else "an empty file (0 bytes)",
                expected="an episode recorded as HDF5",
                hint=_COPY_AGAIN,
            )
        opened = h5py.File(path, "r")
        require_sound_heap(opened, path)
        return opened
    except BlockingIOError as error:
        raise EpisodeError(
            f"{path} is locked by a program that is writing it",
            got=_one_line(error),
            expected="a finished episode",
            hint="wait until the recording has ended.",
        ) from error
    except PermissionError as error:
        raise EpisodeError(
            f"{path} may not be read by this user",
            got=_one_line(error),
            expected="a readable file",
            hint=f"give yourself access: chmod u+r {path}",
        ) from error
    except JetvlaError:
        raise
    except Exception as error:  # h5py has no base of its own for what it raises on damage
        raise EpisodeError(
            f"{path} is truncated or damaged and cannot be opened",
            got=f"{_one_line(error)} ({path.stat().st_size} bytes)",
            expected="a complete HDF5 file",
            hint=_COPY_AGAIN,
        ) from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever h5py raises on a damaged file inside the block into an EpisodeError that names `path` and `what`.

    h5py and pyarrow map errors to many built-in exceptions; only calls into them belong inside the block.
    """
    try:
        yield
    except JetvlaError:
        raise
    except Exception as error:
        raise EpisodeError(
            f"{path} is damaged: {what} cannot be read",
            got=_one_line(error),
            expected="data as it was written",
            hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
        ) from error


def list_datasets(file: h5py.File) -> str:
    """All datasets of `file` with shape and dtype on one line, for error messages."""
    found: list[str] = []
    seen = 0

    def note(name: str, item: object) -> bool | None:
        nonlocal seen
        seen += 1
        if isinstance(item, h5py.Dataset):
            # Asking a virtual dataset for its shape may open its sources.
            found.append(f"{name} (virtual)" if item.is_virtual else f"{name} {item.dtype}{item.shape}")
        return True if seen >= _MOST_LISTED else None

    try:
        file.visititems(note)
    except Exception as error:  # a message about something else goes on without it
        return f"datasets that cannot be listed ({_one_line(error)})"
    more = f", and {len(found) - _LISTED_DATASETS} more" if len(found) > _LISTED_DATASETS else ""
    return ", ".join(found[:_LISTED_DATASETS]) + more if found else "no datasets at all"


def has_link(file: h5py.File, name: str) -> bool:
    """Whether there is something called `name` at the root, wherever it leads; nothing is opened, unlike by `in`."""
    return bool(file.id.links.exists(name.encode()))


def find_dataset(file: h5py.File, name: str, path: Path, *, depth: int = 0) -> h5py.Dataset | None:
    """The dataset `name`, or None where there is nothing of that name; its storage has been looked at.

    Raises:
        EpisodeError: a link leads out of the episode's folder, or in a circle; or see `storage.open_dataset`.
    """
    group: h5py.Group = file
    rest = [part for part in name.split("/") if part]
    followed = depth
    while rest:
        part = rest.pop(0)
        if not group.id.links.exists(part.encode()):
            return None
        kind = group.id.links.get_info(part.encode()).type
        if kind == h5l.TYPE_HARD:
            found = group.get(part, getclass=True)
            if not rest:
                return open_dataset(group, part, path) if found is h5py.Dataset else None
            if found is not h5py.Group:
                return None
            group = group[part]
            continue
        followed += 1
        if followed > EPISODE_LINKS:
            raise EpisodeError(
                f"{path}: {name} is behind more links than anybody sets",
                got=f"{followed} links",
                expected=f"at most {EPISODE_LINKS}",
                hint="the links lead in a circle: leave the episode out.",
            )
        value = group.id.links.get_val(part.encode())
        if kind == h5l.TYPE_SOFT:
            target = os.fsdecode(value)
            group = file if target.startswith("/") else group
            rest = [step for step in target.split("/") if step not in ("", ".")] + rest
        elif kind == h5l.TYPE_EXTERNAL:
            there, inner = (os.fsdecode(text) for text in value)
            place = inside(path.parent, there, path, f"the file that {name} is linked to")
            other = open_container(place)
            return find_dataset(other, "/".join([inner, *rest]), place, depth=followed)
        else:
            return None
    return None


def require_dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """The dataset `name`, or an EpisodeError that lists the datasets that are there."""
    dataset = find_dataset(file, name, path)
    if dataset is None:
        raise EpisodeError(
            f"{path} has no dataset {name!r}",
            got=list_datasets(file),
            expected=name,
            hint="if the file is an episode of another layout, pass its schema; otherwise leave it out.",
        )
    return dataset


def read_texts(dataset: h5py.Dataset, path: Path) -> tuple[str, ...]:
    """All elements of a text dataset, stored as fixed bytes (S256) or as variable-length strings, cut at the first NUL.

    Raises:
        EpisodeError: the dataset does not hold text, or the bytes are not UTF-8.
    """
    name = dataset.name
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise EpisodeError(
            f"{path}: {name} does not hold text",
            got=f"dtype {dataset.dtype}",
            expected="fixed-length or variable-length strings",
            hint=f"rewrite {name} as text, or delete it from the file.",
        )
    if dataset.shape is None:
        return ()
    with reading(path, str(name)):
        values: list[bytes | str] = np.atleast_1d(read_values(dataset, path)).ravel().tolist()
    texts: list[str] = []
    for value in values:
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise EpisodeError(
                f"{path}: {name} is not UTF-8 text",
                got=repr(value[:64]),
                expected="UTF-8",
                hint=f"rewrite {name} in UTF-8.",
            ) from error
        if len(text) > EPISODE_TEXT:
            raise EpisodeError(
                f"{path}: {name} holds a text of an absurd length",
                got=f"{len(text)} characters, {text[:40]!r}...",
                expected=f"at most {EPISODE_TEXT}",
                hint=f"rewrite {name}, or leave the episode out.",
            )
        # Fixed-length strings are C strings in a larger buffer: after the first NUL comes padding or left-over memory.
        texts.append(text.split("\0", 1)[0])
    return tuple(texts)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
