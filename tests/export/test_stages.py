"""Every shortcut of the stages changes nothing: in float64, against the reference with its adapters unmerged.

In float64 two orders of the same sums differ by some 1e-15, so 1e-10 tells an exact shortcut from an approximation.
Beside each proof stands what the comparison would see if the shortcut were wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bundle.errors import PromptError
from export import stages
from export.ops import TorchOps
from export.stages import MASKED
from export.to_onnx import round_up
from runtime.prompt import Layout, assemble
from tests.policies import (
    EOS,
    LATENTS,
    PAD,
    VOCAB,
    RecordingOps,
    Row,
    TinyOptions,
    TinyPolicy,
    exact_ops,
    exact_row,
    features_of_images,
    largest,
    module_outputs,
    normalized_pixels,
    prompt_ids,
    reference_actions,
    reference_features,
    reference_images,
    run_action_head,
    run_language,
    run_vision,
    tiny_policy,
    visible,
    visible_slots,
    zero_states,
)

EXACT = 1e-10
# What a wrong variant must differ by at least to count as seen: far more than rounding, in float32 too.
SEEN = 1e-3
WORDS = 6

UPSTREAM = TinyOptions()
FORK = TinyOptions(head="velocities", packing="fork_overwrite")
TOLD = (TinyOptions(head="classes", told=True), TinyOptions(head="classes", told=True, packing="fork_overwrite"))
VARIANTS = (
    UPSTREAM,
    TinyOptions(lora=False),
    TinyOptions(head="velocities"),
    TinyOptions(head="classes"),
    TinyOptions(hand_camera=True),
    TinyOptions(latent=2),
    TinyOptions(latent=2, pooling=True, head="velocities"),
    TinyOptions(latent=3, hand_camera=True, head="classes"),
    TinyOptions(x_attn_causal=True),
    TinyOptions(x_attn_causal=True, hand_camera=True, latent=2),
    TinyOptions(vision_resampler=True),
    TinyOptions(vision_resampler=True, hand_camera=True, scale_embedding=False),
    TinyOptions(vision_resampler=True, packing="fork_overwrite"),
    TinyOptions(head="classes", told=True),
    TinyOptions(head="classes", told=True, latent=2, hand_camera=True, scale_embedding=False),
    TinyOptions(head="classes", told=True, packing="fork_overwrite"),
    TinyOptions(norm="none"),
    TinyOptions(scale_embedding=False),
    TinyOptions(text_layers=1, vision_layers=1, lstm_layers=1),
    TinyOptions(text_layers=4, vision_layers=3, lstm_layers=4),
    TinyOptions(window=1),
    TinyOptions(window=2),
    TinyOptions(window=5),
    FORK,
    TinyOptions(head="classes", packing="fork_overwrite", x_attn_causal=True),
    TinyOptions(head="actions_gripper", packing="fork_overwrite", lora=False),
)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Hugging Face makes its masks in torch's default type."""
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode():
        yield
    torch.set_default_dtype(torch.float32)


def images_and_features(tiny: TinyPolicy, ids: list[int], count: int = 2) -> tuple[Tensor, Tensor]:
    """The reference's scaled image tokens and its features, of `count` frames."""
    images = reference_images(tiny, tiny.frames(count))
    return images * tiny.dims.embed_scale, features_of_images(tiny, images, ids)


# --- all of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options.name)
def test_the_three_stages_are_the_reference(options: TinyOptions) -> None:
    """Frames in, actions out, for three windows and after a reset; image tokens and features on the way."""
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS)
    row = exact_row(tiny, visible_slots(tiny, ids), ids=ids)
    for seed, count in ((0, 3 * options.window), (1, 2)):
        frames = tiny.frames(count, seed)
        images = run_vision(tiny, frames)
        features = run_language(tiny, images, row)
        actions = run_action_head(tiny, features)

        expected_images = reference_images(tiny, frames)
        expected_features = features_of_images(tiny, expected_images, ids)
        expected_actions = reference_actions(tiny, expected_features)

        assert largest(images, expected_images * tiny.dims.embed_scale) < EXACT
        assert largest(features, expected_features) < EXACT
        assert largest(actions, expected_actions) < EXACT
        # A constant would agree as well.
        assert expected_features.std(0).max() > SEEN
        assert expected_actions.std(0).max() > SEEN


