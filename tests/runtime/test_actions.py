"""Commands are what the reference's evaluation wrapper makes of the head's output, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from bundle.manifest import Action, HeadKind
from runtime.actions import denormalize

# tanh stays in -1..1; logits do not. A float32 sigmoid cannot tell logits below 1e-7 from zero, so there are none here.
tanh = st.floats(-1, 1, width=32)
logits = st.floats(-50, 50, width=32).filter(lambda logit: logit == 0 or abs(logit) > 1e-6)
bounds = st.sampled_from([(-1.0, 1.0), (-1.15, 1.15), (-0.65, 0.65), (0.0, 0.4), (-3.0, 0.2)])
mus = st.none() | st.sampled_from([1.0, 5.0, 255.0])


def action(
    head: HeadKind, *, normalized: bool = True, mu: float | None = None, limits: tuple[float, float] = (-1.0, 1.0)
) -> Action:
    classes = ((0.0, 0.0), (1.15, 0.0), (0.0, -1.15), (0.5, 0.5)) if head == "classes" else ()
    return Action(
        head=head,
        names=("linear_x", "linear_y", "gripper")[: 3 if head == "actions_gripper" else 2],
        units=("m/s",) * (3 if head == "actions_gripper" else 2),
        normalized=normalized,
        minimum=limits[0],
        maximum=limits[1],
        mu=mu,
        class_names=tuple("SFRD"[: len(classes)]),
        class_values=classes,
    )


def executed(row: NDArray[np.float32], spec: Action) -> list[float]:
    """One chunk step through spec section 7, in the order written there, in Python floats."""
    x = [float(value) for value in row]
    gripper = spec.head == "actions_gripper"
    if gripper:  # (1)
        x[-1] = 1.0 if 1 / (1 + math.exp(-x[-1])) > 0.5 else 0.0
    if spec.mu is not None:  # (4), the last element kept: that is the gripper, and heads without one have none to keep
        for index in range(len(x) - gripper):
            x[index] = math.copysign(1, x[index]) * math.expm1(abs(x[index]) * math.log(1 + spec.mu)) / spec.mu
    if spec.normalized:  # (5), the gripper too
        x = [0.5 * (value + 1) * (spec.maximum - spec.minimum) + spec.minimum for value in x]
    if gripper:  # (6), (7)
        x[-1] = 1.0 if (x[-1] - 0.5) * 2 > 0 else -1.0
    return x


def check(head_output: NDArray[np.float32], spec: Action) -> None:
    before = head_output.copy()

    values = denormalize(head_output, spec)

    assert (values.dtype, values.shape) == (np.float32, (len(head_output), len(spec.names)))
    np.testing.assert_allclose(values, [executed(row, spec) for row in head_output], atol=3e-6, rtol=3e-6)
    np.testing.assert_array_equal(head_output, before)  # `normalized` of the chunk is the head's own numbers
    assert not np.shares_memory(values, head_output)


@given(arrays(np.float32, (3, 2), elements=tanh), st.booleans(), bounds, mus)
def test_velocities(head: NDArray[np.float32], normalized: bool, limits: tuple[float, float], mu: float | None) -> None:
    check(head, action("velocities", normalized=normalized, limits=limits, mu=mu))


@given(
    arrays(np.float32, (3, 2), elements=tanh), arrays(np.float32, (3, 1), elements=logits), st.booleans(), bounds, mus
)
def test_arm_and_gripper(
    arm: NDArray[np.float32],
    gripper: NDArray[np.float32],
    normalized: bool,
    limits: tuple[float, float],
    mu: float | None,
) -> None:
    check(np.hstack([arm, gripper]), action("actions_gripper", normalized=normalized, limits=limits, mu=mu))


def test_the_range_by_hand() -> None:
    spec = action("velocities", limits=(-1.0, 3.0))
    values = denormalize(np.array([[-1, 1], [0, 0.5]], np.float32), spec)
    np.testing.assert_allclose(values, [[-1, 3], [1, 2]])


def test_mu_law_by_hand() -> None:
    """Its ends and zero stay; half of the companded range is (sqrt(256) - 1) / 255 of the value."""
    spec = action("velocities", normalized=False, mu=255.0)
    values = denormalize(np.array([[0, 1], [-1, 0.5], [-0.5, 0]], np.float32), spec)
    np.testing.assert_allclose(values, [[0, 1], [-1, 15 / 255], [-15 / 255, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("logit", "limits", "command"),
    [
        (3.0, (-1.0, 1.0), 1),
        (-3.0, (-1.0, 1.0), -1),
        (0.0, (-1.0, 1.0), -1),  # sigmoid(0) is not above one half
        (3.0, (-0.65, 0.65), 1),
        # The reference stretches the gripper with the arm's range, so that where the maximum is below 0.5 it never closes.
        (3.0, (-0.4, 0.4), -1),
        (-3.0, (0.0, 2.0), 1),
    ],
)
def test_the_gripper_by_hand(logit: float, limits: tuple[float, float], command: int) -> None:
    values = denormalize(np.array([[0, 0, logit]], np.float32), action("actions_gripper", limits=limits))
    assert values[0, 2] == command


@given(arrays(np.float32, (5, 4), elements=st.floats(-50, 50, width=32)))
def test_classes(head: NDArray[np.float32]) -> None:
    spec = action("classes", normalized=False)
    values = denormalize(head, spec)
    assert (values.dtype, values.shape) == (np.float32, (5, 2))
    for row, command in zip(head.tolist(), values, strict=True):
        np.testing.assert_array_equal(command, np.float32(spec.class_values[row.index(max(row))]))


def test_a_class_command_is_not_the_table_itself() -> None:
    spec = action("classes", normalized=False)
    head = np.array([[0, 1, 0, 0]], np.float32)
    denormalize(head, spec)[:] = 99
    assert denormalize(head, spec).tolist() == [[np.float32(1.15), 0]]
