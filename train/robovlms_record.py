"""The training config in RoboVLMs' keys, as their checkpoints carry it: every key of theirs, because a reader must find what counts.

Half of the keys are ignored by the code that writes them. Knows nothing about weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.config import HEADS, HeadSpec

_USUAL_LAYERS = 4  # of the LSTM; RoboVLMs' configs name another number only


@dataclass(frozen=True)
class RobovlmsRun:
    """What differs between runs, in our words.

    Attributes:
        limits: norm_min and norm_max.
        lora: r, alpha, dropout and bias, or None.
        fork: written by the 2-DoF fork's trainer.
        base: the Kosmos-2 directory as the config names it.
        settings: further keys, by their dotted path in RoboVLMs' config.
    """

    head: HeadSpec
    window: int
    chunk: int
    limits: tuple[float, float]
    lora: tuple[int, float, float, str] | None
    fork: bool
    base: str
    seed: int
    task: str
    hand_camera: bool = False
    learning_rate: float = 1e-4
    settings: tuple[tuple[str, Any], ...] = ()


def robovlms_config(run: RobovlmsRun) -> dict[str, Any]:
    """The config in full."""
    head, fork = run.head, run.fork
    r, alpha, dropout, bias = run.lora or (8, 16, 0.1, "none")
    config: dict[str, Any] = {
        "robovlm_name": "RoboKosMos",
        "parent": None,
        "task_name": run.task,
        "model": "kosmos",
        "model_url": "https://huggingface.co/microsoft/kosmos-2-patch14-224",
        "seq_len": 1,
        "image_size": 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "window_size": run.window,
        "fwd_pred_next_n": run.chunk,
        "arm_gripper_loss_ratio": 0.0 if fork else 0.01,
        "cap_loss_ratio": 0.05,
        "fwd_loss_ratio": 0,
        "seed": run.seed,
        "batch_size": 1,
        "num_workers": 0,
        "data_scale": 1,
        "optimizer": "adam",
        "learning_rate": run.learning_rate,
        "min_lr_scale": 0.01,
        "weight_decay": 0,
        "warmup_epochs": 0,
        "warmup_steps": 0,
        "warmup_ratio": None,
        "use_hand_rgb": run.hand_camera,
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
        "model_path": run.base,
        "model_config": f"{run.base}/config.json",
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
            "lora_enable": run.lora is not None,
            "mm_projector_lr": run.learning_rate,
            "lora_r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "lora_bias": bias,
            "train_text_embedding": False,
        },
        # Ignored by the code that writes it, like the window and chunk inside act_head.
        "vision_resampler": {"vis_dim": 1024, "depth": 8, "dim_head": 64, "heads": 8, "num_latents": 64},
        "act_encoder": None,
        "act_head": {
            "type": next(name for name, kind in HEADS.items() if kind == head.kind),
            "hidden_size": head.hidden,
            "action_dim": 2 if head.kind == "classes" else head.outputs,
            "down_sample": "pooling" if head.pooling else "none",
            "latent": head.latent,
            "fwd_pred_next_n": 1,
            "window_size": 1,
            "action_space": "continuous",
            "with_history": True,
            "history_type": "post",
        },
        "fwd_head": None,
        "tokenizer": {
            "type": "AutoProcessor",
            "pretrained_model_name_or_path": run.base,
            "tokenizer_type": "kosmos",
            "max_text_len": 256,
            "additional_special_tokens": None,
        },
        "vlm": {"type": "AutoModelForVision2Seq", "name": "kosmos", "pretrained_model_name_or_path": run.base},
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
        "norm_min": run.limits[0],
        "norm_max": run.limits[1],
    }
    if head.layers != _USUAL_LAYERS:
        config["act_head"]["num_layers"] = head.layers
    if head.kind == "classes":
        config["act_head"]["num_classes"] = head.outputs
    if fork:
        config["trainer_type"] = "MobileVLATrainer"
    for path, value in run.settings:
        section = config
        *above, leaf = path.split(".")
        for name in above:
            section = section[name]
        section[leaf] = value
    return config
