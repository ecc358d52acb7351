#!/usr/bin/env python3
"""First process of the robot's container: runs run_robot.py with the same arguments, and stays until what that leaves behind is done.

A container ends with its first process, and the kernel kills everything in it at that moment. Were run_robot.py that process, then what
kills it would kill its watchdog too, and nobody would tell the robot to stop. So this one is the first: it passes signals on, and when
run_robot.py has ended in whatever way, it waits for the processes that are left (the watchdog says zero for two seconds, then ends). Works
under an init (`docker run --init`) as well. Knows nothing about robots.

Exit codes: those of run_robot.py; 128 and the signal's number where a signal ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

_SCRIPT = Path(__file__).resolve().with_name("run_robot.py")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 8.0  # docker stop kills after 10; a watchdog that cannot reach the robot tries for ever
_LOOK_S = 0.05


def main(arguments: list[str]) -> int:
    """Run, pass signals on, wait for all; returns the exit code."""
    # Orphans come to this process even where it is not the container's first.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Not before there is somebody to pass them on to: an early signal waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    pid = os.posix_spawn(
        sys.executable, [sys.executable, str(_SCRIPT), *arguments], os.environ, setsigmask=(), setsigdef=_PASSED_ON
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    ended, status = os.wait()
    while ended != pid:
        ended, status = os.wait()
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_IGN)  # `pid` may be anybody's from now on
    _wait_for_the_rest()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _wait_for_the_rest() -> None:
    deadline = time.monotonic() + _PATIENCE_S
    with suppress(ChildProcessError):  # nobody is left
        while time.monotonic() < deadline:
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if not ended:
                time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
