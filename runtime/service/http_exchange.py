"""One HTTP exchange within one deadline, whatever the other side does.

httpx's timeouts are per read: a server that sends one byte a second keeps a call alive for ever. Here each exchange is a task on an event
loop of its own thread, which is cancelled as a whole, connection included, when its time is up; connecting, sending, waiting and receiving
all count. The answer is bounded too. Follows no redirects (they would carry the key to a stranger). Needs the extra `remote`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from bundle.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

MAX_ANSWER = 4_000_000
# Shorter than the server's, so that a connection is not used while the server closes it.
_KEEPALIVE_S = 10.0


class HttpExchange:
    """A connection to one service, kept open between exchanges.

    Args:
        url: http://host:port, without a path.
        headers: sent each time.

    Raises:
        ConfigError: httpx is not installed, or the URL is none.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("a remote policy needs httpx", got=error, hint="pip install 'jetvla[remote]'") from None
        self.url = _checked(url)
        self._httpx = httpx
        # Proxies of the environment are for the internet; asking one for this machine would reach the proxy's own loopback.
        trust_env = not _is_loopback(urlsplit(self.url).hostname or "")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy-client", daemon=True)
        self._thread.start()
        self._client = self._await(self._open(headers, trust_env), 30.0)

    def ask(self, method: str, path: str, deadline_s: float, **content: Any) -> tuple[int, bytes]:
        """Status and body of one exchange.

        Args:
            method, path: of the request.
            deadline_s: time.monotonic() by which this has returned or raised.
            content: as httpx takes it: `content`, `files`, `data`, `headers`.

        Raises:
            ServiceError: no whole answer in time, or none at all.
        """
        remaining = deadline_s - time.monotonic()
        if remaining <= 0:
            raise self._late(0.0)
        try:
            return self._await(self._exchange(method, path, content), remaining)
        except (concurrent.futures.TimeoutError, asyncio.TimeoutError, self._httpx.TimeoutException):
            raise self._late(remaining) from None
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError) as error:
            raise ServiceError(
                f"the policy service at {self.url} does not answer",
                got=f"{type(error).__name__}: {error}",
                expected="an answer",
                hint="is it running, and is the network there? python runtime/serve.py BUNDLE starts one.",
            ) from None

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(concurrent.futures.TimeoutError):  # it is going away in any case
            self._await(self._wind_up(), 2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def _open(self, headers: Mapping[str, str], trust_env: bool) -> httpx.AsyncClient:
        import httpx

        return httpx.AsyncClient(
            base_url=self.url,
            headers={**headers, "accept": "application/json", "accept-encoding": "identity"},
            follow_redirects=False,
            trust_env=trust_env,
            # Reading all certificates takes a tenth of a second, and plain HTTP has none to check.
            verify=self.url.startswith("https:"),
            # The task's own deadline is shorter than any of these would be.
            timeout=None,
            limits=httpx.Limits(max_connections=8, max_keepalive_connections=1, keepalive_expiry=_KEEPALIVE_S),
        )

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, self._client.aclose(), return_exceptions=True)

    async def _exchange(self, method: str, path: str, content: dict[str, Any]) -> tuple[int, bytes]:
        async with self._client.stream(method, path, **content) as response:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER:
                    raise ServiceError(
                        f"the answer from {self.url} does not end",
                        got=f"more than {MAX_ANSWER} bytes",
                        expected="a policy service's answer",
                        hint="is this the address of a policy service?",
                    )
            return response.status_code, bytes(body)

    def _await(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The outcome of a coroutine on the loop's thread; it is cancelled when the time is up, and not waited for."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def _late(self, waited_s: float) -> ServiceError:
        return ServiceError(
            f"the policy service at {self.url} did not answer in time",
            got=f"no whole answer after {waited_s:.3f} s",
            expected="one before the deadline",
            hint="its /metrics tell whether the policy or the network is slow.",
        )


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(
            "this is not the address of a policy service",
            got=url,
            expected="http://host:port",
            hint="runtime/serve.py prints its own when it starts.",
        )
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
