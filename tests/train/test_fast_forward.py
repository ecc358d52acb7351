"""The training forward pass against the reference, shortcut by shortcut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bundle.errors import CheckpointError
from bundle.manifest import Packing
from tests.checkpoints import MakeSynthetic
from tests.oracle import oracle_case
from train.checkpoint import load, load_policy
from train.fast_forward import FrameBatch, TrainingForward, check_forward, pixels_of
from train.policy import KosmosPolicy, normalize_frames
from train.synthetic import SyntheticFiles, SyntheticOptions

PROMPTS = (torch.tensor([0, 60, 9, 12, 33, 2]), torch.tensor([0, 60, 9, 40, 41, 42, 43, 2]))
FRAMES = 6


@pytest.fixture
def policy(fork: SyntheticFiles) -> KosmosPolicy:
    return load_policy(fork.checkpoint, packing="upstream")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 224, 224, 3), dtype=np.uint8)
    return pixels_of(frames, "clip", torch.device("cpu"))


def windows(pixels: Tensor | None, tokens: Tensor | None = None) -> FrameBatch:
    frame_of = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 4, 5], [5, 5, 5]])
    return FrameBatch(pixels, tokens, PROMPTS, torch.tensor([0, 0, 0, 1, 1, 1]), frame_of)


def reference(policy: KosmosPolicy, batch: FrameBatch, pixels: Tensor) -> Tensor:
    """Window by window and frame by frame, as upstream."""
    chunks = []
    for row in batch.frame_of:
        features = []
        for index in row:
            ids = batch.prompts[batch.prompt_of[index]].unsqueeze(0)
            features.append(policy.features(policy.image_tokens(pixels[index : index + 1]), ids, torch.ones_like(ids)))
        chunks.append(policy.act_head(torch.stack(features, dim=1)))
    return torch.cat(chunks)


@pytest.mark.parametrize("packing", ["upstream", "fork_overwrite"])
def test_chunks_are_the_references(fork: SyntheticFiles, pixels: Tensor, packing: Packing) -> None:
    policy = load_policy(fork.checkpoint, packing=packing)
    batch = windows(pixels)
    with torch.no_grad():
        expected = reference(policy, batch, pixels)
        found = TrainingForward(policy)(batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", ["upstream", "fork_overwrite"])
@pytest.mark.parametrize("pad_to", [8, 9, 100])
def test_padded_prompts_are_the_references(fork: SyntheticFiles, pixels: Tensor, packing: Packing, pad_to: int) -> None:
    """Masked slots are not computed, and yet the action token stands behind them; at 8 the longer prompt has none."""
    policy = load(fork.checkpoint, packing=packing, pad_prompt_to=pad_to).policy
    batch, padding = windows(pixels), policy.kosmos.text_config.pad_token_id
    with torch.no_grad():
        features = []
        for index, prompt in enumerate(batch.prompt_of):
            ids = batch.prompts[prompt]
            row = functional.pad(ids, (0, pad_to - len(ids)), value=padding).unsqueeze(0)
            mask = (torch.arange(pad_to) < len(ids)).long().unsqueeze(0)
            features.append(policy.features(policy.image_tokens(pixels[index : index + 1]), row, mask))
        found = TrainingForward(policy).features(batch)
    torch.testing.assert_close(found, torch.cat(features), atol=2e-5, rtol=0)
    natural = load(fork.checkpoint, packing=packing).policy
    with torch.no_grad():
        moved = (TrainingForward(natural).features(batch) - found).abs().max()
    # The fork's image slots are in front of the action token anyhow.
    assert (moved > 1e-2) == (packing == "upstream" or pad_to == 100)


def test_several_action_tokens_take_the_long_way(synthetic: MakeSynthetic, pixels: Tensor) -> None:
    policy = load_policy(synthetic(SyntheticOptions(latent=2)).checkpoint)
    batch = windows(pixels)
    with torch.no_grad():
        expected = reference(policy, batch, pixels)
        torch.testing.assert_close(TrainingForward(policy)(batch), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", ["upstream", "fork_overwrite"])
@pytest.mark.parametrize("pad_to", [None, 100])
def test_a_head_that_is_told_hears_each_frames_own_prompt(
    synthetic: MakeSynthetic, pixels: Tensor, packing: Packing, pad_to: int | None
) -> None:
    options = SyntheticOptions(layout="fork", head="classes", told=True)
    policy = load(synthetic(options).checkpoint, packing=packing, pad_prompt_to=pad_to).policy
    batch = windows(pixels)
    with torch.no_grad():
        features = []
        for index, prompt in enumerate(batch.prompt_of):
            row, mask = (part.unsqueeze(0) for part in policy.padded(batch.prompts[prompt]))
            features.append(policy.features(policy.image_tokens(pixels[index : index + 1]), row, mask))
        found = TrainingForward(policy).features(batch)
        torch.testing.assert_close(found, torch.cat(features), atol=2e-5, rtol=0)
        policy.act_head.instr_proj.weight.neg_()
        assert (TrainingForward(policy).features(batch) - found).abs().max() > 1e-2


def test_no_gradient_goes_into_the_words_that_a_head_is_told(synthetic: MakeSynthetic, pixels: Tensor) -> None:
    """As in the lab's first code with this key; under fork_overwrite the row does not show them either."""
    options = SyntheticOptions(layout="fork", head="classes", told=True, lora=False)
    policy = load_policy(synthetic(options).checkpoint, packing="fork_overwrite").requires_grad_(True)
    TrainingForward(policy)(windows(pixels)).square().sum().backward()
    assert policy.act_head.instr_proj.weight.grad.abs().max() > 0
    embedded = policy.backbone.text_model.model.embed_tokens.weight.grad
    assert embedded is None or not bool(embedded.any())


