"""What the CPU calls itself: for reports, logs and fingerprints that people compare."""

from __future__ import annotations

import re
from pathlib import Path

# Arm kernels have no model name: a board's name, or at least the number of the core's design.
_KEYS = ("model name", "Hardware", "CPU part")


def processor_name(root: Path = Path("/")) -> str | None:
    """The name in /proc/cpuinfo; None where there is none, or no such file.

    Args:
        root: of the file system.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    found = (re.search(rf"^{key}\s*:[ \t]*(\S.*)$", text, re.MULTILINE | re.IGNORECASE) for key in _KEYS)
    return next((each[1].strip() for each in found if each is not None), None)
