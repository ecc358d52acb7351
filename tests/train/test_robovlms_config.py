"""RoboVLMs configs as ours: what becomes of each key, what is noted, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from bundle.errors import ConfigError, UnsupportedPolicyError
from train.config import policy_spec
from train.config_checks import convert
from train.robovlms_config import Notes, from_robovlms, is_robovlms
from train.run_config import AugmentConfig, LoraConfig, RunConfig
from train.synthetic_layout import SyntheticOptions
from train.synthetic_records import training_config

EPISODES = "/data/mobile_vla_dataset"


def fork_config(**changes: Any) -> dict[str, Any]:
    """A full config of the 2-DoF fork, as its runs of December 2025 have it, with changes by dotted path (None removes)."""
    values = copy.deepcopy(training_config(SyntheticOptions(layout="fork", head="velocities")))
    dataset = {
        "type": "MobileVLAH5Dataset",
        "data_dir": EPISODES,
        "episode_pattern": "episode_20251*.h5",
        "shift_first": False,
        "model_name": "kosmos",
        "rgb_pad": 10,
        "train_split": 0.8,
    }
    values |= {
        "exp_name": "leftright_20251204",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "min_lr_scale": 1e-3,
        "weight_decay": 0.01,
        "warmup_epochs": 0.1,
        "seed": 123,
        "num_workers": 2,
        "output_root": "runs/leftright",
        "train_dataset": dataset,
        "val_dataset": {**dataset, "is_validation": True},
    }
    values["act_head"]["hidden_size"] = 512
    values["train_setup"] |= {"lora_enable": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.1}
    values["trainer"] |= {"precision": "16-mixed", "max_epochs": 10, "accumulate_grad_batches": 8}
    values.pop("jetvla", None)
    return changed(values, changes)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        *above, leaf = path.split("__")
        section = values
        for name in above:
            section = section.setdefault(name, {})
        section[leaf] = value
    return values


def read(values: dict[str, Any]) -> tuple[RunConfig, Notes]:
    settings, notes = from_robovlms(values, origin="lab.json")
    return convert(settings, origin="lab.json"), notes


def run(**changes: Any) -> RunConfig:
    return read(fork_config(**changes))[0]


def assumed(**changes: Any) -> str:
    return "\n".join(read(fork_config(**changes))[1].assumed)


def test_every_setting_of_a_run_of_the_fork() -> None:
    config, _ = read(fork_config())

    assert config.name == "leftright_20251204"
    assert config.base.weights is None
    data = config.data
    assert [source.files for source in data.sources] == [(f"{EPISODES}/episode_20251*.h5",)]
    assert (data.window, data.chunk, data.val_share, data.action_range) == (8, 10, 0.2, (-1.0, 1.0))
    assert (data.resize, data.pixel_norm, data.actions) == ("bilinear", "clip", ("linear_x", "linear_y"))
    model = config.model
    assert (model.head, model.hidden, model.layers, model.latent) == ("velocities", 512, 4, 1)
    assert (model.packing, model.freeze_backbone, model.lora) == (
        "upstream",
        True,
        LoraConfig(r=32, alpha=16, dropout=0.1),
    )
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.warmup_epochs) == (1e-4, 0.01, 0.1)
    assert (optimizer.schedule, optimizer.clip_norm) == ("constant", 0.0)
    loop = config.loop
    assert (loop.epochs, loop.batch_size, loop.accumulate, loop.workers, loop.seed) == (10, 1, 8, 2, 123)
    assert (loop.precision, loop.max_steps) == ("fp16", 0)
    assert config.output.runs == "runs/leftright"


def test_every_ignored_key_is_listed_once() -> None:
    values = fork_config(_comment="left and right", learnig_rate=3, max_epochs=4, train_setup__lora_rank=3)
    _, notes = read(values)

    listed = [*notes.ignored, *(text.partition(":")[0] for text in notes.unknown)]
    assert len(set(listed)) == len(listed)
    assert {"optimizer", "tokenizer", "vision_resampler", "trainer.logger", "act_head.window_size", "_comment"} <= set(
        listed
    )
    assert {"train_dataset.rgb_pad", "val_dataset.rgb_pad", "train_setup.mm_projector_lr"} <= set(listed)
    assert notes.unknown == (
        "train_setup.lora_rank: did you mean train_setup.lora_r?",
        "learnig_rate: did you mean learning_rate?",
    )
    for key in (
        "learning_rate",
        "act_head.type",
        "train_dataset.data_dir",
        "val_dataset.data_dir",
        "trainer.precision",
    ):
        assert key not in listed


def test_a_key_without_effect_in_this_run_is_ignored_not_unknown() -> None:
    _, notes = read(fork_config(train_setup__lora_enable=False))

    assert {"train_setup.lora_r", "train_setup.lora_bias"} <= set(notes.ignored)
    assert notes.unknown == ()


@pytest.mark.parametrize("options", [SyntheticOptions(), SyntheticOptions(layout="fork", head="velocities")])
def test_the_configs_that_checkpoints_carry_hold_no_unknown_key(options: SyntheticOptions) -> None:
    _, notes = read(training_config(options))

    assert notes.unknown == ()
    assert any("DiskCalvinDataset is not read" in text for text in notes.assumed)


def test_upstream_scales_crops_nothing_and_has_a_gripper() -> None:
    config, _ = read(training_config(SyntheticOptions()))

    assert (config.model.head, config.model.action_dim) == ("actions_gripper", 7)
    assert (config.data.action_range, config.data.resize) == ((-0.65, 0.65), "bicubic")
    assert config.loss.gripper_ratio == 0.01


@pytest.mark.parametrize(
    ("top", "inner", "expected"),
    [(None, None, 0.0), (None, 1.0, 0.0), (0.5, 1.0, 0.5), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0)],
)
def test_the_top_level_clip_wins(top: float | None, inner: float | None, expected: float) -> None:
    changes = {"gradient_clip_val": top, "trainer__gradient_clip_val": inner}

    assert run(**changes).optimizer.clip_norm == expected
    assert ("gradient_clip_val (absent: 0) overwrites" in assumed(**changes)) == (expected != (inner or 0.0))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, ("constant", 1e-3)),
        ("constant", ("constant", 1e-3)),
        ("cosine", ("cosine", 0.0)),
        ("half-cosine", ("cosine", 1e-3)),
    ],
)
def test_schedules(scheduler: str | None, expected: tuple[str, float]) -> None:
    optimizer = run(scheduler=scheduler).optimizer

    assert (optimizer.schedule, optimizer.min_lr_scale) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("16-mixed", "fp16"),
        ("16", "fp16"),
        (16, "fp16"),
        ("bf16", "bf16"),
        ("bf16-true", "bf16"),
        ("32-true", "fp32"),
        (None, "fp32"),
    ],
)
def test_precisions(written: object, expected: str) -> None:
    assert run(trainer__precision=written).loop.precision == expected


def test_normalisation_of_actions() -> None:
    assert run(norm_action=False, norm_min=-0.3).data.action_range == (-1.0, 1.0)
    assert "clipped to [-1, 1]" in assumed(norm_action=False)
    assert run(norm_min=-1.15, norm_max=1.15).data.action_range == (-1.15, 1.15)
    assert "whatever norm_min and norm_max say" in assumed(norm_min=-1.15, norm_max=1.15)


def test_normalisation_of_pixels() -> None:
    assert run(image_mean=None, image_std=None).data.pixel_norm == "clip"
    assert run(image_mean=[0, 0, 0], image_std=[1, 1, 1]).data.pixel_norm == "none"
    with pytest.raises(ConfigError, match=r"lab\.json: `image_mean` is not usable"):
        run(image_mean=[0.5, 0.5, 0.5])


def test_heads() -> None:
    classes = run(
        act_head__type="NavPolicy", act_head__num_classes=9, act_head__class_weights=[1, 1, 0, 9, 9, 3, 3, 0, 0]
    )
    assert (classes.model.head, classes.loss.class_weights) == ("classes", (1, 1, 0, 9, 9, 3, 3, 0, 0))
    unweighted = run(act_head__type="MobileVLAClassificationDecoder", act_head__num_classes=9)
    assert unweighted.loss.class_weights == "none"
    turning = run(act_head__action_dim=3)
    assert turning.data.actions == ("linear_x", "linear_y", "angular_z")
    first = run(act_head__type="LSTMDecoder")
    assert first.model.head == "velocities"
    assert "two velocities" in assumed(act_head__type="LSTMDecoder")


def test_what_trains_beside_adapters_is_what_peft_leaves() -> None:
    config = run(
        train_setup__freeze_backbone=False, train_setup__train_vision=True, train_setup__train_text_embedding=True
    )

    assert (config.model.freeze_backbone, config.model.train_vision, config.model.train_text_embedding) == (
        True,
        False,
        True,
    )
    text = assumed(train_setup__freeze_backbone=False, train_setup__train_vision=True)
    assert "without effect: freeze_backbone false, train_vision" in text


def test_what_trains_without_adapters() -> None:
    lora = {"train_setup__lora_enable": False}
    config = run(
        **lora, train_setup__freeze_backbone=False, train_setup__train_vision=True, train_setup__train_decoder_layers=2
    )
    assert (config.model.lora.targets, config.model.freeze_backbone) == ("none", False)
    assert (config.model.train_vision, config.model.train_decoder_layers) == (True, 2)

    projection = run(**lora, train_setup__tune_mm_projector=True).model
    assert (projection.freeze_backbone, projection.train_projection) == (True, True)
    # Of LLaVA's keys the fork's code reads that one alone.
    assert run(
        **lora, train_setup__tune_mm_projector=True, train_setup__freeze_mm_mlp_adapter=True
    ).model.train_projection
    assert not run(**lora, train_setup__tune_mm_mlp_adapter=True).model.train_projection


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        (None, None, ("all", None)),
        (None, -1, ("all", None)),
        (None, 4, ("all", 4)),
        ("all-linear", None, ("all", None)),
        (["q_proj", "fc1"], None, (("q_proj", "fc1"), None)),
        (["q_proj", "lm_head"], -1, (("q_proj",), None)),
        (r"vision_model\..+\.q_proj", None, (r"vision_model\..+\.q_proj", None)),
        # The lab's code reads the layers only where no targets are named.
        (["q_proj"], 4, (("q_proj",), None)),
    ],
)
def test_adapters_as_the_labs_code_hands_them_to_peft(targets: object, layers: object, expected: object) -> None:
    changes = {"train_setup__lora_target_modules": targets, "train_setup__lora_decoder_layers": layers}
    lora = run(**changes).model.lora

    assert (lora.targets, lora.layers) == expected
    idle = "lora_decoder_layers 4; the lab's code reads it only where" in assumed(**changes)
    assert idle == (targets is not None and layers == 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_target_modules", ""),
        ("lora_target_modules", []),
        ("lora_target_modules", ["lm_head"]),
        ("lora_target_modules", {"q_proj": 1}),
        ("lora_target_modules", [3]),
        ("lora_decoder_layers", 0),
        ("lora_decoder_layers", -2),
        ("lora_decoder_layers", "4"),
    ],
)
def test_adapters_that_peft_or_the_lab_would_refuse(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"lab\.json: `train_setup\.{key}` is not usable"):
        run(**{f"train_setup__{key}": value})


def test_where_a_loader_of_other_files_was_configured_our_kinds_are_looked_for() -> None:
    dataset = {"type": "OpenVLADataset", "data_root_dir": "datasets/oxe", "data_mix": "rt_1", "model_name": "kosmos"}
    config, notes = read(fork_config(train_dataset=dataset, use_hand_rgb=True))
    assert config.data.sources[0].files == ("datasets/oxe/episode_*.h5",)
    assert any(
        "OpenVLADataset is not read; H5 episodes are looked for in datasets/oxe" in text for text in notes.assumed
    )


def test_the_hand_camera() -> None:
    assert run().data.cameras == ("static",)
    assert run(use_hand_rgb=True).data.cameras == ("hand", "static")


def test_augmentation() -> None:
    changes = dict.fromkeys(
        ("train_dataset__augment", "train_dataset__use_color_jitter", "train_dataset__use_random_crop"), True
    )

    expected = AugmentConfig(mirror=0.5, brightness=0.4, contrast=0.4, saturation=0.3, hue=0.1, crop=0.1)
    assert run(**changes).augment == expected
    assert run().augment == AugmentConfig()


LAB = {"type": "NavDataset", "grounding_prefix": True}
LAB_UNDER_ANOTHER_NAME = {"type": "MobileVLAH5Dataset", "grounding_prefix": True}


def of_dataset(changes: dict[str, Any]) -> dict[str, Any]:
    return {f"train_dataset__{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("loader", [LAB, LAB_UNDER_ANOTHER_NAME])
def test_what_the_loader_does_where_the_config_says_nothing(loader: dict[str, Any]) -> None:
    """The lab's package puts its own loader under the fork's name, too; a key that the fork's lacks tells."""
    silent = {**loader, "train_split": None, "use_color_jitter": True}
    config = run(**of_dataset(silent))
    assert (config.data.val_share, config.augment.saturation) == (0.1, 0.4)
    assert config.data.sources[0].least_frames == 10
    assert (config.data.prompt_template, config.data.pad_prompt_to) == ("<grounding>{instruction}", 256)

    fork = run(**of_dataset({"train_split": None, "use_color_jitter": True}))
    assert (fork.data.val_share, fork.augment.saturation) == (0.2, 0.3)
    assert fork.data.sources[0].least_frames == 0


