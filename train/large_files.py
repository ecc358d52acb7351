"""Replacing files of many megabytes whole: written by a library under a temporary name, then renamed, so that no kill leaves half of one.

`bundle.atomic.write_bytes` does the same for what fits in memory twice. Leftovers of killed writers are removed here as well: a run that
is killed and resumed again and again would otherwise fill the disk with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bundle.atomic import disk_errors, publish_file, remove_leftovers


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what the block writes there becomes `path` when it ends without an error, else it goes.

    Raises:
        StorageError: the disk is full; an existing file stays as it was.
    """
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
        publish_file(temporary, path)
    finally:
        with suppress(OSError):  # on a disk that became read-only; the first error is the one to tell
            temporary.unlink(missing_ok=True)
