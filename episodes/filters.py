"""The compression filters of an HDF5 dataset: which are there, which package has those that are not, and how large a chunk unpacks.

libhdf5 believes a compressed chunk: two megabytes of gzip that unpack to two gigabytes do so in memory, whatever the dataset
declares. So a chunk that could grow far beyond its declared size is looked at before libhdf5 sees it, by the size in its header or
by unpacking at most that much. Filters whose unpacked size cannot be told are refused, as is one compression inside another.

Knows nothing about episodes.
"""

from __future__ import annotations

import bz2
import struct
import zlib
from importlib import import_module
from pathlib import Path

import h5py
from h5py import h5z

from bundle.errors import EpisodeError

_DEFLATE, _SZIP, _BZIP2, _LZF, _BLOSC, _LZ4, _BITSHUFFLE, _ZSTD, _BLOSC2 = (
    1, 4, 307, 32000, 32001, 32004, 32008, 32015, 32026,
)  # fmt: skip
_COMPRESSORS = {
    _DEFLATE: "gzip",
    _SZIP: "szip",
    _BZIP2: "bzip2",
    _LZF: "lzf",
    _BLOSC: "blosc",
    _LZ4: "lz4",
    _BITSHUFFLE: "bitshuffle",
    _ZSTD: "zstd",
    _BLOSC2: "blosc2",
}
_FLETCHER, _PACKED = 3, {5, 6}
_SAME_SIZE = {
    2: "shuffle",
    3: "fletcher32",
    5: "nbit",
    6: "scaleoffset",
}  # or of a size that follows from the declared one
_SLACK = 65_536  # checksums, and what a compressor adds to data that it cannot compress
_HARMLESS = 32 << 20  # what a chunk may unpack to without being looked at
_BEST_RATIO = {_DEFLATE: 1032, _LZF: 90}
_PLUGINS = "hdf5plugin"  # the package that brings all of them but those of libhdf5 and h5py


def require_filters(dataset: h5py.Dataset, path: Path) -> None:
    """Have the filters of `dataset` loaded.

    Raises:
        EpisodeError: one is not installed, not known, or there are two compressions of which one unpacks the other.
    """
    found = _filters(dataset)
    for number, said in found:
        if number not in _COMPRESSORS and number not in _SAME_SIZE:
            raise EpisodeError(
                f"{path}: {dataset.name} is stored with a filter that is not known",
                got=f"HDF5 filter {number}" + (f" ({said})" if said else ""),
                expected=", ".join(sorted({*_COMPRESSORS.values(), *_SAME_SIZE.values()})),
                hint="store it again with gzip: h5repack -f GZIP=4 IN OUT, where the filter is installed.",
            )
        if not h5z.filter_avail(number) and not _load(number):
            name = _COMPRESSORS.get(number) or _SAME_SIZE[number]
            raise EpisodeError(
                f"{path}: {dataset.name} is compressed with {name}, for which no filter is installed",
                got=f"HDF5 filter {number}; the file may be perfectly good",
                expected=f"the package {_PLUGINS}, which has it",
                hint=f"pip install {_PLUGINS}; or store it again with gzip: h5repack -f GZIP=4 IN OUT.",
            )
    compressions = [_COMPRESSORS[number] for number, _ in found if number in _COMPRESSORS]
    if len(compressions) > 1:
        raise EpisodeError(
            f"{path}: {dataset.name} is compressed more than once",
            got=" and ".join(compressions),
            expected="one compression",
            hint="store it again with gzip alone: h5repack -f GZIP=4 IN OUT.",
        )


def unpacks_to_more(
    dataset: h5py.Dataset, corner: tuple[int, ...], stored: int, mask: int, declared: int
) -> str | None:
    """Why the chunk at `corner` must not be unpacked, or None.

    Args:
        stored: bytes of the chunk in the file.
        mask: of the filters that were left out for this chunk, one bit each.
        declared: bytes of the chunk by shape and dtype.
    """
    numbers = [number for number, _ in _filters(dataset)]
    used = [number for place, number in enumerate(numbers) if number in _COMPRESSORS and not mask >> place & 1]
    if used == [_BITSHUFFLE] and not any(dataset.id.get_create_plist().get_filter_by_id(_BITSHUFFLE)[1][4:5]):
        used = []  # it shuffles only
    most = declared + _SLACK
    if stored > declared * 1.25 + _SLACK:
        return f"{stored} bytes for a chunk of {declared}"
    if not used and stored < declared and not _PACKED & set(numbers):
        return f"{stored} bytes for a chunk of {declared}"
    if used == [_LZF] and _FLETCHER not in numbers:
        # It has no checksum, and libhdf5 fills up with whatever is in memory what a damaged chunk lacks.
        _, raw = dataset.id.read_direct_chunk(corner)
        size = _lzf_size(bytes(raw))
        return None if size == declared else f"a chunk of {declared} bytes unpacks to {size}"
    if not used or stored * _BEST_RATIO.get(used[0], 1 << 40) <= max(_HARMLESS, most):
        return None
    _, raw = dataset.id.read_direct_chunk(corner)
    size = _unpacked_size(used[0], bytes(raw), most)
    return (
        None
        if size is not None and size <= most
        else f"a chunk of {declared} bytes unpacks to {size or 'no size that can be told'}"
    )


def _unpacked_size(number: int, raw: bytes, most: int) -> int | None:
    """What `raw` says or shows that it unpacks to; `most` + 1 for anything larger; None where that cannot be told."""
    try:
        if number in (_DEFLATE, _BZIP2):
            unpacker = zlib.decompressobj() if number == _DEFLATE else bz2.BZ2Decompressor()
            return len(unpacker.decompress(raw, most + 1))
        if number in (_LZ4, _BITSHUFFLE):
            return int(struct.unpack_from(">Q", raw)[0])
        if number in (_BLOSC, _BLOSC2):
            return int(struct.unpack_from("<I", raw, 4)[0])
        if number == _SZIP:
            return int(struct.unpack_from("<I", raw)[0])
        return _zstd_size(raw) if number == _ZSTD else None
    except (struct.error, IndexError, zlib.error, OSError, ValueError):
        return None


def _lzf_size(raw: bytes) -> int:
    """Bytes that LZF unpacks to: runs that are copied (1 to 32), and repetitions (3 to 264); -1 where it is cut."""
    size = at = 0
    end = len(raw)
    while at < end:
        head = raw[at]
        if head < 32:
            at, size = at + head + 2, size + head + 1
        elif head < 224:
            at, size = at + 2, size + (head >> 5) + 2
        elif at + 1 < end:
            at, size = at + 3, size + raw[at + 1] + 9
        else:
            return -1
    return size if at == end else -1


def _zstd_size(raw: bytes) -> int | None:
    """The content size in the header of a Zstandard frame (RFC 8878, 3.1.1.1)."""
    if raw[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = raw[4]
    single = descriptor >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    field = raw[start : start + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def _filters(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    properties = dataset.id.get_create_plist()
    found = (properties.get_filter(place) for place in range(properties.get_nfilters()))
    return [(int(entry[0]), bytes(entry[3]).decode("utf-8", "replace")) for entry in found]


def _load(number: int) -> bool:
    """Whether the filter is there after the package of filters has been asked for."""
    try:
        import_module(_PLUGINS)
    except ImportError:
        return False
    return bool(h5z.filter_avail(number))
