"""One policy step at a time, and a short queue before it.

A policy is not thread-safe, and two steps at once on one GPU would each take twice as long. A queue that grows is worse than a refusal: a
command that comes late moves the robot by an old picture, so beyond a few waiting requests the answer is 503 at once. A place is taken
when the whole body is there, so that a client that sends slowly, or never ends, takes none; the memory of bodies under way is bounded by
their size and the number of connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from runtime.service.refusal import Refusal

T = TypeVar("T")


class Turns:
    """The queue in front of the policy's one thread. `max_waiting` requests wait at most, besides the one that is running."""

    def __init__(self, max_waiting: int) -> None:
        self._free = 1 + max_waiting
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        # One for each place: a small picture never waits behind large ones, only shares the processor with them.
        self._readers = ThreadPoolExecutor(1 + max_waiting, thread_name_prefix="reader")
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place in the queue, from when a request is there as a whole to its answer.

        Raises:
            Refusal: 503, all places are taken.
        """
        if self._free == 0:
            raise Refusal(
                503,
                "busy",
                "too many requests are waiting for the policy",
                got=f"{self._max_waiting} waiting",
                expected=f"at most {self._max_waiting}",
                hint="the service is asked more often than it can answer: fewer robots, a lower --decide-hz, or a faster machine.",
                retry_after_s=1,
            )
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn, in order of arrival, and keep it."""
        async with self._lock:
            yield

    async def read(self, work: Callable[[], T]) -> T:
        """Run something that needs no turn, such as decoding a picture, beside the event loop. Only with a place."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def run(self, work: Callable[[], T]) -> T:
        """Run something on the policy's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Wait for the step that is running, and for no picture."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._thread.shutdown(wait=True, cancel_futures=True)
