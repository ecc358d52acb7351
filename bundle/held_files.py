"""Files in use: what was checked must stay as it is for as long as it is read.

Weights are mapped, so whoever writes into such a file changes what a running policy computes, and whoever cuts it off kills the process
with SIGBUS. Held files are open, so their changes are seen whatever becomes of their names: size, times and links are compared. Where the
system grants it, each also has a read lease (fcntl(2), F_SETLEASE): a writer then waits, 45 s at most, until the file is let go, and
`check` says so before a byte is changed. Leases are granted for a process's own files on local disks.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import BundleError, JetvlaError

_LEASES = hasattr(fcntl, "F_SETLEASE")
_WATCH_S = 0.2
_SIGNAL = signal.SIGURG  # not SIGINT, which is ignored in what a shell started in the background


@dataclass
class _Held:
    path: Path
    descriptor: int
    stamp: os.stat_result
    leased: bool


class HeldFiles:
    """Files that must not change from now on until `close`.

    Args:
        error: what `check` raises.
        hint: what to do about a change.
    """

    def __init__(self, paths: Iterable[Path], *, error: type[JetvlaError] = BundleError, hint: str) -> None:
        self._error, self._hint = error, hint
        self._held: list[_Held] = []
        try:
            for path in paths:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                leased = _lease(descriptor)  # before the stamp: from here on a writer waits
                self._held.append(_Held(path, descriptor, os.fstat(descriptor), leased))
        except OSError as problem:
            self.close()
            raise error(f"{path} cannot be read", got=problem.strerror, expected="a file", hint=hint) from None

    @property
    def leased(self) -> bool:
        """Whether writers wait for every file."""
        return all(held.leased for held in self._held)

    def check(self, *, names: bool = False) -> None:
        """Refuse to go on with files that were, or are about to be, written to; some microseconds for each.

        Args:
            names: also refuse where a name has come to mean another file; what is open already is not touched by that.

        Raises:
            error: the first file that changed, or that somebody waits to write to.
        """
        for held in self._held:
            if held.leased and fcntl.fcntl(held.descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK:
                raise self._changed(held, "another process is about to write into it")
            found, stamp = os.fstat(held.descriptor), held.stamp
            if found.st_size != stamp.st_size:
                raise self._changed(held, f"{found.st_size} bytes instead of {stamp.st_size}")
            if found.st_mtime_ns != stamp.st_mtime_ns:
                raise self._changed(held, "it was written to")
            if found.st_ctime_ns != stamp.st_ctime_ns:
                if found.st_nlink == stamp.st_nlink:
                    raise self._changed(held, "it was written to, or its name or rights were changed")
                held.stamp = found  # a link to it came or went, as when a new bundle takes over what is the same
            if names and not _is_still(held):
                raise self._error(
                    f"{held.path} was replaced while it was in use",
                    expected="the file that was checked",
                    hint=self._hint,
                )

    def close(self) -> None:
        """Let go of all files; writers that waited go on."""
        while self._held:
            os.close(self._held.pop().descriptor)

    def __del__(self) -> None:
        self.close()

    def _changed(self, held: _Held, got: str) -> JetvlaError:
        return self._error(
            f"{held.path} was changed while it was in use",
            got=got,
            expected="a file that nobody writes to",
            hint=self._hint,
        )


@contextmanager
def unchanged(paths: Iterable[Path], *, error: type[JetvlaError], hint: str) -> Iterator[None]:
    """Long work on mapped files: ends it soon after one of them is written to, instead of with SIGBUS or with other numbers.

    Work in the main thread is interrupted; in another thread the error comes at its end.

    Raises:
        error: see `HeldFiles.check`.
    """
    held = HeldFiles(paths, error=error, hint=hint)
    caller, is_main = threading.get_ident(), threading.current_thread() is threading.main_thread()
    over, found = threading.Event(), list[JetvlaError]()

    def watch() -> None:
        while not over.wait(_WATCH_S):
            try:
                held.check()
            except JetvlaError as problem:
                found.append(problem)
                if is_main:
                    signal.pthread_kill(caller, _SIGNAL)  # which also ends a system call
                return

    watcher = threading.Thread(target=watch, name="held-files", daemon=True)
    before = signal.signal(_SIGNAL, _interrupt) if is_main else None
    watcher.start()
    try:
        try:
            yield
        finally:
            over.set()
            watcher.join()
        held.check()
    except _Interruption:
        raise found[0] from None
    finally:
        if is_main:
            signal.signal(_SIGNAL, before)
        held.close()


class _Interruption(KeyboardInterrupt):
    """Goes up like Ctrl-C, and is not taken for it."""


def _interrupt(*_: object) -> None:
    raise _Interruption


def _lease(descriptor: int) -> bool:
    """Whether writers to an open file wait from now on."""
    if not _LEASES:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:  # another user's file, a file system without leases, or somebody is writing at this moment
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, 0)  # it is asked for, and no signal comes: SIGIO would end the process
    return True


def _is_still(held: _Held) -> bool:
    try:
        found = held.path.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.stamp.st_dev, held.stamp.st_ino)