@pytest.mark.parametrize("options", [UPSTREAM, FORK, TinyOptions(hand_camera=True, latent=2, window=2)])
def test_one_frame_a_tick_is_the_training_forward_over_whole_windows(options: TinyOptions) -> None:
    """KosmosPolicy.forward encodes all frames of a window at once; the stages see each frame once, when it is new."""
    tiny = tiny_policy(options)
    window = options.window
    ids = prompt_ids(WORDS)
    tokens, mask = torch.tensor([ids]), torch.tensor([visible(ids)])
    frames = tiny.frames(window + 2)
    pixels = normalized_pixels(tiny, frames)

    row = exact_row(tiny, visible_slots(tiny, ids))
    actions = run_action_head(tiny, run_language(tiny, run_vision(tiny, frames), row))

    first = tiny.policy(pixels[None, :window], tokens, mask)[0]
    assert largest(actions[:window], first) < EXACT
    for end in range(window + 1, window + 3):
        slid = tiny.policy(pixels[None, end - window : end], tokens, mask)[0, -1]
        assert largest(actions[end - 1], slid) < EXACT
    if window > 1:
        assert largest(actions[window], first[-1]) > SEEN


def run_stages(tiny: TinyPolicy) -> Tensor:
    ids = prompt_ids(LATENTS + 3)
    images = run_vision(tiny, tiny.frames(2))
    features = run_language(tiny, images, exact_row(tiny, visible_slots(tiny, ids)))
    return run_action_head(tiny, features)


@pytest.mark.parametrize(
    "options", [UPSTREAM, FORK, TinyOptions(head="classes", lora=False, x_attn_causal=True)], ids=lambda o: o.name
)
def test_every_weight_is_seen(options: TinyOptions) -> None:
    """A weight changed by a millionth shows in the actions: what the proofs above compare depends on all of them.

    Exempt are the biases of keys, which no softmax can see, and the tables that only the prompt is made of.
    """
    tiny = tiny_policy(options)
    before = run_stages(tiny)
    unseen = []
    for name, tensor in tiny.weights.state.items():
        generator = torch.Generator().manual_seed(0)
        nudged = tensor + 1e-6 * torch.randn(tensor.shape, generator=generator)
        if largest(run_stages(tiny.with_state({name: nudged})), before) < EXACT:
            unseen.append(name)
    prompt_only = {"action_token", "backbone.text_model.model.embed_tokens.weight"}
    keys = {name for name in tiny.weights.state if name.endswith("k_proj.bias")}
    assert len(keys) == options.text_layers + options.vision_layers + 1
    assert set(unseen) == prompt_only | keys


# --- LoRA -----------------------------------------------------------------------------------------------------------------


def test_merged_weights_are_the_adapters_forward() -> None:
    tiny = tiny_policy(UPSTREAM)
    assert len(tiny.policy.adapted) == 6 * 2 + 6 * 2 + 5
    for path in tiny.policy.adapted:
        module = tiny.policy.backbone.get_submodule(path)
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
        name = f"backbone.{path}"

        merged = nn.functional.linear(x, tiny.weights.weight(name), tiny.weights.bias(name))

        assert largest(merged, module(x)) < EXACT
        for wrong in (0.0, 1.0, -tiny.weights.scaling):
            other = dataclasses.replace(tiny.weights, scaling=wrong)
            assert largest(nn.functional.linear(x, other.weight(name), other.bias(name)), module(x)) > SEEN


