"""Answers a name that does not exist with those that are nearest to it.

For command lines with many names; knows nothing about what they name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from bundle.errors import ConfigError


def unknown(what: str, got: str, known: Iterable[str]) -> ConfigError:
    """The error to raise: lists all names, and suggests those that contain what was written, else the most similar one."""
    names = list(known)
    plain = got.strip().lower()
    near = [name for name in names if plain and plain in name.lower()]
    if not near:
        close = difflib.get_close_matches(plain, [name.lower() for name in names], n=1, cutoff=0.4)
        near = [name for name in names if name.lower() in close]
    hint = f"did you mean {' or '.join(near[:4])}?" if near else "take one of these."
    return ConfigError(f"unknown {what}", got=got or "nothing", expected=", ".join(names), hint=hint)
