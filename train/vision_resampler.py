"""RoboVLMs' own resampler behind Kosmos-2's: six layers of latents that attend to the image tokens of a frame, and to themselves.

Where `use_vision_resampler` is set, what it gives stands in the row instead of Kosmos-2's image tokens. Its sizes stand in RoboVLMs' code,
not in its config; the arithmetic is Flamingo's Perceiver resampler (Alayrac et al. 2022). Parameter names are those of checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTH = 6
HEADS = 8
HEAD_WIDTH = 64
EPS = 1e-5


class VisionResampler(nn.Module):
    """Image tokens of single frames to as many tokens.

    Args:
        width: D.
        latents: N, the number of tokens in and out.
    """

    def __init__(self, width: int, *, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(nn.ModuleList([_Attention(width), _feed_forward(width)]) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(tokens, latents)
            latents = latents + feed_forward(latents)
        out: Tensor = self.norm(latents)
        return out


class _Attention(nn.Module):
    """Latents that ask, image tokens and latents that answer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm_media = nn.LayerNorm(width, eps=EPS)
        self.norm_latents = nn.LayerNorm(width, eps=EPS)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """[B, N, D] each, to [B, N, D]."""
        latents = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(tokens), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.to_q(latents), keys, values))
        scores = (q * HEAD_WIDTH**-0.5) @ k.transpose(-1, -2)
        out: Tensor = self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width, eps=EPS),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )
