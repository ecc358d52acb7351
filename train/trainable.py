"""Builds the policy that a run trains, and decides which of its parameters do.

Base weights are assigned, not copied. Adapters start as peft starts them (A random, B zero, so the first step is the base's), the head
with Xavier's weights and the action token at zero, as upstream's. Everything random follows from the seed. Frozen vision runs in
evaluation mode, also while training: dropout in a part that cannot adapt to it is noise, and what is deterministic can be computed once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bundle.errors import BaseWeightsError, CheckpointError
from train.action_classes import NINE
from train.action_head import ActionHead
from train.base import base_weights, read_base_config
from train.checkpoint import materialize_tables
from train.config import HeadSpec, LoraSpec, PolicySpec
from train.keys import canonical, map_keys
from train.lora_targets import adapted_modules
from train.policy import Conventions, KosmosPolicy
from train.robovlms_base import START_NAME
from train.run_config import ModelConfig, RunConfig
from train.vision_resampler import VisionResampler

_RESAMPLER = "vision_resampler."
_VISION = ("backbone.vision_model.", "backbone.image_to_text_projection.", _RESAMPLER)
_EMBEDDING = "backbone.text_model.model.embed_tokens.weight"
_LAYER = re.compile(r"^backbone\.text_model\.model\.layers\.(\d+)\.")


def head_spec(config: RunConfig) -> HeadSpec:
    """The head that a config asks for."""
    model, actions = config.model, len(config.data.actions)
    outputs = {
        "velocities": actions,
        "classes": len(model.classes or NINE),
        "actions_gripper": model.action_dim or actions + 1,
    }
    sizes = outputs[model.head], model.hidden, model.layers, model.latent
    return HeadSpec(model.head, *sizes, pooling=False, told=model.instruction_in_head)


def policy_spec_of(config: RunConfig, *, action_range: tuple[float, float], image_size: int) -> PolicySpec:
    """The policy that a config asks for, as a checkpoint reader will see it."""
    lora = config.model.lora
    return PolicySpec(
        head=head_spec(config),
        lora=None if lora.targets == "none" else LoraSpec(lora.r, lora.alpha, lora.dropout),
        window=config.data.window,
        chunk=config.data.chunk,
        image_size=image_size,
        hand_camera="hand" in config.data.cameras,
        vision_resampler=config.model.vision_resampler,
        normalized=config.model.head != "classes",
        minimum=action_range[0],
        maximum=action_range[1],
        mu=None,
        fork=config.model.head != "actions_gripper",
        base_path=config.base.model,
        prompt_template=config.data.prompt_template,
        pad_to=config.data.pad_prompt_to,
        prompt_source="trained so",
    )


def build_policy(config: RunConfig, base: Path, *, action_range: tuple[float, float]) -> KosmosPolicy:
    """The policy at step 0: base weights from the directory, everything that is new from the seed.

    Raises:
        BaseWeightsError: the directory lacks weights that the policy needs.
        ConfigError: no Kosmos-2 config in it.
        CheckpointError: the policy to start from has another head.
    """
    kosmos = read_base_config(base)
    for name in ("dropout", "attention_dropout"):
        setattr(kosmos.text_config, name, config.model.dropout)
    spec = policy_spec_of(config, action_range=action_range, image_size=kosmos.vision_config.image_size)
    conventions = Conventions(config.model.packing, "trained so", False, "trained so")
    with torch.device("meta"):
        policy = KosmosPolicy(spec, kosmos, conventions, adapted_modules(kosmos, config.model.lora))
    _assign_base(policy, base)
    _start_new(policy, config.loop.seed)
    if config.base.take == "policy":
        _start_from(policy, base / START_NAME)
    materialize_tables(policy.backbone)
    names = trainable_names(policy, config.model)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in names)
    return policy


def trainable_names(policy: KosmosPolicy, model: ModelConfig) -> frozenset[str]:
    """Names (of `policy.named_parameters()`) that train; see docs/training.md for the table."""
    return frozenset(name for name, _ in policy.named_parameters() if _trains(name, policy, model))


def reaches_vision(policy: nn.Module) -> bool:
    """Whether anything that trains can change image tokens."""
    return any(p.requires_grad and name.startswith(_VISION) for name, p in policy.named_parameters())


def training_mode(policy: KosmosPolicy) -> None:
    """Training mode for what trains, evaluation mode for frozen vision and projection."""
    policy.train()
    if not reaches_vision(policy):
        policy.backbone.vision_model.eval()
        policy.backbone.image_to_text_projection.eval()


def _trains(name: str, policy: KosmosPolicy, model: ModelConfig) -> bool:
    if name.startswith(_RESAMPLER):
        return not model.freeze_resampler
    if not name.startswith("backbone.") or ".lora_" in name:
        return True
    lora = model.lora.targets != "none"
    if lora and name.endswith("bias") and model.lora.bias != "none":
        module = name.removeprefix("backbone.").removesuffix(".bias").removesuffix(".base_layer")
        return model.lora.bias == "all" or module in policy.adapted
    if name == _EMBEDDING:
        return model.train_text_embedding
    if name.startswith(_VISION[0]):
        return model.train_vision
    unfrozen = not model.freeze_backbone and not lora
    if name.startswith(_VISION[1]):
        return model.train_projection or (unfrozen and model.train_decoder_layers is None)
    if not unfrozen:
        return False
    layer = _LAYER.match(name)
    if model.train_decoder_layers is None:
        return True
    return layer is not None and int(layer[1]) >= policy.kosmos.text_config.layers - model.train_decoder_layers


def _assign_base(policy: KosmosPolicy, base: Path) -> None:
    """Give every base parameter its tensor, fp32; parameters that no base has stay on the meta device."""
    origin = base_weights(base)
    expected = map_keys(policy.state_dict()).names
    wanted = {name: raw[0] for name, raw in expected.items() if name.startswith("backbone.") and ".lora_" not in name}
    missing = sorted(set(wanted) - set(origin))
    wrong = sorted(
        name for name in wanted if name in origin and origin[name].shape != policy.get_parameter(wanted[name]).shape
    )
    if missing or wrong:
        raise BaseWeightsError(
            f"{base} does not hold the weights of its config.json",
            got=f"{len(missing)} missing, {len(wrong)} misshapen, first {(missing + wrong)[0]}",
            expected=f"{len(wanted)} tensors of Kosmos-2",
            hint="download the whole directory again.",
        )
    assigned: Mapping[str, Tensor] = {raw: origin[name].float() for name, raw in wanted.items()}
    policy.load_state_dict(assigned, strict=False, assign=True)


def _start_new(policy: KosmosPolicy, seed: int) -> None:
    """Adapters, head and action token, from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = policy.kosmos.text_config.embed_dim
        policy.act_head = ActionHead(policy.spec.head, width=width, chunk=policy.spec.chunk)
        for module in policy.act_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        policy.action_token = nn.Parameter(torch.zeros(width))
        if policy.spec.vision_resampler:
            policy.vision_resampler = VisionResampler(width, latents=policy.kosmos.latent_query_num)
        for name, parameter in list(policy.named_parameters()):
            if ".lora_A." in name or ".lora_B." in name:
                tensor = torch.zeros(parameter.shape)
                if ".lora_A." in name:
                    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
                _replace(policy, name, tensor)


