"""The LSTM action head in its three public forms, with the parameter names of their checkpoints.

`LSTMDecoder` (upstream): tanh arm actions and a raw gripper logit; `MobileVLALSTMDecoder` (fork): tanh velocities;
`MobileVLAClassificationDecoder` (fork): logits of discrete motions. All share one recurrent core, run from a zero state over the
features of the last W frames. The lab's class head may be told the instruction as well (`act_head.instr_in_features`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from train.config import HeadSpec


class ChunkMlp(nn.Module):
    """Linear-ReLU x 3 and a last Linear; tanh on top where the outputs are bounded actions."""

    def __init__(self, width: int, outputs: int, *, bounded: bool) -> None:
        super().__init__()
        sizes = [width, 1024, 512, 256]
        layers: list[nn.Module] = []
        for inputs, hidden in pairwise(sizes):
            layers += [nn.Linear(inputs, hidden), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., outputs]."""
        y: Tensor = self.mlp(x)
        return torch.tanh(y) if self.bounded else y


class ActionHead(nn.Module):
    """Features of consecutive frames to action chunks.

    Args:
        spec: kind and sizes.
        width: D, the decoder's width.
        chunk: n, actions per chunk.
    """

    def __init__(self, spec: HeadSpec, *, width: int, chunk: int) -> None:
        super().__init__()
        self.spec = spec
        self.chunk = chunk
        hidden = spec.latent * spec.hidden
        if spec.told:
            self.instr_proj = nn.Linear(width, spec.latent * width)
        self.rnn = nn.LSTM(spec.latent * width, hidden, spec.layers, batch_first=True)
        if spec.kind == "actions_gripper":
            self.actions = ChunkMlp(hidden, chunk * (spec.outputs - 1), bounded=True)
            self.gripper = ChunkMlp(hidden, chunk, bounded=False)
        elif spec.kind == "velocities":
            self.velocities = ChunkMlp(hidden, chunk * spec.outputs, bounded=True)
        else:
            self.logits = nn.Linear(hidden, chunk * spec.outputs)

    def reduce(self, tokens: Tensor) -> Tensor:
        """Action tokens [..., latent, D] to features [..., latent * D].

        `none` flattens token-major. `pooling` is AdaptiveMaxPool1d(latent) over the latent tokens, the identity, flattened the same way.
        """
        return tokens.flatten(-2)

    def tell(self, features: Tensor, words: Tensor) -> Tensor:
        """Features [N, latent * D] with the instruction in them, for heads that are told it.

        Args:
            words: embeddings [N, L, D] of the whole prompt: special tokens and padding count, so a padded prompt has another mean. No
                gradient goes into them.
        """
        if not self.spec.told:
            return features
        told: Tensor = self.instr_proj(words.detach().mean(-2))
        return features + told

    def forward(self, features: Tensor) -> Tensor:
        """[B, l, latent * D] from a zero state -> [B, l, n, A]; the gripper logit, where there is one, is the last column."""
        x, _ = self.rnn(features)
        if self.spec.kind == "actions_gripper":
            arm = self.actions(x).unflatten(-1, (self.chunk, self.spec.outputs - 1))
            return torch.cat([arm, self.gripper(x).unsqueeze(-1)], dim=-1)
        flat: Tensor = self.velocities(x) if self.spec.kind == "velocities" else self.logits(x)
        return flat.unflatten(-1, (self.chunk, self.spec.outputs))