def test_a_letterbox_is_left_out_where_the_loader_leaves_it_out() -> None:
    """Training and import of a checkpoint alike."""
    asked = {**LAB, "resize_mode": "letterbox"}
    for changes, resize in (
        (asked, "letterbox"),
        ({**asked, "use_random_crop": True}, "bilinear"),
        ({**asked, "type": "DiskCalvinDataset"}, "bicubic"),
    ):
        values = fork_config(**of_dataset(changes))
        config, notes = read(values)
        assert policy_spec(values).resize == config.data.resize == resize
        assert any("without effect: resize_mode" in text for text in notes.assumed) == (resize != "letterbox")


def test_a_prior_counts_as_in_the_labs_sum() -> None:
    """A step of theirs minimises 2 (ce + w prior) + ce + prior."""
    head = {
        "act_head__type": "MobileVLAClassificationDecoder",
        "act_head__num_classes": 8,
        "act_head__prior_reg_weight": 0.2,
        "act_head__target_class_prior": [0.125] * 8,
    }
    loss = run(**of_dataset(LAB), **head).loss
    summed = {"ce": 2 + 1, "prior": 2 * 0.2 + 1}
    assert loss.prior_weight == pytest.approx(summed["prior"] / summed["ce"], abs=1e-5)
    assert "prior_reg_weight 0.2 counts as 0.466667" in assumed(**of_dataset(LAB), **head)
    assert run(**of_dataset(LAB), **{**head, "act_head__target_class_prior": None}).loss.prior_weight == 0


