"""Connections that cannot be held open for nothing: uvicorn's HTTP/1.1 protocol, with limits that it lacks.

* A whole request, headers and body, must come in time, and so must the first one of a connection ("slow loris").
* Beyond a number of connections, a new one is let in, and the least needed one is closed for it. Whoever refuses newcomers instead locks
  out every robot that has to connect again, for as long as somebody holds connections open. Least needed is what has begun a request and
  does not end it or does not read its answers, then whoever has no key, then whoever was silent longest, then the oldest newcomer, and
  among equals the address that holds most. A robot that drives, and a request that has a place in the queue, are never closed for one.
* What is no HTTP gets the same kind of answer as any other error.

Needs uvicorn; imported by runtime/service/server.py when a service is started.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from runtime.service.refusal import Refusal, answer
from runtime.service.security import STANDING, Standing

# After the guard's own limit, which answers 408 while this one just closes.
_GRACE_S = 2.0
_COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)
# A robot's request is on its way for less; then it is late in any case.
_ARRIVING_S = 1.0
# A robot decides several times a second.
_DRIVING_S = 10.0
_NO_STANDING = Standing()
# How much a connection is needed; from _DRIVING on it stays.
_LATE, _STRANGER, _SILENT, _ARRIVING, _DRIVING, _WAITING = range(6)


class LimitedProtocol(H11Protocol):
    """One connection; made by uvicorn.

    Attributes:
        request_timeout_s, max_connections, on_refused: see `protocol_settings`.
    """

    request_timeout_s: float
    max_connections: int
    on_refused: Callable[[str], None]

    _timer: asyncio.TimerHandle | None = None
    """Runs while a request is awaited or has not come as a whole."""
    since_s = 0.0
    """Silent since then, on the loop's clock: the request that is awaited was begun, or else the last answer was given."""
    _decided_s = float("-inf")

    @property
    def host(self) -> str:
        """The other side's address."""
        return "" if self.client is None else self.client[0]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > self.max_connections:
            others = [other for other in self.connections if isinstance(other, LimitedProtocol) and other is not self]
            least = least_needed(others, self.loop.time())
            (self if least is None else least).drop()

    def need(self, now_s: float) -> int:
        """How much the connection is needed."""
        if self.flow.write_paused:  # it does not read its answers
            return _LATE
        standing, answered = self._standing, self._cycle is None or self._cycle.response_complete
        if standing.waits and not answered:
            return _WAITING
        if now_s - self._decided_s < _DRIVING_S:
            return _DRIVING
        if self._timer is not None or not answered:
            return _ARRIVING if now_s - self.since_s < _ARRIVING_S else _LATE
        return _SILENT if standing.trusted else _STRANGER

    def drop(self) -> None:
        """Close at once. It counts no more, though asyncio says so only later."""
        self.connections.discard(self)
        self._stop_timer()
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._await_request()
        super().data_received(data)
        if self.conn.their_state in _COMPLETE:
            self._stop_timer()

    def on_response_complete(self) -> None:
        self.since_s = self.loop.time()
        if self._standing.decided:
            self._decided_s = self.since_s
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()  # the guard has read enough of what is left of the request
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self._timer is None:  # the next request came with this one
            self._await_request()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of another answer
            return
        if self._cycle is not None:
            self._cycle.disconnected = True  # nobody hears what it was going to answer
            self._cycle.message_event.set()
        self.on_refused("http")
        status, headers, body = answer(
            Refusal(
                400,
                "http",
                "this is no HTTP request",
                got="bytes that are none, or headers of more than 16 kB",
                expected="HTTP/1.1",
                hint="https:// needs a proxy with TLS in front; docs/policy-service.md has examples.",
            )
        )
        headers.append((b"connection", b"close"))
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        return self.cycle  # which uvicorn's annotation says is always there

    @property
    def _standing(self) -> Standing:
        scope: Any = {} if self._cycle is None else self._cycle.scope
        standing: Standing = scope.get(STANDING, _NO_STANDING)
        return standing

    def _await_request(self) -> None:
        self.since_s = self.loop.time()
        self._timer = self.loop.call_later(self.request_timeout_s + _GRACE_S, self.drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def least_needed(connections: Collection[LimitedProtocol], now_s: float) -> LimitedProtocol | None:
    """Which connection to close for a newcomer, if any."""
    held = Counter(connection.host for connection in connections)

    def order(connection: LimitedProtocol) -> tuple[int, int, float]:
        return connection.need(now_s), -held[connection.host], connection.since_s

    least = min(connections, key=order, default=None)
    return None if least is None or least.need(now_s) >= _DRIVING else least


def protocol_settings(
    *, request_timeout_s: float, max_connections: int, on_refused: Callable[[str], None]
) -> dict[str, Any]:
    """uvicorn.Config's settings that have to do with connections.

    Args:
        request_timeout_s: for a whole request to come in.
        max_connections: open at the same time.
        on_refused: told the reason of each refusal that is given here.
    """
    limits = {
        "request_timeout_s": request_timeout_s,
        "max_connections": max_connections,
        "on_refused": staticmethod(on_refused),
    }
    return {
        "http": type("Connection", (LimitedProtocol,), limits),
        "ws": "none",
        "lifespan": "off",
        # What a proxy says about the client is not believed; nobody here asks where a request comes from.
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": 20,
        "timeout_graceful_shutdown": 3,
        "h11_max_incomplete_event_size": 16 * 1024,
    }
