"""The policy's forward pass for training: the same numbers as `KosmosPolicy.forward`, for less work.

What is saved, and why it changes nothing (tests and a check at the start of every run hold it to the reference):

- windows of an episode overlap, so each distinct frame of a batch is encoded once and its feature is gathered;
- nothing after the action token can reach it (the decoder is causal), so rows end there: no `</s>`, no mask, no language-model head;
- only the action token's row of the last layer is read, so only that row is computed: K and V for all slots, the rest for one;
- with rows of one length and no mask, attention is plain causal, which `scaled_dot_product_attention` does without the S x S matrix.

The resampler's attention stays eager: it is not causal, and some versions of transformers take it for causal under sdpa. Packing
`fork_overwrite` has masked slots and takes the reference's path.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bundle.errors import CheckpointError
from train.policy import CLIP_MEAN, CLIP_STD, KosmosPolicy

_TOLERANCE = 2e-3  # of the feature's scale: fp32 sums in another order, through 24 layers


@dataclass(frozen=True)
class FrameBatch:
    """Distinct frames, the prompts they come with, and the windows made of them.

    Attributes:
        pixels: float32 [U, 3, s, s], or [U, C, 3, s, s] of several cameras; None where `tokens` are given.
        tokens: image tokens [U, N, D] of all cameras, or None.
        prompts: token ids [L] of each distinct instruction.
        prompt_of: int64 [U], index into prompts.
        frame_of: int64 [B, W], index into the U frames.
    """

    pixels: Tensor | None
    tokens: Tensor | None
    prompts: tuple[Tensor, ...]
    prompt_of: Tensor
    frame_of: Tensor


class TrainingForward(nn.Module):
    """Wraps a policy; its parameters are the policy's, so that data-parallel wrappers see one module.

    Args:
        policy: built by train/trainable.py; its attention modules are switched to sdpa.
        gradient_checkpointing: recompute decoder and vision layers in the backward pass.
    """

    def __init__(self, policy: KosmosPolicy, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self._recompute = gradient_checkpointing
        _use_sdpa(policy)
        if gradient_checkpointing:
            vision = policy.backbone.vision_model
            # transformers 5 renames it on the way.
            enable = getattr(vision, "activation_checkpointing_enable", None) or vision.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(self, batch: FrameBatch) -> Tensor:
        """Action chunks [B, W, n, A]."""
        return self.chunks(self.features(batch), batch.frame_of)

    def chunks(self, features: Tensor, frame_of: Tensor) -> Tensor:
        """Features [U, latent * D] of distinct frames to chunks [B, W, n, A], each window from a zero state."""
        chunks: Tensor = self.policy.act_head(features[frame_of])
        return chunks

    def features(self, batch: FrameBatch) -> Tensor:
        """Action features [U, latent * D] of the distinct frames."""
        tokens = batch.tokens
        if tokens is None:
            assert batch.pixels is not None
            tokens = image_tokens(self.policy, batch.pixels)
        parts, order = [], []
        for index, prompt in enumerate(batch.prompts):
            rows = torch.nonzero(batch.prompt_of == index).flatten()
            if len(rows):
                order.append(rows)
                parts.append(self._features(tokens[rows], prompt))
        back = torch.empty_like(torch.cat(order))
        back[torch.cat(order)] = torch.arange(len(back), device=back.device)
        return torch.cat(parts)[back]

    def _features(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Features of frames that share one instruction."""
        policy = self.policy
        if policy.conventions.packing != "upstream":
            ids, mask = policy.padded(prompt)
            return policy.features(tokens, ids.expand(len(tokens), -1), mask.expand(len(tokens), -1))
        text = policy.backbone.text_model.model
        latent = policy.spec.head.latent
        # The text is embedded once for all frames. The last id stands behind the action token and is left out: `</s>`, or padding, which
        # leaves `</s>` in front of it.
        length = policy.spec.pad_to or len(prompt)
        words = text.embed_tokens(prompt[: length - 1]).expand(len(tokens), -1, -1)
        action = policy.action_token.expand(len(tokens), latent, -1)
        rows = torch.cat([words[:, :1], tokens.to(words.dtype), words[:, 1:], action], dim=1)
        # Padding is masked, so it is not there; what stays keeps its position, and the action token's is behind all of it.
        slots = torch.arange(rows.shape[1], device=rows.device)
        slots[-latent:] += tokens.shape[1] + length - 1 + latent - rows.shape[1]
        first = text.embed_positions.padding_idx + 1
        positions = (first + slots).repeat(len(rows), 1)
        hidden = text.forward_embedding(None, inputs_embeds=rows, position_ids=positions)
        hidden = functional.dropout(hidden, p=text.dropout, training=text.training)  # the second of two, as published
        *layers, last = text.layers
        for layer in layers:
            hidden = self._run(layer, hidden)
        hidden = self._run(_action_rows, last, hidden) if latent == 1 else self._run(last, hidden)[:, -latent:]
        features = policy.act_head.reduce(text.layer_norm(hidden))
        return policy.act_head.tell(features, text.embed_tokens(policy.padded(prompt)[0])[None])

    def _run(self, function: Any, *arguments: Any) -> Tensor:
        if self._recompute and self.policy.training:
            result: Tensor = checkpoint(function, *arguments, use_reentrant=False)
            return result
        result = function(*arguments)
        return result