def test_several_datasets() -> None:
    values = fork_config()
    values["train_dataset"] = [values["train_dataset"], {**values["train_dataset"], "data_dir": "/more/", "rgb_pad": 3}]
    config, notes = read(values)

    assert [source.files[0] for source in config.data.sources] == [
        f"{EPISODES}/episode_20251*.h5",
        "/more/episode_20251*.h5",
    ]
    assert "train_dataset[1].rgb_pad" in notes.ignored


def test_validation_files_that_are_not_training_files_are_noted() -> None:
    assert "val_dataset names other files" in assumed(val_dataset__episode_pattern="val_*.h5")
    assert "val_dataset names other files" not in assumed()


def test_packing_is_the_right_one_unless_told_otherwise() -> None:
    assert run().model.packing == "upstream"
    assert "words are invisible" in assumed()
    assert run(jetvla={"packing": "fork_overwrite"}).model.packing == "fork_overwrite"
    assert "words are invisible" not in assumed(jetvla={"packing": "upstream"})


def test_a_resampler_trains_where_its_row_is_used() -> None:
    lab = {"use_vision_resampler": True, "train_setup__freeze_resampler": True}
    assert (run(**lab).model.vision_resampler, run(**lab).model.freeze_resampler) == (True, True)
    overwritten = {**lab, "jetvla": {"packing": "fork_overwrite"}}
    assert not run(**overwritten).model.vision_resampler
    assert "use_vision_resampler has no effect" in assumed(**overwritten)


