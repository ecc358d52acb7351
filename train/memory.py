"""How much memory training takes, and what to change when there is not enough.

Weights, gradients and AdamW's moments are counted exactly, on a policy without storage. Activations follow from what autograd keeps of each
layer (measured, see tests/train/test_memory.py), in units of one tensor of its slots and width:

    frames  U = ceil(B / k) (W - 1) + B       B windows per forward pass, k of an episode in a row, which share frames
    decoder layer, S slots                    7 S D + 2 S F, with adapters 12 S D + 3 S F, trained itself 3 S D + 1 S F more
    vision layer, T patches                   6 T V + 2 T G, with adapters 11 T V + 3 T G, trained itself 3 T V + 1 T G more
    dropout masks                             2 S D, with adapters 7 S D + 1 S F, and 5 T V + 1 T G in the vision tower
    recomputed layers (gradient_checkpointing)   only 1 S D or 1 T V each, and one whole layer

fp32 is 4 bytes; mixed precision 3 on average, plus a half-precision copy of the weights that gradients pass through. The vision tower
counts only where something in it trains. A tenth is added for what allocators leave unused. It is an estimate, and says so.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import Kosmos2Config

from bundle.errors import TrainingError
from train.lora_targets import adapted_modules
from train.policy import Conventions, KosmosPolicy
from train.proofs import ParameterGroup, groups_of
from train.run_config import RunConfig
from train.trainable import policy_spec_of, trainable_names

Device = Literal["cpu", "cuda"]

_FLOAT = 4
_MIXED_ACTIVATION = 3
_HALF = 2
_MOMENTS = 2
_LINEARS = 6  # of a layer: four of its attention, two behind it
_RESERVE = 0.1
_CUDA_CONTEXT = 512 << 20
_VISION = ("backbone.vision_model.", "backbone.image_to_text_projection.", "vision_resampler.")
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_MMAP_BYTES = 1 << 20
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of values.

    Attributes:
        total: all parameters.
        trained: those that train.
        held: those that a small checkpoint holds: what trains, and what no base directory has.
        vision: those of vision tower and projection that train.
        half: weights that gradients pass through, of which mixed precision keeps a copy.
        parts: what trains, by part.
        adapted_text, adapted_vision: shares of the Linears in the layers of each that carry adapters.
    """

    total: int
    trained: int
    held: int
    vision: int
    half: int
    parts: tuple[ParameterGroup, ...]
    adapted_text: float
    adapted_vision: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device that trains, in one process.

    Attributes:
        weights, gradients, optimizer: counted.
        activations: of the largest micro-batch, estimated.
        reserve: what allocators and the device itself take, estimated.
        frames: distinct frames of a micro-batch.
        slots: of the longest row.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    reserve: int
    frames: int
    slots: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.counted + self.activations + self.reserve

    @property
    def counted(self) -> int:
        """What is certain to be needed."""
        return self.weights + self.gradients + self.optimizer


def count_parameters(kosmos: Kosmos2Config, config: RunConfig) -> ParameterCounts:
    """Parameters of the policy that a config asks for; takes no memory for them."""
    spec = policy_spec_of(config, action_range=(-1.0, 1.0), image_size=kosmos.vision_config.image_size)
    conventions = Conventions(config.model.packing, "counted", False, "counted")
    adapted = adapted_modules(kosmos, config.model.lora)
    with torch.device("meta"):
        policy = KosmosPolicy(spec, kosmos, conventions, adapted)
    trained = trainable_names(policy, config.model)
    sizes = {name: parameter.numel() for name, parameter in policy.named_parameters()}
    vision = sum(sizes[name] for name in trained if name.startswith(_VISION))
    passed = ("backbone.text_model.model.layers.", *(_VISION if vision else ()))
    return ParameterCounts(
        total=sum(sizes.values()),
        trained=sum(sizes[name] for name in trained),
        held=sum(size for name, size in sizes.items() if name in trained or not name.startswith("backbone.")),
        vision=vision,
        half=sum(size for name, size in sizes.items() if name.startswith(passed)),
        parts=groups_of({name: sizes[name] for name in trained}),
        adapted_text=_share(adapted, "text_model.", kosmos.text_config.layers),
        adapted_vision=_share(adapted, "vision_model.", kosmos.vision_config.num_hidden_layers),
    )


def _share(adapted: tuple[str, ...], root: str, layers: int) -> float:
    return sum(name.startswith(root) for name in adapted) / (_LINEARS * layers)


def estimate_memory(
    kosmos: Kosmos2Config, config: RunConfig, *, device: Device, prompt_tokens: int, counts: ParameterCounts
) -> MemoryEstimate:
    """What training will take.

    Args:
        prompt_tokens: L of the longest prompt.
        counts: of `count_parameters`.
    """
    loop = config.loop
    frames = math.ceil(loop.batch_size / loop.windows_per_episode) * (config.data.window - 1) + loop.batch_size
    slots = _slots(kosmos, config, prompt_tokens)
    layers = _text_layers(kosmos, config, device, slots, counts.adapted_text)
    if counts.vision:
        layers += len(config.data.cameras) * _vision_layers(kosmos, config, device, counts.adapted_vision)
    activations = frames * layers + _head(kosmos, config)
    if loop.precision != "fp32":
        depth = kosmos.text_config.layers if config.model.gradient_checkpointing else 1
        activations += _HALF * counts.half // depth
    counted = _FLOAT * (counts.total + (1 + _MOMENTS) * counts.trained)
    context = _CUDA_CONTEXT if device == "cuda" else 0
    return MemoryEstimate(
        weights=_FLOAT * counts.total,
        gradients=_FLOAT * counts.trained,
        optimizer=_FLOAT * _MOMENTS * counts.trained,
        activations=activations,
        reserve=int(_RESERVE * (counted + activations)) + context,
        frames=frames,
        slots=slots,
    )


