"""What training takes, against what autograd keeps; and what is said when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Kosmos2Config

from bundle.errors import TrainingError
from tests.train.test_run_config import config
from train.base import read_base_config
from train.fast_forward import FrameBatch, TrainingForward
from train.memory import count_parameters, estimate_memory, explain_out_of_memory, is_out_of_memory, memory_savings
from train.run_config import RunConfig
from train.synthetic import SyntheticFiles
from train.trainable import build_policy, training_mode

FRAMES, WINDOWS, WINDOW, PROMPT = 8, 2, 4, 20

NOTHING_ADAPTED = {"lora": {"targets": "none"}}


def small(base: Path | str = "kosmos", **model: Any) -> RunConfig:
    return config(base={"model": str(base)}, data={"window": WINDOW}, model=model, loop={"batch_size": WINDOWS})


def kept_by_autograd(run: RunConfig) -> int:
    """Bytes that a forward pass leaves for the backward pass, parameters aside."""
    policy = build_policy(run, Path(run.base.model), action_range=(-1, 1))
    forward = TrainingForward(policy, gradient_checkpointing=run.model.gradient_checkpointing)
    training_mode(policy)
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    size = policy.kosmos.vision_config.image_size
    frames = torch.arange(FRAMES)
    batch = FrameBatch(
        torch.randn(FRAMES, 3, size, size),
        None,
        (torch.arange(3, 3 + PROMPT),),
        torch.zeros(FRAMES, dtype=torch.int64),
        frames.reshape(WINDOWS, WINDOW),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(batch).square().mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"lora": {"targets": "text"}},
        {"lora": {"targets": "vision"}},
        {"lora": {"targets": ["q_proj", "fc1"]}},
        NOTHING_ADAPTED,
        {**NOTHING_ADAPTED, "train_vision": True},
        {**NOTHING_ADAPTED, "train_projection": True},
        {**NOTHING_ADAPTED, "freeze_backbone": False, "train_vision": True},
    ],
)
def test_activations_are_estimated_from_above_and_not_by_far(fork: SyntheticFiles, model: dict[str, Any]) -> None:
    """The last decoder layer costs less than the estimate says, which is a third of the tiny model's and little of the real one's."""
    run = small(fork.base, **model)
    kosmos = read_base_config(fork.base)

    estimate = estimate_memory(kosmos, run, device="cpu", prompt_tokens=PROMPT, counts=count_parameters(kosmos, run))

    assert (estimate.frames, estimate.slots) == (FRAMES, kosmos.latent_query_num + PROMPT)
    assert 0.95 < estimate.activations / kept_by_autograd(run) < 1.5


def test_recomputed_layers_keep_little() -> None:
    kosmos = Kosmos2Config()
    recomputed = small(gradient_checkpointing=True)
    counts = count_parameters(kosmos, recomputed)

    plain, less = (
        estimate_memory(kosmos, run, device="cuda", prompt_tokens=PROMPT, counts=counts)
        for run in (small(), recomputed)
    )

    assert less.activations < plain.activations / 5
    assert less.counted == plain.counted


def test_the_real_model_is_counted_without_its_memory() -> None:
    counts = count_parameters(Kosmos2Config(), config())

    # 1.66 billion of Kosmos-2, 43.1 million of adapters of rank 32, and the head.
    assert 1.70e9 < counts.total < 1.73e9
    assert 43.1e6 + 12e6 < counts.trained < 43.1e6 + 13e6
    assert counts.vision > 0
    assert count_parameters(Kosmos2Config(), config(model={"lora": {"targets": "text"}})).vision == 0


def test_weights_gradients_and_moments_are_fp32(fork: SyntheticFiles) -> None:
    kosmos = read_base_config(fork.base)
    run = small(fork.base)
    counts = count_parameters(kosmos, run)
    policy = build_policy(run, fork.base, action_range=(-1, 1))

    estimate = estimate_memory(kosmos, run, device="cpu", prompt_tokens=PROMPT, counts=counts)

    assert counts.total == sum(p.numel() for p in policy.parameters())
    assert counts.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert estimate.counted == 4 * counts.total + 12 * counts.trained
    assert estimate.total == estimate.counted + estimate.activations + estimate.reserve


@pytest.mark.parametrize(
    ("loop", "frames"),
    [
        ({}, 8),
        ({"batch_size": 4}, 32),
        ({"batch_size": 4, "windows_per_episode": 4}, 11),
        ({"batch_size": 4, "windows_per_episode": 3}, 18),
    ],
)
def test_windows_of_an_episode_share_frames(loop: dict[str, Any], frames: int) -> None:
    run = config(loop=loop)
    kosmos = Kosmos2Config()

    estimate = estimate_memory(kosmos, run, device="cpu", prompt_tokens=9, counts=count_parameters(kosmos, run))

    assert estimate.frames == frames


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert is_out_of_memory(caught.value)


def test_savings_come_in_their_order_and_only_where_possible() -> None:
    most = memory_savings(config(loop={"batch_size": 4, "accumulate": 2}))
    assert [text.split(" = ")[0].split(" with ")[0] for text in most] == [
        "set loop.batch_size",
        "loop.windows_per_episode",
        "model.gradient_checkpointing",
        "loop.precision",
        "model.lora.targets",
        "a data.window shorter than 8",
    ]
    assert most[0] == "set loop.batch_size = 2 with loop.accumulate = 4, which keeps the size of a step"

    least = memory_savings(
        config(
            data={"window": 1},
            model={"gradient_checkpointing": True, "lora": {"targets": "text"}},
            loop={"precision": "bf16"},
        )
    )
    assert least == ()


def test_running_out_of_memory_is_explained() -> None:
    run = config(loop={"batch_size": 8})

    error = explain_out_of_memory(RuntimeError("CUDA out of memory.\nmore"), run)

    assert isinstance(error, TrainingError)
    assert "got:      CUDA out of memory.\n" in str(error)
    assert "hint: set loop.batch_size = 4 with loop.accumulate = 16" in str(error)
    assert "--resume" in str(error)
    smallest = config(
        data={"window": 1},
        model={"gradient_checkpointing": True, "lora": {"targets": "text"}},
        loop={"precision": "bf16"},
    )
    assert "as small as it gets" in str(explain_out_of_memory(MemoryError(), smallest))
