"""The control loop's end of the watchdog: starts it, tells it that the loop lives, and learns when it has stopped the robot.

The loop calls `beat` once per tick and `check` before each command. A command that slips out after the watchdog has tripped (the loop was
frozen between `check` and `send`) is followed by the watchdog's next zero within 50 ms, because that goes on until the loop has ended. What
the process does is in runtime/watchdog_process.py.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from bundle.errors import CommandError, WatchdogError
from runtime.robot_file import CommandConfig
from runtime.watchdog_process import MAX_PACKET, PAGE_BYTES, Page, Refusal, Setup

_START_S = 60.0  # a cold start of Python and a middleware from a slow card
_CLOSE_S = 5.0
_SILENCE_S = 1.0  # of the watchdog, before it counts as gone; at least its own patience
_HINT_TRIPPED = (
    "it tells the robot to stop until this process ends; look for what held the control loop up, then start again."
)
_HINT_LOST = "without it nothing may move: end the run. Its own messages are on stderr; after a kill, look for the out-of-memory killer."


class Watchdog:
    """A running watchdog; use from one thread. A context manager that closes.

    Attributes:
        identity: of its publisher, for runtime.commands.select.competitors(exclude=...); empty where publishers have none.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], link: socket.socket, page: Page, identity: str, timeout_s: float
    ) -> None:
        self.identity = identity
        self._process = process
        self._link = link
        self._page = page
        self._timeout_s = timeout_s
        self._patience_s = max(_SILENCE_S, timeout_s)
        self._fault: WatchdogError | None = None
        self._closed = False
        _RUNNING.add(self)

    @classmethod
    def start(cls, commands: CommandConfig, timeout_s: float) -> Watchdog:
        """Start the process and wait until it could send.

        Args:
            commands: the way to the robot, the same as the loop's.
            timeout_s: silence after which it stops the robot.

        Raises:
            CommandError: it cannot reach the robot; the message says why.
            WatchdogError: it did not start.
        """
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("jetvla-watchdog")
        try:
            os.truncate(memory, PAGE_BYTES)
            page = Page(memory)
            process = _spawn(theirs.fileno(), memory)
        except BaseException:
            link.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        try:
            setup = Setup(commands=commands, timeout_s=timeout_s, parent=os.getpid())
            with suppress(ConnectionError):  # it has died already: told below
                link.send(msgspec.json.encode(setup), socket.MSG_NOSIGNAL)
            identity = _wait_until_ready(link, process)
            link.setblocking(False)
            return cls(process, link, page, identity, timeout_s)
        except BaseException:
            _end(process, link)
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def beat(self) -> None:
        """The loop lives. About a microsecond, and cannot fail: `check` tells. The first one arms the watchdog."""
        if not self._closed:
            self._page.beat_s = time.monotonic()

    def check(self) -> None:
        """The watchdog lives and has not tripped; a few microseconds.

        Raises:
            WatchdogError: it has stopped the robot, is gone, or has given no sign of life for a second (or its own timeout, where that is
                longer). Once raised, always raised.
        """
        if self._fault is None:
            self._fault = self._find_fault()
        if self._fault is not None:
            raise self._fault

    def listeners(self) -> int | None:
        """How many receivers its own way to the robot has; None where it cannot tell. A microsecond."""
        return None if self._closed or self._page.listeners < 0 else int(self._page.listeners)

    def close(self) -> None:
        """End it in good order: it sends a last zero. Takes 5 s at most, then it is killed. Safe to call twice.

        Where the zero does not reach the robot it stays, without this process, and goes on trying; it says so on stderr.
        """
        if self._closed:
            return
        self._closed = True
        _RUNNING.discard(self)
        self._fault = self._fault or self._lost("it was closed")
        try:
            self._link.send(b"q", socket.MSG_NOSIGNAL)
        except OSError:  # gone, or it reads nothing: then the end of the connection has to do
            with suppress(OSError):
                self._link.shutdown(socket.SHUT_WR)
        # It answers only to say that it stays; else the connection ends with it.
        deadline_s = time.monotonic() + _CLOSE_S
        ready, _, _ = select.select([self._link], [], [], _CLOSE_S)
        stays = False
        with suppress(OSError):
            stays = bool(ready) and self._link.recv(MAX_PACKET) == b"k"
        if stays:
            self._link.close()
            self._process.returncode = 0  # nobody waits for it any more
        else:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline_s - time.monotonic()))
            _end(self._process, self._link)
        self._page.close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find_fault(self) -> WatchdogError | None:
        if self._page.tripped:
            got = f"no sign of life from the control loop for {self._timeout_s:g} s"
            return WatchdogError("the watchdog has stopped the robot", got=got, hint=_HINT_TRIPPED)
        with suppress(BlockingIOError):  # it has nothing to say: it is there
            with suppress(ConnectionError):
                self._link.recv(MAX_PACKET)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
            return self._lost(_ended(self._process))
        silent_s = time.monotonic() - self._page.alive_s
        return self._lost(f"no sign of life for {silent_s:.1f} s") if silent_s > self._patience_s else None

    def _lost(self, got: object) -> WatchdogError:
        return WatchdogError(
            "the watchdog does not run any more", got=got, expected="a process that answers", hint=_HINT_LOST
        )

    def _forget(self) -> None:
        """In a fork of this process: hold nothing, say nothing."""
        self._closed = True
        self._fault = self._lost("this is a fork of the process that it guards")
        self._link.close()
        self._page.close()


_RUNNING: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def _forget_all() -> None:
    for watchdog in list(_RUNNING):
        watchdog._forget()
    _RUNNING.clear()


# A fork that keeps the connection open, or even says goodbye through it, would blind the watchdog.
os.register_at_fork(after_in_child=_forget_all)


def _spawn(theirs: int, memory: int) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("watchdog_process.py")
    root = str(script.parents[1])  # the very code that runs here, whatever the current folder holds
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Not 0, 1 or 2, which are replaced: they are free in a process that was started with them closed.
    numbers = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3) for number in (theirs, memory)]
    try:
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if _is_open(2) else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=numbers,
            start_new_session=True,  # Ctrl-C reaches the loop alone, which ends both
        )
    except OSError as error:
        raise WatchdogError(
            "the watchdog cannot be started",
            got=error,
            hint="the machine lacks memory or processes; free some and try again.",
        ) from None
    finally:
        for number in numbers:
            os.close(number)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _wait_until_ready(link: socket.socket, process: subprocess.Popen[bytes]) -> str:
    """The identity of its publisher."""
    ready, _, _ = select.select([link], [], [], _START_S)
    try:
        message = link.recv(MAX_PACKET) if ready else b""
    except ConnectionError:
        message = b""
    if message[:1] == b"r":
        return message[1:].decode()
    if message[:1] == b"e":
        refusal = msgspec.json.decode(message[1:], type=Refusal)
        raise CommandError(
            f"the watchdog cannot reach the robot: {refusal.what}",
            got=refusal.got,
            expected=refusal.expected,
            hint=refusal.hint,
        )
    if ready:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)
    raise WatchdogError(
        "the watchdog did not start",
        got=_ended(process) if ready else f"no answer within {_START_S:.0f} s",
        expected="a process that is ready to stop the robot",
        hint="its own message is on stderr, above this one.",
    )


def _ended(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "it has closed the connection"
    return f"it was killed by signal {-code}" if code < 0 else f"it has ended with code {code}"


def _end(process: subprocess.Popen[bytes], link: socket.socket) -> None:
    link.close()
    process.kill()
    process.wait()
