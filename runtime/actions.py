"""From the head's numbers to commands in physical units, as the reference's evaluation wrapper computes them.

Order, for continuous heads: gripper logit to {0, 1}; undo mu-law; undo the [-1, 1] normalisation of all columns; gripper to -1 or +1.
For class heads: the most likely class of each chunk step, looked up in the manifest's table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Action


def action_error(got: NDArray[np.floating], expected: NDArray[np.floating]) -> NDArray[np.float64]:
    """Error of every number of a chunk [..., n, A], as the head gives it.

    Absolute for tanh columns; logits are unbounded, so relative to a column's size in its chunk where that exceeds 1.
    """
    size = np.maximum(1.0, np.abs(expected).max(axis=-2, keepdims=True))
    error: NDArray[np.float64] = np.abs(got.astype(np.float64) - expected) / size
    return error


def denormalize(normalized: NDArray[np.float32], action: Action) -> NDArray[np.float32]:
    """Commands float32 [n, len(action.names)] from the head's output [n, A]; a new array."""
    if action.head == "classes":
        table = np.asarray(action.class_values, np.float32)
        commands: NDArray[np.float32] = table[normalized.argmax(axis=1)]
        return commands
    values = normalized.astype(np.float32, copy=True)
    gripper = action.head == "actions_gripper"
    if gripper:
        # sigmoid(x) > 0.5 is x > 0.
        values[:, -1] = values[:, -1] > 0
    if action.mu is not None:
        arm = values[:, :-1] if gripper else values
        arm[:] = np.sign(arm) * np.expm1(np.abs(arm) * np.log1p(action.mu)) / action.mu
    if action.normalized:
        values = (0.5 * (values + 1) * (action.maximum - action.minimum) + action.minimum).astype(np.float32)
    if gripper:
        # The wrapper maps {0, 1} to (a - 0.5) * 2 after de-normalising, then takes the sign.
        values[:, -1] = np.where((values[:, -1] - 0.5) * 2 > 0, 1.0, -1.0)
    return values
