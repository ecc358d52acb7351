"""The guard in front of the service: who may ask, and how much a request may be.

It stands before the application, as plain ASGI, so that a request without a right key is answered before one byte of its body is read.

* The key is compared in constant time, as hashes, so that neither its length nor its first characters can be measured.
* Without a key only this machine may ask, and a web page open on this machine must not be able to drive a robot: browsers send the page's
  address as `Origin` (refused unless it is ours), and a page that points its own name at 127.0.0.1 ("DNS rebinding") still sends that name
  as `Host` (refused unless it is a name of loopback).
* A body is refused by its Content-Length, and counted while it comes in, because that may be missing or lie; it must come in time.
* What still comes after an answer is read and thrown away, so that the client gets to read the answer instead of a reset, but only so much.
* Who is not trusted gets no second request on a connection, and all of them together so many answers a second: opening connections for
  nothing costs others little, and guessing keys is slow.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import ConfigError
from runtime.service.metrics import Metrics
from runtime.service.refusal import Refusal, answer, unexpected
from runtime.service.wire import KEY_HEADER

KEY_VARIABLE = "JETVLA_API_KEY"
MIN_KEY_LENGTH = 16
OPEN_PATHS = frozenset({"/health"})
# A body for anything but a picture.
SMALL_BODY = 64 * 1024
MAX_DRAINED = 16_000_000
STRANGERS_A_SECOND = 100
_STRANGERS_WAIT_S = 1.0  # at most, and then no longer one after the other

STANDING = "jetvla.standing"

# A name, an IPv4 address or [an IPv6 address], and a port: nothing before, between or after them.
_HOST = re.compile(r"([^\[\]:@/?#\s]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?", re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
_MAKE_KEY = 'python -c "import secrets; print(secrets.token_urlsafe(32))" > key.txt && chmod 600 key.txt'


def read_key(path: Path | None) -> str | None:
    """The key from a file, else from the environment, else None. Never from the command line, where every user of the machine sees it.

    Raises:
        ConfigError: the file cannot be read, others can read it, or the key is too short or not plain text.
    """
    if path is None:
        text, origin = os.environ.get(KEY_VARIABLE), f"the key in {KEY_VARIABLE}"
        if text is None:
            return None
    else:
        origin = f"the key in {path}"
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="ascii")
        except OSError as error:
            raise ConfigError(f"cannot read the key file {path}", got=error.strerror, hint=_MAKE_KEY) from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a key file", expected="one line of ASCII", hint=_MAKE_KEY) from None
        if mode & 0o077:
            raise ConfigError(
                f"others can read the key file {path}",
                got=f"mode {mode & 0o777:o}",
                expected="mode 600",
                hint=f"chmod 600 {path}",
            )
    key = text.strip()
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{origin} is no good",
            got=f"{len(key)} characters",
            expected=f"at least {MIN_KEY_LENGTH} printable ASCII characters without spaces",
            hint=_MAKE_KEY,
        )
    return key


def is_loopback(host: str) -> bool:
    """Only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def check_exposure(host: str, key: str | None) -> None:
    """Refuse to be reachable by others without a key.

    Raises:
        ConfigError: `host` is more than loopback, and there is no key.
    """
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"a service on {host} without a key would let everybody on the network drive the robot",
            got="no key",
            expected=f"--api-key-file, or {KEY_VARIABLE} in the environment",
            hint=f"{_MAKE_KEY}, then --api-key-file key.txt; or --host 127.0.0.1.",
        )


@dataclass
class Standing:
    """What is known of a request's client, for those who decide which connections are needed. In the scope, as STANDING.

    Attributes:
        trusted: the key was right, or none is needed and it is no web page.
        waits: it has a place in the queue.
        decided: a step was answered.
    """

    trusted: bool = False
    waits: bool = False
    decided: bool = False


@dataclass(frozen=True)
class Access:
    """What the guard holds requests against.

    Attributes:
        key: that requests must carry; None lets in everybody who reaches a loopback address.
        max_body: bytes of a request with a picture.
        body_timeout_s: for a whole body to come in.
    """

    key: str | None
    max_body: int
    body_timeout_s: float


