"""Where the bytes of an HDF5 dataset are, whether all of them exist, and whether they are few enough, before one is read.

HDF5 reads storage that was never written as zeros: as black frames and as "stop" actions. It reads a cut external file and a missing
source of a virtual dataset the same way. And it believes what a file declares: sizes, chunks, files elsewhere on the machine. So a dataset
is looked at when it is opened, and each of its chunks before it is unpacked.

What lies outside of the file (external storage, sources of virtual datasets, linked files) must be a regular file in the folder of the
episode or below: an episode that names /etc/passwd as its pictures is no episode. JETVLA_EPISODE_LINKS=anywhere lifts that.

Knows nothing about images or actions; what the values tell is the business of episodes/unwritten.py.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5f, h5p, h5s

from bundle.errors import EpisodeError
from bundle.reading_limits import (
    EPISODE_CHUNK_BYTES,
    EPISODE_CHUNKS,
    EPISODE_CHUNKS_A_FRAME,
    EPISODE_SOURCES,
    EPISODE_VALUE_BYTES,
    check_regular_file,
)
from episodes.filters import require_filters, unpacks_to_more
from episodes.heap import require_sound_references

_MOST_CHUNK_BYTES = EPISODE_CHUNK_BYTES
_MOST_CHUNKS_A_ROW = EPISODE_CHUNKS_A_FRAME
_MOST_CHUNKS = EPISODE_CHUNKS
_MOST_SOURCES = EPISODE_SOURCES
LINKS_SWITCH = "JETVLA_EPISODE_LINKS"
_LEAVE_OUT = "leave the episode out; no recorder writes such a file."


@dataclass(frozen=True)
class Chunks:
    """The chunks of a dataset that were written: corner -> (bytes stored, mask of filters that were left out).

    `sound` are those that were looked at.
    """

    shape: tuple[int, ...]
    stored: dict[tuple[int, ...], tuple[int, int]]
    sound: set[tuple[int, ...]] = field(default_factory=set)

    def of_row(self, row: int, dataset: h5py.Dataset) -> list[tuple[int, ...]]:
        """The corners of the chunks that hold `row`."""
        first = row // self.shape[0] * self.shape[0]
        rest = (range(0, size, chunk) for size, chunk in zip(dataset.shape[1:], self.shape[1:], strict=True))
        return list(itertools.product((first,), *rest))


def inside(folder: Path, name: str, path: Path, what: str) -> Path:
    """The regular file `name`, seen from `folder`, which is that of the episode `path`.

    Raises:
        EpisodeError: it does not exist, is no regular file, or lies elsewhere.
    """
    target = folder / name
    resolved = target.resolve()
    if not resolved.is_relative_to(folder.resolve()) and os.environ.get(LINKS_SWITCH) != "anywhere":
        raise EpisodeError(
            f"{path}: {what} lies outside of the episode's folder",
            got=str(target),
            expected=f"a file in {folder}",
            hint=f"move both into one folder; or, if you trust the file, set {LINKS_SWITCH}=anywhere.",
        )
    try:
        check_regular_file(resolved, error=EpisodeError)
    except EpisodeError as error:
        raise EpisodeError(
            f"{path}: {what} is missing or no regular file",
            got=error.what,
            expected="the file that holds the data; HDF5 would read zeros",
            hint="copy it again from the robot, together with the episode.",
        ) from None
    return resolved


def open_dataset(group: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """The dataset `name` of `group`, whose storage is whole as far as its layout tells, and within bounds.

    Args:
        name: of a hard link.

    Raises:
        EpisodeError: parts of it are elsewhere, cut or missing; or its size is absurd; or a filter is missing.
    """
    access = h5p.create(h5p.DATASET_ACCESS)
    opened = h5d.open(group.id, name.encode(), access)
    properties = opened.get_create_plist()
    if properties.get_external_count():
        opened.close()
        access.set_efile_prefix(b"${ORIGIN}")  # else names would be taken from the folder in which the user stands
        opened = h5d.open(group.id, name.encode(), access)
    if properties.get_layout() == h5d.VIRTUAL:
        _require_sources(opened, path, depth=0)  # before anything asks for the shape: that may open them
    dataset = h5py.Dataset(opened)
    _require_external(dataset, path)
    require_filters(dataset, path)
    if not dataset.is_virtual:
        require_sound_references(dataset, path)
    if dataset.chunks is None or dataset.size in (None, 0):
        _require_enough(dataset, path)
        return dataset
    # Frames share chunks in some files: without room for one row of chunks each frame would unpack all of them again.
    row = _chunk_bytes(dataset) * _chunks_a_row(dataset)
    if math.prod(dataset.chunks) == 0 or _chunk_bytes(dataset) > _MOST_CHUNK_BYTES:
        raise _absurd(dataset, path, f"chunks of {_chunk_bytes(dataset)} bytes", f"at most {_MOST_CHUNK_BYTES}")
    if _chunks_a_row(dataset) > _MOST_CHUNKS_A_ROW:
        raise _absurd(dataset, path, f"{_chunks_a_row(dataset)} chunks a row", f"at most {_MOST_CHUNKS_A_ROW}")
    if dataset.id.get_num_chunks() > _MOST_CHUNKS:
        raise _absurd(dataset, path, f"{dataset.id.get_num_chunks()} chunks", f"at most {_MOST_CHUNKS}")
    if row > access.get_chunk_cache()[1] and dataset.chunks[0] > 1:
        opened.close()  # else the cache would stay as it is
        access.set_chunk_cache(521, min(row, _MOST_CHUNK_BYTES), 1.0)
        return h5py.Dataset(h5d.open(group.id, name.encode(), access))
    return dataset


def written_chunks(dataset: h5py.Dataset) -> Chunks | None:
    """The chunks that exist; None where the storage is one piece. Looks at the index only."""
    if dataset.chunks is None or dataset.is_virtual:
        return None
    stored: dict[tuple[int, ...], tuple[int, int]] = {}

    def note(chunk: h5d.StoreInfo) -> None:
        if chunk.byte_offset is not None:
            stored[chunk.chunk_offset] = (int(chunk.size), int(chunk.filter_mask))

    if dataset.size:
        dataset.id.chunk_iter(note)
    return Chunks(dataset.chunks, stored)


def missing_chunks(dataset: h5py.Dataset) -> int:
    """How many storage chunks of `dataset` were never written; HDF5 would read them as zeros. Storage in one piece counts as one."""
    if not dataset.size or dataset.is_virtual:  # whose sources were looked at
        return 0
    if dataset.chunks is None:
        return int(dataset.id.get_storage_size() == 0)
    sizes = zip(dataset.shape, dataset.chunks, strict=True)
    expected: int = math.prod(math.ceil(size / chunk) for size, chunk in sizes)
    return expected - int(dataset.id.get_num_chunks())


def read_values(dataset: h5py.Dataset, path: Path) -> npt.NDArray[np.generic]:
    """All of a dataset of small values, as h5py gives it.

    Raises:
        EpisodeError: it is too large, was not written completely, or unpacks to more than it declares.
        OSError, ...: what h5py raises on damaged data (see container.reading).
    """
    size = int(dataset.size or 0) * dataset.dtype.itemsize
    if size > EPISODE_VALUE_BYTES:
        raise _absurd(
            dataset, path, f"{size} bytes in {dataset.dtype} {dataset.shape}", f"at most {EPISODE_VALUE_BYTES}"
        )
    if missing := missing_chunks(dataset):
        raise EpisodeError(
            f"{path}: {str(dataset.name).lstrip('/')} was never written to disk",
            got=f"{missing} storage chunks missing; HDF5 would read them as zeros",
            expected="the recorded values",
            hint="the disk was full, or the recorder was killed, when this episode was recorded: leave it out.",
        )
    chunks = written_chunks(dataset)
    if chunks is not None:
        for corner in chunks.stored:
            if reason := chunk_problem(dataset, chunks, corner):
                raise _absurd(dataset, path, reason, "what was declared")
    return np.asarray(dataset[()])


def chunk_problem(dataset: h5py.Dataset, chunks: Chunks, corner: tuple[int, ...]) -> str | None:
    """Why the chunk at `corner` must not be read, or None."""
    if corner in chunks.sound:
        return None
    if corner not in chunks.stored:
        return "its storage was never written"
    stored, mask = chunks.stored[corner]
    reason = unpacks_to_more(dataset, corner, stored, mask, _chunk_bytes(dataset))
    if reason is None:
        chunks.sound.add(corner)
    return reason


def _require_external(dataset: h5py.Dataset, path: Path) -> None:
    properties = dataset.id.get_create_plist()
    count = properties.get_external_count()
    if count > _MOST_SOURCES:
        raise _absurd(dataset, path, f"{count} external files", f"at most {_MOST_SOURCES}")
    needed = int(dataset.size or 0) * dataset.id.get_type().get_size()
    for place in range(count):
        stored, offset, size = properties.get_external(place)
        name = os.fsdecode(stored)
        target = inside(path.parent, name, path, f"the external storage of {dataset.name}")
        held = needed if size == h5f.UNLIMITED else min(needed, int(size))
        there = target.stat().st_size
        if there < offset + held:
            raise EpisodeError(
                f"{path}: the external storage of {dataset.name} is cut off",
                got=f"{target}: {there} bytes",
                expected=f"{offset + held} bytes; HDF5 would read zeros beyond the end",
                hint="copy it again from the robot; if it is like this there too, leave the episode out.",
            )
        needed -= held


def _require_sources(opened: h5d.DatasetID, path: Path, depth: int) -> None:
    """Check that the sources of a virtual dataset exist, are whole, and leave no gap."""
    from episodes.container import find_dataset, open_container  # which import this module

    properties = opened.get_create_plist()
    count = properties.get_virtual_count()
    name = "a virtual dataset"
    if count > _MOST_SOURCES or depth > 3:
        raise EpisodeError(
            f"{path}: {name} has an absurd number of sources",
            got=count,
            expected=f"at most {_MOST_SOURCES}",
            hint=_LEAVE_OUT,
        )
    extent = opened.get_space()
    union = extent.copy()
    union.select_none()
    whole = False
    for place in range(count):
        file_name, inner = properties.get_virtual_filename(place), properties.get_virtual_dsetname(place)
        selected = properties.get_virtual_vspace(place)
        if "%" in file_name or "%" in inner or not _bounded(selected):
            raise EpisodeError(
                f"{path}: {name} has sources without end",
                got=f"{file_name}:{inner}",
                expected="sources that are named one by one",
                hint="copy it into one file: h5repack IN OUT with h5py's or HDF5's tools.",
            )
        target = path if file_name == "." else inside(path.parent, file_name, path, f"the source {file_name} of {name}")
        with open_container(target) as file:
            source = find_dataset(file, inner, target, depth=depth + 1)
            if source is None or missing_chunks(source) or source.external is not None:
                raise EpisodeError(
                    f"{path}: the source {file_name}:{inner} of {name} is missing or was never written",
                    expected="whole data; HDF5 would read zeros",
                    hint="copy it again from the robot, together with the episode.",
                )
            _require_covered(source, properties.get_virtual_srcspace(place), path)
        if selected.get_select_type() == h5s.SEL_ALL:
            whole = True
        else:
            _add(union, selected)
    if not whole and union.get_select_npoints() != extent.get_simple_extent_npoints():
        raise EpisodeError(
            f"{path}: {name} has parts without a source",
            got=f"{union.get_select_npoints()} values",
            expected=f"{extent.get_simple_extent_npoints()}; HDF5 would read the rest as zeros",
            hint="leave the episode out, or write the missing sources.",
        )


def _add(union: h5s.SpaceID, selected: h5s.SpaceID) -> None:
    """Select in `union` what `selected` selects as well."""
    if selected.get_select_type() != h5s.SEL_HYPERSLABS:
        return
    for first, last in selected.get_select_hyper_blocklist():
        block = tuple(int(end - start + 1) for start, end in zip(first, last, strict=True))
        ones = (1,) * len(block)
        union.select_hyperslab(tuple(map(int, first)), ones, None, block, op=h5s.SELECT_OR)


def _require_covered(source: h5py.Dataset, selected: h5s.SpaceID, path: Path) -> None:
    """Check that `selected` lies within `source`: a source that is shorter reads as zeros."""
    if selected.get_select_type() == h5s.SEL_ALL:
        return
    _, last = selected.get_select_bounds()
    if len(last) != len(source.shape) or any(end >= size for end, size in zip(last, source.shape, strict=True)):
        raise EpisodeError(
            f"{path}: a source of a virtual dataset is shorter than what is taken from it",
            got=f"{source.name} {source.shape}",
            expected=f"at least {tuple(end + 1 for end in last)}; HDF5 would read zeros",
            hint="copy it again from the robot, together with the episode.",
        )


def _bounded(space: h5s.SpaceID) -> bool:
    if space.get_select_type() != h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return True
    return all(value != h5s.UNLIMITED for part in space.get_regular_hyperslab() for value in part)


def _require_enough(dataset: h5py.Dataset, path: Path) -> None:
    """Refuse storage in one piece that is smaller than its shape: what is beyond it would be whatever is in memory."""
    stored = dataset.id.get_storage_size() if dataset.size and not dataset.is_virtual else 0
    needed = int(dataset.size or 0) * int(dataset.id.get_type().get_size())
    if 0 < stored < needed:
        raise EpisodeError(
            f"{path} is damaged: {str(dataset.name).lstrip('/')} cannot be read",
            got=f"{stored} bytes of storage for {dataset.dtype} {dataset.shape}",
            expected=f"{needed} bytes",
            hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
        )


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    chunk: int = math.prod(dataset.chunks)
    return chunk * int(dataset.id.get_type().get_size())


def _chunks_a_row(dataset: h5py.Dataset) -> int:
    return math.prod(math.ceil(n / c) for n, c in zip(dataset.shape[1:], dataset.chunks[1:], strict=True))


def _absurd(dataset: h5py.Dataset, path: Path, got: str, expected: str) -> EpisodeError:
    return EpisodeError(
        f"{path}: {str(dataset.name).lstrip('/')} is of an absurd size", got=got, expected=expected, hint=_LEAVE_OUT
    )
