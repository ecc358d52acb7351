#!/usr/bin/env python3
"""Command line: checkpoint in, verified bundle out.

    python export/build_engines.py CKPT --out BUNDLE

Exit codes: 0 built or up to date, 1 failed, 2 usage, 3 parity failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from bundle.errors import JetvlaError, ParityError
from export.console import Reporter
from export.pipeline import STEPS, BuildConfig, build


def main() -> int:
    """Parse, build, print the bundle's path on stdout."""
    reporter = Reporter(STEPS)
    try:
        config = tyro.cli(BuildConfig, description=__doc__, args=_spell_out(sys.argv[1:]))
        bundle = build(config, reporter)
        if not config.dry_run:
            print(bundle)
    except JetvlaError as error:
        reporter.console.print(f"[bold red]error:[/] {error.__class__.__name__}", markup=True)
        reporter.console.print(str(error), markup=False, soft_wrap=True)
        return 3 if isinstance(error, ParityError) else 1
    except KeyboardInterrupt:
        reporter.console.print("interrupted; nothing was written.")
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
