"""Makes a request's body into a record and picture bytes, from JSON or from a form, strictly.

How much may come and how long it may take is the guard's business (runtime/service/security.py): its limits raise from within
`read_body`. All else here is plain functions of bytes, to be run where they hold up nobody.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from runtime.service.form import read_form
from runtime.service.pictures import decode_base64
from runtime.service.refusal import Refusal
from runtime.service.wire import PredictFields, PredictRequest

_Record = TypeVar("_Record", bound=msgspec.Struct)
_IMAGE = "image"
_JSON, _FORM = "application/json", "multipart/form-data"
_FIELD = 16 * 1024  # bytes of a plain field; an instruction has 2000 characters
_CHARSET = re.compile(r"charset[^=;]{0,8}=[\s\"]*([^\";\s]*)", re.IGNORECASE)
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")


async def read_body(request: Request, *kinds: str) -> bytes:
    """The whole body of a request of one of these types, by default of JSON or a form.

    Raises:
        Refusal: 415 for another content type, 400 when the client went away; see also the guard.
    """
    kinds = kinds or (_JSON, _FORM)
    kind = _content_type(request)
    if kind not in kinds:
        raise _wrong_type(kind, " or ".join(kinds))
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
    except ClientDisconnect:
        raise Refusal(400, "gone", "the client went away", hint="nobody reads this.") from None
    return bytes(body)


def step_of(request: Request, body: bytes) -> tuple[PredictFields, bytes]:
    """The fields of a step and its picture file, from a body of `read_body`.

    Raises:
        Refusal: 422 for a body that does not fit.
    """
    if _content_type(request) == _FORM:
        return _form_of(request.headers["content-type"], body)
    record = record_of(body, PredictRequest)
    return record, decode_base64(record.image)


def record_of(body: bytes, record: type[_Record]) -> _Record:
    """A JSON body as a record.

    Raises:
        Refusal: 422 for a body that does not fit.
    """
    try:
        return msgspec.json.decode(body, type=record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unfit(error) from None


def _form_of(content_type: str, body: bytes) -> tuple[PredictFields, bytes]:
    fields: dict[str, Any] = {}
    image: bytes | None = None
    try:
        parts = read_form(content_type, body)
    except ValueError as error:
        raise _unfit(error) from None
    for part in parts:
        if part.name in fields or (part.name == _IMAGE and image is not None):
            raise _unfit(f"{part.name[:64]!r} twice")
        if part.is_file != (part.name == _IMAGE):
            raise _unfit(f"{part.name[:64]!r} as a {'file' if part.is_file else 'plain field'}")
        if part.is_file:
            image = part.content
        elif len(part.content) > _FIELD:
            raise _unfit(f"{len(part.content)} bytes of {part.name[:64]!r}")
        else:
            try:
                fields[part.name] = part.content.decode()
            except UnicodeDecodeError:
                raise _unfit(f"{part.name[:64]!r} that is no UTF-8") from None
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
