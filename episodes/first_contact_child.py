"""The child process of episodes/first_contact.py: opens episodes, one after another, and says that it came back.

A request is a line of JSON on standard input, [path, schema or null, links, seconds of computing, seconds of the clock]; the answer is
an empty line, whatever is in the file. A limit that is exceeded ends the process. Run by its path and not as a module: `-m` would import
from the folder that the user stands in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bundle.errors import EpisodeError
from episodes.layout import Schema
from episodes.reader import open_here
from episodes.storage import LINKS_SWITCH

_GRACE_S = 5  # in which a parent that lives ends it


def look_up(path: Path, schema: Schema | None) -> None:
    """Open an episode and have libhdf5 find all JPEG files in it, decoding none, or the first and last of raw frames.

    Raw frames lie where the index of their chunks says, which is walked through by opening; JPEG files lie in heaps.

    Raises:
        EpisodeError: see open_episode.
    """
    with open_here(path, schema=schema) as episode:
        for camera in episode.cameras:
            for index in range(len(episode)):
                with suppress(EpisodeError):  # a damaged frame is found by whoever reads it
                    if episode.jpeg(index, camera) is None and index in (0, len(episode) - 1):
                        episode.frame(index, camera)


def main() -> int:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent got it too, and decides
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        path, schema, links, cpu_s, patience_s = json.loads(line)
        os.environ[LINKS_SWITCH] = links
        # Both end a process in C code. The clock is the parent's to watch; if it is gone, nobody else ends this one.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.alarm(int(patience_s) + _GRACE_S)
        with suppress(Exception):  # as it would be there, where somebody reads what is raised
            look_up(Path(path), schema)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        os.write(answers, b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
