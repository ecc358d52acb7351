"""The process of one baseline: builds the model, then computes once for each line that it reads; see bench/baselines.py.

A program, not a module to import. Speaks JSON lines on what was stdout when it started; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_PACKAGES = {"torch", "transformers", "onnx", "onnxruntime", "peft"}


def main() -> int:
    """Answer `{"ready": true}`, then `{"ms": ...}` for every line; or `{"skip": reason}`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    task = json.loads(sys.argv[1])
    try:
        from bench.torch_baselines import NotHereError, decision

        run = decision(task)
        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _PACKAGES:
            raise
        say(skip=f"{error.name} is not installed: pip install 'jetvla[export]'")
        return 0
    except NotHereError as reason:
        say(skip=str(reason))
        return 0
    except MemoryError:
        say(skip="not enough memory")
        return 0
    say(ready=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        say(ms=(time.perf_counter() - start) * 1e3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
