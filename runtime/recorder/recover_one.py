"""The child process of recover.py: finishes one recording, within limits of memory and time, and says what came of it.

python runtime/recorder/recover_one.py PATH prints why the file was left alone, or nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bundle.errors import JetvlaError
from episodes.recording_repair import BeingWrittenError, repair

_MEMORY_BYTES = 512 << 20  # of all addresses; the program itself has 30 MB of them
_CPU_S = 60
_SECONDS = 150
_LEAST_URGENT = 19


def main(arguments: list[str]) -> int:
    """Repair, or print why not."""
    (path,) = arguments
    os.nice(_LEAST_URGENT)  # a robot drives meanwhile
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(_SECONDS)  # a disk that does not answer, and a parent that is gone
    try:
        repair(Path(path))
    except BeingWrittenError:
        pass
    except JetvlaError as error:
        print(error.what if error.got is None else f"{error.what} ({error.got})")
    except MemoryError:
        print(f"{path} takes more than {_MEMORY_BYTES >> 20} MB of memory")
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror or error})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
