"""Unpacks the chunks of an MCAP file into as much as they declare and no more, whatever is in them.

The libraries believe what packed bytes say of their size, and some unpack without end. Needs the libraries of what is packed only.
"""

from __future__ import annotations

from collections.abc import Callable

from bundle.reading_limits import RECORDING_CHUNK_BYTES


class Damage(Exception):
    """The bytes at this place are not what they should be."""


def unpack(data: bytes, compression: str, size: int) -> bytes:
    """The records of a chunk: `size` bytes.

    Raises:
        Damage: they are more or fewer, or cannot be unpacked.
    """
    if compression == "":
        records = data
    elif (codec := _codec(compression)) is None:
        raise Damage(f"compression {compression!r} cannot be read here")
    else:
        try:
            records = codec(data, size)
        except Exception as error:  # each library has its own, and they differ between versions
            raise Damage(f"{compression}: {error}") from None
    if len(records) != size:
        raise Damage(f"{len(records)} bytes in a chunk of {size}")
    return records


def _codec(compression: str) -> Callable[[bytes, int], bytes] | None:
    """What the mcap library depends on; our own recordings are not compressed."""
    try:
        if compression == "zstd":
            import zstandard  # noqa: F401

            return _unpack_zstd
        if compression == "lz4":
            import lz4.frame  # type: ignore[import-untyped]

            # Not further than to the first byte too much.
            return lambda data, size: bytes(lz4.frame.LZ4FrameDecompressor().decompress(data, size + 1))
    except ImportError:
        pass
    return None


def _unpack_zstd(data: bytes, size: int) -> bytes:
    """What `data` says of its size is believed by the library, which takes that much memory."""
    import zstandard

    said = zstandard.frame_content_size(data)
    if said not in (-1, size):
        raise ValueError(f"{said} bytes in a chunk of {size}")
    reader = zstandard.ZstdDecompressor(max_window_size=RECORDING_CHUNK_BYTES).stream_reader(
        data, read_across_frames=True
    )
    unpacked: bytes = reader.read(size + 1)
    return unpacked
