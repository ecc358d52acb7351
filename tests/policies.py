"""Very small policies in memory, in float64 if wanted, and the reference's answers to compare shortcuts with.

Smaller than any checkpoint (56-pixel pictures, 8 image tokens, width 32), so that a proof over many variants takes
milliseconds. The weights are those of train.synthetic_weights: every tensor counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Kosmos2Config

from bundle.manifest import HeadKind, Packing
from export import stages
from export.ops import Make, TorchOps
from export.parity import random_frames
from export.stages import StageDims
from export.to_onnx import round_up, stage_dims
from export.weights import MergedWeights
from runtime.prompt import Layout, layout
from train.base import Base
from train.config import HeadSpec, LoraSpec, PolicySpec
from train.keys import map_keys
from train.policy import CLIP_MEAN, CLIP_STD, Conventions, KosmosPolicy
from train.synthetic_weights import random_weight

Norm = Literal["clip", "none"]
NORMS: dict[Norm, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
VOCAB = 60
LATENTS = 8
PAD, EOS = 1, 2
_OUTPUTS: dict[HeadKind, int] = {"actions_gripper": 7, "velocities": 2, "classes": 9}


@dataclass(frozen=True)
class TinyOptions:
    """Which policy to make; the defaults are upstream's, with LoRA and a window of three frames."""

    head: HeadKind = "actions_gripper"
    packing: Packing = "upstream"
    lora: bool = True
    hand_camera: bool = False
    latent: int = 1
    pooling: bool = False
    x_attn_causal: bool = False
    window: int = 3
    norm: Norm = "clip"
    text_layers: int = 2
    vision_layers: int = 2
    lstm_layers: int = 2
    scale_embedding: bool = True
    vision_resampler: bool = False
    told: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the default, as a test's id."""
        default = TinyOptions()
        changed = {key: value for key, value in vars(self).items() if value != getattr(default, key)}
        return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


@dataclass(frozen=True)
class TinyPolicy:
    """A reference policy with adapters unmerged, and the same weights as the stages read them."""

    options: TinyOptions
    policy: KosmosPolicy
    weights: MergedWeights
    dims: StageDims

    @property
    def cameras(self) -> int:
        return self.dims.cameras

    def with_state(self, state: dict[str, Tensor]) -> TinyPolicy:
        """Other weights for the stages; the reference keeps its own."""
        return replace(self, weights=replace(self.weights, state={**self.weights.state, **state}))

    def frames(self, count: int, seed: int = 0) -> NDArray[np.uint8]:
        """Pictures uint8 [count, cameras, s, s, 3]."""
        return random_frames(count, self.cameras, self.dims.image_size, seed=seed)


@functools.cache
def tiny_policy(options: TinyOptions) -> TinyPolicy:
    """The policy of these options; tests must not change it."""
    kosmos = _kosmos(options)
    lora = LoraSpec(r=3, alpha=6.0) if options.lora else None
    head = HeadSpec(
        options.head,
        _OUTPUTS[options.head],
        10,
        options.lstm_layers,
        options.latent,
        pooling=options.pooling,
        told=options.told,
    )
    spec = PolicySpec(
        head=head,
        lora=lora,
        window=options.window,
        chunk=4,
        image_size=kosmos.vision_config.image_size,
        hand_camera=options.hand_camera,
        normalized=True,
        minimum=-1.0,
        maximum=1.0,
        mu=None,
        fork=False,
        base_path=None,
        prompt_template="{instruction}",
        vision_resampler=options.vision_resampler,
    )
    conventions = Conventions(options.packing, "a test", options.x_attn_causal, "a test")
    bare = KosmosPolicy(spec, kosmos, conventions)
    linears = tuple(name for name, module in bare.backbone.named_modules() if isinstance(module, nn.Linear))
    policy = KosmosPolicy(spec, kosmos, conventions, linears) if lora else bare
    names = map_keys(policy.state_dict()).names
    scaling = lora.scaling if lora else 0.0
    state = {
        name: random_weight(
            name, policy.get_parameter(raw[0]).shape, seed=options.seed, lora_scaling=scaling or 1.0
        ).to(options.dtype)
        for name, raw in names.items()
    }
    policy.load_state_dict({names[name][0]: tensor for name, tensor in state.items()}, strict=True, assign=True)
    policy.to(options.dtype).requires_grad_(False).eval()
    mean, std = NORMS[options.norm]
    dims = stage_dims(policy, Base(None, kosmos), mean=mean, std=std)
    return TinyPolicy(options, policy, MergedWeights(state, scaling, dtype=options.dtype), dims)


