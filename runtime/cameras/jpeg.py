"""One JPEG or PNG picture from a camera, decoded as all pictures are (episodes/pictures.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CameraError, FrameError, PictureError
from episodes.pictures import decode_picture


def decode_from(data: bytes | bytearray | memoryview, origin: str) -> NDArray[np.uint8]:
    """A picture file as uint8 [H, W, 3] RGB, contiguous.

    Args:
        origin: what it came from, for errors.

    Raises:
        FrameError: it is no JPEG or PNG, is cut short or damaged, or is too large.
        CameraError: it is a picture of a kind that the camera has to be told not to send.
    """
    try:
        return decode_picture(data)
    except PictureError as error:
        size = f"{len(data)} bytes"
        got = {"format": f"{size} that are no picture", "damaged": f"{size}: {error.got}"}.get(error.fault, error.got)
        if error.fault == "meaning":
            raise CameraError(
                f"{origin} sends pictures that are not taken", got=got, expected=error.expected, hint=error.hint
            ) from None
        raise FrameError(
            f"{origin} sent a picture that cannot be used",
            got=got,
            expected="a complete JPEG or PNG picture" if error.fault in ("format", "damaged") else error.expected,
            hint="one such picture is a glitch and is left out; if it goes on, look at the network and at what encodes the pictures.",
        ) from None
