"""Runs the policy service: an address that is taken is known before seconds of loading, and a signal ends it cleanly."""

from __future__ import annotations

import importlib.util
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from bundle.errors import ConfigError, ServiceError
from runtime.service.security import check_exposure

if TYPE_CHECKING:
    from runtime.service.app import Service

# From a signal to the end of the process; supervisors and people wait longer than that before they kill.
END_S = 4.0

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Raise ConfigError unless everything that the service needs is installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "the policy service needs more than is installed",
            got=f"no {', '.join(missing)}",
            expected="the extra `serve`",
            hint="pip install 'jetvla[serve]'",
        )


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A bound socket, not yet accepting; port 0 takes a free one.

    Raises:
        ConfigError: no port, or the address is reachable by others, and there is no key.
        ServiceError: there is no such address here, or it is taken.
    """
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:  # the resolver takes any number, modulo 65536
        raise ConfigError("this is no port", got=port, expected="0 to 65535", hint="0 takes a free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ServiceError(
            f"cannot listen on {where}", got=error.strerror, hint="--host takes an address of this machine."
        ) from None
    # By what the name means here: a hosts file may send localhost anywhere.
    check_exposure(str(address[0]), key)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ServiceError(
            f"cannot listen on {where}",
            got=error.strerror,
            expected="a free port of this machine",
            hint="another service runs there: stop it, or take another --port.",
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where clients reach a bound socket; if it is bound to all addresses, by this machine's name."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Running:
    """A service on a socket. `run` blocks until `stop`, SIGTERM or Ctrl-C.

    Args:
        service: that answers; closed in the end.
        sock: from `listen`.
        key: that clients must have.
        request_timeout_s, max_connections: see runtime.service.app.Limits.
        on_ready: called once the socket accepts.
        on_overdue: called on a thread of its own END_S after the end was asked for, if there is still somebody to call. A picture that is
            being decoded and a step that hangs keep their threads, and threads cannot be stopped: what helps is to end the process.
    """

    def __init__(
        self,
        service: Service,
        sock: socket.socket,
        key: str | None,
        *,
        request_timeout_s: float,
        max_connections: int,
        on_ready: Callable[[], None] = lambda: None,
        on_overdue: Callable[[], None] = lambda: None,
    ) -> None:
        import uvicorn

        from runtime.service.connection import protocol_settings

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                on_ready()

        settings = protocol_settings(
            request_timeout_s=request_timeout_s, max_connections=max_connections, on_refused=service.metrics.refused
        )
        config = uvicorn.Config(service.guarded(key), log_config=None, access_log=False, **settings)
        self._service, self._sock, self._server, self._on_overdue = service, sock, Server(config), on_overdue

    def run(self) -> None:
        """Serve until told to stop; then finish what runs, within seconds, and release the policy."""
        ended = threading.Event()
        threading.Thread(target=self._see_that_it_ends, args=(ended,), name="end", daemon=True).start()
        try:
            with _quiet_signals():
                self._server.run(sockets=[self._sock])
        finally:
            self._sock.close()
            self._service.close()
            ended.set()

    def stop(self) -> None:
        """End `run`; from any thread."""
        self._server.should_exit = True

    def _see_that_it_ends(self, ended: threading.Event) -> None:
        # Asks, because a signal's handler may neither start a thread nor take a lock.
        while not self._server.should_exit:
            if ended.wait(0.2):
                return
        time.sleep(END_S)
        self._on_overdue()


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn ends on SIGTERM and SIGINT, then raises them again for whoever was there before: for this program the end is orderly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