def test_a_class_head_is_told_the_instruction_where_the_lab_says_so() -> None:
    lab = {
        "act_head__type": "NavPolicy",
        "act_head__num_classes": 9,
        "act_head__instr_in_features": 2048,
        "train_dataset__discrete_action": True,
    }
    assert run(**lab).model.instruction_in_head
    assert "the mean of the prompt's word embeddings, padding included" in assumed(**lab)
    other = {"act_head__instr_in_features": 2048}
    assert not run(**other).model.instruction_in_head
    assert "act_head.instr_in_features has no effect" in assumed(**other)


def test_another_kosmos_is_a_name_of_folders() -> None:
    """The class, its weights and the loader of HDF5 episodes do not ask for it."""
    assert "model kosmos-g is a name of folders only" in assumed(model="kosmos-g")
    assert "model kosmos" not in assumed()
    for changes in ({"model": "paligemma"}, {"model": "kosmos-g", "train_dataset__type": "DiskCalvinDataset"}):
        with pytest.raises(UnsupportedPolicyError, match=r"lab\.json: model = "):
            run(**changes)


def test_facts_that_our_trainer_recorded_count() -> None:
    facts = {
        "packing": "upstream",
        "x_attn_causal": False,
        "resize": "bicubic",
        "pixel_norm": "none",
        "action_names": ["linear_x", "angular_z"],
        "action_minimum": -0.5,
        "action_maximum": 0.5,
        "fps": 6.0,
        "base_sha256": "0" * 64,
    }
    config, notes = read(fork_config(jetvla=facts))

    data = config.data
    assert (data.resize, data.pixel_norm, data.actions) == ("bicubic", "none", ("linear_x", "angular_z"))
    assert (data.action_range, data.fps, config.base.sha256) == ((-0.5, 0.5), 6.0, "0" * 64)
    assert notes.unknown == ()


