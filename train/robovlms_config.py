"""A lab's RoboVLMs config as one of ours: the same run where it can be the same, and a note wherever it cannot be.

Follows what RoboVLMs and its 2-DoF fork do with a key, not what its name promises: gradients are clipped by the top-level key alone, the
schedule is constant unless `scheduler` says otherwise, adapters freeze whatever else was to train. Policies that jetvla does not build
are refused by the name of the key. The resampler is trained as published, not causal. Which keys there are: train/robovlms_keys.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from bundle.errors import ConfigError, UnsupportedPolicyError
from train.config import PolicySpec, policy_spec
from train.robovlms_data import augment_settings, box_annotations, data_settings, is_h5
from train.robovlms_heads import class_settings, prompt_settings
from train.robovlms_keys import LabConfig, Notes
from train.robovlms_lora import lora_settings
from train.robovlms_variants import names_kosmos
from train.robovlms_weights import weights_settings

__all__ = ["Notes", "from_robovlms", "is_robovlms"]

_PRECISIONS = {
    **dict.fromkeys(("32", "32-true", "fp32"), "fp32"),
    **dict.fromkeys(("16", "16-mixed", "16-true", "fp16"), "fp16"),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bf16"),
}
_NEEDED = ("act_head.type", "window_size", "fwd_pred_next_n", "learning_rate", "vlm.pretrained_model_name_or_path")
_PATIENCE = 3  # validations, of the fork where trainer.patience is absent


def is_robovlms(values: Mapping[str, Any]) -> bool:
    """Whether a JSON config is RoboVLMs' rather than ours."""
    return any(key in values for key in ("robovlm_name", "act_head", "train_setup"))


def from_robovlms(values: Mapping[str, Any], *, origin: str) -> tuple[dict[str, Any], Notes]:
    """The settings of a RoboVLMs config, as plain data for train.config_checks.convert.

    Args:
        values: the config with its `parent` chain resolved (train.config.read_chain).
        origin: what to call it in messages, usually its file.

    Raises:
        ConfigError: a key that counts is missing, or a known key has a value of the wrong type; names its dotted path.
        UnsupportedPolicyError: it asks for a policy or a training that jetvla does not have; names the key.
    """
    lab = LabConfig(values, origin)
    spec = _policy(values, lab, origin)
    head = spec.head.kind
    words, classes = prompt_settings(lab, values), class_settings(lab, spec, values)
    data = data_settings(lab, spec, words, classes)
    settings = {
        "name": _name(lab),
        "base": _base(lab),
        "data": data,
        "model": _model(lab, spec) | classes.settings,
        "augment": augment_settings(lab, data["actions"]),
        "loss": _loss(lab, head),
        "optimizer": _optimizer(lab),
        "loop": _loop(lab, fork=spec.fork or is_h5(lab)),
        "output": {"runs": lab.get("output_root", "runs")},
    }
    return settings, lab.notes()


def _loss(lab: LabConfig, head: str) -> dict[str, Any]:
    """What is minimised: the gripper's share, or the classes' weights, or the weight of what is not straight ahead."""
    weight = lab.get("act_head.action_weight_non_forward", 1.0)
    stated = {
        "label_smoothing": lab.get("act_head.label_smoothing", 0.0),
        "prior_weight": lab.get("act_head.prior_reg_weight", 0.0),
        "class_prior": tuple(lab.get("act_head.target_class_prior", ())),
    }
    weights = tuple(lab.get("act_head.class_weights", ())) or "none"
    ratio = lab.get("arm_gripper_loss_ratio", 0.01)
    if head == "classes":
        if not (stated["prior_weight"] and stated["class_prior"]):
            stated |= {"prior_weight": 0.0, "class_prior": ()}
        else:
            stated["prior_weight"] = _prior_weight(lab, stated["prior_weight"])
        return {"class_weights": weights, **stated}
    return {"gripper_ratio": ratio} if head == "actions_gripper" else {"non_forward": weight}


def _prior_weight(lab: LabConfig, written: float) -> float:
    """What the prior counts beside the cross-entropy in the lab's sum.

    Its head reports loss = ce + w prior under two names, and ce and prior once more; its trainer adds up all of them: 3 ce + (2 w + 1)
    prior. Three times the loss is the same step of AdamW.
    """
    counts = round((2 * written + 1) / 3, 6)
    lab.assume(
        f"act_head.prior_reg_weight {written:g} counts as {counts:g}: the lab's trainer adds up all that its head reports, the prior by "
        "itself among it (loss.prior_weight)"
    )
    return counts


