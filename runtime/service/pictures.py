"""Pictures on their way through the network: decoded as everywhere (episodes/pictures.py), refused with a status, encoded small."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import PictureError
from episodes.pictures import decode_picture
from runtime.service.refusal import Refusal

Encoding = Literal["png", "jpeg"]

# Status and reason for each fault of a PictureError.
_REFUSALS = {
    "format": (415, "image_type"),
    "meaning": (415, "image_type"),
    "pixels": (413, "pixels"),
    "damaged": (422, "image"),
}


def decode(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The picture in a JPEG or PNG file as uint8 [H, W, 3] RGB; see episodes/pictures.py.

    Raises:
        Refusal: 415 for another format or pixel format, 413 for more pixels than allowed (nothing is decoded then), 422 for a damaged file.
    """
    try:
        return decode_picture(data, most_pixels=max_pixels)
    except PictureError as error:
        status, reason = _REFUSALS[error.fault]
        hint = f"{error.hint} Or raise --max-pixels." if error.fault == "pixels" else error.hint
        raise Refusal(status, reason, error.what, got=error.got, expected=error.expected, hint=hint) from None


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


def _not_base64(got: object) -> Refusal:
    return Refusal(
        422,
        "image",
        "`image` is not base64",
        got=got,
        expected="base64 of a JPEG or PNG file, with or without data:image/...;base64, in front",
        hint="or send the file itself, as multipart/form-data.",
    )
