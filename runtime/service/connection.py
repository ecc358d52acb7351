"""Connections that cannot be held open for nothing: uvicorn's HTTP/1.1 protocol, with three limits that it lacks.

* A whole request, headers and body, must come in time, and so must the first one of a connection ("slow loris").
* What still comes after a refusal is read and thrown away, so that the client gets to read the answer instead of a reset, but only so much.
* Connections beyond a number are closed at once; uvicorn's own limit would refuse requests of those that are already driving instead.

Needs uvicorn; imported by runtime/service/server.py when a service is started.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_DRAINED = 16_000_000
# After the guard's own limit, which answers 408 while this one just closes.
_GRACE_S = 2.0
_COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)


def limited_protocol(*, request_timeout_s: float, max_connections: int) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http` setting."""

    class LimitedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _drained = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            self._start_timer()
            if self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
                self._drained += len(data)
                if self._drained > MAX_DRAINED:
                    self.transport.abort()
                    return
            super().data_received(data)
            if self.conn.their_state in _COMPLETE:
                self._stop_timer()
                self._drained = 0

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(request_timeout_s + _GRACE_S, self._too_slow)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            self.transport.abort()

    return LimitedProtocol


def protocol_settings(*, request_timeout_s: float, max_connections: int) -> dict[str, Any]:
    """uvicorn.Config's settings that have to do with connections."""
    return {
        "http": limited_protocol(request_timeout_s=request_timeout_s, max_connections=max_connections),
        "ws": "none",
        "lifespan": "off",
        # What a proxy says about the client is not believed; nobody here asks where a request comes from.
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": 20,
        "timeout_graceful_shutdown": 5,
        "h11_max_incomplete_event_size": 16 * 1024,
    }
