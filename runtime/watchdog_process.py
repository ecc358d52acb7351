"""The watchdog's own process: says zero to the robot when the control loop falls silent.

A process of its own, because what it guards against - a crash, `kill -9`, a deadlock, a debugger, a swap storm - stops threads as well.
Started by runtime/watchdog.py. Once it runs it loads nothing, keeps its memory, waits for nobody's pipe and reads no wall clock. Knows
nothing about policies, limits or levels: all it can say is zero.

Two connections to the loop: a page of shared memory (`Page`), in which both leave signs of life without waking each other, and a socket,
one packet per message: setup and "q" (goodbye) to here; from here "r" + identity (ready), "e" + error, or "k" (it stays: the robot has not
been reached). The end of the socket means that the loop's process is gone.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import msgspec

from bundle.errors import JetvlaError
from runtime.commands.base import ZERO, CommandSink
from runtime.commands.select import identity, open_sink
from runtime.realtime import WATCHDOG_PRIORITY, take_priority
from runtime.robot_file import CommandConfig

MAX_PACKET = 65536
PAGE_BYTES = mmap.PAGESIZE
ZERO_PERIOD_S = 0.05
HOLD_S = 2.0  # zeros for so long after the loop is gone: its last commands may still be on their way
LAST_ZEROS = 3  # at a goodbye; datagrams get lost
GOODBYE_S = 1.0  # for the last zeros to get out; after that it stays without its parent
UNREACHED_S = 60.0  # for a receiver that was there and does not confirm; longer than any robot coasts in a room
LISTENERS_S = 0.5
_MCL_CURRENT, _MCL_ONFAULT = 1, 4


class Page:
    """Four numbers that both processes see; each is one aligned store, so none is ever seen half-written.

    Stamps are time.monotonic(), which is one clock for all processes of a machine.

    Args:
        number: a file descriptor of PAGE_BYTES of shared memory; it may be closed afterwards.
    """

    def __init__(self, number: int) -> None:
        self._memory = mmap.mmap(number, PAGE_BYTES)
        self._numbers = memoryview(self._memory).cast("d")

    @property
    def beat_s(self) -> float:
        """The loop's last sign of life; 0 before the first, which arms the watchdog."""
        return self._numbers[0]

    @beat_s.setter
    def beat_s(self, stamp: float) -> None:
        self._numbers[0] = stamp

    @property
    def alive_s(self) -> float:
        """The watchdog's last sign of life."""
        return self._numbers[1]

    @alive_s.setter
    def alive_s(self, stamp: float) -> None:
        self._numbers[1] = stamp

    @property
    def tripped(self) -> bool:
        """The watchdog has stopped the robot; for good."""
        return self._numbers[2] != 0.0

    @tripped.setter
    def tripped(self, value: bool) -> None:
        self._numbers[2] = float(value)

    @property
    def listeners(self) -> float:
        """How many receivers the watchdog's own way to the robot has; -1 where it cannot tell."""
        return self._numbers[3]

    @listeners.setter
    def listeners(self, count: float) -> None:
        self._numbers[3] = count

    def close(self) -> None:
        """Let go of the memory."""
        self._numbers.release()
        self._memory.close()


class Setup(msgspec.Struct, frozen=True):
    """What the process is told first."""

    commands: CommandConfig
    timeout_s: float
    parent: int


class Refusal(msgspec.Struct, frozen=True):
    """A JetvlaError on its way to the parent."""

    what: str
    hint: str
    got: str | None = None
    expected: str | None = None