# --- vision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hand_camera", [False, True])
@pytest.mark.parametrize("norm", ["clip", "none"])
def test_pixel_scaling_and_centring_fold_into_the_patches(norm: str, hand_camera: bool) -> None:
    """uint8 through the folded weights is what Hugging Face's embeddings give for normalised floats."""
    tiny = tiny_policy(TinyOptions(norm=norm, hand_camera=hand_camera))  # type: ignore[arg-type]
    frames = tiny.frames(1)
    frames[0, :, 0], frames[0, :, 1] = 0, 255
    ops = RecordingOps()
    stages.vision(ops, tiny.weights, tiny.dims, torch.from_numpy(frames[0]))

    embeddings = tiny.policy.backbone.vision_model.model.embeddings
    expected = embeddings(normalized_pixels(tiny, frames[0])).flatten(0, 1)

    assert largest(ops.inputs["pre_norm"], expected) < EXACT
    # What goes into the GEMM is exact in fp16: whole numbers from -128 to 127.
    patches = ops.inputs["patches/projection"]
    assert torch.equal(patches, patches.to(torch.float16).double())
    assert (float(patches.min()), float(patches.max())) == (-128.0, 127.0)


@pytest.mark.parametrize("wrong", ["mean", "std", "channels"])
def test_a_wrong_pixel_norm_is_seen(wrong: str) -> None:
    tiny = tiny_policy(UPSTREAM)
    mean, std = tiny.dims.mean, tiny.dims.std
    changed = {
        "mean": {"mean": (0.5, 0.5, 0.5)},
        "std": {"std": (0.5, 0.5, 0.5)},
        "channels": {"mean": mean[::-1], "std": std[::-1]},
    }
    frames = tiny.frames(1)
    other = dataclasses.replace(tiny, dims=dataclasses.replace(tiny.dims, **changed[wrong]))
    assert largest(run_vision(other, frames), run_vision(tiny, frames)) > SEEN


@pytest.mark.parametrize("layer", [0, 1])
def test_vision_qkv_is_one_gemm_with_the_scale_in_its_queries(layer: int) -> None:
    tiny = tiny_policy(UPSTREAM)
    frames = tiny.frames(1)
    path = f"vision_model.model.encoder.layers.{layer}.self_attn"
    ops = RecordingOps()
    with module_outputs(tiny.policy, [f"{path}.{part}_proj" for part in "qkv"]) as seen:
        tiny.policy.image_tokens(normalized_pixels(tiny, frames[0]))
    stages.vision(ops, tiny.weights, tiny.dims, torch.from_numpy(frames[0]))

    q, k, v = ops.outputs[f"layers.{layer}/qkv"].chunk(3, 1)
    scale = tiny.policy.backbone.get_submodule(path).scale
    assert scale != 1
    assert largest(q, seen[f"{path}.q_proj"][0][0] * scale) < EXACT
    assert largest(k, seen[f"{path}.k_proj"][0][0]) < EXACT
    assert largest(v, seen[f"{path}.v_proj"][0][0]) < EXACT
    assert largest(q, k) > SEEN


def test_vision_tokens_have_length_one_however_short_they_were() -> None:
    """Only below 1e-12 does the floor count, which keeps a token of zeros from becoming NaN."""
    tiny = tiny_policy(UPSTREAM)
    frames = tiny.frames(1)
    norm = "backbone.vision_model.model.post_layernorm"
    images = run_vision(tiny, frames)

    def scaled(by: float) -> Tensor:
        parts = {f"{norm}.{part}": tiny.weights.state[f"{norm}.{part}"] * by for part in ("weight", "bias")}
        return run_vision(tiny.with_state(parts), frames)

    assert largest(scaled(1e-6), images) < EXACT
    assert largest(scaled(1e6), images) < EXACT
    assert largest(scaled(1e-15), images) > SEEN
    nothing = scaled(0.0)
    assert torch.isfinite(nothing).all()
    assert largest(nothing, scaled(1e-30)) < EXACT


