"""The policy against the recorded reference, against Hugging Face's own forward pass, and against attention by hand."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2Model

from bundle.manifest import Packing
from tests.oracle import CASES, OracleCase, oracle_case
from tests.train.conftest import MakeSynthetic
from train.action_head import ActionHead
from train.checkpoint import LoadedPolicy, load
from train.config import HeadSpec
from train.policy import CLIP_MEAN, CLIP_STD, KosmosPolicy, ReferenceStream, normalize_frames
from train.synthetic import SyntheticOptions

# What fp32 leaves between two orders of the same sums; the recorded cases agree to 5e-6.
TOLERANCE = 1e-4
IMAGE_SIZE = 224


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


# --- recorded reference -------------------------------------------------------------------------------------------------


@functools.cache
def recorded(name: str) -> tuple[OracleCase, LoadedPolicy]:
    case = oracle_case(name)
    return case, load(case.checkpoint, packing=case.packing)


def prompt(case: OracleCase, prefix: str) -> tuple[Tensor, Tensor]:
    ids, mask = (torch.from_numpy(case.inputs[f"{prefix}.{part}"]) for part in ("input_ids", "attention_mask"))
    return ids, mask


def assert_close(actual: Tensor | NDArray[np.float32], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected.reshape(actual.shape), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("prefix", "clip"), [("win0", 0), ("win1", 1), ("fixedpad", 0)])
def test_windows_match_the_reference(name: str, prefix: str, clip: int) -> None:
    case, loaded = recorded(name)
    policy = loaded.policy
    ids, mask = prompt(case, prefix)
    pixels = torch.from_numpy(case.expected["pixel_values"][clip])

    images = policy.image_tokens(pixels)
    features = policy.features(images, ids.expand(len(images), -1), mask.expand(len(images), -1))
    chunks = policy(pixels[None, :, None], ids, mask)

    if f"{prefix}.image_embeds" in case.expected:
        assert_close(images, case.expected[f"{prefix}.image_embeds"])
    assert_close(features, case.expected[f"{prefix}.action_hs"])
    assert_close(policy.act_head(features[None]), case.chunks(prefix))
    assert_close(chunks, case.chunks(prefix))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("fork")])
def test_a_batch_of_padded_prompts_matches_the_reference(name: str) -> None:
    case, loaded = recorded(name)
    ids, mask = prompt(case, "pad")
    assert not mask.all()
    pixels = torch.from_numpy(case.expected["pixel_values"])
    assert_close(loaded.policy(pixels[:, :, None], ids, mask), case.chunks("pad"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["win0", "win1"])
def test_rows_match_the_reference(name: str, prefix: str) -> None:
    case, loaded = recorded(name)
    ids, mask = prompt(case, prefix)
    images = torch.from_numpy(case.expected[f"{prefix}.image_embeds"])
    embeds, attention = loaded.policy.rows(images, ids.expand(len(images), -1), mask.expand(len(images), -1))

    np.testing.assert_array_equal(attention, case.expected[f"{prefix}.lm_attention_mask"])
    if f"{prefix}.lm_inputs_embeds" in case.expected:
        assert_close(embeds, case.expected[f"{prefix}.lm_inputs_embeds"])
    text = loaded.policy.backbone.text_model.model
    hidden = text(inputs_embeds=embeds, attention_mask=attention, use_cache=False).last_hidden_state
    seen = attention.bool()
    assert_close(hidden[seen], case.expected[f"{prefix}.lm_last_hidden"][seen.numpy()])


@pytest.mark.parametrize("name", CASES)
def test_the_stream_matches_the_reference_through_a_reset(name: str) -> None:
    case, loaded = recorded(name)
    ids, mask = (tensor[0].numpy() for tensor in prompt(case, "win0"))
    frames = resized(case)
    resets = set(case.inputs["stream.reset_before"].tolist())
    assert resets, "the case must cover a reset"
    expected = case.chunks("stream", "arm_chunk", "gripper_logit_chunk")

    stream = ReferenceStream(loaded.policy, ids, mask)
    for step, index in enumerate(case.inputs["stream.frame_index"]):
        if step in resets:
            stream = ReferenceStream(loaded.policy, ids, mask)
        result = stream.step(frames[index][None])
        assert_close(result.feature, case.expected["stream.action_hs"][step])
        assert_close(result.action, expected[step])


@pytest.mark.parametrize("name", CASES)
def test_preprocessing_matches_the_reference(name: str) -> None:
    case = oracle_case(name)
    frames = resized(case)[: case.expected["pixel_values"].shape[1]]
    np.testing.assert_allclose(normalize_frames(frames), case.expected["pixel_values"][0], atol=1e-5, rtol=0)


def resized(case: OracleCase) -> NDArray[np.uint8]:
    """The first clip as the policy sees it: uint8 [frames, 224, 224, 3]."""
    clip = case.inputs["frames_u8"][0]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip])


@pytest.mark.parametrize("name", ["fork2dof_stock", "fork2dof_patched"])
def test_only_the_right_packing_matches_the_reference(name: str) -> None:
    case, loaded = recorded(name)
    wrong: Packing = "upstream" if case.packing == "fork_overwrite" else "fork_overwrite"
    policy = load(case.checkpoint, packing=wrong).policy
    ids, mask = prompt(case, "win0")
    pixels = torch.from_numpy(case.expected["pixel_values"][0][None, :, None])
    assert (policy(pixels, ids, mask) - loaded.policy(pixels, ids, mask)).abs().max() > 100 * TOLERANCE


# --- Hugging Face -------------------------------------------------------------------------------------------------------

IDS = (0, 1199, 21, 23, 7, 5, 24, 300, 42, 2)
ACTION_ID = 1100  # no prompt here uses this token; its embedding stands in for the action token
IMAGE_ID = 99  # stands where image tokens come
LATENTS = 64


def hugging_face(policy: KosmosPolicy) -> Kosmos2Model:
    """Hugging Face's model with the policy's weights: adapters merged by hand, the action token in the vocabulary."""
    model = Kosmos2Model._from_config(policy.kosmos, attn_implementation="eager").eval()
    ours = dict(policy.backbone.named_parameters())
    lora = policy.spec.lora
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        adapted = f"{module}.base_layer.{leaf}"
        if adapted not in ours:
            parameter.copy_(ours[name])
        elif leaf == "bias" or lora is None:
            parameter.copy_(ours[adapted])
        else:
            down, up = (ours[f"{module}.lora_{side}.default.weight"] for side in "AB")
            parameter.copy_(ours[adapted] + lora.alpha / lora.r * (up @ down))
    model.text_model.model.embed_tokens.weight[ACTION_ID] = policy.action_token
    return model


def random_pixels(count: int) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "frozen"])
def test_image_tokens_are_hugging_faces(synthetic: MakeSynthetic, lora: bool) -> None:
    policy = load(synthetic(SyntheticOptions(lora=lora)).checkpoint).policy
    pixels = random_pixels(3)
    expected = hugging_face(policy).get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(policy.image_tokens(pixels), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "frozen"])
def test_upstream_features_are_hugging_faces(synthetic: MakeSynthetic, lora: bool) -> None:
    """`<s>`, image tokens, text, action token, `</s>` through Hugging Face's whole forward pass, pixels to hidden states."""
    policy = load(synthetic(SyntheticOptions(lora=lora)).checkpoint).policy
    slots = torch.tensor([[IDS[0], *[IMAGE_ID] * LATENTS, *IDS[1:-1], ACTION_ID, IDS[-1]]])
    pixels = random_pixels(1)

    hidden = hugging_face(policy)(
        pixel_values=pixels,
        input_ids=slots,
        attention_mask=torch.ones_like(slots),
        image_embeds_position_mask=(slots == IMAGE_ID).long(),
    ).last_hidden_state

    ids = torch.tensor([IDS])
    features = policy.features(policy.image_tokens(pixels), ids, torch.ones_like(ids))
    torch.testing.assert_close(features, hidden[:, -2], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("hand_camera", "latent"), [(True, 1), (False, 3), (True, 2)])