@pytest.mark.parametrize(
    ("written", "name"),
    [("left/right test", "left-right-test"), ("한글", "robovlms"), (None, "synthetic"), ("..x", "x")],
)
def test_names_become_folders(written: str | None, name: str) -> None:
    assert run(exp_name=written).name == name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_load_path": "whole.pt"}, ("whole.pt", "policy")),
        ({"pretrained_vlm_path": "part.pt", "load_vlm_only": True}, ("part.pt", "backbone")),
        # As the fork's code: not read without the flag, and loaded over by the whole.
        ({"pretrained_vlm_path": "part.pt"}, (None, "backbone")),
        (
            {"pretrained_vlm_path": "part.pt", "load_vlm_only": True, "model_load_path": "whole.pt"},
            ("whole.pt", "policy"),
        ),
        ({"pretrained_vlm_path": None, "load_vlm_only": True, "model_load_source": "lightning"}, (None, "backbone")),
        ({"model_load_path": ""}, (None, "backbone")),
    ],
)
def test_weights_to_start_from(changes: dict[str, Any], expected: tuple[str | None, str]) -> None:
    base = run(**changes).base

    assert (base.weights, base.take) == expected
    idle = "without effect: pretrained_vlm_path" in assumed(**changes)
    assert idle == (changes.get("pretrained_vlm_path") is not None and base.weights != "part.pt")


