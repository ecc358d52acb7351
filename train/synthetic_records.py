"""What stands in a lab's checkpoint around its weights: the training config, and Lightning's top level.

Configs hold every key that RoboVLMs' do, ignored ones included, because a reader must find what counts among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.config import HEADS
from train.synthetic_layout import CHUNK, SyntheticOptions, dimensions

BASE_FOLDER = "base"
STEPS = 2
_LEARNING_RATE = 1e-4


def training_config(options: SyntheticOptions) -> dict[str, Any]:
    """The RoboVLMs config of the run, in full; the base directory is named relative to the checkpoint."""
    sizes = dimensions(options.size)
    fork = options.layout == "fork"
    limit = 1.0 if fork else 0.65
    config: dict[str, Any] = {
        "robovlm_name": "RoboKosMos",
        "parent": None,
        "task_name": "synthetic",
        "model": "kosmos",
        "model_url": "https://huggingface.co/microsoft/kosmos-2-patch14-224",
        "seq_len": 1,
        "image_size": 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "window_size": 8,
        "fwd_pred_next_n": CHUNK,
        "arm_gripper_loss_ratio": 0.0 if fork else 0.01,
        "cap_loss_ratio": 0.05,
        "fwd_loss_ratio": 0,
        "seed": options.seed,
        "batch_size": 1,
        "num_workers": 0,
        "data_scale": 1,
        "optimizer": "adam",
        "learning_rate": _LEARNING_RATE,
        "min_lr_scale": 0.01,
        "weight_decay": 0,
        "warmup_epochs": 0,
        "warmup_steps": 0,
        "warmup_ratio": None,
        "use_hand_rgb": options.hand_camera,
        "use_time_causal_attn": False,
        "use_mim_obs_loss": False,
        "use_pixel_loss": True,
        "use_obs_queries": True,
        "use_vision_resampler": False,
        "vision_masked_ratio": 0.9,
        "use_tube_mask": False,
        "output_root": "runs/checkpoints",
        "log_root": "runs/logs",
        "cache_root": "runs/cache",
        "model_load_path": None,
        "model_load_source": "torch",
        "resume": None,
        "model_path": BASE_FOLDER,
        "model_config": f"{BASE_FOLDER}/config.json",
        "train_setup": {
            "precision": "32",
            "predict_action": True,
            "predict_forward": False,
            "predict_forward_hand": False,
            "predict_caption": False,
            "train_vision": False,
            "bits": -1,
            "freeze_mm_mlp_adapter": False,
            "freeze_backbone": True,
            "freeze_resampler": False,
            "tune_mm_mlp_adapter": False,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "gradient_checkpointing": False,
            "lora_enable": options.lora,
            "mm_projector_lr": _LEARNING_RATE,
            "lora_r": sizes.lora_r,
            "lora_alpha": sizes.lora_alpha,
            "lora_dropout": 0.1,
            "lora_bias": "none",
            "train_text_embedding": False,
        },
        # Ignored by the code that writes it, like the window and chunk inside act_head.
        "vision_resampler": {"vis_dim": 1024, "depth": 8, "dim_head": 64, "heads": 8, "num_latents": 64},
        "act_encoder": None,
        "act_head": {
            "type": next(name for name, kind in HEADS.items() if kind == options.head),
            "hidden_size": options.hidden,
            "action_dim": 2 if options.head == "classes" else options.outputs,
            "down_sample": "pooling" if options.pooling else "none",
            "latent": options.latent,
            "fwd_pred_next_n": 1,
            "window_size": 1,
            "action_space": "continuous",
            "with_history": True,
            "history_type": "post",
        },
        "fwd_head": None,
        "tokenizer": {
            "type": "AutoProcessor",
            "pretrained_model_name_or_path": BASE_FOLDER,
            "tokenizer_type": "kosmos",
            "max_text_len": 256,
            "additional_special_tokens": None,
        },
        "vlm": {"type": "AutoModelForVision2Seq", "name": "kosmos", "pretrained_model_name_or_path": BASE_FOLDER},
        "trainer": {
            "accelerator": "cpu",
            "strategy": "auto",
            "precision": "32",
            "logger": ["tensorboard"],
            "gradient_clip_val": 1.0,
            "use_distributed_sampler": False,
            "log_every_n_steps": 10,
            "max_epochs": 1,
            "val_check_interval": None,
            "check_val_every_n_epoch": 1,
            "max_steps": -1,
            "accumulate_grad_batches": 1,
        },
        "train_dataset": {"type": "DiskCalvinDataset", "data_dir": "datasets/training", "model_name": "kosmos"},
        "val_dataset": {"type": "DiskCalvinDataset", "data_dir": "datasets/validation", "model_name": "kosmos"},
        "norm_action": True,
        "norm_min": -limit,
        "norm_max": limit,
    }
    if options.head == "classes":
        config["act_head"]["num_classes"] = options.outputs
    if fork:
        config["trainer_type"] = "MobileVLATrainer"
    return config


def lightning_records(
    options: SyntheticOptions, state: dict[str, Tensor], optimizer: dict[int, dict[str, Tensor]]
) -> dict[str, Any]:
    """The file's top level as Lightning 2.5 writes it after STEPS steps.

    Args:
        state: raw key -> tensor.
        optimizer: AdamW's state of each trained parameter, by its index.
    """
    hyper: dict[str, Any] = {"configs": training_config(options)}
    if options.layout == "fork":
        hyper["quantization_config"] = None
    group = {
        "lr": _LEARNING_RATE,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "initial_lr": _LEARNING_RATE,
        "params": list(optimizer),
    }
    schedule = {
        "base_lrs": [_LEARNING_RATE],
        "last_epoch": STEPS,
        "_step_count": STEPS + 1,
        "_last_lr": [_LEARNING_RATE],
    }
    best: dict[str, object] = {
        "monitor": None,
        "best_model_score": None,
        "best_k_models": {},
        "kth_value": torch.tensor(torch.inf),
    }
    return {
        "epoch": 0,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.5.6",
        "state_dict": state,
        "loops": {loop: {"state_dict": {}} for loop in ("fit_loop", "validate_loop", "test_loop", "predict_loop")},
        "callbacks": {"ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_epochs': 1}": best},
        "optimizer_states": [{"state": optimizer, "param_groups": [group]}],
        "lr_schedulers": [schedule],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper,
    }
