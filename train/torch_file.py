"""Files of torch.save: what they hold as descriptions, and tensors mapped from them once they have been checked.

Two containers: the zip of torch 1.6 and later, one stored member a storage, and the older row of pickles with the storages behind it.
Nothing is allocated by what a file claims: a storage must have exactly the bytes that its tensors say, a member lies inside the file,
overlaps no other and is not compressed, and a tensor lies inside its storage without overlapping itself. The checksums of the members
that are used are verified (4 GB/s a core, beside which reading the file from disk is what takes time); torch does not look at them, and
a byte that has flipped in a weight is otherwise not found by anything. Knows nothing about what keys mean.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bundle.reading_limits import PICKLE_BYTES, TENSORS, ZIP_DIRECTORY_BYTES
from train.plain_pickle import NotPlainError, StorageRef, TensorRef, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_PIECE = 8 << 20

# Records of a zip file (PKWARE's APPNOTE 4.3): the fields that are read, and their signatures.
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 1 << 16
_IN_EXTRA = 0xFFFFFFFF
_ZIP64_EXTRA = 1


@dataclass(frozen=True)
class Region:
    """Bytes in a file, and their CRC-32; None where the container has none."""

    start: int
    length: int
    crc: int | None


@dataclass(frozen=True)
class TorchFile:
    """A file's content with descriptions in place of tensors, and where the storages lie.

    Attributes:
        content: plain data and TensorRefs.
        regions: storage key -> bytes.
        checked: whether the file has checksums.
    """

    path: Path
    content: Any
    regions: Mapping[str, Region]
    checked: bool


def read_torch_file(path: Path, file: BinaryIO) -> TorchFile:
    """Read everything but the numbers.

    Args:
        file: `path`, opened.

    Raises:
        NotPlainError (a ValueError), ValueError, OSError: damaged, or beyond the budget.
        ForbiddenGlobalError: it wants to run code.
    """
    size = file.seek(0, io.SEEK_END)
    start = _read_at(file, 0, 4)
    members = _zip_members(file, size) if start[:2] == b"PK" else None
    return _read_row(path, file, size) if members is None else _read_zip(path, file, members)


def map_tensors(found: TorchFile, file: BinaryIO, tensors: Mapping[str, TensorRef]) -> dict[str, Tensor]:
    """Tensors that share the file's pages, copied only where numbers do not stand at multiples of their size.

    Args:
        file: the file that `found` was read from, opened.
        tensors: name -> description, from `found.content`.

    Raises:
        NotPlainError: a tensor that its storage does not hold, or a storage whose checksum is wrong; names it.
    """
    if len(tensors) > TENSORS:
        raise NotPlainError(f"{len(tensors)} tensors, more than {TENSORS}")
    for name, tensor in tensors.items():
        _check_extent(name, tensor, found.regions)
    _check_sums(found, file, tensors)
    size = file.seek(0, io.SEEK_END)
    mapped = torch.UntypedStorage.from_file(str(found.path), False, size)
    storages: dict[str, torch.UntypedStorage] = {}
    made = {}
    for name, tensor in tensors.items():
        region = found.regions[tensor.storage.key]
        if tensor.storage.key not in storages:
            view = mapped[region.start : region.start + region.length]
            if region.length and view.data_ptr() % tensor.dtype.itemsize:
                view = torch.UntypedStorage(region.length).copy_(view)
            storages[tensor.storage.key] = view
        empty = torch.empty(0, dtype=tensor.dtype)
        made[name] = empty.set_(storages[tensor.storage.key], tensor.offset, tensor.size, tensor.stride)
    return made


def _check_extent(name: str, tensor: TensorRef, regions: Mapping[str, Region]) -> None:
    """Hold a tensor against its storage, and the storage against the file."""
    region = regions.get(tensor.storage.key)
    if region is None or region.length != tensor.storage.bytes:
        held = "none of them" if region is None else f"{region.length}"
        raise NotPlainError(f"{name} lies in a storage of {tensor.storage.bytes} bytes, of which the file has {held}")
    span = 1  # elements from the first to the last, of dimensions with smaller strides
    for stride, length in sorted(zip(tensor.stride, tensor.size, strict=True)):
        if length > 1 and stride < span:
            raise NotPlainError(f"{name} repeats its numbers: size {list(tensor.size)}, stride {list(tensor.stride)}")
        span += (length - 1) * stride if length > 1 else 0
    empty = 0 in tensor.size
    if not empty and (tensor.offset + span) * tensor.dtype.itemsize > region.length:
        raise NotPlainError(
            f"{name} reaches beyond its storage of {region.length} bytes: {tensor.dtype}, offset {tensor.offset}, "
            f"size {list(tensor.size)}, stride {list(tensor.stride)}"
        )


def _check_sums(found: TorchFile, file: BinaryIO, tensors: Mapping[str, TensorRef]) -> None:
    first = {tensor.storage.key: name for name, tensor in reversed(list(tensors.items()))}
    for key in sorted(first, key=lambda key: found.regions[key].start):
        region = found.regions[key]
        if region.crc is not None and _crc(file, region) != region.crc:
            raise NotPlainError(f"the bytes of {first[key]} are not those that were written (CRC-32)")


def _crc(file: BinaryIO, region: Region) -> int:
    value = 0
    buffer = memoryview(bytearray(min(_PIECE, region.length)))
    file.seek(region.start)
    left = region.length
    while left and (count := file.readinto(buffer[:left])):  # type: ignore[attr-defined]
        value = zlib.crc32(buffer[:count], value)
        left -= count
    return value


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes at a place; fewer at the end of the file."""
    file.seek(start)
    pieces = []
    while length and (piece := file.read(length)):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


