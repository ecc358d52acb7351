"""A training run from its first step to its last, or from where it stopped: epochs, validation, checkpoints, ledger.

Accelerate moves tensors, wraps for several processes, scales losses and sums over processes; what is ours is the order of things. After
any kill the run goes on exactly: order, augmentation and dropout are functions of (seed, epoch, step), and the state on disk is only ever
replaced whole. At the end of an epoch comes validation, then the checkpoint, then the ledger, then the state, and only then are checkpoints
deleted that are no longer among the best: whatever a kill leaves undone of these is done again, with the same numbers, and what the state
names is always there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor

from bundle.atomic import disk_errors, write_bytes
from bundle.errors import TrainingError
from train.fast_forward import TrainingForward, check_forward, pixels_of
from train.keys import canonical
from train.ledger import Ledger
from train.ledger_record import CheckpointKind
from train.memory import explain_out_of_memory, is_out_of_memory
from train.optimization import Stepper, StepResult, learning_rate
from train.proofs import check_frozen, frozen_sha256
from train.run_checkpoints import save_lightning, save_policy, trained_state
from train.run_log import RunLog
from train.run_setup import Setup
from train.run_state import STATE_NAME, RunState, resumed_state, save_state
from train.sampling import Step, epoch_plan, shard
from train.trainable import training_mode
from train.validation import Validation, Validator

CHECKPOINTS = "checkpoints"
LAST_NAME = "last.safetensors"
_PROBE_NAME = "probe.safetensors"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: finished, or stopped (by a signal, or `stop_after`); it can be resumed then.
        best: the checkpoint with the lowest validation loss, if there was a validation.
        last: the newest checkpoint.
        validation: of the last epoch in this sitting.
    """

    status: str
    best: Path | None
    last: Path | None
    validation: Validation | None