def _slots(kosmos: Kosmos2Config, config: RunConfig, prompt_tokens: int) -> int:
    """Length of a row; the last token of the prompt stands behind the action and is not computed."""
    if config.model.packing == "upstream":
        return len(config.data.cameras) * kosmos.latent_query_num + prompt_tokens - 1 + config.model.latent
    return max(kosmos.latent_query_num, prompt_tokens) + 1


def _text_layers(kosmos: Kosmos2Config, config: RunConfig, device: Device, slots: int, adapted: float) -> int:
    """Bytes that autograd keeps of the decoder for one frame; `adapted` is the share of its Linears with adapters."""
    text = kosmos.text_config
    trained = not config.model.freeze_backbone
    width, inner = slots * text.embed_dim, slots * text.ffn_dim
    values = (7 + 5 * adapted + 3 * trained) * width + (2 + adapted + trained) * inner
    masks = (2 + 5 * adapted) * width + adapted * inner
    # Without a fused kernel, which CPUs lack where there is dropout, attention keeps its weights three times.
    values += 3 * text.attention_heads * slots**2 if device == "cpu" else 0
    return _kept(values, masks, width, text.layers, config, device)


def _vision_layers(kosmos: Kosmos2Config, config: RunConfig, device: Device, adapted: float) -> int:
    """Bytes that autograd keeps of vision tower and projection for one frame; `adapted` as for the decoder."""
    vision, model = kosmos.vision_config, config.model
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    total = 0
    if adapted or model.train_vision:
        width, inner = patches * vision.hidden_size, patches * vision.intermediate_size
        values = (6 + 5 * adapted + 3 * model.train_vision) * width + (2 + adapted + model.train_vision) * inner
        masks = 5 * adapted * width + adapted * inner
        total = _kept(values, masks, width, vision.num_hidden_layers, config, device)
    latents, heads = kosmos.latent_query_num, kosmos.text_config.attention_heads
    keys = patches + latents
    projection = 6 * keys * kosmos.text_config.embed_dim + 4 * heads * latents * keys
    return total + _bytes_each(config) * projection


def _kept(values: float, masks: float, width: int, layers: int, config: RunConfig, device: Device) -> int:
    """Bytes of a stack of layers that keep `values` and `masks` each, or their input if they are computed again."""
    # CPUs keep a dropout mask as numbers.
    layer = math.ceil(_bytes_each(config) * values + (1 if device == "cuda" else _bytes_each(config)) * masks)
    return _FLOAT * width * layers + layer if config.model.gradient_checkpointing else layer * layers


def _bytes_each(config: RunConfig) -> int:
    return _FLOAT if config.loop.precision == "fp32" else _MIXED_ACTIVATION


def _head(kosmos: Kosmos2Config, config: RunConfig) -> int:
    """Bytes of the LSTM and what follows it, which see every frame of every window."""
    model = config.model
    width = model.latent * (2 * kosmos.text_config.embed_dim + 8 * model.layers * model.hidden)
    return _FLOAT * config.loop.batch_size * config.data.window * width


def return_freed_memory() -> None:
    """Let glibc give every freed tensor back to the system; elsewhere, nothing.

    Its heap grows a block for tensors below 32 MB, and what is saved for the backward pass keeps the holes between apart: at full size a
    frame took 1.1 GB of memory for 0.65 GB of tensors (docs/lab-notes.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of its GPU, is what failed."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def explain_out_of_memory(error: BaseException, config: RunConfig) -> TrainingError:
    """What to tell who ran out of memory: the settings that would save some, the least harmful first."""
    steps = memory_savings(config)
    text = str(error).strip().splitlines()
    return TrainingError(
        "there is not enough memory for a step",
        got=text[0][:200] if text else type(error).__name__,
        expected=f"room for {config.loop.batch_size} x {config.data.window} frames at a time",
        hint="; then ".join(steps) + ". The last saved state is good: --resume goes on from it."
        if steps
        else "this config is as small as it gets: use a device with more memory, or end what else runs on this one.",
    )


def memory_savings(config: RunConfig) -> tuple[str, ...]:
    """Settings that would take less memory and are still possible, the least harmful first."""
    loop, model = config.loop, config.model
    savings = []
    if loop.batch_size > 1:
        half = loop.batch_size // 2
        same = math.ceil(loop.accumulate * loop.batch_size / half)
        savings.append(f"set loop.batch_size = {half} with loop.accumulate = {same}, which keeps the size of a step")
    if loop.windows_per_episode < loop.batch_size:
        savings.append(f"loop.windows_per_episode = {loop.batch_size}: windows of an episode share frames")
    if not model.gradient_checkpointing:
        savings.append("model.gradient_checkpointing = true, which costs a third more time")
    if loop.precision == "fp32":
        savings.append('loop.precision = "bf16"')
    if model.lora.targets == "all":
        savings.append('model.lora.targets = "text", which leaves the vision tower out of training')
    if model.train_vision:
        savings.append("model.train_vision = false")
    if config.data.window > 1:
        savings.append(f"a data.window shorter than {config.data.window}")
    return tuple(savings)
