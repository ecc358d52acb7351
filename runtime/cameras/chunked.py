"""Undoes HTTP's chunked transfer coding, as data comes.

http.client can do that too, but waits for the next chunk before it says that there is none. Knows nothing about what is in the chunks.
"""

from __future__ import annotations

from http.client import HTTPException

_LONGEST_LINE = 256


class Dechunker:
    """Feed it what arrives; it gives the content. `over` is set when the last chunk has come."""

    def __init__(self) -> None:
        self.over = False
        self._line = bytearray()
        self._left = 0  # of the chunk that is being read

    def feed(self, data: bytes) -> bytes:
        """The content in `data`, which follows what was fed before.

        Raises:
            HTTPException: this is no chunked coding.
        """
        content = bytearray()
        at = 0
        while at < len(data) and not self.over:
            if self._left:
                piece = data[at : at + self._left]
                content += piece
                at += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\n", at)
            self._line += data[at : end if end >= 0 else None]
            if len(self._line) > _LONGEST_LINE:
                raise HTTPException("a chunk without a size")
            if end < 0:
                break
            at = end + 1
            line = bytes(self._line).partition(b";")[0].strip()
            self._line.clear()
            if line:  # an empty one ends the chunk before
                self._begin(line)
        return bytes(content)

    def _begin(self, size: bytes) -> None:
        try:
            self._left = int(size, 16)
        except ValueError:
            raise HTTPException(f"a chunk of size {size[:20]!r}") from None
        if self._left < 0:
            raise HTTPException("a chunk of negative size")
        self.over = self._left == 0