# --- zip ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    name: str
    region: Region


def _read_zip(path: Path, file: BinaryIO, members: list[_Member]) -> TorchFile:
    # torch can be told to write no checksums (set_crc32_options), and then all of them are 0.
    checked = any(member.region.crc for member in members)
    inside: dict[str, Region] = {}
    for member in members:
        _, _, name = member.name.partition("/")
        if name in inside:
            raise NotPlainError(f"{member.name} stands in the file twice")
        region = member.region
        inside[name] = region if checked else Region(region.start, region.length, None)
    pickled = inside.get("data.pkl")
    if pickled is None:
        raise NotPlainError("a zip file without data.pkl")
    if "byteorder" in inside and _member(file, inside["byteorder"], "byteorder") != b"little":
        raise NotPlainError("numbers written on a big-endian machine")
    content = read_pickle(io.BytesIO(_member(file, pickled, "data.pkl")), {})
    data = {name.removeprefix("data/"): region for name, region in inside.items() if name.startswith("data/")}
    return TorchFile(path, content, data, checked)


def _member(file: BinaryIO, region: Region, name: str) -> bytes:
    if region.length > PICKLE_BYTES:
        raise NotPlainError(f"a {name} of {region.length} bytes, more than {PICKLE_BYTES}")
    content = _read_at(file, region.start, region.length)
    if region.crc is not None and zlib.crc32(content) != region.crc:
        raise NotPlainError(f"the bytes of {name} are not those that were written (CRC-32)")
    return content


