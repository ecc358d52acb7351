"""Crowds of clients that hold connections for nothing, and a robot among them.

    python -m tests.runtime.service.crowds 64

prints the table of docs/policy-service.md: how many of a robot's requests are answered while so many others are connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from runtime.service.pictures import encode
from runtime.service.wire import KEY_HEADER
from tests.bundles import GO_LEFT, make_bundle
from tests.runtime.service.serving import KEY, PATIENCE_S, service_process

DEADLINE_S = 0.2
REQUESTS = 40
ASKS_EVERY_S = 3.0
TRICKLES_EVERY_S = 0.5
PAUSE_S = 0.1  # before one whose connection was closed comes again

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]

_PICTURE = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)  # 150 kB as PNG
_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
_BODY = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n"


async def asks_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request, then silence; and the same again as soon as that is over."""
    await _ask(reader, writer)
    await reader.read()


async def asks_often(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A request every few seconds, over another connection only if need be."""
    while not reader.at_eof():
        await _ask(reader, writer)
        await asyncio.sleep(ASKS_EVERY_S)


async def sends_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A connection, and no request."""
    await reader.read()


async def ends_no_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A request whose headers trickle."""
    await _trickle(_HEALTH[:-2] + b"X-More: ", reader, writer)


async def ends_no_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A request whose body trickles."""
    await _trickle(_BODY, reader, writer)


CROWDS: dict[str, Behaviour] = {
    "ask /health once": asks_once,
    "ask /health every 3 s": asks_often,
    "send nothing": sends_nothing,
    "send half a header": ends_no_header,
    "send a body slowly": ends_no_body,
}


class Crowd:
    """Clients that behave alike, and come again when they are thrown out.

    Attributes:
        came: connections so far.
        thrown_out: of these.
    """

    def __init__(self, url: str, behaviour: Behaviour) -> None:
        parts = urlsplit(url)
        self._address = (str(parts.hostname), int(parts.port or 0))
        self._behaviour = behaviour
        self.came, self.thrown_out = 0, 0

    @contextmanager
    def of(self, count: int) -> Iterator[Crowd]:
        """So many of them, from when each has come once."""
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        thread = threading.Thread(target=lambda: loop.run_until_complete(self._all(count, stop)))
        thread.start()
        try:
            self.wait_for(lambda: self.came >= count)
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(PATIENCE_S)
            loop.close()

    def wait_for(self, sign: Callable[[], bool]) -> None:
        """Until then."""
        deadline = time.monotonic() + PATIENCE_S
        while not sign():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    async def _all(self, count: int, stop: asyncio.Event) -> None:
        tasks = {asyncio.create_task(self._one()) for _ in range(count)}
        await stop.wait()
        while tasks:  # wait_for of Python 3.10 and 3.11 loses a cancellation now and then
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.1)

    async def _one(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with self._connection() as (reader, writer):
                    await self._behaviour(reader, writer)
            self.thrown_out += 1
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Streams]:
        reader, writer = await asyncio.open_connection(*self._address)
        self.came += 1
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


class Robot:
    """Asks for decisions, each time over a connection of its own, or always over the same one, which is never opened again."""

    def __init__(self, url: str, key: str | None, *, keeps: bool) -> None:
        self._host = urlsplit(url).netloc
        self._keeps = keeps
        fields = {"session": "keeps" if keeps else "reconnects", "instruction": GO_LEFT}
        files = {"image": ("frame.png", encode(_PICTURE, "png"), "image/png")}
        form = httpx.Request("POST", url, data=fields, files=files)
        self._body, self._type = form.read(), form.headers["content-type"]
        self._key = {} if key is None else {KEY_HEADER: key}
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, timeout_s: float = PATIENCE_S) -> int:
        """The status of an answer.

        Raises:
            OSError, http.client.HTTPException: there is none.
        """
        connection = self._connection
        if connection is None:
            connection = http.client.HTTPConnection(self._host, timeout=timeout_s)
            connection.connect()
            connection.auto_open = 0
        try:
            connection.request("POST", "/predict", self._body, {"Content-Type": self._type, **self._key})
            answer = connection.getresponse()
            answer.read()
        finally:
            if self._keeps:
                self._connection = connection
            else:
                connection.close()
        return answer.status

    def close(self) -> None:
        """Close what is kept."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_HEALTH)
    with contextlib.suppress(asyncio.IncompleteReadError):
        await reader.readuntil(b"}")


async def _trickle(begin: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(begin)
    while not reader.at_eof():
        writer.write(b"a")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(1000), TRICKLES_EVERY_S)


def measure(robot: Robot) -> str:
    """A cell of the table: one request each DEADLINE_S, and what came of them."""
    times: list[float] = []
    for _ in range(REQUESTS):
        start = time.monotonic()
        with contextlib.suppress(OSError, http.client.HTTPException):
            if robot.ask(DEADLINE_S * 5) == 200:
                times.append(time.monotonic() - start)
        time.sleep(max(0.0, start + DEADLINE_S - time.monotonic()))
    robot.close()
    late = sum(seconds > DEADLINE_S for seconds in times)
    if len(times) < 2:
        return f"{len(times)} of {REQUESTS}"
    p50, p99 = (statistics.quantiles(times, n=100, method="inclusive")[at] * 1e3 for at in (49, 98))
    return f"{len(times) - late} of {REQUESTS}, {p50:.0f} / {p99:.0f} ms"


def main(count: int) -> None:
    """Print the table."""
    crowds: dict[str, Behaviour | None] = {"nobody else": None, **CROWDS}
    print(f"| {count} others | key | robot that reconnects | robot that keeps its connection |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "bundle")
        key_file = Path(folder) / "key"
        key_file.write_text(KEY)
        key_file.chmod(0o600)
        for name, behaviour in crowds.items():
            for key, arguments in ((None, ()), (KEY, ("--api-key-file", key_file))):
                with service_process(bundle, "--port", "0", *arguments) as service, contextlib.ExitStack() as stack:
                    kept = Robot(service.url, key, keeps=True)
                    kept.ask()
                    if behaviour is not None:
                        stack.enter_context(Crowd(service.url, behaviour).of(count))
                    cells = measure(kept), measure(Robot(service.url, key, keeps=False))
                who = "none" if key is None else "the robot's alone"
                print(f"| {name} | {who} | {cells[1]} | {cells[0]} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
