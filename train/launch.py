"""From a config file to a finished run: preflight, preparation, ledger, training - and what is left behind when one of them fails.

One function for the command and for tests. Every process of a torchrun calls it; the first one shows, writes and keeps the ledger.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bundle.errors import ConfigError
from train.episode_set import TrainingEpisode
from train.ledger import BaseFacts, DataFile, Ledger, ParameterCounts, SplitFacts
from train.load_config import LoadedConfig, load_run_config
from train.memory import return_freed_memory
from train.preflight import Plan, preflight
from train.preflight_files import refuse, require_files
from train.preflight_view import render
from train.proofs import trained_groups
from train.run_config import RunConfig
from train.run_log import RunLog
from train.run_setup import Gathered, Setup, gather, prepare
from train.run_state import resumed_state
from train.split import SPLIT_NAME, save_split
from train.trainer import Outcome, Trainer

# For the first process, which hashes, resizes and encodes for all; torch's own ten minutes would end a run on many episodes. A process
# that dies is noticed by torchrun, not by this.
_LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True)
class Launch:
    """What became of a launch.

    Attributes:
        plan: the preflight's.
        folder: of the run.
        outcome: None for a dry run.
    """

    plan: Plan
    folder: Path
    outcome: Outcome | None


def launch(
    path: Path, overrides: Sequence[str] = (), *, resume: bool = False, dry_run: bool = False, console: Console
) -> Launch:
    """Train as the config says.

    Args:
        path: TOML, or a lab's RoboVLMs JSON.
        overrides: `key=value` pairs over the config.
        resume: go on with the run of that name.
        dry_run: check everything, show the plan, and stop.

    Raises:
        JetvlaError: what is wrong; the run's ledger says so too if it had begun.
    """
    loaded = load_run_config(path, overrides)
    accelerator = make_accelerator(loaded.config, planned=dry_run)
    first = accelerator.is_main_process
    shown = console if first else Console(quiet=True)
    bar = _bars(shown)
    going_on = None if dry_run and not resume else resume
    require_files(loaded, resume=going_on, weights=not dry_run)
    with accelerator.main_process_first():
        gathered = gather(loaded, bar)
    plan = preflight(
        loaded,
        gathered,
        resume=going_on,
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        strict=not dry_run,
    )
    if first:
        shown.print(render(plan))
    if dry_run:
        refuse(plan.problems, name=plan.name)
        return Launch(plan, gathered.folder, None)
    if resume:
        resumed_state(gathered.folder)  # before the long work: it says what is missing
    with accelerator.main_process_first():
        setup = prepare(gathered, accelerator.device, bar)
    if not first:
        return Launch(plan, gathered.folder, Trainer(setup, accelerator, log=None, ledger=None).run(resume=resume))
    _print_parameters(setup, shown)
    ledger, step = _open_ledger(loaded, gathered, setup, accelerator, resume=resume)
    try:
        with RunLog(gathered.folder, step=step, tensorboard=loaded.config.output.tensorboard, console=shown) as log:
            outcome = Trainer(setup, accelerator, log=log, ledger=ledger).run(resume=resume)
    except BaseException as error:
        ledger.fail(error)
        raise
    if outcome.status == "finished":
        ledger.finish()
    else:
        ledger.stop("asked to stop by a signal")
    return Launch(plan, gathered.folder, outcome)


def make_accelerator(config: RunConfig, *, planned: bool = False) -> Accelerator:
    """Devices, processes and precision of this run.

    Args:
        planned: nothing is trained here, so a precision that this machine cannot do is no error; train/preflight_checks.py warns of it.

    Raises:
        ConfigError: the machine cannot do the precision, or micro-batches cannot be dealt evenly.
    """
    gpu = torch.cuda.is_available()
    precision = config.loop.precision
    if precision == "fp16" and not gpu and planned:
        precision = "fp32"
    if precision == "fp16" and not gpu:
        raise ConfigError(
            "loop.precision fp16 needs a GPU",
            got="no CUDA device",
            expected="fp32 or bf16 on a CPU",
            hint="--set loop.precision=bf16",
        )
    names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    accelerator = Accelerator(
        mixed_precision=names[precision],
        cpu=not gpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
    if config.loop.accumulate % accelerator.num_processes:
        raise ConfigError(
            "loop.accumulate cannot be dealt evenly to the processes",
            got=f"{config.loop.accumulate} micro-batches for {accelerator.num_processes} processes",
            expected=f"a multiple of {accelerator.num_processes}",
            hint="it is the number of micro-batches of a step over all processes.",
        )
    if not gpu:
        return_freed_memory()
    set_seed(config.loop.seed % 2**32)  # nothing should draw from these generators; numpy's takes no other seeds
    return accelerator


def _open_ledger(
    loaded: LoadedConfig, gathered: Gathered, setup: Setup, accelerator: Accelerator, *, resume: bool
) -> tuple[Ledger, int]:
    """The run's ledger, and the steps that are done."""
    config, split = loaded.config, gathered.split
    groups = trained_groups(setup.policy)
    parts: tuple[tuple[Literal["train", "val"], tuple[TrainingEpisode, ...]], ...]
    parts = (("train", gathered.train), ("val", gathered.val))
    facts: dict[str, Any] = {
        "name": config.name,
        "config": config.as_dict(),
        "split": SplitFacts(sha256=split.sha256, train=len(split.train), val=len(split.val)),
        "data": [
            DataFile(path=str(each.path), sha256=each.sha256, frames=len(each), kind=each.kind, part=part)
            for part, episodes in parts
            for each in episodes
        ],
        "base": BaseFacts(
            path=str(gathered.base),
            sha256=gathered.base_sha256,
            weights=None if gathered.start.weights is None else str(gathered.start.weights),
            weights_sha256=gathered.start.weights_sha256,
            taken=gathered.start.story,
        ),
        "parameters": ParameterCounts(
            trainable=sum(group.values for group in groups), total=sum(p.numel() for p in setup.policy.parameters())
        ),
        "machine": {"device": _device(accelerator), "processes": accelerator.num_processes},
    }
    if resume:
        step = resumed_state(gathered.folder)[0].step
        ledger = Ledger.resume(gathered.folder, **facts, from_step=step)
    else:
        step, ledger = 0, Ledger.start(gathered.folder, **facts)
    if not (gathered.folder / SPLIT_NAME).exists():  # a kill may have come before it
        save_split(gathered.folder / SPLIT_NAME, split)
    return ledger, step


def _device(accelerator: Accelerator) -> str:
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _print_parameters(setup: Setup, console: Console) -> None:
    groups = trained_groups(setup.policy)
    total = sum(p.numel() for p in setup.policy.parameters())
    trainable = sum(group.values for group in groups)
    parts = ", ".join(f"{group.name} {group.values:,}" for group in groups)
    console.print(f"training {trainable:,} of {total:,} parameters: {parts}", soft_wrap=True)


def _bars(console: Console) -> Callable[[str, int], Any]:
    @contextmanager
    def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(label, total=total)
            yield lambda amount: progress.advance(task, amount)

    return bar
