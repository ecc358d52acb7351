"""Writes the table of faults into docs/safety.md, with what a run of the tests saw; see scripts/fault_table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tests.runtime.test_faults
import tests.runtime.test_faults_of_processes
import tests.runtime.test_faults_of_the_service  # noqa: F401 - importing the tests registers their cases
from tests.runtime.faults import HEADER, Fault, table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "safety.md"


def main(results: Path) -> int:
    """Replace the table; everything else in the page stays."""

    def seen(case: Fault) -> str:
        path = results / f"{case.name}.json"
        seconds = json.loads(path.read_text()) if path.exists() else "not run"
        return "as promised" if seconds is None else seconds if isinstance(seconds, str) else f"{seconds:.2f} s"

    lines = DOCS.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {HEADER[0]} | {HEADER[1]}"))
    end = next((index for index in range(start, len(lines)) if not lines[index].startswith("|")), len(lines))
    lines[start:end] = table(seen)
    DOCS.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
