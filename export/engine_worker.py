"""The process that builds one engine: `python -m export.engine_worker FD`, a request on stdin, messages on file descriptor FD.

A message is a line of JSON: ["progress", [phase, parent, done, steps]], then ["built", EngineBuilt] or ["error", {...}]. TensorRT itself
may print what it likes on stdout and stderr. Dies with its parent, so that a killed build leaves no orphan holding the GPU.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress

import msgspec

from bundle.errors import JetvlaError
from export.to_tensorrt import EngineRequest, build_engine
from runtime.tensorrt_flavour import open_flavour

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Build what stdin asks for."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = int(sys.argv[1])
    if _is_orphan(descriptor):
        return 1

    def send(kind: str, content: object) -> None:
        os.write(descriptor, msgspec.json.encode([kind, content]) + b"\n")

    def report(phase: str, parent: str | None, done: int, steps: int) -> bool:
        send("progress", [phase, parent, done, steps])
        return True

    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineRequest)
        send("built", build_engine(open_flavour(request.flavour), request, report))
    except JetvlaError as error:
        send(
            "error",
            {
                "what": error.what,
                "got": None if error.got is None else str(error.got),
                "expected": None if error.expected is None else str(error.expected),
                "hint": error.hint,
            },
        )
        return 1
    except OSError as error:
        send("oserror", [error.errno, error.strerror, str(error.filename)])
        return 1
    return 0


def _is_orphan(descriptor: int) -> bool:
    """True if nobody reads the pipe any more: a parent that died before the request for its signal sends none."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