@pytest.mark.parametrize("hand_camera", [False, True])
def test_the_resamplers_constants_are_what_it_computes_from_its_latents(hand_camera: bool) -> None:
    """Queries, keys and values of the latents do not depend on the picture; dense and key-value are one Linear."""
    tiny = tiny_policy(TinyOptions(hand_camera=hand_camera))
    frames = tiny.frames(1)
    path = "image_to_text_projection.x_attn"
    ops = RecordingOps()
    with module_outputs(tiny.policy, [f"{path}.{part}_proj" for part in "qkv"]) as seen:
        tiny.policy.image_tokens(normalized_pixels(tiny, frames[0]))
    stages.vision(ops, tiny.weights, tiny.dims, torch.from_numpy(frames[0]))

    tokens = tiny.dims.patches + 1
    heads = tiny.dims.heads
    expected = {part: seen[f"{path}.{part}_proj"][0] for part in "qkv"}
    queries = ops.constants["resampler/queries"].transpose(1, 2).flatten(2)
    latent_keys = ops.constants["resampler/latent_keys"].permute(0, 3, 1, 2).flatten(2)
    latent_values = ops.constants["resampler/latent_values"].transpose(1, 2).flatten(2)
    k, v = ops.outputs["resampler/kv"].unflatten(0, (tiny.cameras, tokens)).chunk(2, 2)

    assert largest(queries.expand(tiny.cameras, -1, -1), expected["q"] * (tiny.dims.width // heads) ** -0.5) < EXACT
    assert largest(k, expected["k"][:, :tokens]) < EXACT
    assert largest(v, expected["v"][:, :tokens]) < EXACT
    assert len(queries) == 1
    assert largest(latent_keys, expected["k"][:, tokens:]) < EXACT
    assert largest(latent_values, expected["v"][:, tokens:]) < EXACT
    other = stages.vision(exact_ops(), tiny.weights, tiny.dims, torch.from_numpy(tiny.frames(1, seed=1)[0]))
    assert largest(other, ops.outputs["resampler/out"][None]) > SEEN


def test_the_embedding_scale_sits_in_the_resamplers_output() -> None:
    scaled, plain = tiny_policy(UPSTREAM), tiny_policy(TinyOptions(scale_embedding=False))
    assert scaled.dims.embed_scale == scaled.dims.width**0.5
    assert plain.dims.embed_scale == 1
    frames = scaled.frames(1)
    images = run_vision(plain, frames)
    assert largest(run_vision(scaled, frames), images * scaled.dims.embed_scale) < EXACT
    assert largest(images, reference_images(plain, frames)) < EXACT


def test_a_causal_resampler_never_looks_behind_its_latents() -> None:
    """Only the first LATENTS tokens of a picture go in; the causal reference does not see the others either."""
    tiny = tiny_policy(TinyOptions(x_attn_causal=True))
    free = tiny_policy(UPSTREAM)
    frames = tiny.frames(1)
    ops = RecordingOps()
    images = stages.vision(ops, tiny.weights, tiny.dims, torch.from_numpy(frames[0]))
    assert ops.inputs["resampler/kv"].shape[0] == LATENTS < tiny.dims.patches + 1
    assert "resampler/latent_keys" not in ops.constants
    assert largest(images, reference_images(tiny, frames) * tiny.dims.embed_scale) < EXACT
    assert largest(images, run_vision(free, frames)) > SEEN

    def noise_behind_the_latents(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, LATENTS:] += 1
        return output

    for policy, sees in ((tiny, False), (free, True)):
        before = reference_images(policy, frames)
        dense = policy.policy.backbone.image_to_text_projection.dense
        hook = dense.register_forward_hook(noise_behind_the_latents)
        try:
            after = reference_images(policy, frames)
        finally:
            hook.remove()
        assert (largest(after, before) > SEEN) == sees
        assert (largest(after, before) == 0) != sees


def test_two_cameras_do_not_mix() -> None:
    """Each camera is a batch row of its own, and their order counts."""
    tiny = tiny_policy(TinyOptions(hand_camera=True))
    frames = tiny.frames(1)
    both = run_vision(tiny, frames)
    swapped = run_vision(tiny, frames[:, ::-1].copy())
    assert largest(swapped, both.unflatten(1, (2, LATENTS)).flip(1).flatten(1, 2)) < EXACT
    assert largest(swapped, both) > SEEN


# --- language: what is in a row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "length"),
    [
        (UPSTREAM, 2),
        (UPSTREAM, 6),
        (UPSTREAM, 30),
        (TinyOptions(latent=2, hand_camera=True), 6),
        (FORK, 2),
        (FORK, LATENTS - 1),
        (FORK, LATENTS),
        (FORK, LATENTS + 1),
        (FORK, 30),
    ],
    ids=lambda value: value.name if isinstance(value, TinyOptions) else str(value),
)
def test_features_are_the_references_for_every_prompt_length(options: TinyOptions, length: int) -> None:
    tiny = tiny_policy(options)
    ids = prompt_ids(length)
    images, expected = images_and_features(tiny, ids)
    row = exact_row(tiny, visible_slots(tiny, ids))
    assert largest(run_language(tiny, images, row), expected) < EXACT
    other = visible_slots(tiny, prompt_ids(length + 1))
    assert largest(run_language(tiny, images, exact_row(tiny, other)), expected) > SEEN


def test_the_end_of_the_text_cannot_be_seen() -> None:
    """`</s>` stands behind the action token: any other token there gives the same feature, so it is not in the row."""
    tiny = tiny_policy(UPSTREAM)
    ids = prompt_ids(WORDS)
    images, expected = images_and_features(tiny, ids)
    unscaled = images / tiny.dims.embed_scale
    assert largest(features_of_images(tiny, unscaled, [*ids[:-1], 40]), expected) < EXACT
    assert largest(features_of_images(tiny, unscaled, [*ids[:-2], 40, EOS]), expected) > SEEN

    slots = visible_slots(tiny, ids)
    assert EOS not in slots.token
    assert slots.length == LATENTS + len(ids) - 1 + 1


@pytest.mark.parametrize("options", [UPSTREAM, FORK, TinyOptions(latent=2)], ids=lambda options: options.name)
@pytest.mark.parametrize("pad_to", [7, 12, 40])
def test_masked_slots_go_but_positions_stay(options: TinyOptions, pad_to: int) -> None:
    """A padded prompt moves the action token; the pads themselves cannot be seen, and take no room in the row."""
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS, pad_to=pad_to)
    images, expected = images_and_features(tiny, ids)
    slots = visible_slots(tiny, ids)

    assert largest(run_language(tiny, images, exact_row(tiny, slots)), expected) < EXACT

    natural = prompt_ids(WORDS)
    # Upstream keeps `</s>`, which in a padded prompt stands before the action token.
    assert slots.length == visible_slots(tiny, natural).length + int(options.packing == "upstream")
    hidden = int(slots.position[-1]) + 1 - slots.length
    assert hidden == (max(pad_to, LATENTS) - WORDS if options is FORK else pad_to - WORDS - 1)
    if hidden:
        compact = dataclasses.replace(slots, position=np.arange(slots.length))
        assert largest(run_language(tiny, images, exact_row(tiny, compact)), expected) > SEEN
    if pad_to > (LATENTS if options is FORK else WORDS):
        unpadded = features_of_images(tiny, images / tiny.dims.embed_scale, natural)
        assert largest(unpadded, expected) > SEEN


