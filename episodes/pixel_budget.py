"""How many pixels the pictures of one episode may have together, by the bytes that hold them.

Each picture is within its own limit (episodes/pictures.py), but a file can name one picture a hundred thousand times. Pictures are
counted once, in the order in which they are read first; who reads in another order is stopped later.
"""

from __future__ import annotations

from dataclasses import dataclass

from bundle.reading_limits import FREE_PIXEL_BYTES, PIXEL_BYTES_A_BYTE


@dataclass
class PixelBudget:
    """Of one episode.

    Attributes:
        stored: bytes in which its pictures are.
        free, ratio: bytes of pixels that may come of any number of bytes, and of each byte.
    """

    stored: int
    free: int = FREE_PIXEL_BYTES
    ratio: int = PIXEL_BYTES_A_BYTE
    _spent: int = 0
    _furthest: int = -1

    def exceeded(self, index: int, pixel_bytes: int) -> str | None:
        """Take what picture `index` needs; says why that is too much, or None."""
        if index > self._furthest:
            self._furthest = index
            self._spent += pixel_bytes
        if self._spent <= self.free + self.ratio * self.stored:
            return None
        return f"{self._spent} bytes of pixels from {self.stored} bytes in the file"
