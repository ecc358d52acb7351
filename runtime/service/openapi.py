"""The service's endpoints and their description at /openapi.json, made of the very records that are decoded and encoded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from runtime.service.wire import (
    KEY_HEADER,
    ErrorAnswer,
    Health,
    PredictFields,
    Prediction,
    PredictRequest,
    ResetAnswer,
    ResetRequest,
)

Endpoint = Callable[[Request], Awaitable[Response]]
Described = dict[Any, Any]

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    400: "Not a request, or its client went away",
    401: "No right key",
    403: "From a web page, or under another name than this machine's",
    404: "No such session, and no instruction to begin one with",
    408: "The body did not come in time",
    409: "The session is at another step, or another bundle is served",
    413: "Too many bytes or pixels",
    415: "Neither JPEG nor PNG, or another content type",
    422: "A body, an instruction or a picture that does not fit",
    500: "The policy failed; the session is what it was",
    503: "Busy, too many sessions, or failed for good; see Retry-After",
}
_ALWAYS = (400, 401, 403, 413, 415, 500)


def add_endpoints(app: FastAPI, endpoints: dict[tuple[str, str], Endpoint]) -> None:
    """Add the service's endpoints, by method and path, to an application, and describe them."""
    for (method, path), endpoint in endpoints.items():
        facts = _facts(path)
        app.add_api_route(
            path, endpoint, methods=[method], name=path[1:], openapi_extra=facts["extra"], responses=facts["responses"]
        )
    made: Described = {}

    def described() -> Described:
        if not made:
            made.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            made["components"] = {
                "schemas": _schemas(),
                "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": KEY_HEADER}},
            }
            # A service on loopback may run without a key.
            made["security"] = [{"key": []}, {}]
        return made

    app.openapi = described  # type: ignore[method-assign]


def _facts(path: str) -> Described:
    facts: dict[str, Described] = {
        "/predict": {
            "extra": {
                "requestBody": _body({"application/json": "PredictRequest", "multipart/form-data": "PredictForm"})
            },
            "responses": _responses("One step's commands", "Prediction", 404, 408, 409, 422, 503),
        },
        "/reset": {
            "extra": {"requestBody": _body({"application/json": "ResetRequest"})},
            "responses": _responses("The session begins anew", "ResetAnswer", 408, 409, 422, 503),
        },
        "/policy": {"extra": {}, "responses": _responses("The bundle's manifest.json", None)},
        "/health": {
            "extra": {"security": []},
            "responses": _responses("It can drive", "Health") | {503: _answer("It must be started again", "Health")},
        },
        "/metrics": {
            "extra": {},
            "responses": {
                **_responses("Counters", None),
                200: {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}},
            },
        },
    }
    return facts[path]


def _responses(good: str, record: str | None, *errors: int) -> Described:
    answers: Described = {200: _answer(good, record)}
    return answers | {status: _answer(_ERRORS[status], "ErrorAnswer") for status in sorted((*_ALWAYS, *errors))}


def _answer(description: str, record: str | None) -> Described:
    return {"description": description, "content": {"application/json": {"schema": _schema(record)}}}


def _body(records: dict[str, str]) -> Described:
    return {"required": True, "content": {kind: {"schema": _schema(record)} for kind, record in records.items()}}


def _schema(record: str | None) -> Described:
    return {"type": "object"} if record is None else {"$ref": _REFERENCE.format(name=record)}


def _schemas() -> Described:
    records = (PredictRequest, PredictFields, ResetRequest, Prediction, ResetAnswer, Health, ErrorAnswer)
    _, schemas = msgspec.json.schema_components(records, ref_template=_REFERENCE)
    form: Described = schemas.pop("PredictFields")
    form["title"] = "PredictForm"
    form["properties"]["image"] = {"type": "string", "format": "binary", "description": "a JPEG or PNG file"}
    form["required"] = [*form["required"], "image"]
    return {**schemas, "PredictForm": form}
