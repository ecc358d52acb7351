"""The policy as the reference computes it: Hugging Face's Kosmos-2, adapters unmerged, every frame through the whole decoder.

This is the ruler that engines are measured with, so it takes no shortcuts. Two things are ours on top of Hugging Face's modules: the two
layouts of a row (packing), and the resampler's attention with an explicit mask, because the versions of transformers disagree
about it (`x_attn_causal`). Attention is `eager` always: from transformers 4.52 on, `sdpa` silently makes the resampler causal.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2Model

from bundle.errors import PromptError
from bundle.manifest import Packing
from bundle.recording import ReferenceStep
from train.action_head import ActionHead
from train.config import PolicySpec
from train.vision_resampler import VisionResampler

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Conventions:
    """What the weights were trained under and no upstream checkpoint records; `*_source` says how each was decided."""

    packing: Packing
    packing_source: str
    x_attn_causal: bool
    x_attn_causal_source: str


class KosmosPolicy(nn.Module):
    """Frozen Kosmos-2 with optional adapters, an action token, and an LSTM head.

    Built on the meta device by `train.checkpoint.load_policy`, which assigns the checkpoint's tensors without copying them.

    Args:
        spec: what the config says.
        kosmos: dimensions of the base model.
        conventions: packing and resampler masking.
        adapted: paths below `backbone.` of the Linears that carry adapters.
    """

    def __init__(
        self, spec: PolicySpec, kosmos: Kosmos2Config, conventions: Conventions, adapted: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.spec = spec
        self.kosmos = kosmos
        self.conventions = conventions
        self.adapted = adapted
        width = kosmos.text_config.embed_dim
        backbone: Any = Kosmos2Model._from_config(kosmos, attn_implementation="eager")
        if adapted:
            assert spec.lora is not None
            adapters = LoraConfig(
                r=spec.lora.r,
                lora_alpha=spec.lora.alpha,
                lora_dropout=spec.lora.dropout,
                target_modules=list(adapted),
            )
            inject_adapter_in_model(adapters, backbone, low_cpu_mem_usage=True)
        self.backbone = backbone
        self.action_token = nn.Parameter(torch.zeros(width))
        if spec.vision_resampler:
            self.vision_resampler = VisionResampler(width, latents=kosmos.latent_query_num)
        self.act_head = ActionHead(spec.head, width=width, chunk=spec.chunk)

    @property
    def resamples(self) -> bool:
        """Whether RoboVLMs' own resampler gives the image tokens.

        Where the fork's code overwrites slots, Kosmos-2 puts its own image tokens there: the resampler's were made for the row that failed,
        and are thrown away with it.
        """
        return self.spec.vision_resampler and self.conventions.packing == "upstream"

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Normalised frames [N, 3, s, s] to image tokens [N, latents, D]."""
        vision = self.backbone.vision_model.model
        x = vision.post_layernorm(vision(pixel_values=pixels).last_hidden_state)
        x = functional.normalize(x, dim=-1)
        projection = self.backbone.image_to_text_projection
        latents = projection.latent_query.expand(len(x), -1, -1)
        keys = torch.cat([projection.dense(x), latents], dim=1)
        mask = None
        if self.conventions.x_attn_causal:
            # What sdpa's is_causal means for unequal lengths: latent i sees keys 0..i.
            mask = torch.full((latents.shape[1], keys.shape[1]), torch.finfo(x.dtype).min, device=x.device).triu(1)
        tokens: Tensor = projection.x_attn(hidden_states=latents, encoder_hidden_states=keys, attention_mask=mask)[0]
        return self.vision_resampler(tokens) if self.resamples else tokens

    def padded(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A prompt [L] as long as the policy's prompts are, and its mask: padding on the right, masked.

        Masking by length, not by id: a tokenizer may give the padding's id for a word.

        Raises:
            PromptError: it is longer.
        """
        length = self.spec.pad_to or len(token_ids)
        if len(token_ids) > length:
            raise PromptError(
                "an instruction is longer than this policy's prompts",
                got=f"{len(token_ids)} tokens",
                expected=f"at most {length}",
                hint="shorten it: the policy was trained on prompts padded to that length.",
            )
        ids = token_ids.new_full((length,), self.kosmos.text_config.pad_token_id)
        ids[: len(token_ids)] = token_ids
        mask = torch.zeros_like(ids)
        mask[: len(token_ids)] = 1
        return ids, mask

    def rows(self, images: Tensor, token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's unscaled input embeddings [N, S, D] and attention mask [N, S], slots in the reference's order.

        Args:
            images: [N, image tokens of all cameras, D].
            token_ids, mask: [N, L].
        """
        text = self.backbone.text_model.model.embed_tokens(token_ids)
        count, length = token_ids.shape
        latent = self.spec.head.latent
        action = self.action_token.expand(count, latent, -1)
        seen = mask.new_ones(count, latent)
        shown = mask.new_ones(count, images.shape[1])
        if self.conventions.packing == "upstream":
            embeds = torch.cat([text[:, :1], images, text[:, 1:-1], action, text[:, -1:]], dim=1)
            return embeds, torch.cat([mask[:, :1], shown, mask[:, 1:-1], seen, mask[:, -1:]], dim=1)
        overwritten = images.shape[1]
        embeds = torch.cat([images, text[:, overwritten:], action], dim=1)
        hidden = mask.new_zeros(count, max(overwritten - length, 0))
        return embeds, torch.cat([mask, hidden, seen], dim=1)

    def action_slots(self, length: int, cameras: int) -> slice:
        """Where the action token stands in a row of a prompt of `length` tokens."""
        images = self.kosmos.latent_query_num * cameras
        latent = self.spec.head.latent
        start = images + length - 1 if self.conventions.packing == "upstream" else max(length, images)
        return slice(start, start + latent)

    def features(self, images: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Action features [N, latent * D] of N independent frames; arguments as in `rows`."""
        embeds, attention = self.rows(images, token_ids, mask)
        hidden = self.backbone.text_model.model(
            inputs_embeds=embeds, attention_mask=attention, use_cache=False
        ).last_hidden_state
        cameras = images.shape[1] // self.kosmos.latent_query_num
        features = self.act_head.reduce(hidden[:, self.action_slots(token_ids.shape[1], cameras)])
        return self.act_head.tell(features, self.backbone.text_model.model.embed_tokens(token_ids))

    def forward(self, pixels: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Windows [B, l, cameras, 3, s, s] and prompts [B, L] to action chunks [B, l, n, A] (all l steps, zero initial state)."""
        batch, frames = pixels.shape[:2]
        images = self.image_tokens(pixels.flatten(0, 2)).unflatten(0, (batch * frames, -1)).flatten(1, 2)
        repeat = {"repeats": frames, "dim": 0}
        features = self.features(images, token_ids.repeat_interleave(**repeat), mask.repeat_interleave(**repeat))
        chunks: Tensor = self.act_head(features.unflatten(0, (batch, frames)))
        return chunks


def normalize_frames(
    frames: NDArray[np.uint8], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> Tensor:
    """uint8 [..., s, s, 3] RGB to float32 [..., 3, s, s]: / 255, then (x - mean) / std."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float() / 255
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, -3).contiguous()


class ReferenceStream:
    """Frame-by-frame inference as upstream's evaluation does it: the head re-runs from zero over the last W features.

    Args:
        policy: in eval mode.
        token_ids, mask: [L].
        mean, std: the preprocessing of the policy.
    """

    def __init__(
        self,
        policy: KosmosPolicy,
        token_ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        *,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        self._policy = policy
        self._ids = torch.from_numpy(np.asarray(token_ids, np.int64)).reshape(1, -1)
        self._mask = torch.from_numpy(np.asarray(mask, np.int64)).reshape(1, -1)
        self._mean, self._std = mean, std
        self._history: deque[Tensor] = deque(maxlen=policy.spec.window)

    @torch.inference_mode()
    def step(self, frames: NDArray[np.uint8]) -> ReferenceStep:
        """One observation: resized frames uint8 [cameras, s, s, 3]."""
        images = self._policy.image_tokens(normalize_frames(frames, self._mean, self._std)).flatten(0, 1)
        feature = self._policy.features(images.unsqueeze(0), self._ids, self._mask)
        self._history.append(feature)
        action = self._policy.act_head(torch.stack(list(self._history), dim=1))[0, -1]
        return ReferenceStep(images.numpy(), feature[0].numpy(), action.numpy())
