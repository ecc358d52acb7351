"""The fates of a lab's keys: each has one, and the docs and messages say it."""

from __future__ import annotations

from typing import Any

import pytest

from bundle.errors import UnsupportedPolicyError
from tests.train.test_robovlms_config import fork_config, read
from train import robovlms_key_table as table
from train.config import policy_spec

# Keys of public configs of RoboVLMs, its fork and the lab's navigation package, by section.
KEYS = """
accelerator act_encoder act_head action_bounds action_descriptions arm_gripper_loss_ratio batch_size cache_root cap_loss_ratio
data_collection data_path data_scale description discrete_action exp_name fwd_head fwd_loss_ratio fwd_pred_next_n gpus grounding_aux
image_mean image_size image_std inference_mode instruction_override learning_rate load_vlm_only log_root max_epochs min_lr_scale model
model_config model_load_path model_load_source model_path model_url norm_action norm_max norm_min num_classes num_nodes num_workers
on_device_optimization optimizer output_root pretrained_vlm_path quantization resume robovlm_name scheduler seed seq_len strategy task_name
tokenizer train_dataset train_setup trainer trainer_type use_bbox_target use_hand_rgb use_mim_obs_loss use_obs_queries use_pixel_loss
use_time_causal_attn use_tube_mask use_vision_resampler val_dataset vision_masked_ratio vision_resampler vlm vlm_path vlm_prompt
warmup_epochs warmup_ratio warmup_steps weight_decay window_size
act_head.action_dim act_head.action_space act_head.action_weight_non_forward act_head.chunk_size act_head.class_weights
act_head.discrete_action act_head.down_sample act_head.dropout act_head.fwd_pred_next_n act_head.hidden_size act_head.history_type
act_head.instr_in_features act_head.label_smoothing act_head.latent act_head.num_classes act_head.num_layers act_head.prior_reg_weight
act_head.target_class_prior act_head.type act_head.window_size act_head.with_history
train_setup.bits train_setup.cap_loss_ratio train_setup.freeze_backbone train_setup.freeze_mm_mlp_adapter train_setup.freeze_resampler
train_setup.gradient_checkpointing train_setup.lora_alpha train_setup.lora_bias train_setup.lora_decoder_layers train_setup.lora_dropout
train_setup.lora_enable train_setup.lora_r train_setup.lora_target_modules train_setup.mm_projector_lr
train_setup.mm_use_im_patch_token train_setup.mm_use_im_start_end train_setup.precision train_setup.predict_action
train_setup.predict_caption train_setup.predict_forward train_setup.predict_forward_hand train_setup.train_decoder_layers
train_setup.train_full_decoder train_setup.train_text_embedding train_setup.train_vision train_setup.tune_mm_mlp_adapter
train_setup.tune_mm_projector train_setup.vl_cotrain_ratio
trainer.accelerator trainer.accumulate_grad_batches trainer.batch_size trainer.check_val_every_n_epoch trainer.default_root_dir
trainer.devices trainer.early_stopping trainer.enable_checkpointing trainer.gradient_clip_val trainer.learning_rate
trainer.limit_train_batches trainer.limit_val_batches trainer.log_every_n_steps trainer.logger trainer.max_epochs trainer.max_steps
trainer.monitor trainer.num_nodes trainer.patience trainer.precision trainer.strategy trainer.use_distributed_sampler
trainer.val_check_interval vlm.name vlm.pretrained_model_name_or_path vlm.type
""".split()  # noqa: SIM905 - a list of names reads as words
DATASET_KEYS = """
abs_action action_dim action_weight_non_forward augment augmentation chunk_size color_jitter counterfactual_steer_prob
counterfactual_stop_prob curvature_only data_dir data_mix data_root_dir discrete_action episode_filter_keyword episode_pattern
exclude_path_types fwd_pred_next_n gripper_pad grounding_aux grounding_prefix history_dropout_prob image_aug image_size
include_path_families instruction_filter instruction_preset is_validation min_episode_frames mode model_name normalize_actions
num_classes organize_type path_family_weights path_type_weights random_crop resize_mode rgb_pad shift_first shuffle_buffer_size
split stratified_split train train_split type use_bbox_target use_color_jitter use_random_crop window_sample window_size
""".split()  # noqa: SIM905


def test_every_public_key_has_one_fate() -> None:
    for keys, tables in (
        (KEYS, (table.ACTS, table.REFUSED, table.NO_EFFECT)),
        (DATASET_KEYS, (table.DATASET_ACTS, table.DATASET_REFUSED, table.DATASET_NO_EFFECT)),
    ):
        for key in keys:
            assert sum(key in each for each in tables) == 1, key