def test_cached_tokens_give_the_same(policy: KosmosPolicy, pixels: Tensor) -> None:
    forward = TrainingForward(policy)
    with torch.no_grad():
        tokens = policy.image_tokens(pixels)
        torch.testing.assert_close(forward(windows(None, tokens)), forward(windows(pixels)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_references(policy: KosmosPolicy, pixels: Tensor, recompute: bool) -> None:
    other = copy.deepcopy(policy)
    batch = windows(pixels)
    for each in (policy, other):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(".lora_" in name or name == "action_token")
    forward = TrainingForward(other, gradient_checkpointing=recompute).train()
    for module in forward.modules():  # dropout draws differ between the two; everything else of training mode stays
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0

    reference(policy, batch, pixels).square().sum().backward()
    forward(batch).square().sum().backward()

    for (name, expected), (_, found) in zip(policy.named_parameters(), other.named_parameters(), strict=True):
        if expected.requires_grad:
            assert expected.grad is not None, name
            assert found.grad is not None, name
            scale = float(expected.grad.abs().max()) + 1e-6
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_pixels_are_the_exporters(pixels: Tensor) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 224, 224, 3), dtype=np.uint8)
    torch.testing.assert_close(pixels, normalize_frames(frames), atol=1e-6, rtol=0)
    raw = pixels_of(frames, "none", torch.device("cpu"))
    torch.testing.assert_close(raw, torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


def test_the_check_passes_and_leaves_modes_alone(policy: KosmosPolicy, pixels: Tensor) -> None:
    forward = TrainingForward(policy)
    policy.backbone.text_model.train()
    before = [module.training for module in policy.modules()]
    assert check_forward(forward, pixels, PROMPTS[0]) < 1e-5
    assert [module.training for module in policy.modules()] == before


def test_attention_that_is_not_causal_is_found(policy: KosmosPolicy, pixels: Tensor) -> None:
    """As a transformers whose text attention lost its flag would compute it."""
    forward = TrainingForward(policy)
    for layer in policy.backbone.text_model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="does not compute Kosmos-2 as published"):
        check_forward(forward, pixels, PROMPTS[0])


def test_a_causal_resampler_is_found(policy: KosmosPolicy, pixels: Tensor) -> None:
    """The defect of some versions: under sdpa, the resampler's attention counts as causal."""
    forward = TrainingForward(policy)
    attention = policy.backbone.image_to_text_projection.x_attn
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "sdpa"
    attention.is_causal = True
    with pytest.raises(CheckpointError, match="a causal resampler"):
        check_forward(forward, pixels, PROMPTS[0])


def test_the_reference_case_gives_its_features() -> None:
    """Recorded by the original code: window 0 of the LoRA case."""
    case = oracle_case("lora_7d")
    policy = load_policy(case.checkpoint)
    ids = torch.from_numpy(case.inputs["win0.input_ids"])[0]
    pixels = torch.from_numpy(case.expected["pixel_values"])[0]
    count = len(pixels)
    batch = FrameBatch(pixels, None, (ids,), torch.zeros(count, dtype=torch.int64), torch.arange(count).unsqueeze(0))
    forward = TrainingForward(policy)
    with torch.no_grad():
        found = forward(batch)
    np.testing.assert_allclose(found.numpy(), case.chunks("win0"), atol=2e-5)


def test_recomputing_saves_memory_whatever_mode_the_wrapper_is_in(fork: SyntheticFiles, pixels: Tensor) -> None:
    """It is the policy's mode that counts: a validation before the first step once switched recomputing off."""

    def kept(*, recompute: bool) -> int:
        policy = load_policy(fork.checkpoint, packing="upstream")
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        forward = TrainingForward(policy, gradient_checkpointing=recompute)
        forward.eval()
        policy.train()
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            forward(windows(pixels))
        return sum(sizes)

    assert kept(recompute=True) < 0.4 * kept(recompute=False)