def test_two_cameras_and_several_action_tokens_are_hugging_faces(
    synthetic: MakeSynthetic, hand_camera: bool, latent: int
) -> None:
    options = SyntheticOptions(hand_camera=hand_camera, latent=latent)
    policy = load(synthetic(options).checkpoint).policy
    cameras = 2 if hand_camera else 1
    slots = torch.tensor([[IDS[0], *[IMAGE_ID] * LATENTS * cameras, *IDS[1:-1], *[ACTION_ID] * latent, IDS[-1]]])
    pixels = random_pixels(cameras)
    model = hugging_face(policy)

    images = model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)[None]
    hidden = model(
        image_embeds=images,
        input_ids=slots,
        attention_mask=torch.ones_like(slots),
        image_embeds_position_mask=(slots == IMAGE_ID).long(),
    ).last_hidden_state

    ids = torch.tensor([IDS])
    expected = hidden[:, -1 - latent : -1].flatten(1)
    features = policy.features(images, ids, torch.ones_like(ids))
    torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)
    chunks = policy(pixels[None, None], ids, torch.ones_like(ids))
    torch.testing.assert_close(chunks, policy.act_head(expected[None]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("length", "resampler"), [(10, False), (64, False), (70, False), (10, True)])
def test_fork_features_are_hugging_faces(synthetic: MakeSynthetic, length: int, resampler: bool) -> None:
    """Image tokens over the first slots, text behind them, the action token behind max(L, 64); nothing in between.

    The image tokens are Kosmos-2's own, whether or not the checkpoint has a resampler of RoboVLMs.
    """
    options = SyntheticOptions(layout="fork", head="velocities", vision_resampler=resampler)
    policy = load(synthetic(options).checkpoint, packing="fork_overwrite").policy
    ids = torch.tensor([[*IDS[:-1], *range(200, 200 + length - len(IDS)), IDS[-1]]])
    assert ids.shape[1] == length
    hidden_slots = max(LATENTS - length, 0)
    slots = torch.tensor([[*[IMAGE_ID] * LATENTS, *ids[0, LATENTS:].tolist(), ACTION_ID]])
    mask = torch.tensor([[1] * length + [0] * hidden_slots + [1]])
    pixels = random_pixels(1)

    hidden = hugging_face(policy)(
        pixel_values=pixels,
        input_ids=slots,
        attention_mask=mask,
        image_embeds_position_mask=(slots == IMAGE_ID).long(),
    ).last_hidden_state

    features = policy.features(policy.image_tokens(pixels), ids, torch.ones_like(ids))
    torch.testing.assert_close(features, hidden[:, -1], atol=TOLERANCE, rtol=0)


# --- the resampler's mask -----------------------------------------------------------------------------------------------


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def every_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1) @ value