def test_a_source_that_robovlms_does_not_know() -> None:
    assert run(model_load_source="hub").base.weights is None
    with pytest.raises(ConfigError, match="`model_load_source` is not usable"):
        run(model_load_path="whole.pt", model_load_source="hub")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("use_mu_law", True),
        ("use_clip_norm", True),
        ("train_setup.reinit", True),
        ("tcp_rel", True),
        ("regular_action", True),
        ("model", "paligemma"),
        ("fwd_head", {"type": "x"}),
        ("image_size", 336),
        ("act_head.history_type", "pre"),
        ("act_head.action_space", "discrete"),
        ("act_head.policy_rnn_dropout_p", 0.1),
        ("act_head.fill_zero", True),
        ("train_setup.predict_action", False),
        ("train_setup.predict_caption", True),
        ("train_dataset.abs_action", True),
        ("train_dataset.episode_filter_keyword", "left"),
    ],
)
def test_what_jetvla_does_not_train_is_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(UnsupportedPolicyError) as caught:
        run(**{path.replace(".", "__"): value})

    assert path in str(caught.value)
    assert "lab.json" in str(caught.value)


NAV: dict[str, Any] = {"act_head__type": "MobileVLAClassificationDecoder", "train_dataset__type": "NavDataset"}
V5: dict[str, Any] = {**NAV, "train_dataset__grounding_prefix": True}


def test_eight_classes_of_the_lab_turn() -> None:
    """Its NavDataset since V5: turns in place, `<grounding>` before the sentence, 256 tokens."""
    changes = {**V5, "act_head__num_classes": 8, "train_dataset__num_classes": 8}
    config, notes = read(fork_config(**changes))

    assert config.model.classes == ("Stop", "F", "L", "R", "FL", "FR", "TurnL", "TurnR")
    assert config.model.relabel == {}
    assert config.data.actions == ("linear_x", "linear_y", "angular_z")
    assert config.data.action_range == "auto"
    assert (config.data.prompt_template, config.data.pad_prompt_to) == ("<grounding>{instruction}", 256)
    assert "classes Stop F L R FL FR TurnL TurnR (assumed: the order of NavDataset of V5)" in "\n".join(notes.assumed)
    assert "train_dataset.num_classes" not in notes.ignored
    assert not {path for path in notes.unknown if "grounding_prefix" in path or "num_classes" in path}


def test_six_classes_are_labelled_as_their_loader_did() -> None:
    six = {"act_head__num_classes": 6, "train_dataset__num_classes": 6}
    before, later = run(**NAV, **six), run(**V5, **six)

    assert before.model.classes == later.model.classes == ("Stop", "F", "L", "R", "FL", "FR")
    assert (before.model.relabel, before.data.actions) == ({}, ("linear_x", "linear_y"))
    assert later.model.relabel == {"FL": "L", "FR": "R", "TurnL": "L", "TurnR": "R"}
    assert later.data.actions == ("linear_x", "linear_y", "angular_z")
    assert "FL as L" in assumed(**V5, **six)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        (
            {**V5, "act_head__num_classes": 9},
            ("NavDataset of V5 with num_classes 9 labels 8 classes", "the head has 9"),
        ),
        ({**NAV, "act_head__num_classes": 8}, ("NavDataset before V5 with num_classes 9 labels 9 classes",)),
        ({**V5, "act_head__num_classes": 8, "train_dataset__num_classes": 6}, ("labels 6 classes", "the head has 8")),
        ({"act_head__type": "MobileVLAClassificationDecoder", "act_head__num_classes": 6}, ("MobileVLAH5Dataset",)),
        ({**V5, "act_head__num_classes": 7}, ("act_head.num_classes",)),
    ],
)
def test_classes_whose_order_nobody_can_know_must_be_stated(changes: dict[str, Any], texts: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedPolicyError, match="must be stated") as caught:
        run(**changes)
    for text in (*texts, "lab.json", "jetvla.classes"):
        assert text in str(caught.value)