def _zip_members(file: BinaryIO, size: int) -> list[_Member] | None:
    """The members of a zip file, by its directory; None if it is no zip file."""
    tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
    tail = _read_at(file, tail_start, size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise NotPlainError("a zip file without its end")
    *_, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = _read_at(file, max(0, end - _END64_LOCATOR.size), _END64_LOCATOR.size)
    if locator[:4] == b"PK\6\7" and len(locator) == _END64_LOCATOR.size:
        record = _read_at(file, _END64_LOCATOR.unpack(locator)[2], _END64.size)
        if record[:4] != b"PK\6\6" or len(record) != _END64.size:
            raise NotPlainError("a zip file whose directory is not where it says")
        *_, length, start = _END64.unpack(record)
    if length > ZIP_DIRECTORY_BYTES:
        raise NotPlainError(f"a zip directory of {length} bytes, more than {ZIP_DIRECTORY_BYTES}")
    if start + length > end:
        raise NotPlainError("a zip file whose directory is not where it says")
    members = [_locate(file, entry, start) for entry in _entries(_read_at(file, start, length))]
    last = 0
    for region in sorted((member.region for member in members), key=lambda region: region.start):
        if region.start < last:
            raise NotPlainError("a zip file whose members overlap")
        last = region.start + region.length
    if last > start:
        raise NotPlainError("a zip file whose members reach beyond it")
    return members


@dataclass(frozen=True)
class _Entry:
    name: str
    crc: int
    length: int
    header: int


def _entries(directory: bytes) -> Iterable[_Entry]:
    at = 0
    while at < len(directory):
        if len(directory) - at < _ENTRY.size:
            raise NotPlainError("a zip directory that is cut")
        (signature, _, _, flags, method, _, _, crc, packed, length, names, extras, comments, _, _, _, header) = (
            _ENTRY.unpack_from(directory, at)
        )
        at += _ENTRY.size
        name, extra = directory[at : at + names], directory[at + names : at + names + extras]
        at += names + extras + comments
        if signature != b"PK\1\2" or at > len(directory):
            raise NotPlainError("a damaged zip directory")
        text = name.decode("utf-8", "backslashreplace")
        length, packed, header = _wide(extra, [length, packed, header])
        if flags & 1 or method or length != packed:
            raise NotPlainError(f"{text} is compressed or encrypted; torch.save does neither")
        yield _Entry(text, crc, length, header)


def _wide(extra: bytes, fields: list[int]) -> list[int]:
    """Sizes and offsets of 64 bits, which stand in an extra field in the order of those that have no room."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64_EXTRA:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra[: at + 4 + length], at + 4))
            return [next(numbers, field) if field == _IN_EXTRA else field for field in fields]
        at += 4 + length
    return fields


def _locate(file: BinaryIO, entry: _Entry, directory: int) -> _Member:
    """Where a member's bytes begin: behind its own header, whose length only that header tells."""
    raw = _read_at(file, entry.header, _LOCAL.size)
    if len(raw) != _LOCAL.size or raw[:4] != b"PK\3\4":
        raise NotPlainError(f"{entry.name} is not where the zip directory says")
    *_, names, extras = _LOCAL.unpack(raw)
    start = entry.header + _LOCAL.size + names + extras
    if start + entry.length > directory:
        raise NotPlainError(f"{entry.name} reaches beyond the file")
    return _Member(entry.name, Region(start, entry.length, entry.crc))


# --- row of pickles -----------------------------------------------------------------------------------------------------


def _read_row(path: Path, file: BinaryIO, size: int) -> TorchFile:
    """Magic number, version, machine, content, storage keys: five pickles; then each storage's length in elements and its bytes."""
    pickles = io.BytesIO(_read_at(file, 0, PICKLE_BYTES))
    storages: dict[str, StorageRef] = {}
    magic = read_pickle(pickles, {})
    if not isinstance(magic, int):  # a bare pickle, which holds no tensors
        return TorchFile(path, magic, {}, checked=False)
    version, machine = read_pickle(pickles, {}), read_pickle(pickles, {})
    if magic != _MAGIC or version != _PROTOCOL or not isinstance(machine, dict):
        raise NotPlainError("no file of torch.save")
    if not machine.get("little_endian", True):
        raise NotPlainError("numbers written on a big-endian machine")
    content, keys = read_pickle(pickles, storages), read_pickle(pickles, {})
    if not isinstance(keys, list) or any(not isinstance(key, str) or key not in storages for key in keys):
        raise NotPlainError("storages that no tensor names")
    regions: dict[str, Region] = {}
    at = pickles.tell()
    for key in keys:
        count = int.from_bytes(_read_at(file, at, 8), "little")
        length = storages[key].bytes
        if count != storages[key].count or at + 8 + length > size or key in regions:
            raise NotPlainError(f"storage {key} is not as long as its tensors say, or is cut")
        regions[key] = Region(at + 8, length, None)
        at += 8 + length
    return TorchFile(path, content, regions, checked=False)