def _action_rows(layer: Any, hidden: Tensor) -> Tensor:
    """A decoder layer for the last slot alone: [U, S, D] -> [U, 1, D]. One query may see every key, so there is no mask."""
    residual = hidden[:, -1:]
    normed = layer.self_attn_layer_norm(hidden)
    mixed, _ = layer.self_attn(hidden_states=normed[:, -1:], encoder_hidden_states=normed)
    hidden = residual + functional.dropout(mixed, p=layer.dropout, training=layer.training)
    result: Tensor = hidden + layer.ffn(layer.final_layer_norm(hidden))
    return result


def _use_sdpa(policy: KosmosPolicy) -> None:
    """Decoder and vision attention through sdpa; each attention module looks the choice up in its own config."""
    for root in (policy.backbone.text_model, policy.backbone.vision_model):
        for module in root.modules():
            if type(module).__name__ in ("KosmosTextAttention", "Kosmos2VisionAttention"):
                module.config = copy.copy(module.config)
                module.config._attn_implementation = "sdpa"


def image_tokens(policy: KosmosPolicy, pixels: Tensor) -> Tensor:
    """Image tokens [U, C * N, D] of frames [U, C, 3, s, s] of several cameras, or of [U, 3, s, s] of one."""
    if pixels.ndim == 4:
        return policy.image_tokens(pixels)
    return policy.image_tokens(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).flatten(1, 2)


def pixels_of(frames: NDArray[np.uint8], pixel_norm: str, device: torch.device) -> Tensor:
    """uint8 [..., s, s, 3] RGB to float32 [..., 3, s, s]: / 255, and CLIP's mean and std unless `none`; on the device, bytes travel."""
    pixels = torch.from_numpy(np.array(frames)).to(device)  # a copy: memory maps are read-only
    pixels = pixels.movedim(-1, -3).float() / 255
    if pixel_norm == "none":
        return pixels
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


@torch.no_grad()
def check_forward(forward: TrainingForward, pixels: Tensor, prompt: Tensor) -> float:
    """Hold the shortcuts, and the installed transformers, to the reference on one frame; returns the relative difference.

    Raises:
        CheckpointError: the features differ, or the resampler cannot see all of the image (a defect of transformers 4.52 and later 4.x).
    """
    policy = forward.policy
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        ids, mask = (row.unsqueeze(0) for row in policy.padded(prompt))
        tokens = image_tokens(policy, pixels[:1])
        reference = policy.features(tokens, ids, mask)
        zero = torch.zeros(1, dtype=torch.int64, device=pixels.device)
        fast = forward.features(FrameBatch(None, tokens, (prompt,), zero, zero.unsqueeze(0)))
        error = float((fast - reference).abs().max() / reference.abs().max().clamp_min(1e-6))
        seen = _first_latent_sees_all(policy, pixels.reshape(-1, *pixels.shape[-3:])[:1])
    finally:
        for module, mode in modes:
            module.training = mode
    if not error <= _TOLERANCE or not seen:
        raise CheckpointError(
            "the installed transformers does not compute Kosmos-2 as published",
            got=f"features differ by {error:.1e} of their scale" if seen else "a causal resampler",
            expected=f"at most {_TOLERANCE:.0e}, and latents that see the whole image",
            hint="install the pinned versions: pip install -c constraints.txt -e .[train]",
        )
    return error


def _first_latent_sees_all(policy: KosmosPolicy, pixels: Tensor) -> bool:
    """Whether the first image token depends on the last patch: under the causal defect it would not see it."""
    projection = policy.backbone.image_to_text_projection
    seen: list[Tensor] = []
    hook = projection.x_attn.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        before = policy.image_tokens(pixels)[0, 0]
    finally:
        hook.remove()
    keys = seen[0].clone()
    patches = keys.shape[1] - projection.latent_query.shape[0]
    keys[:, patches - 1] += keys[:, patches - 1].abs().mean()
    latents = projection.latent_query.expand(1, -1, -1)
    after = projection.x_attn(hidden_states=latents, encoder_hidden_states=keys, attention_mask=None)[0][0, 0]
    return not torch.equal(before, after)
