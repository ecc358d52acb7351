"""Finishes recordings that a crash or a power cut left without their end, so that every tool opens them quickly.

Such a file can be read as it is (episodes/recording.py does); finished it is found to be whole by tools that want the summary at its end.
The work is done by episodes/recording_repair.py; this decides which files, and touches none that somebody is writing.
"""

from __future__ import annotations

from pathlib import Path

from bundle.errors import JetvlaError
from episodes.recording_repair import is_finished, repair
from runtime.recorder.disk_budget import recordings


def recover_folder(folder: Path) -> list[Path]:
    """Finish every unfinished recording of ours in a folder; returns those that were. Skips what cannot be mended now."""
    return [stored.path for stored in recordings(folder) if recover_file(stored.path)]


def recover_file(path: Path) -> bool:
    """Finish one recording; False where there was nothing to do, somebody is writing it, or the disk refuses."""
    try:
        return not is_finished(path) and repair(path)
    except (JetvlaError, OSError):
        return False
