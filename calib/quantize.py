#!/usr/bin/env python3
"""Command line: bundle and recordings in, the bundle with an INT8 variant out.

    python calib/quantize.py BUNDLE EPISODES
    python calib/quantize.py BUNDLE EPISODES --max-action-error 0.02 --keep-float action_head

Exit codes: 0 ok, 1 failed, 2 usage, 3 no INT8 variant does the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import tyro
from rich.console import Console

from bundle.errors import CalibrationError, ConfigError, JetvlaError
from bundle.manifest import Manifest


def main() -> int:
    """Parse, quantize, print."""
    console = Console(stderr=True, highlight=False)
    try:
        from calib.config import QuantizeConfig
        from calib.pipeline import STEPS, quantize
        from export.console import Reporter

        config = tyro.cli(QuantizeConfig, description=__doc__)
        bundle = quantize(config, Reporter(STEPS))
    except ImportError as error:
        console.print(f"[bold red]error:[/] {error}\n\nhint: pip install 'jetvla\\[calib]'", soft_wrap=True)
        return 1
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 3 if isinstance(error, CalibrationError) else 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was.")
        return 1
    quantized = Manifest.load(bundle).quantized
    if config.dry_run:
        if config.json:
            print(json.dumps({"bundle": str(bundle), "dry_run": True}))
    elif config.json:
        found = None if quantized is None else msgspec.to_builtins(quantized)
        print(json.dumps({"bundle": str(bundle), "quantized": found}))
    else:
        print(bundle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
