#!/usr/bin/env python3
"""The training table of docs/performance.md: iterations per second against a straightforward RoboVLMs-style step.

    python bench/training_speed.py --size small

Both sides train the same parameters on the same windows with the same loss, on the same machine and interleaved A B A B. The
straightforward side does what RoboVLMs' trainer does: every window's frames through the full model on their own, eager attention with a
mask, language-model head included. Ours is train/fast_forward.py with the step of train/optimization.py. Losses are compared in every
round; dropout is off, because the two sides draw different numbers. Ratios first: machines are shared.

`shuffled` draws each window from another episode, `together` takes neighbouring windows of one episode (windows_per_episode), which
share frames. `cached` keeps image tokens, which needs adapters on the text model only.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from episodes.synthetic import write_synthetic
from train.batches import Batch
from train.fast_forward import TrainingForward, pixels_of
from train.inputs import InputSource
from train.load_config import load_run_config
from train.losses import LossSpec, loss_counts, loss_terms, total_loss
from train.optimization import Stepper
from train.policy import KosmosPolicy
from train.run_config import OptimizerConfig
from train.run_setup import Setup, gather, prepare
from train.sampling import View, Window
from train.synthetic import SyntheticOptions, make_checkpoint
from train.synthetic_layout import Size, dimensions

_EPISODES = 16
_LENGTH = 18
_LIMIT = 1e-4


@dataclass(frozen=True)
class TrainingSpeedConfig:
    """Measure training steps.

    Attributes:
        size: of the policy.
        windows: per step; window 8, chunk 10.
        rounds: timed pairs per row.
        warmup: untimed pairs before.
        json: machine-readable result on stdout.
    """

    size: Size = "small"
    windows: int = 8
    rounds: int = 5
    warmup: int = 1
    json: bool = False


@dataclass(frozen=True)
class Row:
    """One comparison; seconds are medians, the ratio is the median of pairs."""

    adapters: str
    windows: str
    cached: bool
    frames: int
    straightforward_s: float
    ours_s: float
    ratio: float
    loss_difference: float


def main() -> int:
    """Measure, print; 3 if a loss differs."""
    config = tyro.cli(TrainingSpeedConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(Path(folder), config)
        rows = [
            _measure(Path(folder), config, adapters=adapters, together=together, console=console)
            for adapters in ("all", "text")
            for together in (False, True)
        ]
    if config.json:
        print(json.dumps([row.__dict__ for row in rows]))
    else:
        _print(rows, config)
    return 0 if all(row.loss_difference <= _LIMIT for row in rows) else 3


def _write_inputs(folder: Path, config: TrainingSpeedConfig) -> None:
    make_checkpoint(folder, SyntheticOptions(size=config.size, layout="fork", head="velocities"))
    (folder / "episodes").mkdir()
    for seed in range(_EPISODES):
        side: Any = "left" if seed % 2 else "right"
        write_synthetic(folder / "episodes", "v1", side=side, seed=seed, height=240, width=320, length=_LENGTH)


def _measure(folder: Path, config: TrainingSpeedConfig, *, adapters: str, together: bool, console: Console) -> Row:
    setup = _setup(folder, config, adapters)
    windows = _windows(config.windows, together=together)
    batch = setup.train.batch(windows)
    straightforward = _Straightforward(copy.deepcopy(setup.policy), setup.train, setup.loss)
    ours = _ours(setup, windows)
    times: dict[str, list[float]] = {"straightforward": [], "ours": []}
    difference = 0.0
    label = f"{adapters}, {'together' if together else 'shuffled'}"
    for round_ in track(range(config.warmup + config.rounds), label, console=console, transient=True):
        first, seconds = _timed(lambda: straightforward.step(windows))
        second, other = _timed(ours)
        difference = max(difference, abs(first - second))
        if round_ >= config.warmup:
            times["straightforward"].append(seconds)
            times["ours"].append(other)
    ratios = [a / b for a, b in zip(times["straightforward"], times["ours"], strict=True)]
    return Row(
        adapters=adapters,
        windows="together" if together else "shuffled",
        cached=setup.train.tokens is not None,
        frames=len(batch.view_of),
        straightforward_s=statistics.median(times["straightforward"]),
        ours_s=statistics.median(times["ours"]),
        ratio=statistics.median(ratios),
        loss_difference=difference,
    )


def _setup(folder: Path, config: TrainingSpeedConfig, adapters: str) -> Setup:
    sizes = dimensions(config.size)
    hidden = {"tiny": 40, "small": 128, "full": 512}[config.size]
    path = folder / f"{adapters}.json"
    lora = {"targets": adapters, "r": sizes.lora_r, "alpha": float(sizes.lora_alpha), "dropout": 0.0}
    values = {
        "name": f"speed-{adapters}",
        "base": {"model": "base"},
        "data": {"sources": [{"files": ["episodes/*.h5"]}]},
        "model": {"hidden": hidden, "dropout": 0.0, "lora": lora},
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    setup = prepare(gather(load_run_config(path)), torch.device("cpu"))
    _stir(setup.policy)
    return setup


def _stir(policy: KosmosPolicy) -> None:
    """Give everything that trains values of a trained policy's size: as initialised, adapters are zero and pictures hardly reach the loss,
    so that equal losses would say nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def _windows(count: int, *, together: bool) -> tuple[Window, ...]:
    """Windows of one step: neighbours of one episode, or one of each of several."""
    starts = range(_LENGTH - 8 + 1)
    if together:
        return tuple(Window(View(0, False, None), starts[index % len(starts)]) for index in range(count))
    episodes = _EPISODES // 2  # more of them train, whatever the split
    return tuple(
        Window(View(index % episodes, False, None), starts[(index * 5) % len(starts)]) for index in range(count)
    )