def test_a_config_of_ours_trains_the_same_classes_again() -> None:
    again = run(
        act_head__type="MobileVLAClassificationDecoder",
        act_head__num_classes=2,
        jetvla__classes=["Stop=0,0", "F=1.15,0"],
        jetvla__relabel={"FL": "F"},
    )
    assert (again.model.classes, again.model.relabel) == (("Stop=0,0", "F=1.15,0"), {"FL": "F"})


def test_stated_classes_go_before_the_loaders() -> None:
    stated = ["Stop", "slow=0.2,0", "fast=1,0", "arc=0.5,0,0.3", "B", "L", "R"]
    config, notes = read(fork_config(**V5, act_head__num_classes=7, jetvla__classes=stated))
    assert config.model.classes == tuple(stated)
    assert config.data.actions == ("linear_x", "linear_y", "angular_z")
    assert "classes" not in "\n".join(notes.assumed)


@pytest.mark.parametrize(
    ("changes", "template"),
    [
        ({}, "{instruction}"),
        ({"grounding_prefix": True}, "<grounding>{instruction}"),
        ({"grounding_prefix": False, "instruction_preset": "default"}, "{instruction}"),
        ({"instruction_preset": "action_aware_train"}, "<grounding>An image of a robot {instruction}"),
        (
            {"instruction_preset": "action_aware_train", "grounding_prefix": True},
            "<grounding>Instruction: {instruction}. Action:",
        ),
        (
            {"instruction_preset": "path_type_aware", "grounding_prefix": True},
            "<grounding>Instruction: {instruction}. Action:",
        ),
        (
            {"instruction_override": {"left": ["go"]}, "grounding_prefix": True},
            "<grounding>Instruction: {instruction}. Action:",
        ),
    ],
)
def test_the_text_around_an_instruction_is_what_the_loader_put_there(changes: dict[str, Any], template: str) -> None:
    values = fork_config(train_dataset__type="NavDataset")
    values["train_dataset"] |= changes
    config, notes = read(values)
    assert (config.data.prompt_template, config.data.pad_prompt_to) == (template, 256)
    replaced = "told here is the sentence of each file" in "\n".join(notes.assumed)
    assert replaced == ("Instruction:" in template or "robot" in template)


def test_the_forks_loader_puts_upstreams_text_and_leaves_the_length() -> None:
    data = run().data
    assert (data.prompt_template, data.pad_prompt_to) == ("<grounding>An image of a robot {instruction}", None)
    stated = run(jetvla__prompt_template="<grounding>{instruction}", jetvla__pad_prompt_to=64).data
    assert (stated.prompt_template, stated.pad_prompt_to) == ("<grounding>{instruction}", 64)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("learning_rate", "1e-4"),
        ("learning_rate", None),
        ("learning_rate", float("nan")),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("seed", "a"),
        ("train_setup", []),
        ("train_setup.lora_enable", "yes"),
        ("train_setup.lora_r", None),
        ("train_dataset", "folder"),
        ("train_dataset", None),
        ("train_dataset.data_dir", None),
        ("train_dataset.train_split", "0.8"),
        ("trainer.max_epochs", "10"),
        ("trainer.precision", "8"),
        ("act_head.class_weights", ["a"]),
        ("act_head.type", None),
        ("scheduler", "linear"),
        ("vlm.pretrained_model_name_or_path", None),
        ("jetvla.packing", 3),
    ],
)
def test_a_wrong_type_is_refused_by_its_path(path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"lab\.json: .*`{path}`"):
        run(**{path.replace(".", "__"): value})


def test_a_misspelt_key_that_is_needed_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean learning_rate by `learnig_rate`"):
        run(learning_rate=None, learnig_rate=1e-4)


def test_all_keys_that_are_missing_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"`window_size`, `learning_rate` are missing"):
        run(window_size=None, learning_rate=None)


def test_which_json_is_robovlms() -> None:
    assert is_robovlms(fork_config())
    assert not is_robovlms({"name": "x", "base": {}, "data": {}})