@pytest.mark.parametrize(
    "key", [*sorted(table.ACTS.keys() - {"act_head.num_layers"}), *table.REFUSED, *table.NO_EFFECT]
)
def test_no_known_key_is_called_unknown(key: str) -> None:
    values = fork_config()
    section, _, leaf = key.rpartition(".")
    (values.setdefault(section, {}) if section else values).setdefault(leaf, None)
    assert not [text for text in read(values)[1].unknown if text.partition(":")[0] == key]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", "paligemma"),
        ("use_clip_norm", True),
        ("train_setup__predict_action", False),
        ("train_setup__predict_caption", True),
        ("act_head__policy_rnn_dropout_p", 0.1),
        ("train_dataset__use_bbox_target", True),
        ("train_dataset__abs_action", True),
        ("trainer__monitor", "train_loss"),
    ],
)
def test_what_would_change_what_is_learned_is_refused_by_its_name(path: str, value: Any) -> None:
    with pytest.raises(UnsupportedPolicyError) as caught:
        read(fork_config(**{path: value}))
    assert path.replace("__", ".") in caught.value.what
    assert repr(value) in caught.value.what


def test_all_that_is_refused_is_told_at_once() -> None:
    with pytest.raises(UnsupportedPolicyError) as caught:
        read(fork_config(use_mu_law=True, train_dataset__use_bbox_target=True, train_setup__predict_forward=True))
    said = str(caught.value)
    for key in ("use_mu_law", "train_dataset.use_bbox_target", "train_setup.predict_forward"):
        assert key in said


def test_the_same_in_the_validation_section_is_not_refused() -> None:
    read(fork_config(val_dataset__use_bbox_target=True))


@pytest.mark.parametrize("asked", [{}, {"trainer__early_stopping": True}, {"trainer__early_stopping": False}])
def test_the_fork_s_trainer_stops_early_whatever_it_is_asked(asked: dict[str, bool]) -> None:
    config, notes = read(fork_config(**asked))
    assert config.loop.patience == 3
    assert any("training stops after 3 validations" in text for text in notes.assumed) != any(asked.values())
    assert read(fork_config(**asked, trainer__patience=5))[0].loop.patience == 5
    assert read(fork_config(**asked, trainer__patience=0))[0].loop.patience == 1  # Lightning's count is one behind


def test_upstream_s_trainer_does_not() -> None:
    upstream = {"act_head__type": "LSTMDecoder", "act_head__action_dim": 7, "train_dataset__type": "DiskCalvinDataset"}
    upstream |= {"trainer_type": "BaseTrainer", "val_dataset__type": "DiskCalvinDataset"}
    assert read(fork_config(**upstream))[0].loop.patience == 0
    config, notes = read(fork_config(**upstream, trainer__patience=5))
    assert config.loop.patience == 0
    assert any("trainer.patience has no effect" in text for text in notes.assumed)


def test_a_share_of_windows_is_told_to_stop() -> None:
    config, notes = read(fork_config(train_dataset__counterfactual_stop_prob=0.2))
    assert config.augment.stop == 0.2
    assert any("stop_words" in text for text in notes.assumed)


def test_a_share_of_windows_is_told_to_steer() -> None:
    nav = {"train_dataset__type": "NavDataset", "train_dataset__counterfactual_steer_prob": 0.3}
    config, notes = read(fork_config(**nav))
    assert config.augment.steer == 0.3
    assert config.augment.turn_words == ()
    assert any("exchanges the turns" in text for text in notes.assumed)
    assert any("nothing is told to turn" in text for text in notes.assumed)

    nav |= {"train_dataset__grounding_prefix": True, "act_head__type": "MobileVLAClassificationDecoder"}
    for count in (6, 8):
        classes = {"act_head__num_classes": count, "train_dataset__num_classes": count, "act_head__action_dim": count}
        config, notes = read(fork_config(**nav, **classes))
        assert config.augment.turn_words
        assert not any("nothing is told to turn" in text for text in notes.assumed)


@pytest.mark.parametrize(("kind", "saturation"), [("MobileVLAH5Dataset", 0.3), ("NavDataset", 0.4)])
def test_colours_and_crop_of_a_loader(kind: str, saturation: float) -> None:
    config, notes = read(
        fork_config(train_dataset__type=kind, train_dataset__use_color_jitter=True, train_dataset__use_random_crop=True)
    )
    assert (config.augment.saturation, config.augment.brightness, config.augment.crop) == (saturation, 0.4, 0.1)
    assert any("always takes the middle" in text for text in notes.assumed)


@pytest.mark.parametrize(
    ("kind", "resize"),
    [("MobileVLAH5Dataset", "bilinear"), ("NavDataset", "bilinear"), ("MobileVLAActionDataset", "bicubic")],
)
def test_training_resizes_as_the_import_of_its_checkpoint_expects(kind: str, resize: str) -> None:
    values = fork_config(train_dataset__type=kind)
    assert read(values)[0].data.resize == policy_spec(values).resize == resize


