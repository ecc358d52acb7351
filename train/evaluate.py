#!/usr/bin/env python3
"""Command line: judges a checkpoint or a bundle on recorded episodes, by the same numbers.

    python train/evaluate.py runs/first/checkpoints/last.safetensors "training/*.h5" --split runs/first/split.json
    python train/evaluate.py policy.bundle "training/*.h5" --split runs/first/split.json --swap-words

Exit codes: 0 ok, 1 failed, 2 usage, 3 below what --min-direction-accuracy or --max-rmse asks.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from bundle.errors import JetvlaError
from train.evaluation import Evaluation, episode_paths, evaluate, trained_on
from train.evaluation_view import check_plot, plot, render
from train.predictors import Stated, open_predictor

_WIDTH = 110  # of what is not a terminal


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a policy.

    Attributes:
        policy: a bundle, or a checkpoint of any kind that build_engines.py takes.
        episodes: files, folders or globs.
        split: a run's split.json; only its `part` is used.
        part: of the split.
        instruction: instead of the episodes' own.
        swap_words: judge again with left and right swapped in the words: a policy that does no worse does not listen.
        backend: of a bundle.
        stated: about a checkpoint that does not record it.
        plot: write a PNG of predicted and recorded commands.
        min_direction_accuracy, max_rmse: fail (exit code 3) if the accuracy is below, or the RMSE of an axis above.
        json: machine-readable result on stdout.
    """

    policy: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT|BUNDLE")]
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="EPISODES")]
    split: Path | None = None
    part: Literal["train", "val"] = "val"
    instruction: str | None = None
    swap_words: bool = False
    backend: str = "auto"
    stated: Annotated[Stated, tyro.conf.arg(name="")] = field(default_factory=Stated)
    plot: Path | None = None
    min_direction_accuracy: float | None = None
    max_rmse: float | None = None
    json: bool = False


def main() -> int:
    """Parse, evaluate, print."""
    config = tyro.cli(EvaluateConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        found = _evaluate(config, console)
        missed = _show(found, config, console)
        if config.plot is not None:
            plot(found, config.plot)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    return 3 if missed else 0


def _show(found: Evaluation, config: EvaluateConfig, console: Console) -> list[str]:
    missed = _missed(found, config)
    if config.json:
        print(json.dumps({**found.as_json(), "missed": missed}))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(render(found))
    for text in missed:
        console.print(f"[bold red]missed:[/] {text}")
    return missed


def _evaluate(config: EvaluateConfig, console: Console) -> Evaluation:
    if config.plot is not None:
        check_plot(config.plot)
    paths = episode_paths(config.episodes, split=config.split, part=config.part)
    known = None if config.split is not None else trained_on(config.policy, paths)
    if known is not None and known[0]:
        console.print(
            f"[yellow]warning:[/] {known[0]} of {len(paths)} episodes are what this policy was trained on: the numbers will look better "
            f"than it is; --split {escape(str(known[1]))} takes the others alone",
            soft_wrap=True,
        )
    predictor = open_predictor(config.policy, config.stated, backend=config.backend)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("playing episodes", total=len(paths) * (2 if config.swap_words else 1))
        return evaluate(
            predictor,
            paths,
            instruction=config.instruction,
            swap_words=config.swap_words,
            advance=lambda: progress.advance(task),
        )


def _missed(found: Evaluation, config: EvaluateConfig) -> list[str]:
    missed = []
    accuracy = found.measures.direction_accuracy.value
    if config.min_direction_accuracy is not None and math.isnan(accuracy):
        missed.append(
            f"there is no direction accuracy without linear_x or linear_y; the axes are {', '.join(found.axes)}"
        )
    elif config.min_direction_accuracy is not None and accuracy < config.min_direction_accuracy:
        missed.append(f"direction accuracy {accuracy:.3f} is below {config.min_direction_accuracy}")
    for axis, rmse in zip(found.axes, found.measures.rmse, strict=True):
        if config.max_rmse is not None and rmse.value > config.max_rmse:
            missed.append(f"RMSE of {axis} {rmse.value:.3f} is above {config.max_rmse}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
