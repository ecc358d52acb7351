"""Walks through the heap of an HDF5 file, where texts and JPEG frames of any length lie, before libhdf5 does.

libhdf5 takes a collection of the heap into memory as a whole, whatever its size, and a collection of which a sector was lost sends it in
a circle for ever. Neither can be asked beforehand, so the collections are looked for in those parts of the file that are not the storage
of a dataset, by the mark with which they begin (HDF5 file format, III.E).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import h5py
import numpy as np

from bundle.errors import EpisodeError
from bundle.reading_limits import EPISODE_CHUNKS, EPISODE_FRAMES

_MARK = b"GCOL\x01\0\0\0"
_HEADER, _OBJECT = 16, 16  # bytes
_MOST_BYTES = 64 << 20
_READ_BYTES = 8 << 20
_MOST_LOOKED_AT = 1000
_GZIP = 1


def require_sound_heap(file: h5py.File, path: Path) -> None:
    """Refuse a file with a collection that is too large or damaged.

    Raises:
        EpisodeError: there is one.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as raw:
        for start, end in _gaps(file, size):
            for place in _marks(raw, start, end):
                _check(raw, place, size, path)


def require_sound_references(dataset: h5py.Dataset, path: Path) -> None:
    """Refuse a dataset of texts or JPEG frames that names lengths which nothing in the heap has: libhdf5 takes that much memory first.

    References that are packed by anything but gzip are not looked at.

    Raises:
        EpisodeError: one is too long.
    """
    kind = dataset.id.get_type()
    is_reference = isinstance(kind, h5py.h5t.TypeVlenID) or (
        isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()
    )
    if not is_reference or not dataset.size or dataset.size > EPISODE_FRAMES:
        return
    most = min(_MOST_BYTES, path.stat().st_size)
    for stored in _references(dataset, path):
        width = kind.get_size()
        lengths = np.frombuffer(stored[: len(stored) // width * width], np.dtype((np.void, width)))
        longest = int(lengths.view(np.uint8).reshape(-1, width)[:, :4].copy().view("<u4").max(initial=0))
        if longest > most:
            raise EpisodeError(
                f"{path} is damaged: {dataset.name} cannot be read",
                got=f"a text or picture of {longest} bytes in a file of {path.stat().st_size}",
                expected=f"at most {most}",
                hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
            )


def _references(dataset: h5py.Dataset, path: Path) -> Iterator[bytes]:
    """The stored elements of `dataset`: length, place in the heap, number."""
    size = int(dataset.size) * dataset.id.get_type().get_size()
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is not None:
            with path.open("rb", buffering=0) as raw:
                yield os.pread(raw.fileno(), size, start)
        return
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(place)[0] for place in range(properties.get_nfilters())]
    chunk = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    corners: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda found: corners.append(found.chunk_offset))
    for corner in corners if filters in ([], [_GZIP]) else ():
        mask, stored = dataset.id.read_direct_chunk(corner)
        packed = bool(filters) and not mask & 1
        yield zlib.decompressobj().decompress(stored, chunk) if packed else bytes(stored)


def _check(raw: FileIO, place: int, size: int, path: Path) -> None:
    length = int.from_bytes(os.pread(raw.fileno(), _HEADER, place)[8:], "little")
    if length > size - place:
        return  # no collection, or one that libhdf5 refuses
    if length > _MOST_BYTES:
        raise EpisodeError(
            f"{path} holds one text, attribute or picture of an absurd size",
            got=f"{length} bytes at {place}",
            expected=f"at most {_MOST_BYTES}",
            hint="leave the episode out; no recorder writes such a file.",
        )
    content = os.pread(raw.fileno(), length, place)
    at = _HEADER
    while at + _OBJECT <= length:
        number = int.from_bytes(content[at : at + 2], "little")
        held = int.from_bytes(content[at + 8 : at + 16], "little")
        step = _OBJECT + -(-held // 8) * 8 if number else held  # what is free counts its own header
        if step < _OBJECT or step > length - at:
            raise EpisodeError(
                f"{path} is damaged: its texts or pictures cannot be read",
                got=f"an object of {held} bytes at {place + at}, in a collection of {length} at {place}",
                expected="data as it was written",
                hint="a part of the file was lost: copy it again from the robot; if it is like this there too, leave it out.",
            )
        at += step


def _gaps(file: h5py.File, size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 byte of what is not the storage of a dataset, of the first thousand or so."""
    taken: list[tuple[int, int]] = []
    seen = 0

    def note(name: str, item: object) -> bool | None:
        nonlocal seen
        seen += 1
        if (
            isinstance(item, h5py.Dataset)
            and not item.is_virtual
            and not item.id.get_create_plist().get_external_count()
        ):
            taken.extend(_storage(item))
        return True if seen >= _MOST_LOOKED_AT else None

    file.visititems(note)
    at = 0
    for start, end in sorted(taken):
        if start > at:
            yield at, start
        at = max(at, end)
    if at < size:
        yield at, size


def _storage(dataset: h5py.Dataset) -> list[tuple[int, int]]:
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        return [] if start is None else [(start, start + dataset.id.get_storage_size())]
    found: list[tuple[int, int]] = []
    if dataset.size and dataset.id.get_num_chunks() <= EPISODE_CHUNKS:
        dataset.id.chunk_iter(
            lambda chunk: (
                None if chunk.byte_offset is None else found.append((chunk.byte_offset, chunk.byte_offset + chunk.size))
            )
        )
    return found


def _marks(raw: FileIO, start: int, end: int) -> Iterator[int]:
    """Where collections begin between two places; holes of a sparse file are passed over."""
    tail = b""
    while start < end:
        try:
            here = raw.seek(start, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            return
        block = raw.read(max(0, min(_READ_BYTES, end - here)))
        if not block:
            return
        tail = tail if here == start else b""
        data, first = tail + block, here - len(tail)
        place = data.find(_MARK)
        while place >= 0:
            yield first + place
            place = data.find(_MARK, place + 1)
        start, tail = here + len(block), data[-len(_MARK) + 1 :]
