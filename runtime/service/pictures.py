"""Pictures on their way through the network: decoded with suspicion, encoded small.

A picture is what a stranger's bytes can make expensive: its size is read before anything is decoded, only JPEG and PNG are taken, and a
JPEG with hundreds of scans (minutes of work in a few kilobytes) is refused. EXIF orientation is ignored, as everywhere in jetvla: a robot's
camera is turned upright by the robot file.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.service.refusal import Refusal

Encoding = Literal["png", "jpeg"]

# Cameras write one scan, progressive encoders about ten.
MAX_SCANS = 64
_MODES = ("RGB", "L", "P", "RGBA")
# What Pillow raises on bytes that lie.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error, OverflowError)


def decode(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The picture in a JPEG or PNG file as uint8 [H, W, 3] RGB; grey becomes RGB, transparency is dropped.

    Raises:
        Refusal: 415 for what is neither, 413 for more pixels than allowed (nothing is decoded then), 422 for a damaged file.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("more than Pillow opens at all", max_pixels) from None
    except _DAMAGE:
        raise Refusal(
            415,
            "image_type",
            "the image is neither a JPEG nor a PNG file",
            got=f"{len(data)} bytes that begin with {data[:8].hex(' ') or 'nothing'}",
            expected="a whole JPEG or PNG file",
            hint="send the file's bytes as they are; raw pixels and other formats are not taken.",
        ) from None
    with image:
        if image.width * image.height > max_pixels:
            raise _too_many_pixels(f"{image.width} x {image.height}", max_pixels)
        if image.mode not in _MODES:
            raise Refusal(
                415,
                "image_type",
                "the image has a pixel format that is not taken",
                got=image.mode,
                expected="8-bit RGB or grey",
                hint="convert the picture to RGB before it is sent.",
            )
        if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
            raise _damaged(f"{data.count(bytes.fromhex('ffda'))} scans", f"at most {MAX_SCANS}")
        try:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
        except _DAMAGE as error:
            raise _damaged(error, "a whole file") from None
    return pixels


def decode_base64(text: str) -> bytes:
    """The bytes of an `image` field: base64, after an optional `data:image/...;base64,`.

    Raises:
        Refusal: 422 for anything else.
    """
    head, comma, rest = text.partition(",")
    if comma:
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise _not_base64(head[:40])
        text = rest
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _not_base64(error) from None


def encode(pixels: NDArray[np.uint8], encoding: Encoding, quality: int = 95) -> bytes:
    """A file of uint8 [H, W, 3] RGB. PNG gives the very same pixels back, JPEG does not (here without chroma subsampling)."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if encoding == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _too_many_pixels(got: str, max_pixels: int) -> Refusal:
    return Refusal(
        413,
        "pixels",
        "the image has too many pixels",
        got=got,
        expected=f"at most {max_pixels} in all",
        hint="send it smaller: the policy looks at a few hundred pixels squared; or raise --max-pixels.",
    )


def _damaged(got: object, expected: str) -> Refusal:
    return Refusal(
        422,
        "image",
        "the image cannot be decoded",
        got=got,
        expected=expected,
        hint="it was cut off or damaged on its way.",
    )


def _not_base64(got: object) -> Refusal:
    return Refusal(
        422,
        "image",
        "`image` is not base64",
        got=got,
        expected="base64 of a JPEG or PNG file, with or without data:image/...;base64, in front",
        hint="or send the file itself, as multipart/form-data.",
    )
