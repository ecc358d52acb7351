"""Finishes recordings that a crash or a power cut left without their end, so that every tool opens them quickly.

Such a file can be read as it is (episodes/recording.py does); finished it is found to be whole by tools that want the summary at its end.
This decides which files, and touches none that somebody is writing. A robot drives meanwhile, and whatever has the name of a recording may
lie in the folder: so each file is read by a child (recover_one.py) of bounded memory and time, at the lowest priority. What is not
finished is told, and left as it is.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from episodes.isolation import death_of, end_child
from episodes.recording_repair import is_finished
from runtime.recorder.disk_budget import recordings

CHILD: tuple[str, ...] = (sys.executable, str(Path(__file__).with_name("recover_one.py")))
FILE_S = 120.0
_FOLDER_S = 600.0
_LOOK_S = 0.05
_SECONDS_TO_DIE = 1.0
_NEVER = threading.Event()


def _silence(text: str) -> None:
    pass


def recover_folder(folder: Path, tell: Callable[[str], None] = _silence, stop: threading.Event = _NEVER) -> list[Path]:
    """Finish every unfinished recording of ours in a folder; returns those that were. Raises nothing for what is in it.

    Args:
        tell: called with a line for each file that is left alone, but for those that somebody is writing.
        stop: ends it, and leaves the rest for another time.
    """
    repaired = []
    until = time.monotonic() + _FOLDER_S
    for stored in recordings(folder):
        if stop.is_set():
            break
        if time.monotonic() > until:
            tell("unfinished recordings are left for the next start: it took too long")
            break
        if recover_file(stored.path, tell, stop):
            repaired.append(stored.path)
    return repaired


def recover_file(path: Path, tell: Callable[[str], None] = _silence, stop: threading.Event = _NEVER) -> bool:
    """Finish one recording; False where there was nothing to do, somebody is writing it, or it is left alone.

    Args:
        tell, stop: see recover_folder.
    """
    try:
        if is_finished(path):
            return False
        child = subprocess.Popen(
            [*CHILD, str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return False
    try:
        said = _answer(child, stop)
    finally:
        end_child(child, _SECONDS_TO_DIE)
    if said:
        tell(f"left {path.name} unfinished: {said}")
    try:
        return is_finished(path)
    except OSError:
        return False


def _answer(child: subprocess.Popen[bytes], stop: threading.Event) -> str:
    """Why it did not finish the file; empty if it did, or there was nothing to do, or it has to stop."""
    until = time.monotonic() + FILE_S
    while not stop.is_set():
        try:
            output, _ = child.communicate(timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                return f"reading it did not end within {FILE_S:g} s"
            continue
        if child.returncode:
            return f"reading it took too much memory or time, or crashed ({death_of(child.returncode)})"
        return " ".join(output.decode("utf-8", "replace").split())
    return ""