class _Straightforward:
    """A training step as RoboVLMs does it."""

    def __init__(self, policy: KosmosPolicy, source: InputSource, loss: LossSpec) -> None:
        self._policy = policy
        self._source = source
        self._loss = loss
        self._optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-12)

    def step(self, windows: tuple[Window, ...]) -> float:
        """Frames from the store to updated weights; returns the loss."""
        policy, source = self._policy, self._source
        batch = source.batch(windows, frames=False)
        frames = [
            np.asarray(source.store.frames(source.episodes[w.view.episode])[w.start : w.start + 8]) for w in windows
        ]
        pixels = pixels_of(np.concatenate(frames), source.data.pixel_norm, torch.device("cpu"))
        prompts = [source.prompts[source.episodes[window.view.episode].instruction] for window in windows]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
        ids, mask = ids.repeat_interleave(8, dim=0), mask.repeat_interleave(8, dim=0)
        embeds, attention = policy.rows(policy.image_tokens(pixels), ids, mask)
        text: Any = policy.backbone.text_model.model
        hidden = text(inputs_embeds=embeds, attention_mask=attention, use_cache=False).last_hidden_state
        logits = hidden @ text.embed_tokens.weight.T  # the model computes them whether or not anybody asks
        features = policy.act_head.reduce(hidden[:, policy.action_slots(ids.shape[1], 1)])
        predicted = policy.act_head(features.unflatten(0, (len(windows), 8)))
        targets = source.targets(batch)
        counts = loss_counts(self._loss, batch.mask, batch.classes, source.columns)
        terms = loss_terms(self._loss, predicted, targets.actions, targets.classes, targets.mask)
        loss = total_loss(self._loss, terms, counts)
        loss.backward()
        del logits
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def _ours(setup: Setup, windows: tuple[Window, ...]) -> Callable[[], float]:
    accelerator = Accelerator(cpu=True)
    forward = TrainingForward(setup.policy)
    optimizer = torch.optim.AdamW([p for p in forward.parameters() if p.requires_grad], lr=1e-12)
    prepared: tuple[nn.Module, Any] = accelerator.prepare(forward, optimizer)
    # Nothing moves, so that both sides stay at the same weights.
    settings = OptimizerConfig(learning_rate=1e-12, schedule="constant", clip_norm=0.0)
    stepper = Stepper(accelerator, prepared[0], prepared[1], setup.train, setup.loss, settings, seed=0)

    def step() -> float:
        batch: Batch = setup.train.batch(windows)
        return stepper.step((windows,), [batch], 0, 1, stop=False).loss

    return step


def _timed(function: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def _print(rows: list[Row], config: TrainingSpeedConfig) -> None:
    table = Table(box=None, pad_edge=False)
    for name in (
        "adapters",
        "windows",
        "image tokens",
        "frames",
        "straightforward",
        "ours",
        "ratio",
        "loss differs by",
    ):
        table.add_column(name, justify="left" if name in ("adapters", "windows", "image tokens") else "right")
    for row in rows:
        table.add_row(
            row.adapters,
            row.windows,
            "cached" if row.cached else "computed",
            f"{config.windows * 8} -> {row.frames}",
            f"{1 / row.straightforward_s:.3f} it/s",
            f"{1 / row.ours_s:.3f} it/s",
            f"{row.ratio:.2f}x",
            f"{row.loss_difference:.1e}",
        )
    console = Console(highlight=False, width=120)
    console.print(table)
    console.print(
        f"size {config.size}, {config.windows} windows a step, torch {torch.__version__}, {os.cpu_count()} CPUs"
    )


if __name__ == "__main__":
    sys.exit(main())