def _policy(values: Mapping[str, Any], lab: LabConfig, origin: str) -> PolicySpec:
    """What the exporter's reader makes of the config, and the refusal of what we cannot train."""
    lab.refuse(*_refused(lab, values))
    lab.require_all(*_NEEDED)
    plain = copy.deepcopy(dict(values))
    kind = lab.get("act_head.type")
    width = lab.get("act_head.action_dim")
    if kind == "LSTMDecoder" and width == 2 and is_h5(lab):
        # The fork's first configs: one velocity and a gripper by the code, two velocities by intention.
        plain["act_head"]["type"] = "MobileVLALSTMDecoder"
        lab.assume(
            "act_head.type LSTMDecoder with action_dim 2 means one velocity and a gripper; trained is what was meant: two velocities"
        )
    try:
        spec = policy_spec(plain)
    except (ConfigError, UnsupportedPolicyError) as error:
        # The exporter has --config; here the file at hand is the one to complete, and RoboVLMs could not read it either.
        hint = (
            f"complete {origin}; RoboVLMs' own trainer needs the key as well."
            if "--config" in error.hint
            else error.hint
        )
        raise type(error)(f"{origin}: {error.what}", got=error.got, expected=error.expected, hint=hint) from None
    for key in ("act_head.hidden_size", "act_head.num_layers", "act_head.latent", "act_head.num_classes"):
        lab.get(key)
    for key in ("robovlm_name", "trainer_type", "window_size", "fwd_pred_next_n"):
        lab.get(key)
    if lab.get("quantization") is not None:
        lab.assume(
            "quantization: nothing is quantized in training; calib/quantize.py does it afterwards, on recordings"
        )
    return spec


def _refused(lab: LabConfig, values: Mapping[str, Any]) -> list[tuple[str, object, str]]:
    """What no single key says: another backbone, pooling over several tokens, and box annotations that are really there."""
    found: list[tuple[str, object, str]] = []
    model = lab.get("model")
    if model is not None and not names_kosmos(model, values):
        found.append(("model", model, "kosmos: Kosmos-2 is the backbone"))
    elif model not in (None, "kosmos"):
        lab.assume(f"model {model} is a name of folders only: robovlm_name says that the backbone is Kosmos-2")
    sampling = lab.get("act_head.down_sample", "none")
    if sampling == "pooling" and lab.get("act_head.latent", 1) > 1:
        found.append(("act_head.down_sample", sampling, "none, where act_head.latent is more than 1"))
    boxes = box_annotations(lab)
    if boxes is not None:
        found.append(("grounding_aux", str(boxes), "actions alone: boxes are not learned"))
    return found


def _name(lab: LabConfig) -> str:
    written = lab.get("exp_name") or lab.get("task_name") or "robovlms"
    lab.get("task_name")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(written)).lstrip("._-") or "robovlms"


def _base(lab: LabConfig) -> dict[str, Any]:
    base = {"model": lab.require("vlm.pretrained_model_name_or_path"), **weights_settings(lab)}
    lab.name("base.model", "vlm.pretrained_model_name_or_path")
    if (digest := lab.get("jetvla.base_sha256")) is not None:
        base["sha256"] = digest
    if (path := lab.get("resume")) is not None:
        lab.assume(f"resume = {path} is not followed: --resume goes on with a run of ours")
    return base


def _model(lab: LabConfig, spec: PolicySpec) -> dict[str, Any]:
    setup = "train_setup."
    model: dict[str, Any] = {
        "head": spec.head.kind,
        "hidden": spec.head.hidden,
        "layers": spec.head.layers,
        "latent": spec.head.latent,
        "packing": lab.get("jetvla.packing", "upstream"),
        "gradient_checkpointing": lab.get(setup + "gradient_checkpointing", False),
        "train_text_embedding": lab.get(setup + "train_text_embedding", False),
        "train_projection": _tunes_projection(lab),
        **_resampler(lab),
        "lora": {"targets": "none"},
    }
    if spec.fork and lab.get("jetvla.packing") is None:
        lab.assume(
            "packing: the right layout is trained; the fork may have run with fork_overwrite, where words are invisible (jetvla.packing)"
        )
    if lab.get("jetvla.x_attn_causal", False):
        lab.assume("x_attn_causal: the original had a defective resampler; the published one is trained")
    if spec.head.kind == "actions_gripper":
        lab.get("act_head.action_dim")
        model["action_dim"] = spec.head.outputs
    if lab.get(setup + "bits", -1) in (4, 8):
        lab.assume(f"train_setup.bits {lab.get(setup + 'bits')}: the base is not quantized in training")
    if lab.get(setup + "lora_enable", False):
        model["lora"] = _lora(lab, spec)
        return model
    layers = lab.get(setup + "train_decoder_layers", -1)
    model["freeze_backbone"] = frozen = lab.require(setup + "freeze_backbone")
    model["train_vision"] = lab.get(setup + "train_vision", False)
    if not frozen and layers > 0:
        model["train_decoder_layers"] = layers
    return model