def test_filters_and_shares_of_a_dataset() -> None:
    config, _ = read(
        fork_config(
            train_dataset__type="NavDataset",
            train_dataset__exclude_path_types=["straight"],
            train_dataset__curvature_only=True,
            train_dataset__path_type_weights={"left": 0.5, "right": 0.5},
        )
    )
    (source,) = config.data.sources
    assert source.exclude == ("straight",)
    assert source.curved
    assert source.least_frames == 10
    assert source.path_shares == {"left": 0.5, "right": 0.5}


def test_what_a_letterbox_does_not_share_with_the_loader_is_said() -> None:
    nav = {"train_dataset__type": "NavDataset", "train_dataset__resize_mode": "letterbox"}
    config, notes = read(fork_config(**nav))
    assert config.data.resize == "letterbox"
    assert not any("letterbox" in text for text in notes.assumed)
    _, notes = read(fork_config(**nav, train_dataset__use_color_jitter=True))
    assert sum("colours change after it" in text for text in notes.assumed) == 1
    config, notes = read(fork_config(**nav, train_dataset__use_random_crop=True, train_dataset__use_color_jitter=True))
    assert config.data.resize == "bilinear"  # a loader that crops leaves the letterbox out
    assert sum("letterbox" in text for text in notes.assumed) == 1


@pytest.mark.parametrize(("kind", "share"), [("MobileVLAH5Dataset", 0.2), ("NavDataset", 0.1)])
def test_the_share_that_validates_is_the_loader_s_own_where_the_config_is_silent(kind: str, share: float) -> None:
    values = fork_config(train_dataset__type=kind)
    del values["train_dataset"]["train_split"]
    assert read(values)[0].data.val_share == share


def test_sentences_that_a_config_states_are_told() -> None:
    nav = {"train_dataset__type": "NavDataset", "train_dataset__grounding_prefix": True}
    override = {"left": ["Go left", "Head left"], "right": ["Go right"], "default": ["Go"], "note": "x"}
    config, notes = read(fork_config(**nav, train_dataset__instruction_override=override))
    words = config.data.sources[0].words
    assert words == {"left": ("Go left", "Head left"), "right": ("Go right",), "other": ("Go",)}
    assert any("where it has no straight: a sentence drawn from lists in the code" in text for text in notes.assumed)

    whole = {**override, "straight": ["Go on"]}
    config, notes = read(fork_config(**nav, train_dataset__instruction_override=whole))
    assert config.data.sources[0].words.keys() == {"left", "right", "straight", "other"}
    assert not any("lists in the code" in text for text in notes.assumed)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_dataset__type": "MobileVLAH5Dataset", "train_dataset__instruction_override": {"left": ["Go left"]}},
        {
            "train_dataset__type": "NavDataset",
            "train_dataset__instruction_override": {"left": ["Go left"]},
        },  # before V5
        {"train_dataset__type": "NavDataset", "instruction_override": {"left": ["Go left"]}},
        {
            "train_dataset__type": "NavDataset",
            "train_dataset__grounding_prefix": True,
            "train_dataset__instruction_preset": "action_aware_train",
            "train_dataset__instruction_override": {"left": ["Go left"]},
        },
    ],
)
def test_sentences_that_the_loader_does_not_read_are_not_told(changes: dict[str, Any]) -> None:
    assert read(fork_config(**changes))[0].data.sources[0].words == {}


def test_what_each_of_the_labs_loaders_does_otherwise() -> None:
    fork, nav = (
        "\n".join(read(fork_config(train_dataset__type=kind))[1].assumed)
        for kind in ("MobileVLAH5Dataset", "NavDataset")
    )
    for text in ("draws fewer at random", "one of five", "subtracted no mean"):
        assert text in fork
        assert text not in nav
    assert "leaves out those with a chunk beyond the end" in nav


def test_the_later_loader_subtracts_clips_mean_whatever_it_is_told() -> None:
    strange = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    assert read(fork_config(train_dataset__type="NavDataset", **strange))[0].data.pixel_norm == "clip"


@pytest.mark.parametrize(
    ("changes", "accumulate", "text"),
    [
        ({}, 8, None),
        ({"gpus": 1, "num_nodes": 1}, 8, None),
        ({"gpus": 4}, 32, "the batches of 4 processes"),
        ({"gpus": [0, 2], "num_nodes": 2}, 32, "the batches of 4 processes"),
        ({"gpus": "auto"}, 8, "taken for one"),
        ({"gpus": -1}, 8, "taken for one"),
        ({"trainer__devices": 4, "trainer__num_nodes": 4}, 8, None),  # RoboVLMs overwrites them
    ],
)
def test_a_step_is_as_many_windows_as_it_was_on_several_gpus(
    changes: dict[str, Any], accumulate: int, text: str | None
) -> None:
    config, notes = read(fork_config(**changes))
    assert config.loop.accumulate == accumulate
    assert any("gpus" in each for each in notes.assumed) == (text is not None)
    assert text is None or any(text in each for each in notes.assumed)
