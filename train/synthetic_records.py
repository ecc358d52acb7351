"""What stands in a lab's checkpoint around its weights: the training config, and Lightning's top level.

Configs hold every key that RoboVLMs' do, ignored ones included, because a reader must find what counts among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.robovlms_record import RobovlmsRun, robovlms_config
from train.synthetic_layout import CHUNK, WINDOW, SyntheticOptions, dimensions, head_spec

BASE_FOLDER = "base"
STEPS = 2
_LEARNING_RATE = 1e-4


def training_config(options: SyntheticOptions) -> dict[str, Any]:
    """The RoboVLMs config of the run, in full; the base directory is named relative to the checkpoint."""
    sizes = dimensions(options.size)
    fork = options.layout == "fork"
    limit = 1.0 if fork else 0.65
    config = robovlms_config(
        RobovlmsRun(
            head=head_spec(options),
            window=WINDOW,
            chunk=CHUNK,
            limits=(-limit, limit),
            lora=(sizes.lora_r, sizes.lora_alpha, 0.1, "none"),
            fork=fork,
            base=BASE_FOLDER,
            seed=options.seed,
            task="synthetic",
            hand_camera=options.hand_camera,
            learning_rate=_LEARNING_RATE,
        )
    )
    config["train_setup"]["lora_enable"] = options.lora
    config["use_vision_resampler"] = options.vision_resampler
    if options.told:
        config["act_head"]["instr_in_features"] = sizes.kosmos.text_config.embed_dim
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
