#!/usr/bin/env python3
"""Command line: trains a policy from H5 episodes.

    python train/finetune.py run.toml --dry-run
    python train/finetune.py run.toml
    python train/finetune.py run.toml --resume
    torchrun --nproc-per-node 2 train/finetune.py run.toml --set loop.precision=bf16

CONFIG is TOML (docs/training.md), or a lab's RoboVLMs JSON. The run's folder holds its checkpoints and its ledger, run.json.

Exit codes: 0 ok, 1 failed or stopped before the end, 2 usage.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from bundle.errors import JetvlaError

if TYPE_CHECKING:
    from train.launch import Launch


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a policy.

    Attributes:
        config: TOML, or RoboVLMs JSON.
        set: settings over the config's, as key=value, for example loop.epochs=3. Repeatable.
        resume: go on with the run of that name, exactly where its state stands.
        dry_run: check everything that can be checked, print the plan, and stop.
        json: machine-readable result on stdout.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    resume: bool = False
    dry_run: bool = False
    json: bool = False


def main() -> int:
    """Parse, train, print."""
    options = tyro.cli(FinetuneConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        from train.launch import launch  # seconds of imports, in which Ctrl-C is no bug either

        done = launch(options.config, options.set, resume=options.resume, dry_run=options.dry_run, console=console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted at once; if the run had begun, --resume goes on from its last saved state.")
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        _print_result(done, options)
    return 0 if done.outcome is None or done.outcome.status == "finished" else 1


def _print_result(done: Launch, options: FinetuneConfig) -> None:
    outcome = done.outcome
    if options.json:
        result: dict[str, Any] = {"run": str(done.folder), "plan": done.plan.as_json()}
        if outcome is not None:
            result |= {
                "status": outcome.status,
                "best": None if outcome.best is None else str(outcome.best),
                "last": None if outcome.last is None else str(outcome.last),
                "metrics": None if outcome.validation is None else outcome.validation.metrics(),
            }
        print(json.dumps(result))
    elif outcome is not None:
        print(f"{outcome.status}\t{done.folder}")
        print(f"best\t{outcome.best}")
        print(f"last\t{outcome.last}")
        if outcome.status == "stopped":
            settings = [part for pair in options.set for part in ("--set", pair)]
            print(f"go on\tpython train/finetune.py {shlex.join([str(options.config), *settings])} --resume")
        else:
            print(f"next\tpython export/build_engines.py {shlex.quote(str(outcome.best))}")


if __name__ == "__main__":
    sys.exit(main())
