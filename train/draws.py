"""Random numbers that are functions of names and seeds alone, not of a generator's state.

So a run resumes from (epoch, step), a split does not depend on the order of the files, and neither changes with the version of a
library. SHA-256, because numpy may change the streams of its generators, and Python's `hash` differs between processes.
"""

from __future__ import annotations

import hashlib

_BITS = 53  # what a float holds


def draw_number(*key: int | str) -> int:
    """A number in [0, 2^53) that is always the same for a key and looks random across keys."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's integers look different
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _BITS)


def draw_uniform(*key: int | str) -> float:
    """The same in [0, 1)."""
    return draw_number(*key) / (1 << _BITS)