def _resampler(lab: LabConfig) -> dict[str, Any]:
    """RoboVLMs' own resampler, where its row is used."""
    if not lab.get("use_vision_resampler", False):
        return {}
    if lab.get("jetvla.packing") == "fork_overwrite":
        lab.assume("use_vision_resampler has no effect: under fork_overwrite the image tokens are Kosmos-2's own")
        return {}
    return {"vision_resampler": True, "freeze_resampler": lab.get("train_setup.freeze_resampler", False)}


def _tunes_projection(lab: LabConfig) -> bool:
    """Of the `mm` keys that configs have from LLaVA, the fork's code reads this one alone."""
    if not lab.get("train_setup.tune_mm_projector", False):
        return False
    lab.assume(
        "train_setup.tune_mm_projector: the projection trains, as in the fork; upstream's code does not read the key"
    )
    return True


def _lora(lab: LabConfig, spec: PolicySpec) -> dict[str, Any]:
    assert spec.lora is not None
    setup = "train_setup."
    lost = ["freeze_backbone false"] if not lab.get(setup + "freeze_backbone", True) else []
    lost += ["train_vision"] if lab.get(setup + "train_vision", False) else []
    if lost:
        lab.assume(f"without effect: {', '.join(lost)}; adapters freeze everything of the base but the word embeddings")
    return lora_settings(lab, spec.lora)


def _optimizer(lab: LabConfig) -> dict[str, Any]:
    schedule = lab.get("scheduler", "constant")
    if schedule not in ("constant", "cosine", "half-cosine"):
        raise lab.unusable("scheduler", expected="constant, cosine or half-cosine")
    clip, written = lab.get("gradient_clip_val", 0.0), lab.get("trainer.gradient_clip_val", 0.0)
    if clip != written:
        outcome = "not clipped" if clip == 0 else f"clipped to {clip:g}"
        lab.assume(
            f"gradients are {outcome}: as in RoboVLMs, the top-level gradient_clip_val (absent: 0) overwrites "
            f"trainer.gradient_clip_val {written:g}; optimizer.clip_norm sets it here"
        )
    return {
        "learning_rate": lab.require("learning_rate"),
        "weight_decay": lab.get("weight_decay", 0.0),
        "schedule": "constant" if schedule == "constant" else "cosine",
        # The plain cosine ends at zero; only half-cosine reads the scale.
        "min_lr_scale": 0.0 if schedule == "cosine" else lab.get("min_lr_scale", 0.01),
        "warmup_steps": lab.get("warmup_steps", 0),
        "warmup_epochs": lab.get("warmup_epochs", 0.0),
        "clip_norm": clip,
    }


def _processes(lab: LabConfig) -> int:
    """How many batches a micro-step of the original had: one on each GPU."""
    gpus, nodes = lab.get("gpus", 1), lab.get("num_nodes", 1)
    each = len(gpus) if isinstance(gpus, list) else gpus
    if isinstance(each, str) or each < 1 or nodes < 1:
        lab.assume(f"gpus {gpus}: taken for one; the original's step had a batch for each (loop.accumulate)")
        return 1
    if each * nodes > 1:
        lab.assume(
            f"gpus and num_nodes: a step is the batches of {each * nodes} processes, however many there are here (loop.accumulate)"
        )
    return each * nodes


def _loop(lab: LabConfig, *, fork: bool) -> dict[str, Any]:
    precision = str(lab.get("trainer.precision", "32"))
    if precision not in _PRECISIONS:
        raise lab.unusable("trainer.precision", expected=", ".join(_PRECISIONS))
    if precision in ("16-true", "bf16-true"):
        lab.assume(f"trainer.precision {precision} is trained in mixed precision: weights stay fp32")
    loop: dict[str, Any] = {
        "batch_size": lab.get("batch_size", 1),
        "accumulate": lab.get("trainer.accumulate_grad_batches", 1) * _processes(lab),
        "precision": _PRECISIONS[precision],
        "workers": lab.get("num_workers", 0),
        "seed": lab.get("seed", 0),
        "max_steps": max(lab.get("trainer.max_steps", -1), 0),
    }
    asked, patience = lab.get("trainer.early_stopping"), lab.get("trainer.patience")
    if fork or asked:
        loop["patience"] = _PATIENCE if patience is None else max(patience, 1)  # Lightning's 0 is our 1
        if not asked:
            lab.assume(
                f"training stops after {loop['patience']} validations without a better loss, which the fork's trainer does since February "
                "2026 whatever trainer.early_stopping says (loop.patience)"
            )
    elif patience is not None:
        lab.assume("trainer.patience has no effect without trainer.early_stopping")
    if (limit := lab.get("trainer.limit_train_batches")) is not None:
        lab.assume(
            f"trainer.limit_train_batches {limit:g} is not followed: epochs are whole (loop.max_steps ends a trial)"
        )
    epochs = lab.get("trainer.max_epochs", -1)
    if epochs > 0:
        loop["epochs"] = epochs
    else:
        lab.assume("trainer.max_epochs sets no end; loop.epochs has its default")
    return loop