@settings(max_examples=60)
@given(data=st.data())
def test_any_prompt_with_any_mask_is_the_references(data: st.DataObject) -> None:
    options = data.draw(st.sampled_from([UPSTREAM, FORK, TinyOptions(latent=2, hand_camera=True)]))
    tiny = tiny_policy(options)
    token = st.integers(0, VOCAB - 1)
    ids = data.draw(st.lists(token, min_size=2, max_size=14))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    with torch.inference_mode():
        images = reference_images(tiny, tiny.frames(1))
        expected = features_of_images(tiny, images, ids, mask)
        row = exact_row(tiny, visible_slots(tiny, ids, mask))
        assert largest(run_language(tiny, images * tiny.dims.embed_scale, row), expected) < EXACT


@pytest.mark.parametrize("options", [UPSTREAM, FORK, TinyOptions(latent=2)], ids=lambda options: options.name)
def test_padding_behind_the_action_token_cannot_be_seen(options: TinyOptions) -> None:
    """The same feature from buckets of several sizes, whatever stands in the slots that fill them up."""
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS)
    slots = visible_slots(tiny, ids)
    images, expected = images_and_features(tiny, ids)
    smallest = round_up(slots.length)
    for bucket in (slots.length, smallest, smallest + 8, smallest + 32):
        for filler in (0.0, 7.0):
            row = exact_row(tiny, slots, bucket=bucket, filler=filler)
            assert row.sequence == bucket
            assert largest(run_language(tiny, images, row), expected) < EXACT

    row = exact_row(tiny, slots)
    before = row.prompt.clone()
    before[0, slots.length - slots.latent - 1] *= -1
    assert largest(run_language(tiny, images, dataclasses.replace(row, prompt=before)), expected) > SEEN


