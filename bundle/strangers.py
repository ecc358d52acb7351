"""What lies in a bundle's folder and is not the bundle's: a latency report, somebody's robot file, recordings.

Whoever replaces a bundle replaces its folder, and takes these along. Engines are no strangers: they have a way of their own
(bundle/engine_cache.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from bundle.atomic import link_or_copy
from bundle.engine_cache import ENGINES
from bundle.manifest import MANIFEST_NAME

# Of a bundle whose manifest cannot be read any more, these are taken for its own.
_OWN_SUFFIXES = (".onnx", ".data", ".npz", ".npy", ".json", ".html", ".log", ".engine")


def strangers(bundle: Path) -> set[str]:
    """Names of files, relative to the folder; none if there is no such folder."""
    if not bundle.is_dir():
        return set()
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    found = {name for name in found - {MANIFEST_NAME} if not name.startswith(f"{ENGINES}/")}
    named = _named(bundle)
    return {name for name in found if not name.endswith(_OWN_SUFFIXES)} if named is None else found - named


def keep_strangers(old: Path, new: Path) -> None:
    """Give the files of others in `old` a second name in `new`, where they come last: what is new has a name first."""
    for name in sorted(strangers(old)):
        if not (new / name).exists():
            link_or_copy(old / name, new / name)


def _named(bundle: Path) -> set[str] | None:
    """The files in a manifest of whatever version; None if it cannot be read."""
    try:
        return set(json.loads((bundle / MANIFEST_NAME).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
