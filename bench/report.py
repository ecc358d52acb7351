#!/usr/bin/env python3
"""Command line: draws a latency result as one HTML file that needs nothing else.

    python bench/report.py latency.json
    python bench/report.py latency.json --out report.html

bench/latency.py writes this page by itself; from latency.json it can be drawn again, with pictures where matplotlib is installed.
Exit codes: 0 written, 1 failed, 2 usage, or no result.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console

from bench.report_writer import write_report
from bench.results import read_result
from bundle.atomic import make_folder
from bundle.errors import ConfigError, JetvlaError


@dataclass(frozen=True)
class ReportConfig:
    """Draw a latency result.

    Attributes:
        result: latency.json.
        out: the page; by default report.html beside the result.
    """

    result: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="latency.json")]
    out: Path | None = None


def main() -> int:
    """Parse, draw, say where."""
    config = tyro.cli(ReportConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    out = config.out or config.result.with_name("report.html")
    try:
        result = read_result(config.result)
        make_folder(out.parent)
        with console.status("drawing"):
            write_report(result, out)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
