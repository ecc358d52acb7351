from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.oracle import oracle_case
from train.checkpoint import load_policy
from train.losses import Counts, LossSpec, balanced_weights, loss_counts, loss_terms, pad_targets, total_loss


@pytest.mark.parametrize(
    ("name", "prefix"), [("lora_7d", "loss"), ("fork2dof_patched", "floss"), ("fork2dof_stock", "floss")]
)
def test_losses_are_those_of_the_reference(name: str, prefix: str) -> None:
    case = oracle_case(name)
    policy = load_policy(case.checkpoint, packing=case.packing)
    given_ = {
        key: torch.from_numpy(case.inputs[f"{prefix}.{key}"]) for key in ("rgb", "text", "text_mask", "action_chunck")
    }
    mask = case.inputs[f"{prefix}.chunck_mask"].astype(bool)
    with torch.no_grad():
        predicted = policy(given_["rgb"].float().unsqueeze(2), given_["text"], given_["text_mask"])
    spec = LossSpec(policy.spec.head.kind)
    classes = np.zeros(mask.shape, np.int64)

    counts = loss_counts(spec, mask, classes, predicted.shape[-1])
    terms = loss_terms(
        spec, predicted, given_["action_chunck"].float(), torch.from_numpy(classes), torch.from_numpy(mask)
    )

    expected = case.expected
    if prefix == "floss":
        assert float(total_loss(spec, terms, counts)) == pytest.approx(float(expected["floss.velocity"]), abs=1e-4)
    else:
        assert float(total_loss(spec, terms, counts)) == pytest.approx(float(expected["loss.loss"]), abs=1e-4)
        assert float(terms["main"] / counts.main) == pytest.approx(float(expected["loss.loss_arm_act"]), abs=1e-4)
        assert float(terms["gripper"] / counts.elements) == pytest.approx(
            float(expected["loss.loss_gripper_act"]), abs=1e-4
        )


def test_classes_are_torchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 3, 4, 9), torch.randint(0, 9, (2, 3, 4))
    spec = LossSpec("classes", class_weights=tuple(float(weight) for weight in torch.rand(9) + 0.1))
    mask = np.ones((2, 3, 4), bool)

    loss = total_loss(
        spec,
        loss_terms(spec, logits, torch.zeros(2, 3, 4, 2), classes, torch.from_numpy(mask)),
        loss_counts(spec, mask, classes.numpy(), 9),
    )

    expected = functional.cross_entropy(logits.flatten(0, 2), classes.flatten(), torch.tensor(spec.class_weights))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["velocities", "actions_gripper", "classes"])
@given(cut=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_loss_does_not_depend_on_how_a_step_is_cut(kind: str, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = 9 if kind == "classes" else 3
    predicted = torch.randn(5, 2, 3, columns, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 9, (5, 2, 3), generator=generator)
    mask = torch.rand(5, 2, 3, generator=generator) > 0.3
    spec = LossSpec(kind, class_weights=tuple(0.5 + index for index in range(9)))  # type: ignore[arg-type]

    def counted(part: slice) -> Counts:
        return loss_counts(spec, mask[part].numpy(), classes[part].numpy(), columns)

    def lost(part: slice, counts: Counts) -> float:
        return float(
            total_loss(spec, loss_terms(spec, predicted[part], targets[part], classes[part], mask[part]), counts)
        )

    whole = counted(slice(None))
    parts = [slice(None, cut), slice(cut, None)]

    assert sum((counted(part) for part in parts), Counts(0.0, 0.0)) == whole
    assert sum(lost(part, whole) for part in parts) == pytest.approx(lost(slice(None), whole), rel=1e-5)


def test_masked_elements_weigh_nothing() -> None:
    spec = LossSpec("velocities")
    predicted, targets = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [50.0, 50.0]]]])
    mask = torch.tensor([[[True, False]]])
    classes = torch.zeros(1, 1, 2, dtype=torch.int64)
    loss = total_loss(
        spec,
        loss_terms(spec, predicted, targets, classes, mask),
        loss_counts(spec, mask.numpy(), classes.numpy(), 2),
    )
    assert float(loss) == 0.5


