"""From an error to the answer that a client gets: a status, a short reason for the metrics, and the error as JSON, never a traceback.

Knows nothing about any HTTP framework, so that the guard in front of the application and the application answer alike.
"""

from __future__ import annotations

import logging

import msgspec

from bundle.errors import BackendError, FrameError, JetvlaError, PromptError, ServiceError
from runtime.service.wire import ErrorAnswer

log = logging.getLogger("jetvla")

Headers = list[tuple[bytes, bytes]]


class Refusal(ServiceError):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        reason: one word, counted in the metrics.
        retry_after_s: when it may be worth another try.
        step: see ErrorAnswer.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        hint: str,
        retry_after_s: int | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.step = step


def as_refusal(error: JetvlaError) -> Refusal:
    """The refusal that stands for any error of ours: a picture or an instruction is the client's fault, all else the server's."""
    if isinstance(error, Refusal):
        return error
    status, reason = 500, "internal"
    if isinstance(error, PromptError):
        status, reason = 422, "instruction"
    elif isinstance(error, FrameError):
        status, reason = 422, "image"
    elif isinstance(error, BackendError):
        reason = "backend"
    return Refusal(status, reason, error.what, got=error.got, expected=error.expected, hint=error.hint)


def answer(error: JetvlaError) -> tuple[int, Headers, bytes]:
    """Status, headers and JSON body for an error."""
    refusal = as_refusal(error)
    kind = type(error).__name__ if error is not refusal else "ServiceError"
    body = msgspec.json.encode(
        ErrorAnswer(
            error=kind,
            reason=refusal.reason,
            what=refusal.what,
            hint=refusal.hint,
            got=None if refusal.got is None else str(refusal.got),
            expected=None if refusal.expected is None else str(refusal.expected),
            step=refusal.step,
        )
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'ApiKey realm="jetvla"'))
    return refusal.status, headers, body


def unexpected(error: BaseException) -> Refusal:
    """What a client is told of an error that nobody foresaw; the log has the rest."""
    log.error("a request failed", exc_info=error)
    return Refusal(
        500, "internal", "the service failed", got=type(error).__name__, hint="the service's own log says more."
    )
