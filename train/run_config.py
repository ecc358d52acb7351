"""The settings of a training run: one typed, strict structure.

Every field has the default that the reference experiments used, so a config names what differs. The docstrings are the documentation of
the keys: docs/training-config.md is made of them. Ranges of single values stand here; what one value cannot know of another is checked
by train/config_checks.py, what values refer to (files, hashes, memory) by train/preflight.py. Files are read by train/load_config.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bundle.manifest import HeadKind, Packing
from bundle.prompt_template import UPSTREAM

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
AboveZero = Annotated[float, Meta(gt=0.0)]
AtLeastZero = Annotated[float, Meta(ge=0.0)]
Text = Annotated[str, Meta(min_length=1)]
Kind = Literal["real", "sim", "augmented"]
Precision = Literal["fp32", "bf16", "fp16"]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections."""


class BaseConfig(_Strict, frozen=True):
    """What training starts from.

    Attributes:
        model: Hugging Face Kosmos-2 directory: config.json, tokenizer.json, model.safetensors.
        weights: a RoboVLMs checkpoint to start from instead of the directory's weights.
        take: of that checkpoint: `backbone` is its vision-language part, adapters merged, under a new head; `policy` takes head and action
            token too, and goes on with its adapters if the run has the same ones.
        sha256: hash of the directory's weights, as runs record it; another base is refused.
    """

    model: str
    weights: str | None = None
    take: Literal["backbone", "policy"] = "backbone"
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None


class SourceConfig(_Strict, frozen=True):
    """Episodes of one kind.

    Attributes:
        files: paths, folders or globs of HDF5 episodes, or folders of LeRobot v3 datasets; relative ones start at the
            config's folder.
        kind: what they are; the run records how many frames of each kind it saw.
        schema: of HDF5 files, where it is recognised wrongly.
        instruction: what the robot was told, for files that do not say.
        words: sentences that mean the same, by the path in a file's name: `left`, `right`, `straight` (as in `left_path`), else `other`.
            They replace what the files say: an episode is told one of them in an epoch, and in validation the first.
        exclude: files whose name holds one of these are left out.
        families: only files of these; a family is what stands between `_target_` and `_path` in a name.
        least_frames: shorter episodes are left out.
        curved: leave out episodes that drive straight ahead all the way.
        path_shares: share of the training episodes by the first of straight, left, right that a name holds, else other. What has no
            share is left out; too few are repeated.
        family_shares: the same by family.
    """

    files: tuple[str, ...]
    kind: Kind = "real"
    schema: Literal["v1", "v5", "v6"] | None = None
    instruction: str | None = None
    words: dict[str, tuple[str, ...]] = {}
    exclude: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    least_frames: NotNegative = 0
    curved: bool = False
    path_shares: dict[str, Share] = {}
    family_shares: dict[str, Share] = {}


class DataConfig(_Strict, frozen=True):
    """Windows over episodes.

    Attributes:
        sources: the episodes.
        actions: the columns that are learned, by name.
        cameras: what the policy sees: `static`, or `hand` and `static`, which every episode must then have.
        window: W, frames of history.
        chunk: n, actions that are predicted at each frame.
        action_range: physical values that become -1 and +1; what exceeds them is clipped. `auto` takes the largest absolute action of the
            training set, symmetrically; the run records it.
        resize: filter of the squash to the model's image size; letterbox keeps the aspect ratio, in the middle of a black square.
        pixel_norm: clip subtracts CLIP's mean and divides by its std.
        val_share: share of the episodes that validates.
        split: a saved split file; by default one is drawn and saved with the run.
        split_seed: of that draw.
        fps: refuse episodes of another rate; by default the files must agree with each other.
        prompt_template: text around the instruction, which goes where `{instruction}` stands. Without that place the policy is trained
            without words. An instruction that carries the whole text already is taken as it is.
        pad_prompt_to: pad every prompt to so many tokens, as some trainers do: masked slots, behind which the action token stands.
    """

    sources: tuple[SourceConfig, ...]
    actions: tuple[str, ...] = ("linear_x", "linear_y")
    cameras: tuple[Literal["hand", "static"], ...] = ("static",)
    window: Positive = 8
    chunk: Positive = 10
    action_range: Literal["auto"] | tuple[float, float] = "auto"
    resize: Literal["bicubic", "bilinear", "letterbox"] = "bilinear"
    pixel_norm: Literal["clip", "none"] = "clip"
    val_share: Share = 0.2
    split: str | None = None
    split_seed: int = 0
    fps: AboveZero | None = None
    prompt_template: str = UPSTREAM
    pad_prompt_to: Annotated[int, Meta(ge=2, le=2048)] | None = None


