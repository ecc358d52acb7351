"""The three stages, as little work as the mathematics allows.

Written in the vocabulary of export/ops.py and nothing else, so that the same lines are executed by torch and written down as ONNX. Every
shortcut against the reference (train/policy.py) is exact, and tests/export/test_stages.py proves each in float64:

* vision: pixel scaling, mean and std live in the patch weights; the resampler's queries and the latents' keys and values are
  constants; its dense layer is composed with the key and value projections; the embedding scale sits in its output projection.
* language: attention scale in W_q; embeddings and positions come in precomputed; masked slots, `</s>` and the LM head are gone; the last
  layer computes keys and values for all slots but everything else for the action slots only.
* action_head: W staggered recurrent states advance together by one feature; the oldest, which has seen the whole window, answers.

Sources: the arithmetic is RoboVLMs' (8adc1d2) on Kosmos-2; staggering follows from LSTM(window) being a fold over features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from export.ops import Make, Ops
from export.weights import MergedWeights
from train.config import HeadSpec
from train.vision_resampler import EPS, HEAD_WIDTH, HEADS

T = TypeVar("T")
# Added to scores of slots that must not be seen: exp() of it is exactly 0 in fp32, and it fits fp16.
MASKED = -30000.0
# Middle of uint8. Centred pixels are exact in fp16, and the patch GEMM's output needs no large constant subtracted.
_PIXEL_CENTRE = 128.0
_L2_FLOOR = 1e-12


@dataclass(frozen=True)
class StageDims:
    """Sizes and conventions that the stages need."""

    image_size: int
    patch: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_eps: float
    width: int
    layers: int
    heads: int
    eps: float
    latents: int
    cameras: int
    embed_scale: float
    x_attn_causal: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window: int
    chunk: int
    head: HeadSpec
    perceiver: int = 0  # layers of RoboVLMs' own resampler

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def image_tokens(self) -> int:
        """Of all cameras together."""
        return self.cameras * self.latents

    @property
    def feature(self) -> int:
        return self.head.latent * self.width

    @property
    def hidden(self) -> int:
        """Width of the recurrent state."""
        return self.head.latent * self.head.hidden


def vision(ops: Ops[T], weights: MergedWeights, dims: StageDims, frames: T) -> T:
    """uint8 frames [cameras, s, s, 3] to scaled image tokens, fp32 [1, cameras * latents, D]."""
    root = "backbone.vision_model.model"
    tokens = dims.patches + 1
    grid, patch, width = dims.image_size // dims.patch, dims.patch, dims.vision_width
    with ops.scope("patches"):
        centre = ops.weight("centre", lambda: torch.tensor(_PIXEL_CENTRE))
        x = ops.sub(ops.compute(frames), centre)
        x = ops.transpose(ops.reshape(x, [dims.cameras * grid, patch, grid, patch * 3]), [0, 2, 1, 3])
        x = ops.reshape(x, [dims.cameras * dims.patches, patch * patch * 3])
        x = ops.island(ops.linear(x, "projection", lambda: _patch_weight(weights, dims), None))
        x = ops.reshape(x, [dims.cameras, dims.patches, width])
        x = ops.add(x, ops.weight("positions", lambda: _patch_offset(weights, dims), island=True))
        x = ops.concat([ops.weight("class_token", lambda: _class_rows(weights, dims), island=True), x], 1)
        x = ops.reshape(x, [dims.cameras * tokens, width])
    x = _norm(ops, weights, x, "pre_norm", f"{root}.pre_layrnorm", dims.vision_eps)
    for index in range(dims.vision_layers):
        path = f"{root}.encoder.layers.{index}"
        with ops.scope(f"layers.{index}"):
            y = ops.compute(_norm(ops, weights, x, "norm1", f"{path}.layer_norm1", dims.vision_eps))
            scale = (width // dims.vision_heads) ** -0.5
            qkv = _fused(ops, weights, y, "qkv", f"{path}.self_attn", {"q_proj": scale, "k_proj": 1.0, "v_proj": 1.0})
            q, k, v = ops.split(qkv, 3, 1)
            heads = (dims.cameras, tokens, dims.vision_heads)
            y = _attend(ops, _rows(ops, q, *heads), _columns(ops, k, *heads), _rows(ops, v, *heads), None)
            y = ops.reshape(y, [dims.cameras * tokens, width])
            x = ops.add(x, ops.island(_linear(ops, weights, y, "out", f"{path}.self_attn.out_proj")))
            y = ops.compute(_norm(ops, weights, x, "norm2", f"{path}.layer_norm2", dims.vision_eps))
            y = ops.quick_gelu(_linear(ops, weights, y, "fc1", f"{path}.mlp.fc1"))
            x = ops.add(x, ops.island(_linear(ops, weights, y, "fc2", f"{path}.mlp.fc2")))
    x = _norm(ops, weights, x, "post_norm", f"{root}.post_layernorm", dims.vision_eps)
    x = ops.div(x, ops.l2_norm(x, _L2_FLOOR))
    with ops.scope("resampler"):
        x = _resample(ops, weights, dims, x)
    if dims.perceiver:
        x = _perceive(ops, weights, dims, x)
    return ops.reshape(x, [1, dims.image_tokens, dims.width])


def language(
    ops: Ops[T],
    weights: MergedWeights,
    dims: StageDims,
    sequence: int,
    image_tokens: T,
    prompt: T,
    image_index: T,
    action_index: T,
) -> T:
    """One decoder row to the action feature, fp32 [1, latent * D].

    Args:
        sequence: S, the bucket.
        image_tokens: fp32 [1, cameras * latents, D], scaled (the vision stage's output).
        prompt: fp32 [1, S, D], see runtime.prompt.PromptTensors.
        image_index: int64 [S]; the image token added to a slot, or the number of image tokens for none.
        action_index: int64 [latent]; for heads that are told the instruction, its slot as the last one: [latent + 1].
    """
    root = "backbone.text_model.model"
    heads, latent = dims.heads, dims.head.latent
    scale = (dims.width // heads) ** -0.5
    # Named by its size: the graphs of all buckets share one weight file.
    mask = ops.weight(f"causal_mask.{sequence}", lambda: torch.full((sequence, sequence), MASKED).triu(1), island=True)
    nothing = ops.weight("no_image", lambda: torch.zeros(1, dims.width), island=True)
    images = ops.concat([ops.reshape(image_tokens, [dims.image_tokens, dims.width]), nothing], 0)
    row = ops.reshape(prompt, [sequence, dims.width])
    words = None
    if dims.head.told:
        words = ops.gather(row, ops.slice(action_index, 0, latent, latent + 1))
        action_index = ops.slice(action_index, 0, 0, latent)
    x = ops.add(row, ops.gather(images, image_index))
    for index in range(dims.layers):
        path = f"{root}.layers.{index}"
        with ops.scope(f"layers.{index}"):
            y = ops.compute(_norm(ops, weights, x, "norm1", f"{path}.self_attn_layer_norm", dims.eps))
            if index < dims.layers - 1:
                rows = sequence
                qkv = _fused(
                    ops, weights, y, "qkv", f"{path}.self_attn", {"q_proj": scale, "k_proj": 1.0, "v_proj": 1.0}
                )
                q, k, v = ops.split(qkv, 3, 1)
            else:
                rows = latent
                kv = _fused(ops, weights, y, "kv", f"{path}.self_attn", {"k_proj": 1.0, "v_proj": 1.0})
                k, v = ops.split(kv, 2, 1)
                q = _fused(ops, weights, ops.gather(y, action_index), "q", f"{path}.self_attn", {"q_proj": scale})
                mask = ops.gather(mask, action_index)
                x = ops.gather(x, action_index)
            y = _attend(
                ops,
                _rows(ops, q, 1, rows, heads),
                _columns(ops, k, 1, sequence, heads),
                _rows(ops, v, 1, sequence, heads),
                mask,
            )
            y = ops.island(ops.reshape(y, [rows, dims.width]))
            y = ops.compute(_norm(ops, weights, y, "inner_norm", f"{path}.self_attn.inner_attn_ln", dims.eps))
            x = ops.add(x, ops.island(_linear(ops, weights, y, "out", f"{path}.self_attn.out_proj")))
            y = ops.compute(_norm(ops, weights, x, "norm2", f"{path}.final_layer_norm", dims.eps))
            # The activation stays in the island: the LayerNorm over the wide FFN row that follows wants fp32 anyway.
            y = ops.gelu(ops.island(_linear(ops, weights, y, "fc1", f"{path}.ffn.fc1")))
            y = ops.compute(_norm(ops, weights, y, "ffn_norm", f"{path}.ffn.ffn_layernorm", dims.eps))
            x = ops.add(x, ops.island(_linear(ops, weights, y, "fc2", f"{path}.ffn.fc2")))
    x = ops.reshape(_norm(ops, weights, x, "final_norm", f"{root}.layer_norm", dims.eps), [1, dims.feature])
    return x if words is None else ops.add(x, _told(ops, weights, words))


def _told(ops: Ops[T], weights: MergedWeights, words: T) -> T:
    """What the instruction adds to every feature: words [1, D] to [1, latent * D]. In the island: it is the same at each recurrent step."""
    path = "act_head.instr_proj"
    matrix = ops.weight("told.weight", lambda: weights.weight(path).T.contiguous(), island=True)
    return ops.add(ops.matmul(words, matrix), ops.weight("told.bias", lambda: weights.bias(path), island=True))


def action_head(ops: Ops[T], weights: MergedWeights, dims: StageDims, feature: T, h: T, c: T) -> tuple[T, T, T]:
    """One feature to one chunk, and the states for the next call.

    Row k of the states has seen the last k-th-started run of features; row 0 started W frames ago (or at the reset) and answers. It is
    then dropped and a fresh zero row appended, so row 0 always holds the fold over the last min(t, W) features.

    Args:
        feature: fp32 [1, latent * D].
        h, c: fp32 [W, layers, hidden], zeros after a reset.

    Returns:
        action fp32 [1, n, A], next_h, next_c.
    """
    spec, window, hidden = dims.head, dims.window, dims.hidden
    x = ops.compute(feature)
    next_h: list[T] = []
    next_c: list[T] = []
    old_h, old_c = (_layers(ops, state, spec.layers, window, hidden) for state in (h, c))
    for layer in range(spec.layers):
        with ops.scope(f"lstm.{layer}"):
            before = ops.compute(old_h[layer])
            if layer == 0:
                # All rows get the same feature: its product is computed for one row and broadcast.
                gates = ops.linear(
                    x, "input", lambda: weights.tensor("act_head.rnn.weight_ih_l0"), lambda: _lstm_bias(weights, 0)
                )
                state = ops.linear(before, "state", lambda: weights.tensor("act_head.rnn.weight_hh_l0"), None)
                gates = ops.add(ops.island(gates), ops.island(state))
            else:
                gates = ops.island(
                    ops.linear(
                        ops.concat([x, before], 1),
                        "gates",
                        lambda layer=layer: _lstm_weight(weights, layer),  # type: ignore[misc]
                        lambda layer=layer: _lstm_bias(weights, layer),  # type: ignore[misc]
                    )
                )
            i, f, g, o = ops.split(gates, 4, 1)
            cell = ops.add(ops.mul(ops.sigmoid(f), old_c[layer]), ops.mul(ops.sigmoid(i), ops.tanh(g)))
            out = ops.mul(ops.sigmoid(o), ops.tanh(cell))
            next_c.append(cell)
            next_h.append(out)
            x = ops.compute(out)
    x = ops.slice(x, 0, 0, 1)
    if spec.kind == "actions_gripper":
        arm = ops.tanh(_mlp(ops, weights, x, "actions"))
        logit = _mlp(ops, weights, x, "gripper")
        arm = ops.reshape(arm, [1, dims.chunk, spec.outputs - 1])
        action = ops.concat([arm, ops.reshape(logit, [1, dims.chunk, 1])], 2)
    elif spec.kind == "velocities":
        action = ops.reshape(ops.tanh(_mlp(ops, weights, x, "velocities")), [1, dims.chunk, spec.outputs])
    else:
        logits = ops.island(_linear(ops, weights, x, "logits", "act_head.logits"))
        action = ops.reshape(logits, [1, dims.chunk, spec.outputs])
    fresh = ops.weight("fresh_state", lambda: torch.zeros(1, spec.layers, hidden), island=True)
    return action, _advance(ops, next_h, fresh, dims), _advance(ops, next_c, fresh, dims)


def _advance(ops: Ops[T], layers: list[T], fresh: T, dims: StageDims) -> T:
    """[W, hidden] per layer to [W, layers, hidden], without its first row and with a zero row at the end."""
    if dims.window == 1:
        return ops.concat([fresh], 0)  # a graph's output must come out of a node
    stacked = ops.concat([ops.reshape(layer, [dims.window, 1, dims.hidden]) for layer in layers], 1)
    return ops.concat([ops.slice(stacked, 0, 1, dims.window), fresh], 0)


def _layers(ops: Ops[T], state: T, layers: int, window: int, hidden: int) -> list[T]:
    return [ops.reshape(part, [window, hidden]) for part in ops.split(state, layers, 1)]


def _mlp(ops: Ops[T], weights: MergedWeights, x: T, name: str) -> T:
    with ops.scope(name):
        for index in (0, 2, 4):
            x = ops.relu(_linear(ops, weights, x, f"mlp.{index}", f"act_head.{name}.mlp.{index}"))
        return ops.island(_linear(ops, weights, x, "mlp.6", f"act_head.{name}.mlp.6"))


def _resample(ops: Ops[T], weights: MergedWeights, dims: StageDims, x: T) -> T:
    """Normalised vision tokens [cameras * tokens, E] to image tokens [cameras * latents, D], scaled by embed_scale."""
    path = "backbone.image_to_text_projection"
    tokens, width, heads = dims.patches + 1, dims.width, dims.heads
    if dims.x_attn_causal:
        # Latent i sees keys 0..i only, so no key behind the first `latents` is ever seen - the latents' own included.
        x = ops.slice(ops.reshape(x, [dims.cameras, tokens, dims.vision_width]), 1, 0, dims.latents)
        tokens = dims.latents
        x = ops.reshape(x, [dims.cameras * tokens, dims.vision_width])
    kv = ops.linear(
        ops.compute(x),
        "kv",
        lambda: torch.cat([_composed(weights, path, name)[0] for name in ("k_proj", "v_proj")]),
        lambda: torch.cat([_composed(weights, path, name)[1] for name in ("k_proj", "v_proj")]),
    )
    k, v = ops.split(kv, 2, 1)
    k, v = _columns(ops, k, dims.cameras, tokens, heads), _rows(ops, v, dims.cameras, tokens, heads)
    mask = None
    if dims.x_attn_causal:
        mask = ops.weight("causal_mask", lambda: torch.full((dims.latents, dims.latents), MASKED).triu(1), island=True)
    else:
        latent_k = ops.weight(
            "latent_keys", lambda: _latent_heads(weights, dims, "k_proj").transpose(2, 3).contiguous()
        )
        latent_v = ops.weight("latent_values", lambda: _latent_heads(weights, dims, "v_proj"))
        k, v = ops.concat([k, latent_k], 3), ops.concat([v, latent_v], 2)
    scale = (width // heads) ** -0.5
    q = ops.weight("queries", lambda: _latent_heads(weights, dims, "q_proj") * scale)
    y = ops.reshape(_attend(ops, q, k, v, mask), [dims.image_tokens, width])
    out = f"{path}.x_attn.out_proj"
    last = 1.0 if dims.perceiver else dims.embed_scale
    return ops.island(ops.linear(y, "out", lambda: weights.weight(out) * last, lambda: weights.bias(out) * last))


def _perceive(ops: Ops[T], weights: MergedWeights, dims: StageDims, x: T) -> T:
    """Image tokens [cameras * latents, D] through RoboVLMs' own resampler, scaled by embed_scale (train/vision_resampler.py)."""
    count, rows, width = dims.latents, dims.image_tokens, dims.width
    with ops.scope("perceiver"):
        latents = ops.weight(
            "latents", lambda: weights.tensor("vision_resampler.latents").repeat(dims.cameras, 1), island=True
        )
        for index in range(dims.perceiver):
            path = f"vision_resampler.layers.{index}"
            with ops.scope(f"layers.{index}"):
                media = _norm(ops, weights, x, "norm_media", f"{path}.0.norm_media", EPS)
                own = _norm(ops, weights, latents, "norm_latents", f"{path}.0.norm_latents", EPS)
                seen = ops.concat([ops.reshape(part, [dims.cameras, count, width]) for part in (media, own)], 1)
                kv = ops.linear(
                    ops.compute(ops.reshape(seen, [2 * rows, width])), "kv", _matrix(weights, f"{path}.0.to_kv"), None
                )
                q = ops.linear(ops.compute(own), "q", _matrix(weights, f"{path}.0.to_q", HEAD_WIDTH**-0.5), None)
                k, v = ops.split(kv, 2, 1)
                y = _attend(
                    ops,
                    _rows(ops, q, dims.cameras, count, HEADS),
                    _columns(ops, k, dims.cameras, 2 * count, HEADS),
                    _rows(ops, v, dims.cameras, 2 * count, HEADS),
                    None,
                )
                y = ops.reshape(y, [rows, HEADS * HEAD_WIDTH])
                latents = ops.add(latents, ops.island(ops.linear(y, "out", _matrix(weights, f"{path}.0.to_out"), None)))
                y = ops.compute(_norm(ops, weights, latents, "norm", f"{path}.1.0", EPS))
                y = ops.gelu(ops.island(ops.linear(y, "fc1", _matrix(weights, f"{path}.1.1"), None)))
                y = ops.linear(ops.compute(y), "fc2", _matrix(weights, f"{path}.1.3"), None)
                latents = ops.add(latents, ops.island(y))
        return ops.layer_norm(
            latents,
            "norm",
            lambda: weights.tensor("vision_resampler.norm.weight") * dims.embed_scale,
            lambda: weights.tensor("vision_resampler.norm.bias") * dims.embed_scale,
            EPS,
        )


def _matrix(weights: MergedWeights, path: str, scale: float = 1.0) -> Make:
    """The weight of a Linear without bias, made when it is needed."""
    return lambda: weights.weight(path) * scale


def _attend(ops: Ops[T], q: T, k: T, v: T, mask: T | None) -> T:
    """q [B, h, R, d], k [B, h, d, S], v [B, h, S, d] to [B, R, h, d]; softmax in the island."""
    scores = ops.island(ops.matmul(q, k))
    if mask is not None:
        scores = ops.add(scores, mask)
    return ops.transpose(ops.matmul(ops.compute(ops.softmax(scores)), v), [0, 2, 1, 3])


def _rows(ops: Ops[T], x: T, batch: int, rows: int, heads: int) -> T:
    """[B * R, D] to [B, h, R, d]."""
    return ops.transpose(ops.reshape(x, [batch, rows, heads, -1]), [0, 2, 1, 3])


def _columns(ops: Ops[T], x: T, batch: int, rows: int, heads: int) -> T:
    """[B * R, D] to [B, h, d, R]: keys, transposed for the score product."""
    return ops.transpose(ops.reshape(x, [batch, rows, heads, -1]), [0, 2, 3, 1])


def _norm(ops: Ops[T], weights: MergedWeights, x: T, name: str, path: str, eps: float) -> T:
    return ops.layer_norm(x, name, lambda: weights.tensor(f"{path}.weight"), lambda: weights.bias(path), eps)


def _linear(ops: Ops[T], weights: MergedWeights, x: T, name: str, path: str) -> T:
    return ops.linear(x, name, lambda: weights.weight(path), lambda: weights.bias(path))


def _fused(ops: Ops[T], weights: MergedWeights, x: T, name: str, path: str, scales: dict[str, float]) -> T:
    """Several Linears of one input as one GEMM, each scaled."""
    return ops.linear(
        x,
        name,
        lambda: torch.cat([weights.weight(f"{path}.{part}") * scale for part, scale in scales.items()]),
        lambda: torch.cat([weights.bias(f"{path}.{part}") * scale for part, scale in scales.items()]),
    )


def _patch_weight(weights: MergedWeights, dims: StageDims) -> Tensor:
    """The patch convolution as a matrix [E, patch * patch * 3] in NHWC order, for pixels in 0..255."""
    kernel = weights.tensor("backbone.vision_model.model.embeddings.patch_embedding.weight")
    scale = 255 * torch.tensor(dims.std, dtype=kernel.dtype).view(1, 3, 1, 1)
    return (kernel / scale).permute(0, 2, 3, 1).flatten(1)


def _patch_offset(weights: MergedWeights, dims: StageDims) -> Tensor:
    """Position rows of the patches plus what mean subtraction and pixel centring add: [patches, E]."""
    embeddings = "backbone.vision_model.model.embeddings"
    kernel = weights.tensor(f"{embeddings}.patch_embedding.weight")
    mean, std = torch.tensor(dims.mean, dtype=kernel.dtype), torch.tensor(dims.std, dtype=kernel.dtype)
    offset = kernel.sum((2, 3)) @ ((_PIXEL_CENTRE / 255 - mean) / std)
    return weights.tensor(f"{embeddings}.position_embedding.weight")[1:] + offset


def _class_rows(weights: MergedWeights, dims: StageDims) -> Tensor:
    """The class token with its position, [cameras, 1, E]."""
    embeddings = "backbone.vision_model.model.embeddings"
    row = weights.tensor(f"{embeddings}.class_embedding") + weights.tensor(f"{embeddings}.position_embedding.weight")[0]
    return row.expand(dims.cameras, 1, -1).contiguous()


def _composed(weights: MergedWeights, path: str, name: str) -> tuple[Tensor, Tensor]:
    """A projection of the resampler applied after its dense layer, as one Linear; multiplied out in float64."""
    dense, outer = f"{path}.dense", f"{path}.x_attn.{name}"
    matrix = weights.weight(outer).double()
    weight = matrix @ weights.weight(dense).double()
    bias = matrix @ weights.bias(dense).double() + weights.bias(outer).double()
    return weight.to(weights.dtype), bias.to(weights.dtype)


def _latent_heads(weights: MergedWeights, dims: StageDims, name: str) -> Tensor:
    """A projection of the resampler's constant latents, [cameras or 1, h, latents, d] (queries broadcast over cameras)."""
    path = "backbone.image_to_text_projection"
    latents = weights.tensor(f"{path}.latent_query")
    x = latents @ weights.weight(f"{path}.x_attn.{name}").T + weights.bias(f"{path}.x_attn.{name}")
    heads = x.view(1, dims.latents, dims.heads, -1).transpose(1, 2)
    return heads.expand(1 if name == "q_proj" else dims.cameras, -1, -1, -1).contiguous()


def _lstm_weight(weights: MergedWeights, layer: int) -> Tensor:
    return torch.cat([weights.tensor(f"act_head.rnn.weight_{kind}_l{layer}") for kind in ("ih", "hh")], dim=1)


def _lstm_bias(weights: MergedWeights, layer: int) -> Tensor:
    return weights.tensor(f"act_head.rnn.bias_ih_l{layer}") + weights.tensor(f"act_head.rnn.bias_hh_l{layer}")
