"""What every key of a lab's RoboVLMs config does: it acts, it has no effect, or it asks for what jetvla does not do.

Facts about RoboVLMs (8adc1d2), its 2-DoF fork and the lab's navigation package on top of it, whose configs hold some hundred keys of which
the code reads a third. A key that stands in no table is one that none of them reads. docs/training-config.md is made of these tables; what
acting keys become is in train/robovlms_config.py and train/robovlms_data.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WHOLE, NUMBER, TEXT, FLAG = "a whole number", "a finite number", "a text", "true or false"
NUMBERS, TEXTS, TEXT_OR_WHOLE = "a list of numbers", "a list of texts", "a text or a whole number"
TEXT_OR_TEXTS = "a text or a list of texts"
DEVICES = "a whole number, a list of them, or a text"
SECTION, SECTIONS = "an object", "an object, or a list of objects"
DATASETS = ("train_dataset", "val_dataset")


@dataclass(frozen=True)
class Refused:
    """A key with values that would change what is learned, and that jetvla does not do.

    Attributes:
        kind: type of its values.
        harmless: whether a value asks for nothing; null always does.
        instead: what is trained, or what can be done about it.
    """

    kind: str
    harmless: Callable[[Any], bool]
    instead: str


def _keys(kind: str, names: str, *, section: str = "") -> dict[str, str]:
    return {section + name: kind for name in names.split()}


def _off(value: Any) -> bool:
    return not value


ACTS: dict[str, str] = {
    **_keys(WHOLE, "window_size fwd_pred_next_n seed batch_size num_workers warmup_steps"),
    **_keys(NUMBER, "learning_rate min_lr_scale weight_decay warmup_epochs gradient_clip_val"),
    **_keys(NUMBER, "arm_gripper_loss_ratio norm_min norm_max mu_val"),
    **_keys(TEXT, "model robovlm_name exp_name task_name trainer_type scheduler output_root"),
    **_keys(TEXT, "model_load_path model_load_source pretrained_vlm_path resume"),
    **_keys(FLAG, "use_hand_rgb use_vision_resampler load_vlm_only norm_action"),
    **_keys(NUMBERS, "image_mean image_std"),
    **_keys(DEVICES, "gpus"),
    **_keys(WHOLE, "num_nodes"),
    **_keys(SECTION, "act_head train_setup vlm trainer jetvla quantization grounding_aux"),
    **_keys(SECTIONS, "train_dataset val_dataset"),
    **_keys(TEXT, "pretrained_model_name_or_path", section="vlm."),
    **_keys(TEXT, "type down_sample", section="act_head."),
    **_keys(WHOLE, "hidden_size num_layers action_dim num_classes latent instr_in_features", section="act_head."),
    **_keys(NUMBERS, "class_weights target_class_prior", section="act_head."),
    **_keys(NUMBER, "label_smoothing prior_reg_weight action_weight_non_forward", section="act_head."),
    **_keys(
        FLAG,
        "freeze_resampler freeze_backbone lora_enable train_vision train_text_embedding gradient_checkpointing tune_mm_projector",
        section="train_setup.",
    ),
    **_keys(WHOLE, "lora_r lora_decoder_layers train_decoder_layers bits", section="train_setup."),
    **_keys(NUMBER, "lora_alpha lora_dropout", section="train_setup."),
    **_keys(TEXT, "lora_bias", section="train_setup."),
    **_keys(TEXT_OR_TEXTS, "lora_target_modules", section="train_setup."),
    **_keys(WHOLE, "max_epochs max_steps accumulate_grad_batches patience", section="trainer."),
    **_keys(NUMBER, "gradient_clip_val limit_train_batches", section="trainer."),
    **_keys(TEXT_OR_WHOLE, "precision", section="trainer."),
    **_keys(FLAG, "early_stopping", section="trainer."),
    **_keys(TEXT, "packing resize pixel_norm base_sha256 prompt_template", section="jetvla."),
    **_keys(NUMBER, "action_minimum action_maximum fps", section="jetvla."),
    **_keys(FLAG, "x_attn_causal", section="jetvla."),
    **_keys(WHOLE, "pad_prompt_to", section="jetvla."),
    **_keys(SECTION, "relabel", section="jetvla."),
    **_keys(TEXTS, "action_names classes", section="jetvla."),
}

# Of each object in train_dataset and val_dataset.
DATASET_ACTS: dict[str, str] = {
    **_keys(TEXT, "type data_dir data_root_dir episode_pattern instruction_preset resize_mode"),
    **_keys(
        FLAG, "augment use_color_jitter use_random_crop is_validation curvature_only stratified_split grounding_prefix"
    ),
    **_keys(WHOLE, "window_size fwd_pred_next_n min_episode_frames num_classes"),
    **_keys(NUMBER, "train_split counterfactual_stop_prob counterfactual_steer_prob"),
    **_keys(TEXTS, "exclude_path_types include_path_families"),
    **_keys(SECTION, "path_type_weights path_family_weights grounding_aux instruction_override"),
}

_ONE_LOSS = "actions are all that is learned"
REFUSED: dict[str, Refused] = {
    "image_size": Refused(WHOLE, lambda value: value == 224, "224, the size of Kosmos-2's position table"),
    "use_mu_law": Refused(FLAG, _off, "actions on a linear scale"),
    "use_clip_norm": Refused(
        FLAG,
        _off,
        "false: that loss pulls action features towards the instruction's embedding by OpenAI's CLIP ViT-L-14, which trains along and "
        "stands in no Kosmos-2 directory; it would take CLIP's weights and tokenizer",
    ),
    "tcp_rel": Refused(FLAG, _off, "actions in the robot's frame, as recorded"),
    "regular_action": Refused(FLAG, _off, "norm_action scales, x_mean and x_std do not"),
    "fwd_head": Refused(SECTION, _off, f"no forward head: {_ONE_LOSS}"),
    "act_head.action_space": Refused(TEXT, lambda value: value == "continuous", "continuous"),
    "act_head.history_type": Refused(TEXT, lambda value: value == "post", "post: the LSTM sees the history"),
    "act_head.fill_zero": Refused(FLAG, _off, "a history that starts empty"),
    "act_head.text_in_features": Refused(
        WHOLE, _off, "words reach the head through the backbone, or as their mean with act_head.instr_in_features"
    ),
    "act_head.policy_rnn_dropout_p": Refused(NUMBER, _off, "0: an LSTM without dropout"),
    "train_setup.reinit": Refused(FLAG, _off, "false: training starts from Kosmos-2's weights"),
    "train_setup.predict_action": Refused(FLAG, bool, "true: actions are what is learned"),
    **{
        f"train_setup.{name}": Refused(FLAG, _off, f"false: {_ONE_LOSS}")
        for name in ("predict_forward", "predict_forward_hand", "predict_caption")
    },
    "trainer.monitor": Refused(TEXT, lambda value: value == "val_loss", "val_loss"),
}
DATASET_REFUSED: dict[str, Refused] = {
    "abs_action": Refused(FLAG, _off, "actions with their sign: without it a robot only ever goes left"),
    "episode_filter_keyword": Refused(TEXT, _off, "an episode_pattern that finds these files"),
    "use_bbox_target": Refused(FLAG, _off, "words without boxes: the loader finds them by colour"),
    "letterbox_fill": Refused(WHOLE, _off, "0: black bars"),
}


def _unread(reason: str, names: str, *, section: str = "") -> dict[str, str]:
    return {section + name: reason for name in names.split()}


_OLD = "an option of other models; RoboVLMs' Kosmos does not read it"
_NOT_READ = "no trainer reads it"
_COUNTS = "that of `{}` counts"
_LIGHTNING = (
    "how Lightning logs, validates and starts; this trainer validates all of the validation part after each epoch"
)
_PROCESSES = "how processes are started is not the config's to say: see docs/training.md"
_ELSEWHERE = "read by loaders of other data than HDF5 episodes"
NO_EFFECT: dict[str, str] = {
    **_unread("followed when the file is read", "parent"),
    **_unread(
        "the model's directory is vlm.pretrained_model_name_or_path", "model_url model_path model_config vlm_path"
    ),
    **_unread("the tokenizer is that of the model's directory", "tokenizer llm"),
    **_unread("the directory says what it holds", "type name", section="vlm."),
    **_unread("read where the policy is stepped, not where it is trained", "seq_len inference_mode"),
    **_unread(
        "weight of a loss that such a run does not have",
        "cap_loss_ratio fwd_loss_ratio kl_div_ratio clip_norm_ratio vl_cotrain_ratio",
    ),
    **_unread(
        "weight of a loss that such a run does not have", "cap_loss_ratio vl_cotrain_ratio", section="train_setup."
    ),
    **_unread("RoboVLMs takes AdamW, whatever it says", "optimizer"),
    **_unread("warmup_steps and warmup_epochs count", "warmup_ratio"),
    **_unread(
        _OLD,
        "use_time_causal_attn use_mim_obs_loss use_pixel_loss use_obs_queries vision_masked_ratio use_tube_mask act_encoder "
        "use_multi_modal_emb no_video_pretrained_model finetune data_scale",
    ),
    **_unread("RoboVLMs builds its resampler with numbers of its own", "vision_resampler"),
    **_unread("output_root is the folder of everything", "log_root cache_root log_dir output_dir"),
    **_unread(_PROCESSES, "deepspeed_config accelerator strategy"),
    **_unread("act_head.type says whether the head has classes", "discrete_action discrete_action_history"),
    **_unread(_COUNTS.format("act_head.num_classes"), "num_classes"),
    **_unread(_COUNTS.format("trainer.max_epochs"), "max_epochs"),
    **_unread("loaders are given the sections of the datasets, and this stands beside them", "instruction_override"),
    **_unread(
        "loaders are given the sections of the datasets, and this stands beside them", "use_bbox_target data_path"
    ),
    **_unread("read with regular_action only, which is refused", "x_mean x_std"),
    **_unread("mixes Open X-Embodiment sets; weights of files are path_type_weights", "train_weights"),
    **_unread("what the command line of RoboVLMs writes into its config", "raw_config_path config annotation_file"),
    **_unread("what the command line of RoboVLMs writes into its config", "data_dir data_subfolder task_num"),
    **_unread(
        _NOT_READ, "description action_bounds action_descriptions data_collection vlm_prompt on_device_optimization"
    ),
    **_unread(
        "window_size and fwd_pred_next_n of the top level count", "fwd_pred_next_n window_size", section="act_head."
    ),
    **_unread("fwd_pred_next_n counts", "chunk_size", section="act_head."),
    **_unread("LSTM heads always have a history", "with_history", section="act_head."),
    **_unread("read by heads with action bins only", "n_bin min_action max_action", section="act_head."),
    **_unread("the head's type says it", "discrete_action token_source", section="act_head."),
    **_unread("LSTM heads read policy_rnn_dropout_p alone", "dropout", section="act_head."),
    **_unread(
        "read by LLaVA's trainer, not by RoboVLMs'",
        "mm_use_im_start_end mm_use_im_patch_token mm_projector_lr train_full_decoder tune_mm_mlp_adapter freeze_mm_mlp_adapter",
        section="train_setup.",
    ),
    **_unread("trainer.precision overwrites it", "precision", section="train_setup."),
    **_unread(
        _LIGHTNING,
        "accelerator strategy logger use_distributed_sampler log_every_n_steps val_check_interval check_val_every_n_epoch "
        "limit_val_batches num_sanity_val_steps default_root_dir enable_checkpointing",
        section="trainer.",
    ),
    **_unread("that of the top level counts", "batch_size learning_rate", section="trainer."),
    **_unread(_COUNTS.format("gpus"), "devices", section="trainer."),
    **_unread("that of the top level counts", "num_nodes", section="trainer."),
}
DATASET_NO_EFFECT: dict[str, str] = {
    **_unread(
        "loaders of HDF5 episodes do not shift images; Calvin's does", "rgb_pad gripper_pad traj_cons shift_first"
    ),
    **_unread("the section's place says it", "train mode split"),
    **_unread("that of the top level counts", "model_name image_size"),
    **_unread("act_head.type says whether the head has classes", "discrete_action"),
    **_unread(_COUNTS.format("act_head.action_weight_non_forward"), "action_weight_non_forward"),
    **_unread(_COUNTS.format("act_head.action_dim"), "action_dim"),
    **_unread(_COUNTS.format("fwd_pred_next_n"), "chunk_size"),
    **_unread("no loader reads it", "history_dropout_prob augmentation normalize_actions instruction_filter"),
    **_unread("a loader reads use_random_crop and use_color_jitter", "random_crop color_jitter"),
    **_unread(_ELSEWHERE, "data_mix image_aug organize_type shuffle_buffer_size window_sample"),
}


def is_comment(name: str) -> bool:
    """Whether a key is one of the comments that labs write into their JSON."""
    return name.startswith("_") or name == "comment"
