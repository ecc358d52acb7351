"""Cuts a multipart/x-mixed-replace stream ("MJPEG") into its parts, however the network cut it before.

Cameras are loose with the format: a boundary announced with its dashes or without, lengths that are missing or wrong, line ends of one
byte. So a part ends after its announced length, or at the next line that is the boundary; whatever stands between two parts is skipped.
What is too long is an error before it is kept. Knows nothing about sockets or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

from bundle.errors import CameraError

MOST_BODY = 16 << 20
MOST_HEAD = 16 << 10
_LONGEST_LINE = 256


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        headers: by lower-case name.
        body: as sent.
        begun_s: when its headers were complete, as told to `feed`.
    """

    headers: dict[str, str]
    body: bytes
    begun_s: float


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type announces, without leading dashes.

    Raises:
        CameraError: it announces no stream of parts, or no boundary.
    """
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    core = boundary.strip().lstrip("-").encode("ascii", "replace") if isinstance(boundary, str) else b""
    if message.get_content_maintype() != "multipart" or not core:
        raise CameraError(
            "the camera's answer is not a stream of pictures",
            got=f"Content-Type: {content_type[:120]}",
            expected="multipart/x-mixed-replace with a boundary",
            hint="write the address of the stream itself; for one picture per request set snapshot = true.",
        )
    return core


class PartParser:
    """Feed it what arrives; it gives the parts that became complete."""

    def __init__(self, boundary: bytes) -> None:
        """Args:
        boundary: as `boundary_of` gives it.
        """
        self._marker = b"--" + boundary
        self._buffer = bytearray()
        self._scanned = 0  # so far the buffer holds no end of the body
        self._headers: dict[str, str] | None = None  # None: between parts, or in the headers
        self._in_headers = False
        self._length: int | None = None
        self._begun_s = 0.0
        self.over = False
        """The last boundary has come: the sender will send no more."""

    def feed(self, data: bytes, now_s: float) -> list[Part]:
        """Take `data`, which came at `now_s`.

        Raises:
            CameraError: something is longer than any camera would send, or a length is no number.
        """
        self._buffer += data
        parts: list[Part] = []
        while not self.over and self._advance(parts, now_s):
            pass
        return parts

    def _advance(self, parts: list[Part], now_s: float) -> bool:
        """One step further; false if it takes more data."""
        if self._headers is not None:
            return self._take_body(parts, self._headers)
        return self._take_headers(now_s) if self._in_headers else self._find_boundary()

    def _find_boundary(self) -> bool:
        at = self._buffer.find(self._marker)
        if at < 0:
            del self._buffer[: max(0, len(self._buffer) - len(self._marker) + 1)]
            return False
        end = self._buffer.find(b"\n", at)
        rest = bytes(self._buffer[at + len(self._marker) : end if end >= 0 else None]).strip()
        if rest == b"--":
            self.over = end >= 0
            return self.over
        if end < 0 and len(self._buffer) - at < _LONGEST_LINE:
            return False
        if rest or end < 0:  # something longer that begins alike
            del self._buffer[: at + len(self._marker)]
            return True
        del self._buffer[: end + 1]
        self._in_headers = True
        return True

    def _take_headers(self, now_s: float) -> bool:
        head, rest = _split_head(self._buffer)
        if head is None:
            self._check(len(self._buffer), MOST_HEAD, "headers of a part")
            return False
        self._check(len(head), MOST_HEAD, "headers of a part")
        lines = head.decode("latin-1").splitlines()
        named = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, colon, value in named if colon}
        self._length = self._content_length(headers)
        del self._buffer[:rest]
        self._headers, self._begun_s, self._in_headers, self._scanned = headers, now_s, False, 0
        return True

    def _take_body(self, parts: list[Part], headers: dict[str, str]) -> bool:
        if self._length is not None:
            if len(self._buffer) < self._length:
                return False
            end = rest = self._length
        else:
            rest = self._buffer.find(b"\n" + self._marker, self._scanned)
            if rest < 0:
                self._check(len(self._buffer), MOST_BODY, "a part")
                self._scanned = max(0, len(self._buffer) - len(self._marker))
                return False
            end = rest - 1 if rest and self._buffer[rest - 1] == ord("\r") else rest
            self._check(end, MOST_BODY, "a part")
        parts.append(Part(headers, bytes(self._buffer[:end]), self._begun_s))
        del self._buffer[:rest]
        self._headers = None
        return True

    def _content_length(self, headers: dict[str, str]) -> int | None:
        text = headers.get("content-length")
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise _malformed(f"Content-Length: {text[:40]}", "a number of bytes")
        self._check(int(text), MOST_BODY, "a part")
        return int(text)

    def _check(self, size: int, most: int, what: str) -> None:
        if size > most:
            raise _malformed(f"{what} of {size} bytes or more", f"at most {most}")


def _split_head(buffer: bytearray) -> tuple[bytes | None, int]:
    """The header lines and where the body begins; None if their end has not come yet."""
    begin = 0
    while (end := buffer.find(b"\n", begin, MOST_HEAD + 2)) >= 0:
        if not buffer[begin:end].strip():
            return bytes(buffer[:begin]), end + 1
        begin = end + 1
    return None, 0


def _malformed(got: str, expected: str) -> CameraError:
    return CameraError(
        "the camera's stream is not to be understood",
        got=got,
        expected=expected,
        hint="look at it with a browser, or with curl -v; for one picture per request set snapshot = true.",
    )