def test_image_tokens_go_where_the_layout_says() -> None:
    """The fork lays them over the first slots, so the words of a short prompt cannot be seen; upstream's can."""
    for options, sees in ((UPSTREAM, True), (FORK, False)):
        tiny = tiny_policy(options)
        ids, other = prompt_ids(WORDS), prompt_ids(WORDS, seed=1)
        images, expected = images_and_features(tiny, ids)
        features = run_language(tiny, images, exact_row(tiny, visible_slots(tiny, other)))
        assert (largest(features, expected) > SEEN) == sees
        flipped = run_language(tiny, images.flip(1), exact_row(tiny, visible_slots(tiny, ids)))
        assert largest(flipped, expected) > SEEN


@pytest.mark.parametrize("options", [UPSTREAM, FORK, TinyOptions(latent=2, hand_camera=True)], ids=lambda o: o.name)
def test_the_prepared_prompt_is_embedding_times_scale_plus_position(options: TinyOptions) -> None:
    """The runtime's tensors, in float32, against the decoder's own tables: only rounding lies between them."""
    tiny = tiny_policy(options)
    slots = visible_slots(tiny, prompt_ids(LATENTS + 3))
    table = tiny.weights.state["backbone.text_model.model.embed_tokens.weight"]
    embedding = torch.cat([table, tiny.weights.state["action_token"][None]]).numpy()
    bucket = round_up(slots.length)
    prepared = assemble(
        slots, embedding, bucket=bucket, embed_scale=tiny.dims.embed_scale, image_tokens=tiny.dims.image_tokens
    )
    row = exact_row(tiny, slots)
    assert prepared.prompt.dtype == "float32"
    assert largest(torch.from_numpy(prepared.prompt).double(), row.prompt) < 1e-5
    assert torch.equal(torch.from_numpy(prepared.image_index), row.image_index)
    assert torch.equal(torch.from_numpy(prepared.action_index), row.action_index)

    shifted = dataclasses.replace(slots, position=slots.position + 1)
    assert largest(exact_row(tiny, shifted).prompt, row.prompt) > SEEN


@pytest.mark.parametrize("options", TOLD, ids=lambda options: options.name)
@pytest.mark.parametrize("pad_to", [None, WORDS + 5])
def test_a_head_that_is_told_hears_the_mean_of_the_whole_prompt(options: TinyOptions, pad_to: int | None) -> None:
    """Special tokens and padding count; what is added is the same for every frame, whatever the row shows of the words."""
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS, pad_to=pad_to)
    table = tiny.weights.state["backbone.text_model.model.embed_tokens.weight"]
    weight, bias = (tiny.weights.state[f"act_head.instr_proj.{leaf}"] for leaf in ("weight", "bias"))
    told = weight @ (sum(table[token] for token in ids) / len(ids)) + bias
    assert told.abs().max() > SEEN
    deaf = dataclasses.replace(tiny.policy.act_head.spec, told=False)

    images = reference_images(tiny, tiny.frames(2))
    heard = features_of_images(tiny, images, ids)
    tiny.policy.act_head.spec, kept = deaf, tiny.policy.act_head.spec
    try:
        unheard = features_of_images(tiny, images, ids)
    finally:
        tiny.policy.act_head.spec = kept
    assert largest(heard, unheard + told) < EXACT

    row = exact_row(tiny, visible_slots(tiny, ids), ids=ids, filler=3.0)
    assert largest(run_language(tiny, images * tiny.dims.embed_scale, row), heard) < EXACT