class Trainer:
    """Runs a prepared run; see `run`.

    Args:
        setup: data, policy and settings.
        accelerator: of this process.
        log: of the first process; None in the others.
        ledger: of the first process; None in the others.
    """

    def __init__(self, setup: Setup, accelerator: Accelerator, *, log: RunLog | None, ledger: Ledger | None) -> None:
        self._setup = setup
        self._config = setup.config
        self._accelerator = accelerator
        self._log = log
        self._ledger = ledger
        self._folder = setup.folder
        self._frozen = frozen_sha256(setup.policy)
        self._module = TrainingForward(setup.policy, gradient_checkpointing=self._config.model.gradient_checkpointing)
        self._module.to(accelerator.device)
        self._check_forward()
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        settings = self._config.optimizer
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self._forward, self._optimizer = accelerator.prepare(self._module, optimizer)
        self._rates = settings.resolved(setup.steps_per_epoch)
        self._state = RunState()
        self._asked = False  # by a signal to this process
        self._stop = False  # agreed on by all processes
        self._validation: Validation | None = None
        self._last_saved = time.monotonic()

    def run(self, *, resume: bool) -> Outcome:
        """Train until the last step, early stopping, or a signal.

        Raises:
            TrainingError: the loss is not finite, memory does not suffice, words do not reach the action, or a frozen parameter changed.
            StorageError: the disk is full; the checkpoints and the state are those of before.
            CheckpointError: `resume`, and the state is missing or damaged.
        """
        try:
            with self._signals():
                if resume:
                    self._load()
                self._validator = self._make_validator()
                if self._state.step == 0:
                    self._before()
                while not self._state.finished and not self._stop:
                    self._epoch()
                self._delete_surpassed()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise explain_out_of_memory(error, self._config) from error
            raise
        check_frozen(self._setup.policy, self._frozen)
        return self._outcome()

    def _epoch(self) -> None:
        state, config, setup = self._state, self._config, self._setup
        lengths = [len(episode) for episode in setup.train.episodes]
        words = [episode.words for episode in setup.train.episodes]
        plan = epoch_plan(
            lengths, config.loop, config.augment, window=config.data.window, epoch=state.epoch, words=words
        )
        if self._log is not None:
            self._log.epoch(state.epoch, config.loop.epochs, steps=len(plan), done=state.done)
        training_mode(setup.policy)
        stepper = Stepper(
            self._accelerator,
            self._forward,
            self._optimizer,
            setup.train,
            setup.loss,
            self._rates,
            config.loop.seed,
        )
        for step, batches in self._prepared(plan[state.done :]):
            started = time.monotonic()
            result = stepper.step(step, batches, state.step, setup.steps, stop=self._asked)
            state.seconds += time.monotonic() - started
            state.loss_sum += result.loss
            state.done += 1
            state.step += 1
            self._report(result)
            self._stop = result.stop
            if result.stop or self._is_last_step():
                break
            if time.monotonic() - self._last_saved > 60 * config.loop.save_minutes:
                self._save_state()
        if self._stop and state.done < len(plan) and not self._is_last_step():
            self._pause()
        else:
            self._end_epoch()

    def _before(self) -> None:
        """Validate the untrained policy: what every later number is to be compared with. The ledger calls it epoch 0."""
        found = self._validate()
        if self._ledger is not None:
            self._ledger.epoch(0, 0, 0.0, found.metrics())
            self._print_validation("before training", found)

    def _prepared(self, steps: list[Step]) -> Iterator[tuple[Step, list[Any]]]:
        """Each step with this process's batches, prepared ahead."""
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        shares = [shard(step, rank, world) for step in steps]
        stream = iter(
            self._setup.train.stream([micro for share in shares for micro in share], workers=self._config.loop.workers)
        )
        for step, share in zip(steps, shares, strict=True):
            yield step, [next(stream) for _ in share]

    def _end_epoch(self) -> None:
        state, config = self._state, self._config
        validation = self._validate()
        self._validation = validation
        mean = state.loss_sum / max(state.done, 1)
        metrics = {"train_loss": mean, **validation.metrics()}
        state.stale = state.stale + 1 if state.best and validation.loss >= state.best[0][0] else 0
        name = f"epoch={state.epoch + 1:03d}-step={state.step:07d}.safetensors"
        patience = config.loop.patience
        ended = state.epoch + 1 == config.loop.epochs or self._is_last_step() or 0 < patience <= state.stale
        self._keep(name, validation.loss)
        if self._ledger is not None and self._log is not None:
            self._ledger.epoch(state.epoch + 1, state.step, state.seconds, metrics)
            self._log.scalars(state.step, {name.replace("_", "/", 1): value for name, value in metrics.items()})
            self._print_validation(f"epoch {state.epoch + 1}: loss {mean:.4f},", validation)
        if ended and config.output.lightning:
            self._save_lightning()
        state.epoch, state.done, state.seconds, state.loss_sum, state.finished = state.epoch + 1, 0, 0.0, 0.0, ended
        self._save_state()
        self._delete_surpassed()

    def _keep(self, name: str, loss: float) -> None:
        """Write the epoch's checkpoint: always as the last, and among the best if it is one."""
        state, folder = self._state, self._folder / CHECKPOINTS
        ranked = sorted([(kept, old) for kept, old in state.best if old != name] + [(loss, name)])
        state.best = ranked[: self._config.loop.keep_best]
        if self._ledger is None:
            return
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        files: list[tuple[CheckpointKind, str]] = [("last", LAST_NAME)]
        if (loss, name) in state.best:
            files.append(("best", name))
        for kind, file in files:
            save_policy(folder / file, self._setup.policy, self._setup.checkpoint_config, self._setup.facts)
            self._ledger.checkpoint(folder / file, kind=kind, epoch=state.epoch + 1, step=state.step, val_loss=loss)

    def _delete_surpassed(self) -> None:
        """Delete what is no longer among the best. Not before the state says so: an epoch that is done again on a GPU may end otherwise."""
        if self._ledger is None:
            return
        kept = {f"{CHECKPOINTS}/{name}" for _, name in self._state.best}
        for entry in self._ledger.record.checkpoints:
            path = self._folder / entry.file
            if entry.kind == "best" and entry.file not in kept and path.exists():
                # In this order: a ledger that names a missing file would be a lie, a file that it no longer names is not.
                if not entry.removed:
                    self._ledger.removed(path)
                path.unlink()

    def _pause(self) -> None:
        """Stopped within an epoch: the state to go on from, and a checkpoint to look at."""
        self._save_state()
        if self._ledger is not None:
            path = self._folder / CHECKPOINTS / LAST_NAME
            with disk_errors(path):
                path.parent.mkdir(exist_ok=True)
            save_policy(path, self._setup.policy, self._setup.checkpoint_config, self._setup.facts)
            self._ledger.checkpoint(
                path, kind="last", epoch=self._state.epoch + 1, step=self._state.step, val_loss=None
            )

    def _save_lightning(self) -> None:
        """The policy as it is at the end, in RoboVLMs' layout."""
        if self._ledger is None:
            return
        path = self._folder / CHECKPOINTS / "last.ckpt"
        state, setup = self._state, self._setup
        save_lightning(path, setup.policy, setup.checkpoint_config, epoch=state.epoch, step=state.step)
        assert self._validation is not None
        self._ledger.checkpoint(
            path, kind="lightning", epoch=state.epoch + 1, step=state.step, val_loss=self._validation.loss
        )

    def _save_state(self) -> None:
        """By the first process alone. No process waits for it: each looks at a clock of its own, so they would wait at different steps."""
        self._last_saved = time.monotonic()
        if self._accelerator.is_main_process:
            scaler = self._accelerator.scaler
            save_state(
                self._folder / STATE_NAME,
                self._state,
                trained=trained_state(self._setup.policy),
                optimizer=self._optimizer.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
            )

    def _load(self) -> None:
        self._state, records = resumed_state(self._folder)
        if records is None:
            return
        own = {canonical(name): p for name, p in self._setup.policy.named_parameters() if p.requires_grad}
        stored: dict[str, Tensor] = records["trained"]
        if {name: tensor.shape for name, tensor in stored.items()} != {name: p.shape for name, p in own.items()}:
            raise TrainingError(
                "the state of the run is of another policy",
                got=f"{len(stored)} trained tensors",
                expected=f"the {len(own)} that this config trains",
                hint="resume with the config that the run was started with.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
        self._optimizer.load_state_dict(records["optimizer"])
        if self._accelerator.scaler is not None and records["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(records["scaler"])

    def _make_validator(self) -> Validator:
        path = self._folder / _PROBE_NAME
        initial = load_file(path) if self._state.step > 0 and path.exists() else None
        validator = Validator(self._accelerator, self._module, self._setup.val, self._setup.loss, initial)
        if initial is None and self._accelerator.is_main_process:
            write_bytes(path, save({name: tensor.contiguous() for name, tensor in validator.initial.items()}))
        return validator

    def _validate(self) -> Validation:
        episodes = len(self._setup.val.episodes)
        if self._log is None:
            return self._validator.run()
        with self._log.bar("validation", -(-episodes // self._accelerator.num_processes)) as advance:
            return self._validator.run(lambda: advance(1))

    def _check_forward(self) -> None:
        source = self._setup.train
        frame = np.asarray(source.store.frames(source.episodes[0])[:1])
        pixels = pixels_of(frame, source.data.pixel_norm, self._accelerator.device)
        check_forward(self._module, pixels, next(iter(source.prompts.values())).to(self._accelerator.device))

    def _report(self, result: StepResult) -> None:
        if self._log is None:
            return
        rmse: dict[str, float] = {}
        if result.squared_error is not None and result.elements > 0:
            errors = np.sqrt(result.squared_error / result.elements)
            rmse = dict(zip(self._config.data.actions, map(float, errors), strict=True))
        rate = learning_rate(self._rates, self._state.step - 1, self._setup.steps)
        self._log.step(
            self._state.step,
            epoch=self._state.epoch,
            loss=result.loss,
            learning_rate=rate,
            norm=result.gradient_norm,
            rmse=rmse,
        )

    def _print_validation(self, label: str, found: Validation) -> None:
        assert self._log is not None
        self._log.console.print(f"{label} {found.line()}", soft_wrap=True)

    def _is_last_step(self) -> bool:
        return 0 < self._config.loop.max_steps <= self._state.step

    def _outcome(self) -> Outcome:
        folder = self._folder / CHECKPOINTS
        best = folder / self._state.best[0][1] if self._state.best else None
        last = folder / LAST_NAME
        status = "finished" if self._state.finished else "stopped"
        return Outcome(status, best, last if last.exists() else None, self._validation)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask to stop after the running step; a second Ctrl-C interrupts at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
