"""Has every foreign HDF5 file opened by another process before this one opens it.

libhdf5 hangs or dies on some damage, in C code, where Ctrl-C reaches nobody. Most of such damage is found before libhdf5 sees it
(episodes/heap.py, storage.py, attributes.py); for the rest a child (first_contact_child.py) opens the file as `open_episode` does and has
all that is stored looked up. Only whether it comes back is asked, within a limit: what is wrong with the file, the caller finds out
himself. One child serves all files of a process, and a file that has not changed is asked for once.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from bundle.errors import EpisodeError
from episodes.isolation import death_of, end_child
from episodes.layout import Schema
from episodes.storage import LINKS_SWITCH

__all__ = ["require_answer"]

CHILD: tuple[str, ...] = (sys.executable, "-W", "ignore", str(Path(__file__).with_name("first_contact_child.py")))
CPU_S = 8.0  # of computing; what libhdf5 does with a sound file takes milliseconds
PATIENCE_S = 60.0  # of the clock: a disk may sleep, a network be slow
_BYTES_A_CPU_SECOND = 50e6
_BYTES_A_SECOND = 1e6
_SECONDS_TO_DIE = 5.0
_LEAVE_OUT = "copy the file again from the robot; if it is like this there too, leave the episode out."

_Key = tuple[int, int, int, int, str]


class _Child:
    """The process; a request is a line of JSON, the answer an empty line."""

    def __init__(self) -> None:
        """Raises OSError where no process can be started."""
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        try:
            self._process = subprocess.Popen(
                CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, bufsize=0
            )
        except BaseException:
            self._noise.close()
            raise

    def answers(self, request: str, patience_s: float) -> bool:
        """Whether an answer, or the end of the child, came within `patience_s` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it died while it waited; said by `death`
            self._process.stdin.write(request.encode() + b"\n")
        waiting = select.poll()
        waiting.register(self._process.stdout, select.POLLIN)
        return bool(waiting.poll(patience_s * 1000))

    def lives(self) -> bool:
        """Whether what came was the answer."""
        assert self._process.stdout is not None
        return self._process.stdout.read(1) == b"\n"

    def death(self) -> tuple[int, str]:
        """Exit status of a child that has ended, and the last line that it said."""
        status = self._process.wait(_SECONDS_TO_DIE)
        self._noise.seek(0)
        return status, self._noise.read().decode("utf-8", "replace").strip().rpartition("\n")[2]

    def end(self) -> None:
        """Kill it."""
        end_child(self._process)
        self._noise.close()


_lock = threading.Lock()
_child: _Child | None = None
_inherited: _Child | None = None  # of a process that was forked: kept, because letting it go warns that it runs
_known: dict[_Key, tuple[str, str] | None] = {}  # what is wrong with a file, and what was seen; None: nothing


def require_answer(path: Path, schema: Schema | None) -> None:
    """Nothing, if another process opened `path` and came back; it may have been refused there.

    Raises:
        EpisodeError: it hung or died, or no process can be started.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):
        return  # whoever opens it says so
    if not stat.S_ISREG(found.st_mode):
        return
    links = os.environ.get(LINKS_SWITCH, "")
    request = json.dumps([str(path.absolute()), schema, links, _cpu_s(found.st_size), _patience_s(found.st_size)])
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, request)
    with _lock:
        if key not in _known:
            _known[key] = _ask(request, found.st_size)
        fault = _known[key]
    if fault is not None:
        what, got = fault
        raise EpisodeError(
            f"{path} is damaged: reading it {what}", got=got, expected="data as they were written", hint=_LEAVE_OUT
        )


def _ask(request: str, size: int) -> tuple[str, str] | None:
    global _child
    try:
        child = _child = _child or _Child()
    except OSError as error:
        raise EpisodeError(
            "no process can be started that opens the episode first",
            got=error.strerror or error,
            expected="one, because a damaged file may hang the HDF5 library",
            hint="close other programs, or raise the limit of processes: ulimit -u.",
        ) from None
    good = False
    try:
        if not child.answers(request, _patience_s(size)):
            return "does not end", f"no answer within {_patience_s(size):.0f} s"
        good = child.lives()
        if good:
            return None
        status, said = child.death()
        if status == -signal.SIGPROF:
            return "does not end", f"the HDF5 library computed for {_cpu_s(size):.0f} s"
        return "crashes the HDF5 library", death_of(status) + (f": {said}" if said else "")
    finally:
        if not good:  # also after Ctrl-C
            _child = None
            child.end()


def _cpu_s(size: int) -> float:
    return CPU_S + size / _BYTES_A_CPU_SECOND


def _patience_s(size: int) -> float:
    return PATIENCE_S + size / _BYTES_A_SECOND


def _end_child() -> None:
    if _child is not None:
        _child.end()


def _forget_child() -> None:
    """A forked process has a child of its own: two that ask one would take each other's answers."""
    global _child, _inherited, _lock
    _child, _inherited, _lock = None, _child, threading.Lock()


atexit.register(_end_child)
os.register_at_fork(after_in_child=_forget_child)
