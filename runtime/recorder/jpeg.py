"""Compresses pictures without holding up the other threads of the process.

Pillow keeps Python's global lock while it compresses into memory (4 ms for a 720p picture on a fast core, 15 ms and more on a robot), and
the thread that publishes commands would wait for it. Into a real file it compresses without the lock. So it gets a file, one that
lives in memory.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FULL_COLOUR = 95  # from this quality on colours keep their full resolution (4:4:4), below they have half of it (4:2:0)


class JpegEncoder:
    """Used by one thread."""

    def __init__(self, quality: int) -> None:
        """`quality`: 10 to 100, of Pillow."""
        self._quality = quality
        self._subsampling = "4:4:4" if quality >= FULL_COLOUR else "4:2:0"
        self._file = os.fdopen(os.memfd_create("jpeg"), "w+b")

    def encode(self, pixels: NDArray[np.uint8]) -> bytes:
        """`pixels`, uint8 [H, W, 3] RGB, as the bytes of a JPEG file.

        Raises:
            ValueError: not such pixels, or more than JPEG can hold.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"a picture of {pixels.dtype} {pixels.shape}")
        self._file.seek(0)
        try:
            Image.fromarray(pixels).save(self._file, "JPEG", quality=self._quality, subsampling=self._subsampling)
        except OSError as error:  # not the disk's: that is told apart by its type
            raise ValueError(f"a picture of {pixels.shape} that cannot be compressed: {error}") from error
        length = self._file.tell()
        self._file.seek(0)
        return self._file.read(length)

    def close(self) -> None:
        """Release the memory."""
        self._file.close()
