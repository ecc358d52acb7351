"""What a run measures at every validation, and the proofs that training is what it says.

Loss as in training, over every window of the validation episodes; errors of the action for now as the robot will see it (history grows
from one frame to W); direction accuracy; left/right confusion; instruction sensitivity (does the action change when the words do?); and
feature drift (how far have features of probe frames moved since step 0?). Episodes are dealt to processes and the results gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bundle.errors import TrainingError
from train.augmentation import other_words
from train.fast_forward import FrameBatch, TrainingForward
from train.inputs import InputSource, as_recorded
from train.losses import Counts, LossSpec, loss_counts, loss_terms, total_loss
from train.metrics import has_directions, left_right_confusion
from train.sampling import Window
from train.windows import window_starts

_FRAMES_AT_ONCE = 16
_PROBES = 4  # episodes that are encoded a second time with other words


@dataclass(frozen=True)
class Validation:
    """The outcome.

    Attributes:
        loss: masked mean over all windows.
        rmse: per recorded axis, physical units; empty for class heads.
        direction_accuracy: share of frames with the right class, or one of nine directions; not a number without a linear axis.
        majority: the share that always naming the commonest direction would have; not a number without a linear axis.
        left_right: int64 [3, 3], recorded (left, none, right) by predicted; None where nothing moves sideways.
        sensitivity: mean absolute change of the action for now (head's units) when the instruction's words change; not a number where no
            prompt has words to change.
        sensitivity_largest: the largest such change; zero means that words do not reach the action at all.
        drift: mean cosine distance of probe features to those of step 0.
    """

    loss: float
    rmse: dict[str, float]
    direction_accuracy: float
    majority: float
    left_right: NDArray[np.int64] | None
    sensitivity: float
    sensitivity_largest: float
    drift: float

    def metrics(self) -> dict[str, float]:
        """Flat numbers for ledgers and plots."""
        named = {f"val_rmse_{axis}": value for axis, value in self.rmse.items()}
        if not math.isnan(self.majority):
            named |= {"val_direction_accuracy": self.direction_accuracy, "val_majority_accuracy": self.majority}
        return {
            "val_loss": self.loss,
            **named,
            "instruction_sensitivity": self.sensitivity,
            "feature_drift": self.drift,
        }

    def line(self) -> str:
        """The same for people."""
        errors = " ".join(f"{axis} {value:.3f}" for axis, value in self.rmse.items())
        sides = ""
        if self.left_right is not None:
            wrong = int(self.left_right[0, 2] + self.left_right[2, 0])
            sides = f"  left/right swapped {wrong} of {int(self.left_right[[0, 2]].sum())}"
        return (
            f"validation loss {self.loss:.4f}"
            + (f"  RMSE {errors}" if errors else "")
            + (
                ""
                if math.isnan(self.majority)
                else f"  direction {self.direction_accuracy:.0%} (majority {self.majority:.0%})"
            )
            + sides
            + f"  instruction sensitivity {self.sensitivity:.2g}  feature drift {self.drift:.2g}"
        )


@dataclass
class _Share:
    """What one process found."""

    numerators: dict[str, float] = field(default_factory=dict)
    counts: Counts = field(default_factory=lambda: Counts(0.0, 0.0))
    predicted: list[NDArray[np.float32]] = field(default_factory=list)
    recorded: list[NDArray[np.float32]] = field(default_factory=list)
    classes: list[NDArray[np.int64]] = field(default_factory=list)
    named: list[NDArray[np.int64]] = field(default_factory=list)
    changes: list[NDArray[np.float32]] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)


class Validator:
    """Measures a policy on the validation episodes; make it before the first step, for the probe features.

    Args:
        accelerator: for precision, and to deal episodes to processes.
        forward: the bare module, not its data-parallel wrapper.
        source: the validation data, without augmentation.
        spec: the loss.
        initial: probe features of step 0 by episode, of an earlier sitting of the run; None computes them now.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        forward: TrainingForward,
        source: InputSource,
        spec: LossSpec,
        initial: dict[str, Tensor] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._forward = forward
        self._source = source
        self._spec = spec
        self.initial = self._probe_features() if initial is None else initial

    def run(self, advance: Callable[[], None] = lambda: None) -> Validation:
        """Validate; `advance` is called after each episode of this process.

        Raises:
            TrainingError: the words of the instruction do not change the action although the packing shows them, or the loss is not
                finite.
        """
        modes = [(module, module.training) for module in self._forward.modules()]
        self._forward.eval()
        own = _Share()
        try:
            with torch.no_grad(), self._accelerator.autocast():
                mine = range(
                    self._accelerator.process_index, len(self._source.episodes), self._accelerator.num_processes
                )
                for index in mine:
                    self._episode(index, own)
                    advance()
        finally:
            for module, mode in modes:
                module.training = mode
        shares: list[_Share] = gather_object([own])
        return self._check(self._summary(shares))

    def _episode(self, index: int, own: _Share) -> None:
        source, spec = self._source, self._spec
        episode = source.episodes[index]
        starts = window_starts(len(episode), source.data.window)
        batch = source.batch([Window(as_recorded(index), start) for start in starts])
        frames = source.frames(batch)
        targets = source.targets(batch)
        features = self._features(frames)
        predicted = self._forward.chunks(features, frames.frame_of).float()
        for name, value in loss_terms(spec, predicted, targets.actions, targets.classes, targets.mask).items():
            own.numerators[name] = own.numerators.get(name, 0.0) + float(value)
        own.counts += loss_counts(spec, batch.mask, batch.classes, source.columns)
        now = _as_deployed(predicted[:, :, 0], len(episode))
        if spec.kind == "classes":
            own.named.append(now.argmax(dim=-1).cpu().numpy())
        else:
            minimum, maximum = source.action_range
            axes = episode.actions.shape[1]
            physical = (now[:, :axes] + 1) / 2 * (maximum - minimum) + minimum
            own.predicted.append(physical.cpu().numpy().astype(np.float32))
        own.recorded.append(episode.actions)
        own.classes.append(source.classes.labels(episode.actions, source.data.actions))
        if index < _PROBES:
            reworded = self._reworded(frames, episode.instruction)
            if reworded is not None:
                changed = self._forward.chunks(self._features(reworded), frames.frame_of).float()
                own.changes.append((_as_deployed(changed[:, :, 0], len(episode)) - now).abs().cpu().numpy())
            before = self.initial[episode.name].to(features.device)
            own.drift.append(float(1 - functional.cosine_similarity(features.float(), before, dim=-1).mean()))

    def _features(self, frames: FrameBatch) -> Tensor:
        parts = []
        for start in range(0, len(frames.prompt_of), _FRAMES_AT_ONCE):
            part = slice(start, start + _FRAMES_AT_ONCE)
            pixels = None if frames.pixels is None else frames.pixels[part]
            tokens = None if frames.tokens is None else frames.tokens[part]
            parts.append(
                self._forward.features(
                    FrameBatch(pixels, tokens, frames.prompts, frames.prompt_of[part], frames.frame_of)
                )
            )
        return torch.cat(parts)

    def _reworded(self, frames: FrameBatch, instruction: str) -> FrameBatch | None:
        """The same frames under other words (see `other_words`); None where the prompt has too few to say anything else."""
        own, other = (self._source.prompts[text] for text in (instruction, other_words(instruction)))
        if torch.equal(own, other):  # to a tokenizer that knows none of the words; what it made of them backwards, then
            other = torch.cat([own[:1], own[1:-1].flip(0), own[-1:]])
        if torch.equal(own, other):
            return None
        prompt = other.to(frames.prompt_of.device)
        return FrameBatch(frames.pixels, frames.tokens, (prompt,), torch.zeros_like(frames.prompt_of), frames.frame_of)

    @torch.no_grad()
    def _probe_features(self) -> dict[str, Tensor]:
        self._forward.eval()
        found = {}
        for index, episode in enumerate(self._source.episodes[:_PROBES]):
            starts = window_starts(len(episode), self._source.data.window)
            batch = self._source.batch([Window(as_recorded(index), start) for start in starts])
            with self._accelerator.autocast():  # as in `run`, or rounding would pass for drift
                found[episode.name] = self._features(self._source.frames(batch)).float().cpu()
        return found

    def _summary(self, shares: list[_Share]) -> Validation:
        counts = sum((share.counts for share in shares), Counts(0.0, 0.0))
        names = {name for share in shares for name in share.numerators}
        terms = {name: torch.tensor(sum(share.numerators.get(name, 0.0) for share in shares)) for name in names}
        recorded = np.concatenate([part for share in shares for part in share.recorded])
        classes = np.concatenate([part for share in shares for part in share.classes])
        changes = np.concatenate(
            [part.ravel() for share in shares for part in share.changes] or [np.empty(0, np.float32)]
        )
        rmse: dict[str, float] = {}
        confusion = None
        if self._spec.kind == "classes":
            named = np.concatenate([part for share in shares for part in share.named])
        else:
            predicted = np.concatenate([part for share in shares for part in share.predicted])
            errors = np.sqrt(np.mean((predicted.astype(np.float64) - recorded) ** 2, axis=0))
            rmse = dict(zip(self._source.data.actions, map(float, errors), strict=True))
            named = self._source.classes.labels(predicted, self._source.data.actions)
            if "linear_y" in self._source.data.actions:
                column = self._source.data.actions.index("linear_y")
                confusion = left_right_confusion(predicted[:, column], recorded[:, column])
        directions = has_directions(self._source.data.actions)
        return Validation(
            loss=float(total_loss(self._spec, terms, counts)),
            rmse=rmse,
            direction_accuracy=float(np.mean(named == classes)) if directions else math.nan,
            majority=float(np.bincount(classes).max() / len(classes)) if directions else math.nan,
            left_right=confusion,
            sensitivity=float(changes.mean()) if len(changes) else math.nan,
            sensitivity_largest=float(changes.max()) if len(changes) else math.nan,
            drift=float(np.mean([value for share in shares for value in share.drift])),
        )

    def _check(self, result: Validation) -> Validation:
        if not math.isfinite(result.loss):
            raise TrainingError(
                "the validation loss is not finite",
                got=result.loss,
                expected="a finite number",
                hint="the last checkpoint is good. Lower optimizer.learning_rate, set optimizer.clip_norm = 1, or train in fp32.",
            )
        policy = self._forward.policy
        visible = policy.conventions.packing == "upstream" or policy.spec.head.told
        if visible and result.sensitivity_largest == 0:
            raise TrainingError(
                "the words of the instruction do not reach the action",
                got="not one predicted action changes when left and right are swapped in the text",
                expected="another action for other words",
                hint="a head that saturated or died shows the same actions for everything: look at the loss curve, lower the rate. If "
                "features do not change either, the packing is broken: please report it.",
            )
        return result


def _as_deployed(chunks: Tensor, length: int) -> Tensor:
    """Predictions [windows, W, A] to one for each frame [T, A], with the history that the robot has there: 1 to W frames."""
    window = chunks.shape[1]
    first = chunks[0, : min(window, length)]
    return torch.cat([first, chunks[1:, -1]]) if length > window else first