@pytest.mark.parametrize("options", TOLD, ids=lambda options: options.name)
def test_the_prepared_prompt_holds_what_a_head_is_told(options: TinyOptions) -> None:
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS, pad_to=WORDS + 3)
    slots = visible_slots(tiny, ids)
    table = tiny.weights.state["backbone.text_model.model.embed_tokens.weight"]
    embedding = torch.cat([table, tiny.weights.state["action_token"][None]]).numpy()
    sizes = {"embed_scale": tiny.dims.embed_scale, "image_tokens": tiny.dims.image_tokens}
    prepared = assemble(slots, embedding, bucket=round_up(slots.length + 1), told=np.array(ids), **sizes)
    row = exact_row(tiny, slots, ids=ids)
    assert largest(torch.from_numpy(prepared.prompt).double(), row.prompt) < 1e-5
    assert torch.equal(torch.from_numpy(prepared.action_index), row.action_index)
    # An id that the row does not show counts too.
    with pytest.raises(PromptError, match="outside the vocabulary"):
        assemble(slots, embedding, bucket=round_up(slots.length + 1), told=np.array([*ids, VOCAB]), **sizes)


# --- language: inside the decoder -----------------------------------------------------------------------------------------


def language_recorded(tiny: TinyPolicy, ids: list[int]) -> tuple[RecordingOps, Layout, Tensor]:
    slots = visible_slots(tiny, ids)
    images, _ = images_and_features(tiny, ids, 1)
    ops = RecordingOps()
    run_language(tiny, images, exact_row(tiny, slots), ops)
    return ops, slots, images / tiny.dims.embed_scale


def test_language_qkv_is_one_gemm_with_the_scale_in_its_queries() -> None:
    tiny = tiny_policy(UPSTREAM)
    ids = prompt_ids(WORDS)
    path = "text_model.model.layers.0.self_attn"
    ops, slots, images = language_recorded(tiny, ids)
    with module_outputs(tiny.policy, [f"{path}.{part}_proj" for part in "qkv"]) as seen:
        features_of_images(tiny, images, ids)
    q, k, v = ops.outputs["layers.0/qkv"][: slots.length].chunk(3, 1)
    scale = tiny.policy.backbone.get_submodule(path).scaling
    assert scale != 1
    for part, name, factor in ((q, "q", scale), (k, "k", 1.0), (v, "v", 1.0)):
        expected = seen[f"{path}.{name}_proj"][0][0, : slots.length]
        assert largest(part, expected * factor) < EXACT
        assert largest(part, expected * 1.01) > SEEN


@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_layer_works_for_the_action_slots_only(layers: int, latent: int) -> None:
    """Keys and values of all slots, everything else of `latent` rows, and those rows are the reference's."""
    tiny = tiny_policy(TinyOptions(text_layers=layers, latent=latent))
    ids = prompt_ids(WORDS)
    ops, slots, images = language_recorded(tiny, ids)
    sequence = round_up(slots.length)
    last = f"layers.{layers - 1}"
    rows = {name: len(x) for name, x in ops.inputs.items()}
    assert rows[f"{last}/kv"] == sequence
    for name in ("q", "inner_norm", "out", "norm2", "fc1", "ffn_norm", "fc2"):
        assert rows[f"{last}/{name}"] == latent
    assert rows["final_norm"] == latent
    for layer in range(layers - 1):
        assert {rows[f"layers.{layer}/{name}"] for name in ("qkv", "out", "fc1", "fc2")} == {sequence}

    path = f"text_model.model.layers.{layers - 1}"
    names = [f"{path}.self_attn.out_proj", f"{path}.ffn.fc1", f"{path}.ffn.fc2", "text_model.model.layer_norm"]
    with module_outputs(tiny.policy, names) as seen:
        features_of_images(tiny, images, ids)
    slice_ = tiny.policy.action_slots(len(ids), 1)
    for name, ours in zip(names, (f"{last}/out", f"{last}/fc1", f"{last}/fc2", "final_norm"), strict=True):
        assert largest(ops.outputs[ours], seen[name][0][0, slice_]) < EXACT
        before = slice(slice_.start - 1, slice_.stop - 1)
        assert largest(ops.outputs[ours], seen[name][0][0, before]) > SEEN