def keys_up_to_the_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Latent i sees keys 0..i, counted from the first: never more than 64 of the 321."""
    later = torch.arange(key.shape[1])[None, :] > torch.arange(query.shape[1])[:, None]
    logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    return logits.masked_fill(later, -math.inf).softmax(-1) @ value


def sdpa_as_transformers_called_it(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The defect of transformers 4.52 to 5.0: an attention without a mask was taken for a decoder's."""
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def resampler_by_hand(policy: KosmosPolicy, pixels: Tensor, attend: Attend) -> Tensor:
    vision = policy.backbone.vision_model.model
    x = vision.post_layernorm(vision(pixel_values=pixels).last_hidden_state)
    x = x / x.norm(dim=-1, keepdim=True)
    projection = policy.backbone.image_to_text_projection
    attention, latents = projection.x_attn, projection.latent_query
    heads = policy.kosmos.text_config.attention_heads
    tokens = []
    for image in x:
        keys = torch.cat([projection.dense(image), latents])
        parts = attention.q_proj(latents), attention.k_proj(keys), attention.v_proj(keys)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in parts)
        tokens.append(attention.out_proj(attend(query, key, value).transpose(0, 1).flatten(1)))
    return torch.stack(tokens)


@pytest.mark.parametrize(
    ("causal", "attend"), [(False, every_key), (True, keys_up_to_the_query), (True, sdpa_as_transformers_called_it)]
)
def test_the_resampler_is_attention_by_hand(synthetic: MakeSynthetic, causal: bool, attend: Attend) -> None:
    policy = load(synthetic(SyntheticOptions()).checkpoint, x_attn_causal=causal).policy
    pixels = random_pixels(2)
    tokens = policy.image_tokens(pixels)
    torch.testing.assert_close(tokens, resampler_by_hand(policy, pixels, attend), atol=TOLERANCE, rtol=0)
    other = resampler_by_hand(policy, pixels, every_key if causal else keys_up_to_the_query)
    assert (tokens - other).abs().max() > 100 * TOLERANCE


# --- action head and stream ---------------------------------------------------------------------------------------------


def lstm_by_hand(rnn: nn.LSTM, features: Tensor) -> Tensor:
    """[l, in] to [l, H] from a zero state, gate order i, f, g, o."""
    weights = dict(rnn.named_parameters())
    x = features
    for layer in range(rnn.num_layers):
        h = c = torch.zeros(rnn.hidden_size)
        outputs = []
        for step in x:
            gates = weights[f"weight_ih_l{layer}"] @ step + weights[f"bias_ih_l{layer}"]
            gates = gates + weights[f"weight_hh_l{layer}"] @ h + weights[f"bias_hh_l{layer}"]
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
    return x


def mlp_by_hand(mlp: nn.Module, x: Tensor) -> Tensor:
    layers = dict(mlp.named_parameters())
    for index in (0, 2, 4, 6):
        x = x @ layers[f"mlp.{index}.weight"].T + layers[f"mlp.{index}.bias"]
        x = x.clamp(min=0) if index < 6 else x
    return x


