"""One optimizer step: forward and backward of its micro-batches on every process, one loss, one update.

The step's loss is a masked mean over all of its windows, so it does not matter how they are cut into micro-batches and dealt to
processes: denominators are those of the whole step, known from the targets alone. Dropout is seeded by step and process. A loss or
gradient that is not finite stops the run before the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bundle.errors import TrainingError
from train.batches import Batch
from train.inputs import InputSource, Targets
from train.losses import Counts, LossSpec, loss_counts, loss_terms, total_loss
from train.run_config import OptimizerConfig
from train.sampling import Window, shard

Step = tuple[tuple[Window, ...], ...]


@dataclass(frozen=True)
class StepResult:
    """What a step tells.

    Attributes:
        loss: of the whole step, over all processes.
        gradient_norm: before clipping.
        squared_error, elements: of the action for now, per recorded axis, physical units; None for class heads.
        stop: some process was asked to stop.
        skipped: fp16's scaler found an overflow and left the weights alone.
    """

    loss: float
    gradient_norm: float
    squared_error: np.ndarray | None
    elements: float
    stop: bool
    skipped: bool


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then constant or half a cosine down to min_lr_scale."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    rest = max(steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / rest, 1.0)
    scale = config.min_lr_scale + (1 - config.min_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * scale


class Stepper:
    """Makes steps.

    Args:
        accelerator: devices, processes and precision.
        forward: the prepared train.fast_forward.TrainingForward.
        optimizer: the prepared AdamW.
        source: the training data.
        spec: the loss.
        config: rates and clipping.
        seed: of dropout.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        forward: nn.Module,
        optimizer: Any,
        source: InputSource,
        spec: LossSpec,
        config: OptimizerConfig,
        seed: int,
    ) -> None:
        self._accelerator = accelerator
        self._forward = forward
        self._optimizer = optimizer
        self._source = source
        self._spec = spec
        self._config = config
        self._seed = seed
        self._parameters = [p for p in forward.parameters() if p.requires_grad]

    def step(self, step: Step, batches: Sequence[Batch], number: int, steps: int, *, stop: bool) -> StepResult:
        """Do optimizer step `number` of `steps`.

        Args:
            step: all micro-batches of the step, of all processes.
            batches: this process's share, prepared.
            stop: this process was asked to stop; every process learns of it.

        Raises:
            TrainingError: a loss or gradient is not finite; the weights are those of the step before.
        """
        accelerator = self._accelerator
        counts = self._counts(step)
        share = shard(step, accelerator.process_index, accelerator.num_processes)
        # Dropout differs between steps and processes, and is the same when a step is done again.
        torch.manual_seed(((self._seed * 1_000_003 + number) * 1024 + accelerator.process_index) % 2**63)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, number, steps)
        losses, errors = [], []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self._forward):
                predicted = self._forward(self._source.frames(batch))
                targets = self._source.targets(batch)
                terms = loss_terms(self._spec, predicted, targets.actions, targets.classes, targets.mask)
                # A process without windows left takes part with a batch that is masked whole: a loss of nothing.
                loss = total_loss(self._spec, terms, counts)
                # Gradients are averaged over processes, the loss is a sum over them.
                accelerator.backward(loss * accelerator.num_processes)
            losses.append(loss.detach())
            errors.append(self._squared_error(predicted.detach(), targets))
        mean, stopped, error, elements = self._exchange(losses, errors, stop)
        if not math.isfinite(mean):
            raise self._not_finite("loss", mean, number, share, losses)
        norm = self._clip()
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise self._not_finite("gradient", norm, number, share, [])
        self._optimizer.step()
        self._optimizer.zero_grad()
        skipped = bool(getattr(self._optimizer, "step_was_skipped", False))
        if skipped and accelerator.scaler is not None and accelerator.scaler.get_scale() < 1:
            # The scaler has halved its scale at every step for long enough: it is not the scale that overflows.
            raise self._not_finite("gradient", norm, number, share, [])
        return StepResult(mean, norm, error, elements, stopped, skipped)

    def _counts(self, step: Step) -> Counts:
        total = Counts(0.0, 0.0)
        for windows in step:
            batch = self._source.batch(windows, frames=False)
            total += loss_counts(self._spec, batch.mask, batch.classes, self._source.columns)
        return total

    def _squared_error(self, predicted: Tensor, targets: Targets) -> Tensor:
        """Squared errors of the action for now, summed per axis, and their number last: [a + 1]; empty for classes."""
        if self._spec.kind == "classes":
            return predicted.new_zeros(1)
        axes = targets.physical.shape[-1]
        minimum, maximum = self._source.action_range
        physical = (predicted[:, :, 0, :axes] + 1) / 2 * (maximum - minimum) + minimum
        mask = targets.mask[:, :, 0]
        squares = (physical - targets.physical[:, :, 0]).square() * mask.unsqueeze(-1)
        return torch.cat([squares.sum(dim=(0, 1)), mask.sum().reshape(1)])

    def _exchange(
        self, losses: list[Tensor], errors: list[Tensor], stop: bool
    ) -> tuple[float, bool, np.ndarray | None, float]:
        """Sums over processes, in one exchange."""
        device = self._accelerator.device
        axes = 0 if self._spec.kind == "classes" else len(self._source.data.actions)
        error = torch.stack(errors).sum(dim=0)
        own = torch.cat([torch.stack(losses).sum().reshape(1), torch.tensor([float(stop)], device=device), error])
        values = self._accelerator.reduce(own.double(), "sum").tolist()
        return values[0], values[1] > 0, np.array(values[2:-1]) if axes else None, values[-1]

    def _clip(self) -> float:
        limit = self._config.clip_norm or math.inf
        return float(self._accelerator.clip_grad_norm_(self._parameters, limit))

    def _not_finite(
        self, what: str, value: float, number: int, share: Sequence[Sequence[Window]], losses: list[Tensor]
    ) -> TrainingError:
        bad = [index for index, loss in enumerate(losses) if not torch.isfinite(loss)] or range(len(share))
        named = [
            f"{self._source.episodes[window.view.episode].name} from frame {window.start}"
            for index in bad
            for window in share[index]
        ]
        return TrainingError(
            f"the {what} is not finite at step {number + 1}",
            got=f"{value} on {'; '.join(named) or 'another process'}",
            expected="a finite number",
            hint="the last checkpoint is good. Lower optimizer.learning_rate, lengthen warmup_steps, set optimizer.clip_norm = 1, or look "
            "at the named episodes with episodes/doctor.py.",
        )