def test_a_batch_without_anything_to_learn_has_no_loss_and_a_gradient_of_zero() -> None:
    predicted = torch.ones(1, 1, 2, 2, requires_grad=True)
    mask = torch.zeros(1, 1, 2, dtype=torch.bool)
    classes = torch.zeros(1, 1, 2, dtype=torch.int64)
    spec = LossSpec("velocities")
    loss = total_loss(spec, loss_terms(spec, predicted, torch.zeros(1, 1, 2, 2), classes, mask), Counts(0.0, 0.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_balanced_weights_even_out_classes() -> None:
    weights = balanced_weights(np.array([1, 1, 1, 3]), 9)
    assert weights[1] * 3 == pytest.approx(weights[3] * 1)
    assert weights[0] == 1.0
    assert (3 * weights[1] + weights[3]) / 4 == pytest.approx(1.0)


def test_targets_are_padded_with_zeros() -> None:
    padded = pad_targets(np.ones((2, 3, 2), np.float32), 7)
    assert padded.shape == (2, 3, 7)
    assert padded[..., :2].all()
    assert not padded[..., 2:].any()


def test_label_smoothing_is_torchs() -> None:
    torch.manual_seed(1)
    logits, classes = torch.randn(2, 3, 4, 8), torch.randint(0, 8, (2, 3, 4))
    weights = torch.rand(8) + 0.1
    spec = LossSpec("classes", class_weights=tuple(map(float, weights)), label_smoothing=0.05)
    mask = np.ones((2, 3, 4), bool)

    terms = loss_terms(spec, logits, torch.empty(0), classes, torch.from_numpy(mask))
    loss = total_loss(spec, terms, loss_counts(spec, mask, classes.numpy(), 8))

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), classes.flatten(), weights, label_smoothing=0.05)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


def test_the_prior_is_the_divergence_of_the_mean_prediction() -> None:
    torch.manual_seed(2)
    logits, classes = torch.randn(2, 3, 4, 8), torch.randint(0, 8, (2, 3, 4))
    prior = (0.0, 0.7444783, 0.0228484, 0.0175171, 0.0971059, 0.102818, 0.0076161, 0.0076161)
    plain = LossSpec("classes", class_weights=(1.0,) * 8)
    spec = LossSpec("classes", class_weights=(1.0,) * 8, class_prior=prior, prior_weight=0.2)
    mask = np.ones((2, 3, 4), bool)
    mask[1, 2, 3] = False

    def loss(spec: LossSpec) -> float:
        terms = loss_terms(spec, logits, torch.empty(0), classes, torch.from_numpy(mask))
        return float(total_loss(spec, terms, loss_counts(spec, mask, classes.numpy(), 8)))

    mean = logits.softmax(-1)[torch.from_numpy(mask)].mean(dim=0).double().numpy()
    wanted = (np.array(prior) / sum(prior) + 1e-8) / (1 + 8e-8)
    divergence = float(np.sum(wanted * (np.log(wanted) - np.log(mean))))
    assert loss(spec) - loss(plain) == pytest.approx(0.2 * divergence, abs=1e-5)


def test_what_is_not_straight_ahead_weighs_more() -> None:
    targets = torch.tensor([[0.6, 0.0], [0.6, 0.3], [0.4, 0.0], [0.51, -0.19]])
    spec = LossSpec("velocities", non_forward=5.0)
    mask = np.ones(4, bool)

    terms = loss_terms(spec, targets + 0.1, targets, torch.empty(0), torch.from_numpy(mask))

    assert float(terms["main"]) == pytest.approx((1 + 5 + 5 + 1) * 2 * 0.5 * 0.1**2, abs=1e-6)
    assert loss_counts(spec, mask, np.zeros(4, np.int64), 2).main == 8
