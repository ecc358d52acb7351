"""Whether the process that writes a run is still there: a run that was killed cannot say so itself.

A pid alone proves nothing, as it is given again: the boot and the process's start time stand beside it. Across machines and containers
nothing can be asked, and the answer is then that nobody knows. Knows nothing about what is in a run.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

_PROC = Path("/proc")
_STATE, _START_TIME = 0, 19  # of the fields behind the command name in /proc/PID/stat: fields 3 and 22 of proc(5)


class ProcessFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which process it was. What the system does not tell is None.

    Attributes:
        pid: within `pid_namespace`.
        host: name of the machine.
        boot_id: changes when the machine starts again.
        pid_namespace: differs between containers.
        start_ticks: when the process began, in clock ticks after the boot.
    """

    pid: int
    host: str
    boot_id: str | None
    pid_namespace: str | None
    start_ticks: int | None


def this_process() -> ProcessFacts:
    """The facts of the running process."""
    pid = os.getpid()
    state = _stat(pid)
    return ProcessFacts(
        pid=pid,
        host=socket.gethostname(),
        boot_id=_text(_PROC / "sys/kernel/random/boot_id"),
        pid_namespace=_link(_PROC / "self/ns/pid"),
        start_ticks=None if state is None else state[1],
    )


def is_alive(process: ProcessFacts) -> bool | None:
    """Whether it still runs; None if that cannot be told from here (another machine, another container)."""
    here = this_process()
    if process.boot_id is not None and process.boot_id == here.boot_id:
        if process.pid_namespace != here.pid_namespace:
            return None
        state = _stat(process.pid)
        if state is None:
            return _answers(process.pid)  # /proc may hide the processes of others
        return state[0] not in "ZX" and state[1] == process.start_ticks
    if process.host != here.host:
        return None
    if process.boot_id is None or here.boot_id is None:
        return _answers(process.pid)
    return False  # the machine was started again


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time. The command's name comes before them in parentheses and may hold anything."""
    text = _text(_PROC / str(pid) / "stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[_STATE], int(fields[_START_TIME])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)  # noqa: PTH115 - a name like pid:[1], not a path
    except OSError:
        return None