class Guard:
    """ASGI middleware. Counts every request and its answer."""

    def __init__(self, app: App, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics
        self._next_stranger_s = 0.0
        self._digest = None if access.key is None else hashlib.sha256(access.key.encode()).digest()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["jetvla.start_s"] = time.perf_counter()
        standing = scope[STANDING] = Standing()
        exchange = _Exchange(scope, receive, send, self._access.body_timeout_s, self._strangers_turn)
        self._metrics.in_flight.inc()
        try:
            try:
                self._check(scope, standing)
                await self._app(scope, self._limited(scope, exchange), exchange.send)
            except Refusal as error:
                self._metrics.refused(error.reason)
                await _answer(error, exchange.send)
            except Exception as error:
                # The last resort before uvicorn's own page. What was answered is in the log already.
                if not exchange.status:
                    await _answer(unexpected(error), exchange.send)
            except asyncio.CancelledError:
                if not exchange.status:
                    await _answer(_ending(), exchange.send)
        finally:
            self._metrics.in_flight.dec()
            self._metrics.request(scope["path"], exchange.status)

    async def _strangers_turn(self) -> None:
        now_s = time.monotonic()
        turn_s = max(now_s, self._next_stranger_s)
        self._next_stranger_s = min(turn_s + 1 / STRANGERS_A_SECOND, now_s + _STRANGERS_WAIT_S)
        await asyncio.sleep(turn_s - now_s)

    def _check(self, scope: Message, standing: Standing) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        self._check_browser(headers)
        given = headers.get(KEY_HEADER.lower().encode(), [])
        right = self._digest is None
        if self._digest is not None:
            # Compared whether or not there is one, so that both take the same time.
            same = hmac.compare_digest(hashlib.sha256(given[0] if given else b"").digest(), self._digest)
            right = same and len(given) == 1
        standing.trusted = right
        if not right and scope["path"] not in OPEN_PATHS:
            raise Refusal(
                401,
                "key",
                "a right key is needed",
                got="no key" if not given else "another key" if len(given) == 1 else "several keys",
                expected=f"the service's key in the header {KEY_HEADER}",
                hint="the key is in the file that the service was started with.",
            )
        if headers.get(b"content-encoding", [b"identity"]) != [b"identity"]:
            raise Refusal(
                415,
                "encoding",
                "the body is compressed",
                got=headers[b"content-encoding"][0].decode("latin-1"),
                expected="no Content-Encoding",
                hint="pictures are compressed already.",
            )
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and int(length) > self._max_body(scope):
            raise self._too_large(scope, f"Content-Length {int(length)}")

    def _check_browser(self, headers: dict[bytes, list[bytes]]) -> None:
        host = headers.get(b"host", [b""])[0].decode("latin-1")
        if self._digest is None and not is_loopback(without_port(host)):
            raise Refusal(
                403,
                "host",
                "a service without a key answers to names of loopback only",
                got=f"Host: {host}",
                expected="localhost, 127.0.0.1 or [::1]",
                hint="call it by one of these, or start it with a key.",
            )
        for origin in headers.get(b"origin", []):
            page = origin.decode("latin-1").lower()
            if not host or page not in (f"http://{host.lower()}", f"https://{host.lower()}"):
                raise Refusal(
                    403,
                    "origin",
                    "web pages of other hosts may not use the service",
                    got=f"Origin: {origin.decode('latin-1')}",
                    expected="no Origin header",
                    hint="call the service from a program, not from a page.",
                )

    def _max_body(self, scope: Message) -> int:
        return self._access.max_body if scope["path"] == "/predict" else min(SMALL_BODY, self._access.max_body)

    def _limited(self, scope: Message, exchange: _Exchange) -> Receive:
        async def limited() -> Message:
            try:
                message = await exchange.receive()
            except asyncio.TimeoutError:
                raise Refusal(
                    408,
                    "slow_body",
                    "the body did not come in time",
                    got=f"{exchange.received} bytes in {self._access.body_timeout_s:g} s",
                    expected="the whole request",
                    hint="the network is too slow or too lossy to drive a robot over.",
                ) from None
            if exchange.received > self._max_body(scope):
                raise self._too_large(scope, f"{exchange.received} bytes so far")
            return message

        return limited

    def _too_large(self, scope: Message, got: str) -> Refusal:
        return Refusal(
            413,
            "size",
            "the request is too large",
            got=got,
            expected=f"at most {self._max_body(scope)} bytes",
            hint="send the picture as JPEG, or smaller; or raise --max-upload-mb.",
        )


class _Exchange:
    """One request and its answer, as they pass the guard.

    Attributes:
        status: that was answered; 0 before.
        received: bytes of the body.
    """

    def __init__(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        timeout_s: float,
        strangers_turn: Callable[[], Awaitable[None]],
    ) -> None:
        self._scope, self._receive, self._send, self._strangers_turn = scope, receive, send, strangers_turn
        self._deadline_s = time.monotonic() + timeout_s
        self._complete = False
        self.status, self.received = 0, 0

    async def receive(self) -> Message:
        """The next part of the request.

        Raises:
            asyncio.TimeoutError: the body does not come in time.
        """
        if self._complete:
            return await self._receive()
        message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline_s - time.monotonic()))
        self.received += len(message.get("body", b""))
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer; what still comes of the request is read before the end of the last one."""
        if message["type"] == "http.response.start":
            standing = self._scope[STANDING]
            if not standing.trusted:
                await self._strangers_turn()
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            self.status = message["status"]
            standing.decided = self._scope["path"] == "/predict" and self.status == 200
        elif not message.get("more_body", False) and not self._complete:
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {**message, "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        most = self.received + MAX_DRAINED
        try:
            while not self._complete and self.received <= most:
                await self.receive()
        except asyncio.TimeoutError:
            pass  # it has its answer


def without_port(host: str) -> str:
    """The name or address in a Host header; empty if it is none."""
    match = _HOST.fullmatch(host)
    return "" if match is None else match[1]


async def _answer(error: Refusal, send: Send) -> None:
    status, headers, body = answer(error)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _ending() -> Refusal:
    return Refusal(
        503, "ending", "the service ends", hint="it finishes what takes seconds; start it again.", retry_after_s=10
    )
