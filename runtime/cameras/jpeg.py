"""Decodes one JPEG or PNG picture from a camera, and nothing that only looks like one.

Pillow decodes, as it does for training and for recorded episodes. The size is checked before a pixel is decoded, because a few kilobytes
can hold gigabytes. A picture that is cut short is an error: half a picture over a grey field looks like one. EXIF orientation is
ignored: how a camera hangs is said in the robot file and only there.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bundle.errors import FrameError

MOST_PIXELS = 40_000_000  # a good deal more than any camera here, and 120 MB decoded


def decode_picture(data: bytes | bytearray | memoryview, origin: str) -> NDArray[np.uint8]:
    """A picture file as uint8 [H, W, 3] RGB, contiguous.

    Args:
        origin: what it came from, for errors.

    Raises:
        FrameError: it is no JPEG or PNG, is cut short or damaged, or is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _refused(origin, f"{image.width} x {image.height} pixels", f"at most {MOST_PIXELS} pixels")
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:  # whose message is the name of a Python object
        raise _refused(origin, f"{len(data)} bytes that are no picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(origin, f"{len(data)} bytes: {error}") from None


def _refused(origin: str, got: str, expected: str = "a complete JPEG or PNG picture") -> FrameError:
    return FrameError(
        f"{origin} sent a picture that cannot be used",
        got=got,
        expected=expected,
        hint="one such picture is a glitch and is left out; if it goes on, look at the network and at what encodes the pictures.",
    )
