"""The checkpoints that a run writes: the small one (what trained, tens of megabytes), and RoboVLMs' layout (everything, gigabytes).

Both carry RoboVLMs' config with the facts of train/facts.py in it, so that train/checkpoint.py reads them strictly and export need not
ask how the policy was trained. The small one names the base by its hash. Written atomically: a full disk leaves the previous file.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bundle.errors import StorageError
from train.checkpoint_file import small_metadata
from train.facts import SECTION, TrainingFacts
from train.keys import canonical
from train.large_files import replacing
from train.lora_targets import robovlms_targets
from train.policy import KosmosPolicy
from train.robovlms_layout import layout_keys
from train.robovlms_record import RobovlmsRun, robovlms_config
from train.run_config import RunConfig


def checkpoint_config(run: RunConfig, policy: KosmosPolicy, facts: TrainingFacts, *, base: str) -> dict[str, Any]:
    """The config that travels with the weights, in RoboVLMs' keys.

    Args:
        base: the base directory as the reader should look for it: absolute, or relative to the checkpoint.
    """
    spec, model, optimizer = policy.spec, run.model, run.optimizer
    lora = model.lora
    settings: dict[str, Any] = {
        "arm_gripper_loss_ratio": run.loss.gripper_ratio if spec.head.kind == "actions_gripper" else 0.0,
        "batch_size": run.loop.batch_size,
        "weight_decay": optimizer.weight_decay,
        "warmup_steps": optimizer.warmup_steps,
        "warmup_epochs": optimizer.warmup_epochs,
        "scheduler": optimizer.schedule,
        "min_lr_scale": optimizer.min_lr_scale,
        "gradient_clip_val": optimizer.clip_norm,
        "use_vision_resampler": model.vision_resampler,
        "train_setup.freeze_resampler": model.freeze_resampler,
        "train_setup.freeze_backbone": model.freeze_backbone,
        "train_setup.train_vision": model.train_vision,
        "train_setup.tune_mm_projector": model.train_projection,
        "train_setup.train_text_embedding": model.train_text_embedding,
        "train_setup.gradient_checkpointing": model.gradient_checkpointing,
        "trainer.max_epochs": run.loop.epochs,
        "trainer.accumulate_grad_batches": run.loop.accumulate,
        **robovlms_targets(lora, policy.adapted),
        "image_size": spec.image_size,
        "norm_action": spec.normalized,
        SECTION: msgspec.to_builtins(facts),
    }
    if spec.head.told:
        settings["act_head.instr_in_features"] = policy.kosmos.text_config.embed_dim
    return robovlms_config(
        RobovlmsRun(
            head=spec.head,
            window=spec.window,
            chunk=spec.chunk,
            limits=(spec.minimum, spec.maximum),
            lora=None if spec.lora is None else (lora.r, lora.alpha, lora.dropout, lora.bias),
            fork=spec.fork,
            hand_camera=spec.hand_camera,
            base=base,
            seed=run.loop.seed,
            task=run.name,
            learning_rate=optimizer.learning_rate,
            settings=tuple(settings.items()),
        )
    )


def trained_state(policy: KosmosPolicy) -> dict[str, Tensor]:
    """Canonical name -> parameter of everything that trains."""
    return {canonical(name): p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def held_state(policy: KosmosPolicy) -> dict[str, Tensor]:
    """Canonical name -> parameter of everything that trains, or that no base directory holds, such as a frozen vision resampler."""
    named = {canonical(name): p for name, p in policy.named_parameters()}
    return {name: p.detach() for name, p in named.items() if p.requires_grad or not name.startswith("backbone.")}


def save_policy(path: Path, policy: KosmosPolicy, config: dict[str, Any], facts: TrainingFacts) -> None:
    """Write jetvla's small format atomically.

    Raises:
        StorageError: the disk is full.
    """
    recorded = {
        "base_sha256": facts.base_sha256,
        "packing": facts.packing,
        "x_attn_causal": "true" if facts.x_attn_causal else "false",
    }
    state = {name: tensor.cpu().contiguous() for name, tensor in held_state(policy).items()}
    with replacing(path) as temporary:
        try:
            save_file(state, temporary, small_metadata(config, recorded))
            temporary.chmod(0o666 & ~_umask())  # the library makes files that nobody else may read
        except SafetensorError as error:
            # The library wraps the system's refusal of a write in an error of its own.
            raise _refused(path, error) from None


def _umask() -> int:
    """The process's; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def save_lightning(path: Path, policy: KosmosPolicy, config: dict[str, Any], *, epoch: int, step: int) -> None:
    """Write RoboVLMs' Lightning layout atomically: every weight, alias keys included (they share storages, and bytes in the file).

    Raises:
        StorageError: the disk is full.
    """
    tensors = {canonical(name): p.detach().cpu() for name, p in policy.named_parameters()}
    spec = policy.spec
    rank = None if spec.lora is None else spec.lora.r
    keys = layout_keys(
        policy.kosmos, spec.head, chunk=spec.chunk, rank=rank, adapted=policy.adapted, resampler=spec.vision_resampler
    )
    state = OrderedDict((key.raw, tensors[key.name]) for key in keys)
    records = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": "2.5.6",
        "state_dict": state,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"configs": config},
    }
    save_torch(path, records)


def save_torch(path: Path, records: object) -> None:
    """torch.save, atomically.

    Raises:
        StorageError: the disk is full.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(records, file)
        except RuntimeError as error:
            # torch reports a failed write as a defect of its archive and hides what the system said.
            raise _refused(path, error) from None


def _refused(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} could not be written; the previous file, if any, is as it was",
        got=str(error).splitlines()[0],
        expected="a disk with room for the whole file",
        hint="free some space, then run again with --resume.",
    )