def exact_ops() -> TorchOps:
    """Everything in float64: what differs now is no rounding."""
    return TorchOps(torch.float64, torch.float64)


def normalized_pixels(tiny: TinyPolicy, frames: NDArray[np.uint8]) -> Tensor:
    """[..., s, s, 3] to [..., 3, s, s] in the policy's own precision, as the reference normalises."""
    pixels = torch.from_numpy(frames).to(tiny.options.dtype) / 255
    mean, std = (torch.tensor(value, dtype=tiny.options.dtype) for value in NORMS[tiny.options.norm])
    return ((pixels - mean) / std).movedim(-1, -3)


def reference_images(tiny: TinyPolicy, frames: NDArray[np.uint8]) -> Tensor:
    """Unscaled image tokens [T, cameras * latents, D] of frames [T, cameras, s, s, 3]."""
    images = tiny.policy.image_tokens(normalized_pixels(tiny, frames).flatten(0, 1))
    return images.unflatten(0, frames.shape[:2]).flatten(1, 2)


def reference_features(
    tiny: TinyPolicy, frames: NDArray[np.uint8], ids: Sequence[int], mask: Sequence[int] | None = None
) -> Tensor:
    """Action features [T, latent * D], each frame by itself through the whole decoder."""
    return features_of_images(tiny, reference_images(tiny, frames), ids, mask)


def features_of_images(
    tiny: TinyPolicy, images: Tensor, ids: Sequence[int], mask: Sequence[int] | None = None
) -> Tensor:
    """As reference_features, from unscaled image tokens [T, cameras * latents, D]."""
    tokens = torch.tensor(ids).expand(len(images), -1)
    seen = torch.tensor(visible(ids) if mask is None else mask).expand(len(images), -1)
    return tiny.policy.features(images, tokens, seen)


def reference_actions(tiny: TinyPolicy, features: Tensor) -> Tensor:
    """Chunks [T, n, A]: at each step the head runs from a zero state over the last W features."""
    windows = [features[max(0, end - tiny.dims.window) : end] for end in range(1, len(features) + 1)]
    return torch.stack([tiny.policy.act_head(window[None])[0, -1] for window in windows])


def visible(ids: Sequence[int]) -> list[int]:
    """The mask of a right-padded prompt."""
    return [int(token != PAD) for token in ids]


def prompt_ids(length: int, *, pad_to: int | None = None, seed: int = 0) -> list[int]:
    """<s>, some tokens, </s>, padding."""
    words = np.random.default_rng([seed, length]).integers(3, VOCAB, length - 2)
    ids = [0, *(int(word) for word in words), EOS]
    return ids + [PAD] * ((pad_to or length) - length)


def visible_slots(tiny: TinyPolicy, ids: Sequence[int], mask: Sequence[int] | None = None) -> Layout:
    """The runtime's rule for this policy."""
    return layout(
        ids,
        packing=tiny.options.packing,
        image_tokens=tiny.dims.image_tokens,
        latent=tiny.dims.head.latent,
        mask=mask,
        pad_id=PAD,
    )


@dataclass(frozen=True)
class Row:
    """The language stage's constant inputs, in any precision."""

    prompt: Tensor
    image_index: Tensor
    action_index: Tensor

    @property
    def sequence(self) -> int:
        return self.prompt.shape[1]