def main(arguments: list[str]) -> int:
    """Guard until the parent says goodbye or is gone. `arguments`: the numbers of the inherited socket and shared memory."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)  # whoever stops the parent, stops this one through it
    link, page = socket.socket(fileno=int(arguments[0])), Page(int(arguments[1]))
    setup = msgspec.json.decode(link.recv(MAX_PACKET), type=Setup)
    try:
        sink = open_sink(setup.commands)
    except JetvlaError as error:
        got, expected = (None if part is None else str(part) for part in (error.got, error.expected))
        link.send(b"e" + msgspec.json.encode(Refusal(what=error.what, hint=error.hint, got=got, expected=expected)))
        return 1
    guard = _Guard(link, page, sink, setup)
    _settle()
    page.alive_s, page.listeners = time.monotonic(), -1.0
    link.setblocking(False)
    link.send(b"r" + identity(sink).encode())
    guard.run()
    sink.close()
    return 0


class _Guard:
    """Armed by the first beat, tripped for good by silence."""

    def __init__(self, link: socket.socket, page: Page, sink: CommandSink, setup: Setup) -> None:
        self._link = link
        self._page = page
        self._sink = sink
        self._setup = setup
        self._log = _Log()
        self._poll = select.poll()
        self._poll.register(link, select.POLLIN)
        self._goodbye = False
        self._gone = False
        self._failing = False
        self._had_listeners, self._counted_s = False, -math.inf

    def run(self) -> None:
        """Until the loop has ended and the robot stands."""
        if self._watch():
            self._trip()
        if not self._page.beat_s:
            return  # never armed: the loop has sent nothing, and whoever else drives this robot is not to be braked
        if self._goodbye:
            if self._say_zero(LAST_ZEROS, GOODBYE_S) and self._is_confirmed(GOODBYE_S):
                return
            self._log.write("jetvla watchdog: the run is over, but the last zero has not reached the robot; trying on")
            with suppress(OSError):
                self._link.send(b"k", socket.MSG_NOSIGNAL)
        else:
            self._log.write("jetvla watchdog: the control loop is gone without a goodbye; stopping the robot")
        count = math.ceil(HOLD_S / ZERO_PERIOD_S)
        give_up_s = time.monotonic() + UNREACHED_S
        self._say_zero(count, math.inf)
        while not self._is_confirmed(ZERO_PERIOD_S) and time.monotonic() < give_up_s:
            self._say_zero(count, math.inf)

    def _watch(self) -> bool:
        """Until the loop falls silent (True), or says goodbye or is gone (False)."""
        wait_s = ZERO_PERIOD_S
        while True:
            self._listen(wait_s)
            if self._goodbye or self._gone:
                return False
            beat_s = self._page.beat_s
            if beat_s:
                left_s = beat_s + self._setup.timeout_s - time.monotonic()
                if left_s <= 0:
                    return True
                wait_s = min(left_s, ZERO_PERIOD_S)

    def _trip(self) -> None:
        """Zeros until the loop has ended. Beats do not help it any more: what it decided from is old."""
        self._page.tripped = True  # first, so that the loop sends nothing after the zero
        self._zero()
        self._log.write(f"jetvla watchdog: no sign of life for {self._setup.timeout_s:g} s; stopping the robot")
        while not (self._goodbye or self._gone):
            self._listen(ZERO_PERIOD_S)
            self._zero()

    def _listen(self, wait_s: float) -> None:
        """Wait for the loop's process to say goodbye or to end; leave a sign of life."""
        now_s = self._page.alive_s = time.monotonic()
        if now_s - self._counted_s > LISTENERS_S:
            self._counted_s = now_s
            count = self._sink.listeners()
            self._had_listeners |= bool(count)
            self._page.listeners = -1.0 if count is None else float(count)
        if self._poll.poll(math.ceil(wait_s * 1000)):
            try:
                message = self._link.recv(MAX_PACKET)
            except OSError:
                message = b""
            self._goodbye = message == b"q"
            self._gone = not message
        elif os.getppid() != self._setup.parent:
            self._gone = True  # although a fork of it holds the other end open

    def _is_confirmed(self, wait_s: float) -> bool:
        """Whoever listened has the last command, as far as this transport can tell."""
        if self._had_listeners and self._sink.listeners() == 0:
            return False  # whoever is gone may still be moving
        confirm = getattr(self._sink, "confirm", None)
        return confirm is None or bool(confirm(wait_s))

    def _say_zero(self, count: int, at_most_s: float) -> bool:
        """Send zero `count` times successfully; false where sending failed for `at_most_s`."""
        deadline = time.monotonic() + at_most_s
        while True:
            count -= self._zero()
            if count <= 0 or time.monotonic() > deadline:
                return count <= 0
            time.sleep(ZERO_PERIOD_S)

    def _zero(self) -> bool:
        try:
            self._sink.send(ZERO)
        except Exception as error:  # whatever it is, the next attempt may succeed, and nobody else is left to try
            if not self._failing:
                self._log.write(f"jetvla watchdog: cannot reach the robot, trying on: {error}")
            self._failing = True
            return False
        self._failing = False
        return True


class _Log:
    """Lines to stderr from a thread of its own: a full pipe or a paused terminal must stop nobody but that thread."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        self._lines.put(line.encode(errors="replace") + b"\n")

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError):
                os.write(2, line)


def _settle() -> None:
    """Stay in memory, make no pauses, come first. Some of it needs rights that not everybody has; without them the rest still holds."""
    gc.collect()
    gc.freeze()
    gc.disable()  # the loop makes no cycles
    take_priority(WATCHDOG_PRIORITY)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_ONFAULT)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # threads of a middleware must not keep it