def test_the_causal_mask_hides_completely() -> None:
    """exp(MASKED) is nothing, in float32 and beside any score that a head can have; and it fits fp16."""
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([[0.0, MASKED], [-200.0, 200.0 + MASKED]], dtype=dtype)
        assert torch.equal(scores.softmax(-1)[:, 1], torch.zeros(2, dtype=dtype))
    assert float(torch.tensor(MASKED, dtype=torch.float16)) == pytest.approx(MASKED, rel=1e-3)


def test_a_mask_that_shows_the_future_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_policy(UPSTREAM)
    ids = prompt_ids(WORDS)
    row = exact_row(tiny, visible_slots(tiny, ids))
    images, expected = images_and_features(tiny, ids)
    monkeypatch.setattr(stages, "MASKED", 0.0)
    assert largest(run_language(tiny, images, row), expected) > SEEN


# --- action head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["actions_gripper", "velocities", "classes"])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("latent", [1, 2])
def test_staggered_states_are_the_window_run_from_zero(head: str, window: int, latent: int) -> None:
    tiny = tiny_policy(TinyOptions(head=head, window=window, latent=latent, lstm_layers=3))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(window)
    features = torch.randn(3 * window + 2, tiny.dims.feature, generator=generator)

    actions = run_action_head(tiny, features)

    assert largest(actions, reference_actions(tiny, features)) < EXACT
    # The reset: states of zeros again, and a history of nothing.
    again = run_action_head(tiny, features[:2])
    assert torch.equal(again, actions[:2])
    longer = tiny_policy(dataclasses.replace(tiny.options, window=window + 1))
    assert largest(run_action_head(longer, features), actions) > SEEN


def test_a_state_that_survives_the_reset_is_seen() -> None:
    tiny = tiny_policy(UPSTREAM)
    features = torch.randn(4, tiny.dims.feature, generator=torch.Generator().manual_seed(0))
    h, c = zero_states(tiny)
    for feature in features[:2]:
        _, h, c = stages.action_head(exact_ops(), tiny.weights, tiny.dims, feature[None], h, c)
    stale, _, _ = stages.action_head(exact_ops(), tiny.weights, tiny.dims, features[2:3], h, c)
    fresh = run_action_head(tiny, features[2:3])
    assert largest(stale, fresh) > SEEN


@pytest.mark.parametrize("window", [1, 2, 4])
def test_states_move_up_and_a_fresh_one_comes_last(window: int) -> None:
    """Row k of the states has seen the features since the k-th last start; the last row has seen none."""
    tiny = tiny_policy(TinyOptions(window=window))
    features = torch.randn(window + 3, tiny.dims.feature, generator=torch.Generator().manual_seed(1))
    h, c = zero_states(tiny)
    for feature in features:
        _, h, c = stages.action_head(exact_ops(), tiny.weights, tiny.dims, feature[None], h, c)
    for row in range(window):
        since = features[len(features) - (window - 1 - row) :] if row < window - 1 else features[:0]
        if len(since) == 0:
            assert not h[row].any()
            assert not c[row].any()
            continue
        _, (expected_h, expected_c) = tiny.policy.act_head.rnn(since[None])
        assert largest(h[row], expected_h[:, 0]) < EXACT
        assert largest(c[row], expected_c[:, 0]) < EXACT


# --- rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [UPSTREAM, FORK], ids=lambda options: options.name)
def test_in_fp16_the_stages_stay_near_the_reference(options: TinyOptions) -> None:
    """The same lines in fp16 with fp32 islands: close, and not so close that the types could be ignored."""
    tiny = tiny_policy(options)
    ids = prompt_ids(WORDS)
    frames = tiny.frames(2)
    expected_images = reference_images(tiny, frames) * tiny.dims.embed_scale
    expected = reference_features(tiny, frames, ids)
    row = exact_row(tiny, visible_slots(tiny, ids))
    row = Row(row.prompt.float(), row.image_index, row.action_index)
    ops = TorchOps(torch.float16, torch.float32)
    images = run_vision(tiny, frames, ops)
    features = run_language(tiny, images, row, ops)
    assert images.dtype == features.dtype == torch.float32
    assert 1e-6 < largest(images.double(), expected_images) < 5e-2
    assert 1e-6 < largest(features.double(), expected) < 5e-2
    assert PAD not in ids