def exact_row(
    tiny: TinyPolicy,
    slots: Layout,
    *,
    bucket: int | None = None,
    filler: float = 0.0,
    ids: Sequence[int] | None = None,
) -> Row:
    """What runtime.prompt.assemble makes, in the policy's precision and from its own tables.

    Args:
        bucket: length of the row; by default the smallest one.
        filler: size of the noise in the slots behind the action token.
        ids: the whole prompt, for heads that are told it.
    """
    bucket = round_up(slots.length + tiny.dims.head.told) if bucket is None else bucket
    text = tiny.policy.backbone.text_model.model
    first = text.embed_positions.padding_idx + 1
    noise = torch.randn(1, bucket, tiny.dims.width, generator=torch.Generator().manual_seed(0))
    prompt = filler * noise.to(tiny.options.dtype)
    for slot, (token, position) in enumerate(zip(slots.token, slots.position, strict=True)):
        prompt[0, slot] = text.embed_positions.weights[first + position]
        if token >= 0:
            prompt[0, slot] += text.embed_tokens.weight[token] * tiny.dims.embed_scale
        elif slot >= slots.length - slots.latent:
            prompt[0, slot] += tiny.policy.action_token * tiny.dims.embed_scale
    image_index = torch.full((bucket,), tiny.dims.image_tokens)
    shown = torch.from_numpy(slots.image >= 0)
    image_index[: slots.length][shown] = torch.from_numpy(slots.image)[shown]
    last = slots.length
    if tiny.dims.head.told:
        assert ids is not None
        prompt[0, last] = sum(text.embed_tokens.weight[token] for token in ids) / len(ids)
        last += 1
    return Row(prompt, image_index, torch.arange(slots.length - slots.latent, last))


def run_vision(tiny: TinyPolicy, frames: NDArray[np.uint8], ops: TorchOps | None = None) -> Tensor:
    """Scaled image tokens [T, cameras * latents, D] of frames [T, cameras, s, s, 3], one stage run a frame."""
    ops = ops or exact_ops()
    runs = [stages.vision(ops, tiny.weights, tiny.dims, torch.from_numpy(views)) for views in frames]
    return torch.cat(runs)


def run_language(tiny: TinyPolicy, images: Tensor, row: Row, ops: TorchOps | None = None) -> Tensor:
    """Features [T, latent * D] of scaled image tokens [T, cameras * latents, D], one stage run a frame."""
    ops = ops or exact_ops()
    parts = (row.prompt, row.image_index, row.action_index)
    runs = [stages.language(ops, tiny.weights, tiny.dims, row.sequence, one[None], *parts) for one in images]
    return torch.cat(runs)


def zero_states(tiny: TinyPolicy) -> tuple[Tensor, Tensor]:
    """h and c after a reset."""
    shape = (tiny.dims.window, tiny.dims.head.layers, tiny.dims.hidden)
    return torch.zeros(shape, dtype=tiny.options.dtype), torch.zeros(shape, dtype=tiny.options.dtype)


def run_action_head(tiny: TinyPolicy, features: Tensor, ops: TorchOps | None = None) -> Tensor:
    """Chunks [T, n, A] of features [T, latent * D], one stage run a feature, from a reset."""
    ops = ops or exact_ops()
    h, c = zero_states(tiny)
    chunks = []
    for feature in features:
        action, h, c = stages.action_head(ops, tiny.weights, tiny.dims, feature[None], h, c)
        chunks.append(action)
    return torch.cat(chunks)


@dataclass
class RecordingOps(TorchOps):
    """Executes a stage and keeps, by scoped name, what each Linear and LayerNorm got and gave, and each constant."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(torch.float64, torch.float64)
        self._names: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._names.append(name)
        yield
        self._names.pop()

    def weight(self, name: str, make: Make, *, island: bool = False) -> Tensor:
        value = super().weight(name, make, island=island)
        self.constants[self._full(name)] = value
        return value

    def linear(self, x: Tensor, name: str, weight: Make, bias: Make | None) -> Tensor:
        return self._keep(name, x, super().linear(x, name, weight, bias))

    def layer_norm(self, x: Tensor, name: str, gamma: Make, beta: Make, eps: float) -> Tensor:
        return self._keep(name, x, super().layer_norm(x, name, gamma, beta, eps))

    def _keep(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        self.inputs[self._full(name)], self.outputs[self._full(name)] = x, y
        return y

    def _full(self, name: str) -> str:
        return "/".join([*self._names, name])


@contextmanager
def module_outputs(policy: KosmosPolicy, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What these submodules of the backbone give while the block runs, call by call."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: seen[path].append(output)

    hooks = [policy.backbone.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)}"
    difference = float((a - b).abs().max())
    return math.inf if math.isnan(difference) else difference


def _kosmos(options: TinyOptions) -> Kosmos2Config:
    return Kosmos2Config(
        latent_query_num=LATENTS,
        text_config={
            "vocab_size": VOCAB,
            "embed_dim": 32,
            "layers": options.text_layers,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 128,
            "scale_embedding": options.scale_embedding,
        },
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": options.vision_layers,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": 56,
        },
    )
