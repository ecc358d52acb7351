#!/usr/bin/env python3
"""Command line: did smoothing change a bundle's floating-point policy by more than rounding?

    python calib/check_folding.py BUNDLE

Needs the INT8 variant that calib/quantize.py has added, no recordings. Reads the bundle and writes nothing. Exit codes: 0 rounding only,
1 failed, 2 usage, 3 more than rounding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import tyro
from rich.console import Console
from rich.table import Table

from bundle.errors import ConfigError, JetvlaError


@dataclass(frozen=True)
class FoldingConfig:
    """Check what smoothing folded.

    Attributes:
        bundle: directory with an INT8 variant.
        threads: CPU threads; 0 takes all.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    threads: int = 0
    json: bool = False


def main() -> int:
    """Parse, check, print."""
    console = Console(stderr=True, highlight=False)
    try:
        from calib.folding import check_folding
        from export.console import Reporter

        config = tyro.cli(FoldingConfig, description=__doc__)
        with Reporter(1).count_bar("both graphs of two stages, and the integers of three", 7) as advance:
            found = list(check_folding(config.bundle, threads=config.threads, advance=advance))
    except ImportError as error:
        console.print(f"[bold red]error:[/] {error}\n\nhint: pip install 'jetvla\\[calib]'", soft_wrap=True)
        return 1
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written.")
        return 1
    passed = all(each.passed for each in found)
    table = Table("stage", "LayerNorms", "factors", "relative error (limit)", "integers", box=None)
    for each in found:
        table.add_row(
            each.stage,
            str(each.norms),
            f"{each.smallest:.3g} to {each.largest:.3g}",
            f"{each.difference:.1e} ({each.limit:g})",
            f"within {each.off:.3f} steps",
        )
    for line in (line for each in found for line in each.misread):
        console.print(f"reads other parameters than the variant's: {line}", markup=False)
    console.print(table)
    console.print("PASS" if passed else "FAIL: smoothing changed more than rounding")
    if config.json:
        print(msgspec.json.encode({"passed": passed, "stages": found}).decode())  # what is not a number becomes null
    return 0 if passed else 3


if __name__ == "__main__":
    sys.exit(main())
