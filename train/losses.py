"""What training minimises: Huber on velocities, Huber and BCE for upstream's arm and gripper, weighted cross-entropy for classes.

A loss is a sum over unmasked elements divided by their number, as in RoboVLMs (spec of its `LSTMDecoder.loss`). Sum and number are kept
apart, because a step's gradient must not depend on how its windows were cut into micro-batches and dealt to processes: every
micro-batch divides its sums by the counts of the whole step. One deviation: where upstream's head has fewer than seven columns, its
Huber also covers the gripper's raw logit, which pulls it towards 0 and 1 as if it were a position; here the arm is the arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bundle.manifest import HeadKind

# What counts as straight ahead, in normalised units of linear_x and linear_y.
_FORWARD, _SIDEWAYS = 0.5, 0.2
_SMALLEST = 1e-8  # share of a class


@dataclass(frozen=True)
class LossSpec:
    """How errors are weighed.

    Attributes:
        kind: of the head.
        huber_delta: where Huber turns linear.
        gripper_ratio: weight of the gripper's term.
        class_weights: one per class, for `classes`.
        label_smoothing: for `classes`.
        non_forward: weight of actions that are not straight ahead, for `velocities`.
        class_prior, prior_weight: for `classes`: the shares that predictions should have on average, and how much that counts.
    """

    kind: HeadKind
    huber_delta: float = 1.0
    gripper_ratio: float = 0.01
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    non_forward: float = 1.0
    class_prior: tuple[float, ...] = ()
    prior_weight: float = 0.0


@dataclass(frozen=True)
class Counts:
    """The denominators of a batch: weighted elements of the main term, and all elements, by which the second term is divided."""

    main: float
    elements: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.main + other.main, self.elements + other.elements)


def loss_counts(spec: LossSpec, mask: NDArray[np.bool_], classes: NDArray[np.int64], columns: int) -> Counts:
    """The denominators, from targets alone: they are known before any forward pass.

    Args:
        mask: [..., n].
        classes: [..., n].
        columns: A, the width of a chunk step of the head.
    """
    elements = float(mask.sum())
    if spec.kind == "classes":
        weights = np.asarray(spec.class_weights, np.float64)
        return Counts(float(weights[classes[mask]].sum()), elements)
    arm = columns - 1 if spec.kind == "actions_gripper" else columns
    return Counts(elements * arm, elements)


def loss_terms(spec: LossSpec, predicted: Tensor, targets: Tensor, classes: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The numerators: sums over unmasked elements, by term.

    Args:
        predicted: [..., n, A] as the head gives it; gripper logit last, or class logits.
        targets: [..., n, A] normalised actions, gripper as 0 or 1 in the last column; unused for classes.
        classes: int64 [..., n].
        mask: bool [..., n].
    """
    predicted = predicted.float()
    if spec.kind == "classes":
        return _class_terms(spec, predicted.flatten(0, -2), classes.flatten(), mask.flatten())
    arm = predicted.shape[-1] - 1 if spec.kind == "actions_gripper" else predicted.shape[-1]
    huber = functional.huber_loss(predicted[..., :arm], targets[..., :arm], reduction="none", delta=spec.huber_delta)
    if spec.non_forward != 1 and spec.kind == "velocities":
        forward = (targets[..., :1] > _FORWARD) & (targets[..., 1:2].abs() < _SIDEWAYS).all(dim=-1, keepdim=True)
        huber = torch.where(forward, huber, huber * spec.non_forward)
    terms = {"main": (huber * mask.unsqueeze(-1)).sum()}
    if spec.kind == "actions_gripper":
        bce = functional.binary_cross_entropy_with_logits(predicted[..., -1], targets[..., -1], reduction="none")
        terms["gripper"] = (bce * mask).sum()
    return terms


def _class_terms(spec: LossSpec, logits: Tensor, classes: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Weighted, smoothed cross-entropy of logits [N, C], and the divergence of their mean from the prior times unmasked elements.

    The divergence is that of each micro-batch, as a trainer that accumulates gradients has it, so it alone depends on their size.
    """
    weights = torch.tensor(spec.class_weights, device=logits.device)
    loss = functional.cross_entropy(logits, classes, weights, reduction="none", label_smoothing=spec.label_smoothing)
    terms = {"main": (loss * mask).sum()}
    if spec.prior_weight > 0:
        prior = torch.tensor(spec.class_prior, device=logits.device)
        prior = prior / prior.sum() + _SMALLEST
        elements = mask.sum()
        mean = (logits.softmax(dim=-1) * mask.unsqueeze(-1)).sum(dim=0) / elements.clamp_min(1)
        divergence = functional.kl_div(mean.clamp_min(_SMALLEST).log(), prior / prior.sum(), reduction="sum")
        terms["prior"] = divergence * elements
    return terms


def total_loss(spec: LossSpec, terms: dict[str, Tensor], counts: Counts) -> Tensor:
    """One number to minimise, from numerators and the step's denominators; 0 where nothing is unmasked."""
    loss = terms["main"] / max(counts.main, 1e-12)
    if "gripper" in terms:
        loss = loss + spec.gripper_ratio * terms["gripper"] / max(counts.elements, 1e-12)
    if "prior" in terms:
        loss = loss + spec.prior_weight * terms["prior"] / max(counts.elements, 1e-12)
    return loss


def balanced_weights(classes: NDArray[np.int64], count: int) -> tuple[float, ...]:
    """Weights inverse to each class's share, with a mean of 1 over the samples; classes never seen get 1.

    Args:
        classes: int64 of all training frames.
        count: number of classes.
    """
    seen = np.bincount(classes.ravel(), minlength=count)[:count].astype(np.float64)
    present = seen > 0
    weights = np.ones(count)
    weights[present] = seen.sum() / (present.sum() * seen[present])
    return tuple(float(weight) for weight in weights)


def pad_targets(normalized: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """Recorded axes to a head's columns: zeros after them (upstream's heads are seven wide, robots here have two or three axes).

    Args:
        normalized: [..., a] with a <= columns.
    """
    shape: Any = (*normalized.shape[:-1], columns - normalized.shape[-1])
    return np.concatenate([normalized, np.zeros(shape, np.float32)], axis=-1)
