"""Takes multipart/form-data (RFC 7578) apart, in one pass over a body that is there as a whole.

A form comes from anybody who may ask, so the cost of one is its length: a few searches in C, no state per byte, no charset but UTF-8. Parts
beyond a few, nested forms and anything that readers of forms could understand in two ways are refused. Knows nothing about HTTP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PARTS = 10
MAX_HEADERS = 4096  # bytes of one part's

# RFC 2046, 5.1.1: 1 to 70 characters of these, the last of them no space.
_BOUNDARY = re.compile(
    r";\s*boundary=(?:\"([0-9A-Za-z'()+_,./:=? -]{1,70})\"|([0-9A-Za-z'+_.-]{1,70}))\s*(?=;|$)", re.I
)
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:[ \t]*form-data[ \t]*((?:;[^\r\n]*)?)(?=\r\n|$)", re.I)
# A parameter; browsers write a quote as %22, curl and others as \".
_PARAMETER = re.compile(rb";[ \t]*([a-z*]+)=(?:\"((?:[^\"\\\r\n]|\\.)*)\"|([^\s\";]+))[ \t]*", re.I)


@dataclass(frozen=True)
class Part:
    """One field of a form: `content` as it came, `is_file` when it has a file's name."""

    name: str
    content: bytes
    is_file: bool


def read_form(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form, in order.

    Args:
        content_type: the request's whole Content-Type, for its boundary.
        body: all of it.

    Raises:
        ValueError: it is none; the text says why.
    """
    boundaries = _BOUNDARY.findall(content_type)
    if len(boundaries) != 1:
        raise ValueError("no boundary" if not boundaries else "several boundaries")
    boundary = (boundaries[0][0] or boundaries[0][1]).encode()
    # Every boundary begins on a line of its own.
    preamble, *pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)
    if preamble.strip(b"\r\n"):
        raise ValueError("something before the first boundary")
    if len(pieces) > MAX_PARTS + 1:
        raise ValueError(f"more than {MAX_PARTS} parts")
    if not pieces or pieces[-1].rstrip(b"\r\n") != b"--":
        raise ValueError("no end: the last boundary is missing, or something stands behind it")
    return [_part(piece) for piece in pieces[:-1]]


def _part(piece: bytes) -> Part:
    """A part from behind its boundary to the next."""
    end = piece.find(b"\r\n\r\n", 0, MAX_HEADERS)
    if not piece.startswith(b"\r\n") or end < 0:
        raise ValueError(f"a part without headers, or with more than {MAX_HEADERS} bytes of them")
    dispositions = _DISPOSITION.findall(piece[2:end] if end else b"")
    if len(dispositions) != 1:
        raise ValueError("a part without one Content-Disposition: form-data")
    rest: bytes = dispositions[0]
    parameters: dict[bytes, bytes] = {}
    while rest.strip():
        match = _PARAMETER.match(rest)
        if match is None or match[1].lower() in parameters:
            raise ValueError("a Content-Disposition that cannot be read")
        parameters[match[1].lower()] = match[3] if match[2] is None else match[2]
        rest = rest[match.end() :]
    name = parameters.get(b"name", b"")
    if not name.isascii() or not name:
        raise ValueError("a part without a name in ASCII")
    return Part(name.decode(), piece[end + 4 :], b"filename" in parameters or b"filename*" in parameters)
