"""The child process of episodes/isolation.py: examines one episode and prints the findings as one line of JSON.

python episodes/examine_one.py SECONDS PATH, by its path and not as a module: `-m` would import from the folder that the user stands in.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from episodes.examination import examine


def main(arguments: list[str]) -> int:
    """Examine and print."""
    seconds, path = arguments
    # If the parent is gone, nobody else ends a process that hangs.
    signal.alarm(int(float(seconds)) + 5)
    print(json.dumps(examine(Path(path)).as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
