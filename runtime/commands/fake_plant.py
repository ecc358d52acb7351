"""A robot for tests: a UDP listener that obeys the last command for ever.

The worst robot there is: no timeout of its own, so it coasts until somebody says zero. What stops this one stops any. Both the control
loop's datagrams and the watchdog's arrive here, in the order in which they came.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist
from runtime.commands.cdr import decode_twist


class FakePlant:
    """Listens on 127.0.0.1 from construction until `close`; a context manager.

    Attributes:
        port: to send to.
        malformed: datagrams that were no Twist; they change nothing.
    """

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", port))
        self._socket.settimeout(0.1)
        self.port: int = self._socket.getsockname()[1]
        self.malformed = 0
        self._log: list[tuple[float, Twist]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._listen, name="fake-plant", daemon=True)
        self._thread.start()

    @property
    def velocity(self) -> Twist:
        """What it does now: the last command, however old."""
        with self._changed:
            return self._log[-1][1] if self._log else ZERO

    @property
    def log(self) -> list[tuple[float, Twist]]:
        """Every command so far, with its time.monotonic() of arrival (a copy)."""
        with self._changed:
            return list(self._log)

    def wait_for(self, wanted: Callable[[Twist], bool], timeout_s: float) -> bool:
        """Wait until it does something; also something that passes at once is seen. False where it did not happen in time.

        `wanted` is asked about what it does now and about every command from now on: `plant.wait_for(lambda v: v.is_zero, 30)`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if wanted(self._log[-1][1] if self._log else ZERO):
                return True
            seen = len(self._log)
            while True:
                if any(wanted(twist) for _, twist in self._log[seen:]):
                    return True
                seen = len(self._log)
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)

    def wait_for_commands(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` more commands have come."""
        with self._changed:
            target = len(self._log) + count
            return self._changed.wait_for(lambda: len(self._log) >= target, timeout_s)

    def moving_after(self, moment: float) -> bool:
        """Moved at `moment` (time.monotonic()) or at any time since."""
        return any(end > moment and not twist.is_zero for _, end, twist in self._stretches())

    def stopped_at(self) -> float | None:
        """Since when it has stood still, by time.monotonic(); None while it moves. 0 where it never moved."""
        moved = [end for _, end, twist in self._stretches() if not twist.is_zero]
        last = max(moved, default=0.0)
        return None if last == math.inf else last

    def distance_m(self, after: float = -math.inf) -> float:
        """Metres travelled until now (along the path, turning not counted), from `after` on."""
        now = time.monotonic()
        return sum(
            math.hypot(twist.linear_x, twist.linear_y, twist.linear_z) * max(0.0, min(end, now) - max(start, after))
            for start, end, twist in self._stretches()
        )

    def close(self) -> None:
        """Stop listening; safe to call twice."""
        self._closing = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> FakePlant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stretches(self) -> list[tuple[float, float, Twist]]:
        """From when to when it did what; the last one has no end."""
        log = self.log
        ends = [start for start, _ in log[1:]] + [math.inf]
        return [(start, end, twist) for (start, twist), end in zip(log, ends, strict=False)]

    def _listen(self) -> None:
        while not self._closing:
            try:
                data = self._socket.recv(4096)
            except TimeoutError:
                continue
            now = time.monotonic()
            try:
                twist = decode_twist(data)
            except CommandError:
                self.malformed += 1
                continue
            with self._changed:
                self._log.append((now, twist))
                self._changed.notify_all()
