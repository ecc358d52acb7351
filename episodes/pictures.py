"""Decodes JPEG and PNG, for every way by which a picture file comes in: episodes, datasets, recordings, cameras and the service.

One decoder, so that the same file is the same array wherever it comes in, and what is refused by one is refused by all:

| in the file | becomes |
|---|---|
| RGB, 8 bits; YCbCr | RGB as Pillow decodes it, in which training saw it |
| grey, 1, 2, 4 or 8 bits | three equal channels, white is 255 |
| a palette | its colours |
| transparency | dropped, as Pillow's convert("RGB"), OpenCV and ROS drop it: the colour that is stored counts |
| several JPEG pictures (MPO) | the first, which every reader of JPEG shows |
| orientation (EXIF), gamma and colour profiles | ignored: a camera is turned upright by the robot file |
| 16 bits, CMYK, an animated PNG | refused: 10 or 12 bits in 16 would be a black picture, or a white one if cut |

What is allowed is judged by the file's bytes and never by a library's name of its format, and before a pixel is decoded, because a few
kilobytes can hold gigabytes or minutes. A picture that is cut short is an error, also where somebody closed it: half a picture over a grey
field looks like one.
Needs no HDF5, so a robot can import it.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import dropwhile, takewhile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, JpegImagePlugin, PngImagePlugin

from bundle.errors import PictureError
from bundle.reading_limits import (
    PICTURE_HEADER_BYTES,
    PICTURE_PIXELS,
    PICTURE_SCANNED_PIXELS,
    PICTURE_SCANS,
    PICTURE_SEGMENTS,
)

_INFLATE = 1 << 18  # bytes at a time
_SMALL_CHUNK = 256  # bytes; encoders put thousands into one

SIGNATURES = _JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # with which the files begin
_MODES = ("RGB", "L", "P", "RGBA", "LA", "1")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, behind a scan
_MORE = b"".join(
    bytes([0xFF, marker, *range(1, 255)]) for marker in range(0xD0, 0xD8)
)  # and where a restart is waited for
_ARITHMETIC = tuple(bytes([marker]) for marker in range(0xC9, 0xD0) if marker != 0xCC)
# First column and row, and steps, of the passes of an interlaced PNG (PNG specification, 8.1).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# What Pillow raises on bytes that lie.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


def decode_picture(
    data: bytes | bytearray | memoryview, *, most_pixels: int = PICTURE_PIXELS, png: bool = True
) -> NDArray[np.uint8]:
    """A picture file as uint8 [H, W, 3] RGB, contiguous.

    Args:
        most_pixels: that the picture may have.
        png: whether PNG is taken beside JPEG.

    Raises:
        PictureError: it is neither, means nothing certain, is cut short or damaged, or costs too much.
    """
    data = bytes(data)
    if not data.startswith(SIGNATURES if png else _JPEG):
        kinds = "JPEG or PNG" if png else "JPEG"
        raise PictureError(
            f"this is no {kinds} file",
            got=f"{len(data)} bytes that begin with {data[:8].hex(' ') or 'nothing'}",
            expected=f"a whole {kinds} file",
            hint="other formats, and raw pixels, are not taken.",
            fault="format",
        )
    try:
        image, scans = _opened(data, most_pixels)
        with image:
            _check_size(image.width, image.height, most_pixels, scans)
            if image.mode not in _MODES:
                raise _unclear(f"pixels of the kind {image.mode}")
            image.load()
            image.info.pop("transparency", None)
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
            if data.startswith(_JPEG) and ("progressive" in image.info or _may_be_filled(pixels)):
                _check_end(data, image)
            return pixels
    except _DAMAGE as error:
        raise _damaged(error) from None


def _may_be_filled(pixels: NDArray[np.uint8]) -> bool:
    """Whether the last block of a JPEG's pixels is flat, as libjpeg leaves it where the data ends before it.

    Without the block's first row and column, into which the colours of its neighbours reach.
    """
    bottom, right = ((side - 1) // 8 * 8 + 1 for side in pixels.shape[:2])
    block = pixels[bottom:, right:].reshape(-1, 3)
    return block.size == 0 or not (block != block[0]).any()


def _check_end(data: bytes, image: Image.Image) -> None:
    """Refuse a JPEG whose end was written behind half of its pixels, which libjpeg fills up with grey without an error.

    Bytes between the last pixel and the end are skipped by every decoder. Where they change the picture, pixels were missing.
    """
    stirred = _stirred(data)
    if stirred is not None:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(stirred)) as other:
            other.load()
            if ImageChops.difference(image, other).getbbox() is not None:
                raise _damaged("an end before the last pixels")


def _stirred(data: bytes) -> bytes | None:
    """A JPEG with more bytes at the end of each scan; None where they might count (arithmetic coding takes zeros for what is missing)."""
    pieces: list[bytes] = []
    done, at = 0, 2
    for _ in range(PICTURE_SEGMENTS):
        marker = data[at + 1 : at + 2]
        if data[at : at + 1] != b"\xff" or marker in _ARITHMETIC:
            return None
        if marker == b"\xd9":
            return b"".join([*pieces, data[done:]])
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xda":
            end = _MARKER.search(data, at)
            if end is None:
                return None
            pieces += [data[done : end.start()], _MORE[2:], _MORE]
            done = at = end.start()
    raise _damaged("more segments than a picture has", f"at most {PICTURE_SEGMENTS}")


def _opened(data: bytes, most_pixels: int) -> tuple[JpegImagePlugin.JpegImageFile | PngImagePlugin.PngImageFile, int]:
    """The file, not decoded, and the number of its scans.

    By its class, because `Image.open` looks for further pictures in a JPEG and then calls it by another name.
    """
    is_jpeg = data.startswith(_JPEG)
    scans = _check_segments(data) if is_jpeg else _check_chunks(data, most_pixels)
    try:
        return (JpegImagePlugin.JpegImageFile if is_jpeg else PngImagePlugin.PngImageFile)(io.BytesIO(data)), scans
    except _DAMAGE as error:
        raise _damaged(f"no header that can be read ({error})") from None


def _check_segments(data: bytes) -> int:
    """The number of scans of a JPEG, at most; what comes before the pixels is bounded, because Pillow joins it piece by piece."""
    scans = data.count(b"\xff\xda")
    if scans > PICTURE_SCANS:
        raise _damaged(f"{scans} scans", f"at most {PICTURE_SCANS}")
    at = 2
    for _ in range(PICTURE_SEGMENTS):
        if at > PICTURE_HEADER_BYTES:
            break
        if data[at : at + 1] != b"\xff" or at + 4 > len(data) or data[at + 1] == 0xDA:
            return scans  # the pixels, or what Pillow refuses
        if data[at + 1] == 0xFF:
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise _damaged(
        f"{at} bytes or more before the pixels", f"at most {PICTURE_SEGMENTS} segments and {PICTURE_HEADER_BYTES} bytes"
    )


def _check_chunks(data: bytes, most_pixels: int) -> int:
    """The number of scans of a PNG, which is one; that its pixels are all there, which Pillow does not notice at the end of a row."""
    chunks = list(_chunks(data))
    kinds = [kind for kind, _ in chunks]
    if kinds[:1] != [b"IHDR"] or len(chunks[0][1]) != 13:
        raise _damaged("no header")
    width, height, bits, colours, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    _check_size(width, height, most_pixels, 1)
    if bits == 16:
        raise _unclear("16 bits a channel")
    if b"acTL" in kinds:
        raise _unclear("an animated PNG: several pictures")
    if b"IEND" not in kinds:
        raise _damaged("cut short")
    row_bits = bits * _CHANNELS.get(colours, 0)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    wanted = sum(rows * (1 + -(-columns * row_bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    # Pillow reads no further than to the first other chunk.
    pixels = takewhile(lambda chunk: chunk[0] == b"IDAT", dropwhile(lambda chunk: chunk[0] != b"IDAT", chunks))
    got = _inflated((content for _, content in pixels), wanted)
    if got < wanted:
        raise _damaged(f"{got} bytes of pixels", f"{wanted}")
    return 1


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of the chunks of a PNG, to IEND or the end of the file; the checksums of those that matter are checked."""
    at, view, others = len(_PNG), memoryview(data), 0
    for _ in range(PICTURE_SEGMENTS + len(data) // _SMALL_CHUNK):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        kind, ancillary = data[at + 4 : at + 8], bool(data[at + 4] & 0x20)
        others += kind != b"IDAT"
        if others > PICTURE_SEGMENTS:
            break
        if not ancillary and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise _damaged(f"a wrong checksum of {kind!r}")
        yield kind, view[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4
    raise _damaged("more chunks than a picture has", f"at most {PICTURE_SEGMENTS} beside the pixels")


def _inflated(parts: Iterator[memoryview], enough: int) -> int:
    """Bytes in a zlib stream, counted not much further than `enough`.

    Raises:
        zlib.error: it is damaged.
    """
    stream, total = zlib.decompressobj(), 0
    for part in parts:
        rest: bytes | memoryview = part
        while rest and not stream.eof:
            total += len(stream.decompress(rest, _INFLATE))
            if total > enough:
                return total
            rest = stream.unconsumed_tail
    return total + len(stream.decompress(b"", _INFLATE))


def _check_size(width: int, height: int, most_pixels: int, scans: int) -> None:
    if width * height > most_pixels:
        raise PictureError(
            "the picture has too many pixels",
            got=f"{width} x {height} pixels",
            expected=f"at most {most_pixels} pixels",
            hint="make it smaller: the policy looks at a few hundred pixels squared.",
            fault="pixels",
        )
    if width * height * scans > PICTURE_SCANNED_PIXELS:
        raise _damaged(
            f"{scans} scans of {width} x {height} pixels", f"at most {PICTURE_SCANNED_PIXELS} pixels in all scans"
        )


def _unclear(got: str) -> PictureError:
    return PictureError(
        "the picture has a pixel format that is not taken",
        got=got,
        expected="one picture, 8 bits a channel, RGB, grey or a palette",
        hint="what is black and white in it is not said: convert it to 8-bit RGB or grey where it is made (mono8, not mono16).",
        fault="meaning",
    )


def _damaged(got: object, expected: str = "a whole file") -> PictureError:
    return PictureError(
        "the picture cannot be decoded",
        got=got,
        expected=expected,
        hint="it was cut off or damaged on its way.",
        fault="damaged",
    )