def _start_from(policy: KosmosPolicy, path: Path) -> None:
    """Head, action token and adapters of an earlier policy; all of its head, or none."""
    start = load_file(path)
    if policy.conventions.packing == "fork_overwrite":  # its rows go without
        start = {name: tensor for name, tensor in start.items() if not name.startswith(_RESAMPLER)}
    raw = {canonical(name): name for name, _ in policy.named_parameters()}
    head = [name for name in raw if not name.startswith("backbone.")]
    wrong = [name for name in start if name not in raw or policy.get_parameter(raw[name]).shape != start[name].shape]
    wrong += [name for name in head if name not in start]
    if wrong:
        raise CheckpointError(
            "the policy of base.weights does not fit this run's",
            got=f"{len(wrong)} parameters are missing or of another shape, first {wrong[0]}",
            expected=f"a {policy.spec.head.kind} head of the run's model.hidden, model.layers, model.latent, "
            "model.instruction_in_head and data.chunk, and its model.vision_resampler",
            hint='base.take = "backbone" starts with a new head (load_vlm_only with pretrained_vlm_path, in a RoboVLMs config).',
        )
    for name, tensor in start.items():
        _replace(policy, raw[name], tensor.float())


def _replace(policy: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module: Any = policy.get_submodule(path)
    setattr(module, leaf, nn.Parameter(tensor))