@pytest.mark.parametrize("kind", ["actions_gripper", "velocities", "classes"])
@pytest.mark.parametrize("latent", [1, 2])
def test_heads_are_their_formulas(kind: str, latent: int) -> None:
    torch.manual_seed(0)
    spec = HeadSpec(kind, outputs=3, hidden=10, layers=2, latent=latent, pooling=False)  # type: ignore[arg-type]
    head = ActionHead(spec, width=6, chunk=4)
    features = torch.randn(1, 5, latent * 6)

    hidden = lstm_by_hand(head.rnn, features[0])
    if kind == "actions_gripper":
        arm = mlp_by_hand(head.actions, hidden).tanh().reshape(5, 4, 2)
        expected = torch.cat([arm, mlp_by_hand(head.gripper, hidden).reshape(5, 4, 1)], dim=-1)
    elif kind == "velocities":
        expected = mlp_by_hand(head.velocities, hidden).tanh().reshape(5, 4, 3)
    else:
        expected = (hidden @ head.logits.weight.T + head.logits.bias).reshape(5, 4, 3)

    torch.testing.assert_close(head(features)[0], expected)


def test_pooling_as_many_tokens_as_bins_keeps_them() -> None:
    """Upstream pools with AdaptiveMaxPool1d(latent) over the tokens, of which there are `latent`."""
    spec = HeadSpec("velocities", outputs=2, hidden=4, layers=1, latent=3, pooling=True)
    head = ActionHead(spec, width=5, chunk=2)
    tokens = torch.randn(2, 3, 5)
    pooled = nn.AdaptiveMaxPool1d(3)(tokens.transpose(1, 2)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(head.reduce(tokens), pooled)
    torch.testing.assert_close(
        ActionHead(dataclasses.replace(spec, pooling=False), width=5, chunk=2).reduce(tokens), pooled
    )


def test_the_stream_sees_the_last_window_and_no_more(synthetic: MakeSynthetic) -> None:
    policy = load(synthetic(SyntheticOptions()).checkpoint).policy
    window = policy.spec.window
    frames = np.random.default_rng(0).integers(0, 256, (window + 2, 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    ids = np.array(IDS)
    stream = ReferenceStream(policy, ids, np.ones_like(ids))

    last = [stream.step(frame) for frame in frames][-1]

    pixels = normalize_frames(frames[-window:])[None]
    chunks = policy(pixels, torch.tensor([IDS]), torch.ones(1, len(IDS), dtype=torch.int64))
    np.testing.assert_allclose(last.action, chunks[0, -1], atol=TOLERANCE)
    assert last.image_tokens.shape == (LATENTS, 64)
    assert last.feature.shape == (64,)
    assert last.action.shape == (10, 7)
    assert {value.dtype.name for value in (last.image_tokens, last.feature, last.action)} == {"float32"}


def test_frames_are_normalized_as_clip_does() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (frames / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    actual = normalize_frames(frames)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    np.testing.assert_allclose(actual, np.moveaxis(expected, -1, -3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalize_frames(frames, (0, 0, 0), (1, 1, 1)).amax(), frames.max() / 255)


def test_robovlms_own_resampler_computes_what_its_paper_says(synthetic: MakeSynthetic) -> None:
    """Flamingo's Perceiver resampler, written down again from its weights alone."""
    policy = load(synthetic(SyntheticOptions(vision_resampler=True)).checkpoint).policy
    weights = {name: value.double() for name, value in policy.vision_resampler.state_dict().items()}
    tokens = torch.randn(2, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    latents = weights["latents"].expand(2, -1, -1)
    for layer in range(6):
        path = f"layers.{layer}"
        own, media = norm(latents, f"{path}.0.norm_latents"), norm(tokens, f"{path}.0.norm_media")
        seen = torch.cat([media, own], dim=1)
        q = (own @ weights[f"{path}.0.to_q.weight"].T).reshape(2, 64, 8, 64)
        k, v = (part.reshape(2, 128, 8, 64) for part in (seen @ weights[f"{path}.0.to_kv.weight"].T).split(512, dim=-1))
        shares = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8.0).softmax(-1)
        heads = torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(2, 64, 512)
        latents = latents + heads @ weights[f"{path}.0.to_out.weight"].T
        inner = norm(latents, f"{path}.1.0") @ weights[f"{path}.1.1.weight"].T
        latents = latents + (inner / 2 * (1 + torch.erf(inner / 2**0.5))) @ weights[f"{path}.1.3.weight"].T
    expected = norm(latents, "norm")

    got = policy.vision_resampler(tokens.float())
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-3)
