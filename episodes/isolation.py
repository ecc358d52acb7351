"""Examines episodes in processes of their own, because libhdf5 may hang or die on a damaged file.

Such a file must cost one line of a report, not the report. A process for each file rather than one for all: what a damaged file does
to the library's memory ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from episodes.findings import Examination, Problem, from_json

__all__ = ["death_of", "end_child", "examine_all", "examine_isolated"]

_ROOT = Path(__file__).resolve().parent.parent
_COMMAND: tuple[str, ...] = (sys.executable, str(Path(__file__).with_name("examine_one.py")))
_SECONDS_TO_DIE = 5.0
_COPY_AGAIN = (
    "copy the file again from the robot; if it is like this there too, leave it out: it would do the same in training."
)


def examine_isolated(path: Path, *, timeout_s: float, command: Sequence[str] = _COMMAND) -> Examination:
    """Examine one episode; a child that dies or takes longer than `timeout_s` seconds is an error of that episode.

    Args:
        command: the child's program, to which time and path are appended; for tests.
    """
    modules = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [*command, str(timeout_s), str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": modules},
    )
    try:
        output, noise = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return _lost(path, "hung", f"reading it did not end within {timeout_s:g} s", _hint_hung(timeout_s))
    finally:
        end_child(child)
    # A process that dies after its answer, while it closes the file, would die in training too.
    if child.returncode == 0:
        with suppress(IndexError, ValueError, TypeError, KeyError):
            return from_json(json.loads(output.splitlines()[-1]))
    last = noise.decode("utf-8", "replace").strip().rpartition("\n")[2]
    said = f": {last}" if last else ""
    text = f"it crashed the process that read it ({death_of(child.returncode)}){said}"
    return _lost(path, "crashed", text, _COPY_AGAIN)


def examine_all(
    paths: Sequence[Path], *, timeout_s: float, jobs: int, advance: Callable[[], None] = lambda: None
) -> tuple[Examination, ...]:
    """Examine all `paths`, `jobs` at a time; the result has their order.

    Args:
        advance: called after each episode, from other threads.
    """

    def one(path: Path) -> Examination:
        found = examine_isolated(path, timeout_s=timeout_s)
        advance()
        return found

    pool = ThreadPoolExecutor(jobs)
    try:
        return tuple(pool.map(one, paths))
    finally:
        # After Ctrl-C only the children that run already are waited for, and they got it too.
        pool.shutdown(cancel_futures=True)


def _lost(path: Path, code: str, text: str, hint: str) -> Examination:
    size = path.stat().st_size if path.is_file() else None
    return Examination(str(path), size, problems=(Problem(code, "error", text, hint),))


def _hint_hung(timeout_s: float) -> str:
    return f"is the disk or network slow? Then try --timeout-s {timeout_s * 5:g}. Otherwise {_COPY_AGAIN}"


def end_child(child: subprocess.Popen[bytes], patience_s: float = _SECONDS_TO_DIE) -> None:
    """Kill a process, if it still runs, and close its pipes.

    Args:
        patience_s: one that waits for a lost network disk cannot be killed, and is left behind after so long.
    """
    child.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience_s)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def death_of(status: int) -> str:
    """How a process ended, in words, from its exit status (negative: the signal)."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-status}"
