"""Reads a request's body into a record and picture bytes, from JSON or from a form, strictly.

How much may come and how long it may take is the guard's business (runtime/service/security.py): its limits raise from within the reads
here. Needs the extra `serve`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runtime.service.pictures import decode_base64
from runtime.service.refusal import Refusal
from runtime.service.wire import PredictFields, PredictRequest

_Record = TypeVar("_Record", bound=msgspec.Struct)
_IMAGE = "image"
_FIELD = 16 * 1024  # bytes of a plain field; an instruction has 2000 characters
# A form's own charset would choose the codec of its fields, and Python has some that take the square of the length (punycode).
_CHARSET = re.compile(r"charset[^=;]{0,8}=[\s\"]*([^\";\s]*)", re.IGNORECASE)
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")


async def read_step(request: Request) -> tuple[PredictFields, bytes]:
    """The fields of a step and its picture file.

    Raises:
        Refusal: 415 for another content type, 422 for a body that does not fit; see also the guard.
    """
    kind = _content_type(request)
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind == "application/json":
        record = _decoded(await _body(request), PredictRequest)
        return record, decode_base64(record.image)
    raise _wrong_type(kind, "application/json or multipart/form-data")


async def read_json(request: Request, record: type[_Record]) -> _Record:
    """A JSON body as a record.

    Raises:
        Refusal: 415 for another content type, 422 for a body that does not fit; see also the guard.
    """
    kind = _content_type(request)
    if kind != "application/json":
        raise _wrong_type(kind, "application/json")
    return _decoded(await _body(request), record)


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
    except ClientDisconnect:
        raise Refusal(400, "gone", "the client went away", hint="nobody reads this.") from None
    return bytes(body)


async def _read_form(request: Request) -> tuple[PredictFields, bytes]:
    body = await _body(request)

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, whole(), max_files=2, max_fields=8, max_part_size=_FIELD).parse()
    except (MultiPartException, UnicodeError) as error:
        raise _unfit(getattr(error, "message", error)) from None
    fields: dict[str, Any] = {}
    image: bytes | None = None
    try:
        for name, value in form.multi_items():
            if name in fields or (name == _IMAGE and image is not None):
                raise _unfit(f"{name[:64]!r} twice")
            if isinstance(value, UploadFile) != (name == _IMAGE):
                raise _unfit(f"{name[:64]!r} as a {'file' if isinstance(value, UploadFile) else 'plain field'}")
            if isinstance(value, UploadFile):
                image = await value.read()
            elif value.encode() not in body:  # the parser falls back to latin-1 without a word
                raise _unfit(f"{name[:64]!r} that is no UTF-8")
            else:
                fields[name] = value
    finally:
        await form.close()
    if image is None:
        raise _unfit("no file `image`")
    try:
        # Not strict: a form has no numbers, only digits.
        return msgspec.convert(fields, PredictFields, strict=False), image
    except msgspec.ValidationError as error:
        raise _unfit(error) from None


def _content_type(request: Request) -> str:
    """The type alone, in small letters.

    Raises:
        Refusal: 415, another charset than UTF-8 and its part, ASCII.
    """
    kind = request.headers.get("content-type", "")
    for charset in _CHARSET.findall(kind):
        if charset.lower() not in _CHARSETS:
            raise Refusal(
                415,
                "content_type",
                "the body has a charset that is not taken",
                got=charset[:64],
                expected="UTF-8",
                hint="leave the charset out: forms and JSON are read as UTF-8.",
            )
    return kind.partition(";")[0].strip().lower()


def _decoded(body: bytes, record: type[_Record]) -> _Record:
    try:
        return msgspec.json.decode(body, type=record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unfit(error) from None


def _unfit(got: object) -> Refusal:
    return Refusal(
        422,
        "request",
        "the request does not fit",
        got=got,
        expected="the fields in /openapi.json, and no others",
        hint="docs/policy-service.md has examples.",
    )


def _wrong_type(got: str, expected: str) -> Refusal:
    return Refusal(
        415,
        "content_type",
        "the body has a type that is not taken",
        got=got or "no Content-Type",
        expected=expected,
        hint="curl: -F image=@frame.jpg -F session=lab, or --json.",
    )