class AugmentConfig(_Strict, frozen=True):
    """Random changes of training views; all frames of a view change alike. Zero turns each off.

    Attributes:
        mirror: share of views that are mirrored: image flipped, lateral axes negated, left and right swapped in the text.
        brightness, contrast, saturation: largest relative change.
        hue: largest shift, as a share of the colour circle.
        blur: largest radius of a Gaussian blur, in pixels of the resized frame.
        crop: largest share of width and height that is cut off (then resized back).
        share: share of views that are changed at all by colour, blur and crop.
        stop: share of windows that are told one of stop_words instead of what was recorded, and whose actions are then zeros: words
            that are obeyed must be heard.
        stop_words: what such windows are told.
        steer: share of the other windows that are told to go sideways (0.6 m/s) or to turn in place (0.2 rad/s), left and right alike.
        slide_words, turn_words: what these are told, for the left; mirrored for the right. An empty list leaves the motion out.
    """

    mirror: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.0
    blur: AtLeastZero = 0.0
    crop: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.0
    share: Share = 1.0
    stop: Share = 0.0
    stop_words: tuple[str, ...] = ("Stop", "Stop moving", "Stay where you are", "Do not move", "정지", "멈춰")
    steer: Share = 0.0
    slide_words: tuple[str, ...] = ("Slide left", "Move sideways to the left", "왼쪽으로 움직여")
    turn_words: tuple[str, ...] = ("Spin left on the spot", "Turn to the left", "제자리에서 왼쪽으로 돌아")

    @property
    def changes_pixels(self) -> bool:
        """Whether views differ from the recording by more than mirroring, so that image tokens cannot be cached."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue, self.blur, self.crop)
        return self.share > 0 and any(strength > 0 for strength in strengths)


class LoraConfig(_Strict, frozen=True):
    """Adapters.

    Attributes:
        targets: `all` is every Linear of text, vision and projection, as upstream; `text` leaves vision and projection alone, which allows
            the cache of image tokens; `vision` is these two alone; `none` trains no adapter. Else as peft has it: a list of names, each
            of which also means every module whose path ends with it, or one regular expression that matches whole paths.
        layers: only the last so many layers of the text model; or a list of layers by number, from 0, of text model and vision tower.
        r: rank: W += (alpha / r) B A.
        alpha: strength, see r.
        dropout: on A's input.
        bias: which biases train with the adapters: none, those of adapted modules, or all.
    """

    targets: Text | Annotated[tuple[Text, ...], Meta(min_length=1)] = "all"
    layers: Positive | Annotated[tuple[NotNegative, ...], Meta(min_length=1)] | None = None
    r: Positive = 32
    alpha: AboveZero = 16.0
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.1
    bias: Literal["none", "lora_only", "all"] = "none"


class ModelConfig(_Strict, frozen=True):
    """The policy, and which of its parameters train.

    Attributes:
        head: velocities (Huber), actions_gripper (Huber and BCE), classes (weighted cross-entropy).
        hidden: width of the LSTM.
        layers: of the LSTM.
        latent: number of action tokens.
        action_dim: width of a chunk step of an actions_gripper head, gripper included; recorded axes fill its first columns, the rest is 0.
        classes: of a classes head, in order: names out of Stop, F, B, L, R, FL, FR, BL, BR, TurnL, TurnR, or `name=vx,vy[,wz]` in m/s and
            rad/s. None are `Stop F B L R FL FR BL BR`. Names without numbers get the speed of the recordings, turns 0.5 rad/s.
        relabel: motions (names as above) whose frames are labelled as another class; without it, as their own, or as the one that stands
            still where they have none.
        packing: layout of a row; fork_overwrite makes the words of the instruction invisible and exists only to reproduce such runs.
        freeze_backbone: freeze text model and projection; adapters always do, so `false` goes with model.lora.targets = "none".
        train_vision: train the vision tower too.
        train_text_embedding: train the word embeddings too.
        train_projection: train the projection of image features, with its resampler, too.
        instruction_in_head: tell a classes head the instruction too, as the lab's act_head.instr_in_features does: the mean of its word
            embeddings, projected, is added to every feature.
        vision_resampler: put RoboVLMs' resampler of six layers behind Kosmos-2's, as its use_vision_resampler does.
        freeze_resampler: leave it as it starts; useful with weights to start from only.
        train_decoder_layers: of an unfrozen backbone, only the last so many text layers.
        dropout: Kosmos-2's own, in training; its published value is 0.1.
        gradient_checkpointing: trade time for memory.
    """

    head: HeadKind = "velocities"
    hidden: Positive = 512
    layers: Positive = 4
    latent: Positive = 1
    action_dim: Positive | None = None
    classes: tuple[str, ...] = ()
    relabel: dict[str, str] = {}
    packing: Packing = "upstream"
    lora: LoraConfig = LoraConfig()
    freeze_backbone: bool = True
    train_vision: bool = False
    train_text_embedding: bool = False
    train_projection: bool = False
    instruction_in_head: bool = False
    vision_resampler: bool = False
    freeze_resampler: bool = False
    train_decoder_layers: Positive | None = None
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.1
    gradient_checkpointing: bool = False


class LossConfig(_Strict, frozen=True):
    """What is minimised.

    Attributes:
        huber_delta: where Huber turns linear, in normalised units.
        gripper_ratio: weight of the gripper's BCE beside the arm's Huber.
        class_weights: `balanced` weights classes by the inverse of their share in the training set; or one weight per class.
        label_smoothing: share of a class label that is spread over all classes.
        non_forward: weight of actions that do not drive straight ahead (more than half speed, less than a fifth sideways), for velocities.
        class_prior: share of each class that predictions should have on average; see prior_weight.
        prior_weight: weight of the divergence of a batch's mean prediction from class_prior; 0 turns it off.
    """

    huber_delta: AboveZero = 1.0
    gripper_ratio: AtLeastZero = 0.01
    class_weights: Literal["none", "balanced"] | tuple[AtLeastZero, ...] = "balanced"
    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    non_forward: AboveZero = 1.0
    class_prior: tuple[AtLeastZero, ...] = ()
    prior_weight: AtLeastZero = 0.0


class OptimizerConfig(_Strict, frozen=True):
    """AdamW and its schedule.

    Attributes:
        learning_rate: after the warm-up.
        schedule: cosine falls to learning_rate * min_lr_scale at the end.
        weight_decay: of AdamW, on everything that trains.
        warmup_steps: of linear rise from zero.
        warmup_epochs: as many more, in epochs; fractions are usual.
        min_lr_scale: where cosine ends, as a share of learning_rate.
        clip_norm: largest norm of the gradient; 0 does not clip.
    """

    learning_rate: AboveZero = 1e-4
    weight_decay: AtLeastZero = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NotNegative = 0
    warmup_epochs: AtLeastZero = 0.0
    min_lr_scale: Share = 0.01
    clip_norm: AtLeastZero = 1.0

    def resolved(self, steps_per_epoch: int) -> OptimizerConfig:
        """The same with the whole warm-up in steps."""
        steps = self.warmup_steps + math.ceil(self.warmup_epochs * steps_per_epoch)
        return msgspec.structs.replace(self, warmup_steps=steps, warmup_epochs=0.0)


class LoopConfig(_Strict, frozen=True):
    """How long, how much at a time, and when to stop.

    Attributes:
        epochs: passes over the training windows.
        batch_size: windows per forward pass.
        accumulate: forward passes per optimizer step, summed over all processes; must divide by their number.
        windows_per_episode: how many windows of an episode are drawn together. They share frames, which are encoded once, so more is
            faster; 1 mixes best.
        precision: bf16 and fp16 are mixed precision (fp16 with loss scaling).
        workers: processes that prepare batches.
        patience: stop after so many validations without a better loss; 0 never stops early.
        keep_best: checkpoints kept by validation loss, beside the last.
        seed: of weights, order, augmentation and dropout.
        max_steps: stop after so many optimizer steps, whatever the epoch; 0 is no limit.
        save_minutes: how often the state is saved within an epoch; it is at the end of each, too.
        cache_image_tokens: compute them once where nothing that trains or augments reaches them.
    """

    epochs: Positive = 20
    batch_size: Positive = 1
    accumulate: Positive = 8
    windows_per_episode: Positive = 1
    precision: Precision = "fp32"
    workers: NotNegative = 0
    patience: NotNegative = 0
    keep_best: Positive = 3
    seed: int = 0
    max_steps: NotNegative = 0
    save_minutes: AboveZero = 10.0
    cache_image_tokens: bool = True


class OutputConfig(_Strict, frozen=True):
    """What is written where.

    Attributes:
        runs: folder of run folders.
        cache: folder of prepared frames and image tokens; by default `.cache` in `runs`.
        lightning: also write the final policy in RoboVLMs' layout (gigabytes).
        tensorboard: write event files beside steps.csv.
    """

    runs: str = "runs"
    cache: str | None = None
    lightning: bool = False
    tensorboard: bool = True


class RunConfig(_Strict, frozen=True):
    """A training run.

    Attributes:
        name: of the run, and of its folder below `output.runs`: letters, digits, dot, dash, underscore.
        base, data, model, augment, loss, optimizer, loop, output: sections.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    base: BaseConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    output: OutputConfig = OutputConfig()

    def as_dict(self) -> dict[str, Any]:
        """Plain data of every setting, defaults included."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain
