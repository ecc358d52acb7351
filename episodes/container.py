"""Opens HDF5 files that may be missing, half-written or damaged, and says which of these it is.

Robots record until the disk is full, so truncated and damaged files are an ordinary case: everything that libhdf5 can
raise on one becomes an EpisodeError here. A damaged file can also lie without raising: HDF5 reads storage that was
never written as zeros, that is as black frames and as "stop" actions. `missing_chunks` is how the readers tell the
two apart.

Knows nothing about images or actions; `layout` knows where those are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from bundle.errors import EpisodeError
from bundle.reading_limits import check_regular_file

_HEAD_BYTES = 16  # enough to recognise a text file, a zero-filled file or another format in an error message
_LISTED_DATASETS = 20
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
    check_regular_file(path, error=EpisodeError)
    try:
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
        return h5py.File(path, "r")
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
    except (OSError, RuntimeError) as error:
        raise EpisodeError(
            f"{path} is truncated or damaged and cannot be opened",
            got=f"{_one_line(error)} ({path.stat().st_size} bytes)",
            expected="a complete HDF5 file",
            hint=_COPY_AGAIN,
        ) from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever h5py raises on a damaged file inside the block into an EpisodeError that names `path` and `what`.

    h5py maps HDF5 errors to many built-in exceptions; only calls into h5py belong inside the block.
    """
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError) as error:
        raise EpisodeError(
            f"{path} is damaged: {what} cannot be read",
            got=_one_line(error),
            expected="data as it was written",
            hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
        ) from error


def list_datasets(file: h5py.File) -> str:
    """All datasets of `file` with shape and dtype on one line, for error messages."""
    found: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(f"{name} {item.dtype}{item.shape}")

    file.visititems(note)
    more = f", and {len(found) - _LISTED_DATASETS} more" if len(found) > _LISTED_DATASETS else ""
    return ", ".join(found[:_LISTED_DATASETS]) + more if found else "no datasets at all"


def require_dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """The dataset `name`, or an EpisodeError that lists the datasets that are there."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
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
        values: list[bytes | str] = np.atleast_1d(dataset[()]).ravel().tolist()
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
        # Fixed-length strings are C strings in a larger buffer: after the first NUL comes padding or left-over memory.
        texts.append(text.split("\0", 1)[0])
    return tuple(texts)


def missing_chunks(dataset: h5py.Dataset, row: int | None = None) -> int:
    """How many storage chunks of `dataset` (or only of those that hold `row`) were never written.

    Looks at the index only. HDF5 would read such chunks as zeros. Contiguous storage counts as one chunk.
    """
    if dataset.size == 0:
        return 0
    if dataset.chunks is None:
        return int(dataset.id.get_storage_size() == 0)
    if row is None:
        sizes = zip(dataset.shape, dataset.chunks, strict=True)
        expected: int = math.prod(math.ceil(size / chunk) for size, chunk in sizes)
        return expected - int(dataset.id.get_num_chunks())
    first = row // dataset.chunks[0] * dataset.chunks[0]
    rest = (range(0, size, chunk) for size, chunk in zip(dataset.shape[1:], dataset.chunks[1:], strict=True))
    corners = itertools.product((first,), *rest)
    return sum(dataset.id.get_chunk_info_by_coord(corner).byte_offset is None for corner in corners)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
