"""Runs an engine build in a process of its own: its memory comes back, its death is an error message, Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from bundle.errors import EngineBuildError
from export.to_tensorrt import EngineBuilt, EngineRequest

_ROOT = Path(__file__).resolve().parent.parent
_TAIL_LINES = 3

Progress = Callable[[str, str | None, int, int], None]


def build_in_process(request: EngineRequest, progress: Progress, command: tuple[str, ...] = ()) -> EngineBuilt:
    """Build one engine; the child is killed if this call is left by an exception, KeyboardInterrupt included.

    Args:
        command: the child's program; for tests. By default export.engine_worker.

    Raises:
        EngineBuildError: TensorRT refused, or the process died; the message says of what.
        OSError: the disk is full.
    """
    reader, writer = os.pipe()
    program = command or (sys.executable, "-m", "export.engine_worker")
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as noise:
        try:
            child = subprocess.Popen(
                [*program, str(writer)],
                stdin=subprocess.PIPE,
                stdout=noise,
                stderr=noise,
                pass_fds=(writer,),
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the parent, which ends the child itself
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            assert child.stdin is not None
            try:
                child.stdin.write(msgspec.json.encode(request))
                child.stdin.close()
            except BrokenPipeError:
                pass  # it died at once; its status tells why
            built = _listen(reader, progress)
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if built is None:
            raise _died(request, status, noise)
        return built


def _listen(reader: int, progress: Progress) -> EngineBuilt | None:
    """Read messages until the child closes the pipe; None if it ended without a result."""
    built = None
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break  # killed in the middle of a message
            kind, content = msgspec.json.decode(line)
            if kind == "progress":
                progress(*content)
            elif kind == "built":
                built = msgspec.convert(content, EngineBuilt)
            elif kind == "oserror":
                raise OSError(*content)
            else:
                raise EngineBuildError(content["what"], **{key: content[key] for key in ("got", "expected", "hint")})
    return built


def _died(request: EngineRequest, status: int, noise: object) -> EngineBuildError:
    noise.seek(0)  # type: ignore[attr-defined]
    text = noise.read().decode(errors="replace")  # type: ignore[attr-defined]
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    tail = " | ".join(lines[-_TAIL_LINES:])
    if status == -signal.SIGKILL:
        return EngineBuildError(
            f"the build of {request.label} was killed",
            got="SIGKILL",
            expected="enough memory: the kernel kills what takes too much",
            hint="close other programs, add swap, lower --workspace-mb, or --optimization-level 1; finished engines are kept.",
        )
    ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return EngineBuildError(
        f"the build of {request.label} crashed",
        got=f"{ended}{': ' + tail if tail else ''}",
        hint="try --optimization-level 2; if it crashes again, report it with TensorRT's version. Finished engines are kept.",
    )
