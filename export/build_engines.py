#!/usr/bin/env python3
"""Command line: checkpoint in, verified bundle out, with TensorRT engines where TensorRT is.

    python export/build_engines.py CKPT --out BUNDLE
    python export/build_engines.py --engines-only BUNDLE      on the robot: engines from the bundle alone, without torch

Exit codes: 0 built or up to date, 1 failed, 2 usage, 3 parity failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console

from bundle.errors import JetvlaError, ParityError
from export.console import Reporter
from export.pipeline import BuildConfig, EnginesConfig, build, build_engines, steps


def main() -> int:
    """Parse, build, print the bundle's path on stdout."""
    console = Console(stderr=True, highlight=False)
    try:
        if any(argument.split("=")[0] == "--engines-only" for argument in sys.argv[1:]):
            engines = tyro.cli(EnginesConfig, description=__doc__)
            bundle, dry_run = build_engines(engines, Reporter(1)), engines.dry_run
        else:
            config = tyro.cli(BuildConfig, description=__doc__, args=_spell_out(sys.argv[1:]))
            bundle, dry_run = build(config, Reporter(steps(config))), config.dry_run
        if not dry_run:
            print(bundle)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}", markup=True)
        console.print(str(error), markup=False, soft_wrap=True)
        return 3 if isinstance(error, ParityError) else 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing was replaced, and finished engines are kept.")
        return 1
    return 0


def _spell_out(arguments: list[str]) -> list[str]:
    """Give --x-attn-causal, which is true, false or not stated, the flag forms that the other switches have."""
    spelled = []
    for index, argument in enumerate(arguments):
        if argument == "--no-x-attn-causal":
            spelled += ["--x-attn-causal", "False"]
        elif argument == "--x-attn-causal" and arguments[index + 1 : index + 2] not in (["True"], ["False"], ["None"]):
            spelled += ["--x-attn-causal", "True"]
        else:
            spelled.append(argument)
    return spelled


if __name__ == "__main__":
    sys.exit(main())
