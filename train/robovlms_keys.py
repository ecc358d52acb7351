"""The keys of RoboVLMs configs: which decide a training run, of which type they are, and which nobody reads.

Facts about RoboVLMs (8adc1d2) and its 2-DoF fork, whose configs hold some hundred keys of which the code reads a third. A key in neither
table is unknown, and probably a typing error. What the values mean is in train/robovlms_config.py.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bundle.errors import ConfigError

_WHOLE, _NUMBER, _TEXT, _FLAG = "a whole number", "a finite number", "a text", "true or false"
_NUMBERS, _TEXTS, _TEXT_OR_WHOLE = "a list of numbers", "a list of texts", "a text or a whole number"
_SECTION, _SECTIONS = "an object", "an object, or a list of objects"


def _keys(kind: str, names: str, *, section: str = "") -> dict[str, str]:
    return {section + name: kind for name in names.split()}


_MEANT: dict[str, str] = {
    **_keys(_WHOLE, "window_size fwd_pred_next_n image_size seed batch_size num_workers warmup_steps"),
    **_keys(_NUMBER, "learning_rate min_lr_scale weight_decay warmup_epochs gradient_clip_val"),
    **_keys(_NUMBER, "arm_gripper_loss_ratio norm_min norm_max mu_val"),
    **_keys(_TEXT, "robovlm_name model exp_name task_name trainer_type scheduler output_root model_load_path resume"),
    **_keys(_FLAG, "use_hand_rgb use_vision_resampler use_mu_law use_clip_norm tcp_rel regular_action norm_action"),
    **_keys(_NUMBERS, "image_mean image_std"),
    **_keys(_SECTION, "act_head train_setup vlm trainer fwd_head jetvla"),
    **_keys(_SECTIONS, "train_dataset val_dataset"),
    **_keys(_TEXT, "pretrained_model_name_or_path", section="vlm."),
    **_keys(_TEXT, "type down_sample action_space history_type", section="act_head."),
    **_keys(_WHOLE, "hidden_size num_layers action_dim num_classes latent", section="act_head."),
    **_keys(_WHOLE, "instr_in_features text_in_features", section="act_head."),
    **_keys(_FLAG, "fill_zero", section="act_head."),
    **_keys(_NUMBER, "policy_rnn_dropout_p", section="act_head."),
    **_keys(_NUMBERS, "class_weights", section="act_head."),
    **_keys(
        _FLAG,
        "predict_action predict_forward predict_forward_hand predict_caption freeze_backbone lora_enable train_vision "
        "train_text_embedding gradient_checkpointing tune_mm_mlp_adapter tune_mm_projector freeze_mm_mlp_adapter",
        section="train_setup.",
    ),
    **_keys(_WHOLE, "lora_r train_decoder_layers bits", section="train_setup."),
    **_keys(_NUMBER, "lora_alpha lora_dropout", section="train_setup."),
    **_keys(_TEXT, "lora_bias", section="train_setup."),
    **_keys(_WHOLE, "max_epochs max_steps accumulate_grad_batches", section="trainer."),
    **_keys(_NUMBER, "gradient_clip_val", section="trainer."),
    **_keys(_TEXT_OR_WHOLE, "precision", section="trainer."),
    **_keys(_TEXT, "packing resize pixel_norm base_sha256 prompt_template", section="jetvla."),
    **_keys(_WHOLE, "pad_prompt_to", section="jetvla."),
    **_keys(_NUMBER, "action_minimum action_maximum fps", section="jetvla."),
    **_keys(_FLAG, "x_attn_causal", section="jetvla."),
    **_keys(_TEXTS, "action_names classes", section="jetvla."),
    **_keys(_SECTION, "relabel", section="jetvla."),
}

# Of each object in train_dataset and val_dataset.
_DATASET: dict[str, str] = {
    **_keys(_TEXT, "type data_dir episode_pattern instruction_preset episode_filter_keyword"),
    **_keys(_FLAG, "augment abs_action use_color_jitter use_random_crop is_validation grounding_prefix"),
    **_keys(_SECTION, "instruction_override"),
    **_keys(_WHOLE, "window_size fwd_pred_next_n min_episode_frames num_classes"),
    **_keys(_NUMBER, "train_split history_dropout_prob"),
}

_NOTHING = "anything"
_UNREAD: dict[str, str] = {
    **_keys(
        _NOTHING,
        "parent model_url model_path model_config seq_len cap_loss_ratio fwd_loss_ratio data_scale optimizer warmup_ratio "
        "use_time_causal_attn use_mim_obs_loss use_pixel_loss use_obs_queries vision_masked_ratio use_tube_mask log_root cache_root "
        "log_dir output_dir model_load_source deepspeed_config gpus num_nodes accelerator strategy discrete_action "
        "discrete_action_history vision_resampler act_encoder tokenizer llm description inference_mode raw_config_path config data_dir "
        "annotation_file data_subfolder task_num use_multi_modal_emb no_video_pretrained_model finetune kl_div_ratio clip_norm_ratio "
        "vl_cotrain_ratio train_weights x_mean x_std",
    ),
    **_keys(_NOTHING, "type name", section="vlm."),
    **_keys(
        _NOTHING,
        "fwd_pred_next_n window_size with_history n_bin min_action max_action discrete_action token_source",
        section="act_head.",
    ),
    **_keys(
        _NOTHING,
        "precision freeze_resampler mm_use_im_start_end mm_use_im_patch_token mm_projector_lr lora_target_modules reinit",
        section="train_setup.",
    ),
    **_keys(
        _NOTHING,
        "accelerator strategy logger use_distributed_sampler log_every_n_steps val_check_interval check_val_every_n_epoch "
        "limit_val_batches num_sanity_val_steps devices num_nodes",
        section="trainer.",
    ),
}
_DATASET_UNREAD = _keys(
    _NOTHING, "model_name rgb_pad gripper_pad traj_cons shift_first discrete_action image_size train"
)
_DATASETS = ("train_dataset", "val_dataset")
_SECTIONS_READ = frozenset({"act_head", "train_setup", "vlm", "trainer", "jetvla", *_DATASETS})
_INDEX = re.compile(r"\[\d+\]")
_CUTOFF = 0.75


@dataclass(frozen=True)
class Notes:
    """What became of the keys that did not become settings.

    Attributes:
        ignored: known keys without effect here, by dotted path.
        assumed: sentences: where the original run may have been another one than the config says, or ours will be.
        unknown: keys that RoboVLMs does not know, with the known key that may have been meant.
    """

    ignored: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class LabConfig:
    """A lab's config, read key by key; remembers what was read.

    Args:
        values: the config, parents merged.
        origin: what to call it in messages.

    Raises:
        ConfigError: a known key has a value of the wrong type.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values = values
        self.origin = origin
        self._leaves = dict(_leaves(values, ""))
        self._read: set[str] = {"parent"}  # followed when the file was read
        self._assumed: list[str] = []
        for path, value in self._leaves.items():
            kind = _kind(path)
            if kind is not None and value is not None and not _fits(value, kind):
                raise self.unusable(path, expected=kind)

    def get(self, path: str, default: Any = None) -> Any:
        """The value; null counts as absent."""
        self._read.add(path)
        value = self._leaves.get(path)
        return default if value is None else value

    def require(self, path: str) -> Any:
        """The value.

        Raises:
            ConfigError: there is none.
        """
        value = self.get(path)
        if value is None:
            raise self.unusable(path, expected=_kind(path))
        return value

    def assume(self, sentence: str) -> None:
        """Note that something is not as the config says, or cannot be known from it."""
        self._assumed.append(sentence)

    def unusable(self, path: str, *, expected: object) -> ConfigError:
        """The error for a key whose value, or absence, cannot be worked with."""
        value = self._leaves.get(path)
        misspelt = [key for key, near in self._unknown() if near == path]
        return ConfigError(
            f"{self.origin}: `{path}` is not usable",
            got="nothing" if value is None else repr(value),
            expected=expected,
            hint=f"did you mean {path} by `{misspelt[0]}`?" if misspelt else "correct the value.",
        )

    def datasets(self, key: str) -> tuple[str, ...]:
        """Paths of the objects under train_dataset or val_dataset: one, or the items of a list."""
        value = self._values.get(key)
        if isinstance(value, list):
            return tuple(f"{key}[{index}]" for index in range(len(value)))
        return () if value is None else (key,)

    def notes(self) -> Notes:
        """What was not read, and what was assumed."""
        unknown = self._unknown()
        strange = {path for path, _ in unknown}
        ignored = tuple(path for path in self._leaves if path not in self._read | strange)
        texts = tuple(path if near is None else f"{path}: did you mean {near}?" for path, near in unknown)
        return Notes(ignored, tuple(self._assumed), texts)

    def _unknown(self) -> list[tuple[str, str | None]]:
        """Keys that RoboVLMs does not know, each with the nearest one that it does."""
        strange = (path for path in self._leaves if _kind(path) is None and not _is_unread(path))
        return [(path, _nearest(path)) for path in strange]


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key; sections that nobody reads, and those that nobody knows, are one leaf."""
    for key, value in section.items():
        path = f"{prefix}{key}"
        items = value if path in _DATASETS and isinstance(value, list) else [value]
        if path in _SECTIONS_READ and value is not None and all(isinstance(item, dict) for item in items):
            for index, item in enumerate(items):
                yield from _leaves(item, f"{path}[{index}]." if items is value else f"{path}.")
        else:
            yield path, value


def _kind(path: str) -> str | None:
    """The type of a known key that means something."""
    section, _, key = _INDEX.sub("", path).partition(".")
    return _DATASET.get(key) if section in _DATASETS and key else _MEANT.get(path)


def _is_unread(path: str) -> bool:
    """Whether a key is known, and known to mean nothing. Labs write comments as keys with a leading underscore."""
    section, _, key = _INDEX.sub("", path).partition(".")
    if (key or section).startswith("_"):
        return True
    return key in _DATASET_UNREAD if section in _DATASETS and key else path in _UNREAD


def _nearest(path: str) -> str | None:
    """The known key that was probably meant: nearly that name in the section, else that very name elsewhere."""
    section, _, leaf = path.rpartition(".")
    plain = _INDEX.sub("", section)
    known = list(_DATASET) if plain in _DATASETS else [key.removeprefix(f"{plain}.") for key in _below(plain)]
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=_CUTOFF)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    return next((key for key in _MEANT if key.rpartition(".")[2] == leaf), None)


def _below(section: str) -> list[str]:
    return [key for key in _MEANT if key.rpartition(".")[0] == section]


def _fits(value: object, kind: str) -> bool:
    match kind:
        case "a whole number":
            return isinstance(value, int) and not isinstance(value, bool)
        case "a finite number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "a text":
            return isinstance(value, str)
        case "true or false":
            return isinstance(value, bool)
        case "a list of numbers":
            return isinstance(value, list) and all(_fits(item, _NUMBER) for item in value)
        case "a list of texts":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "a text or a whole number":
            return isinstance(value, str) or _fits(value, _WHOLE)
        case _:
            return isinstance(value, dict)
