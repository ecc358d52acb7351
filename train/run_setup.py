"""Everything that a run needs before its first step: base, episodes, split, prompts, policy, caches - gathered in the order of cost.

`gather` reads what is small and can be checked in seconds (this is all that `--dry-run` does); `prepare` does the long work: weights,
resized frames, image tokens. Knows nothing about optimizers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bundle.errors import BaseWeightsError, ConfigError
from bundle.tokenization import tokenize
from episodes.reader import CAMERAS
from train.action_classes import USUAL_SPEED_MPS, ClassTable, classes_of_model
from train.augmentation import Augmenter
from train.base import base_weights, read_base_config, tensors_sha256
from train.episode_choice import weighted
from train.episode_files import find_files
from train.episode_set import TrainingEpisode, read_episodes
from train.facts import TrainingFacts
from train.frame_store import FrameStore
from train.inputs import InputSource, instructions_of
from train.load_config import LoadedConfig
from train.losses import LossSpec, balanced_weights
from train.policy import KosmosPolicy
from train.preflight_files import missing_weights
from train.robovlms_base import StartingPoint, starting_point
from train.run_checkpoints import checkpoint_config
from train.run_config import RunConfig
from train.sampling import steps_per_epoch
from train.split import SPLIT_NAME, Split, draw_split, part_episodes, read_split
from train.token_cache import TokenCache
from train.told import told_texts
from train.trainable import build_policy, head_spec, reaches_vision, training_mode
from train.windows import resolve_action_range

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that is not shown."""
    yield lambda amount: None


@dataclass(frozen=True)
class Gathered:
    """What a run is about, before any long work.

    Attributes:
        config: the settings.
        root: where relative paths start.
        folder: of the run.
        base: directory of the base model, and the hash of its weights.
        start: the checkpoint that they are from, if any.
        train, val: the episodes of both parts.
        split: the same by name.
        action_range: physical values of -1 and +1.
        prompts: instruction -> token ids, of all that `instructions_of` gives.
        store: of resized frames.
        cache: folder of everything that later runs can use again.
    """

    config: RunConfig
    root: Path
    folder: Path
    base: Path
    base_sha256: str
    start: StartingPoint
    train: tuple[TrainingEpisode, ...]
    val: tuple[TrainingEpisode, ...]
    split: Split
    action_range: tuple[float, float]
    prompts: dict[str, Tensor]
    store: FrameStore
    cache: Path

    @property
    def episodes(self) -> tuple[TrainingEpisode, ...]:
        """All of them."""
        return self.train + self.val

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        lengths = [len(episode) for episode in self.train]
        return steps_per_epoch(lengths, self.config.loop, window=self.config.data.window)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        loop = self.config.loop
        steps = loop.epochs * self.steps_per_epoch
        return min(steps, loop.max_steps) if loop.max_steps else steps


@dataclass(frozen=True)
class Setup:
    """A run that is ready for its first step.

    Attributes:
        train, val: sources of inputs; only training views are augmented.
        policy: at step 0.
        loss: what is minimised.
        facts: what the checkpoints record.
        checkpoint_config: the config that travels with the weights.
        steps_per_epoch, steps: optimizer steps, and those of the whole run.
    """

    config: RunConfig
    folder: Path
    train: InputSource
    val: InputSource
    policy: KosmosPolicy
    loss: LossSpec
    facts: TrainingFacts
    checkpoint_config: dict[str, Any]
    steps_per_epoch: int
    steps: int


def gather(loaded: LoadedConfig, bar: Bar = no_bar) -> Gathered:
    """Read and check everything that is small.

    Raises:
        ConfigError, EpisodeError, BaseWeightsError, CheckpointError, PromptError: what is wrong, and where.
    """
    config, root = loaded.config, loaded.root
    runs = root / config.output.runs
    cache = root / config.output.cache if config.output.cache else runs / ".cache"
    model = root / config.base.model
    kosmos = read_base_config(model)
    # Where the checkpoint is missing, everything else can still be shown; training is refused by then.
    start, complete = StartingPoint(model), missing_weights(loaded) is None
    if complete:
        start = starting_point(config.base, config.model.lora, root=root, folder=cache / "bases")
    base = start.base
    with bar(
        "hashing the base weights", sum(file.stat().st_size for file in base.glob("model*.safetensors"))
    ) as advance:
        digest = tensors_sha256(base_weights(base), advance)
    if complete and config.base.sha256 is not None and config.base.sha256 != digest:
        raise BaseWeightsError(
            f"{base} holds other weights than the config states",
            got=digest,
            expected=config.base.sha256,
            hint="point base.model to the right directory, or leave base.sha256 out.",
        )
    files = find_files(config.data.sources, root=root)
    with bar("reading episodes", len(files)) as advance:
        optional = ("angular_z",) if config.model.head == "classes" else ()  # as the lab's loader fills it up
        episodes = read_episodes(config.data, root, lambda done, total: advance(1), cache=cache, optional=optional)
    saved = root / config.data.split if config.data.split is not None else runs / config.name / SPLIT_NAME
    split = (
        read_split(saved)
        if config.data.split is not None or saved.exists()
        else draw_split(episodes, val_share=config.data.val_share, seed=config.data.split_seed)
    )
    train, val = part_episodes(episodes, split)
    train = weighted(train, config.data.sources, seed=config.loop.seed)
    if not train:
        raise ConfigError(
            "the shares of data.sources leave nothing to train on",
            got="; ".join(str({**source.path_shares, **source.family_shares}) for source in config.data.sources),
            expected="shares of groups that there are",
            hint="path_shares are of straight, left, right and other; family_shares of what stands between _target_ and _path.",
        )
    texts = (*instructions_of(episodes), *told_texts(config.augment))
    cameras = tuple(camera for camera in CAMERAS if camera in config.data.cameras)
    prompts = {
        text: torch.tensor(tokenize(text, config.data.prompt_template, base / "tokenizer.json")) for text in texts
    }
    _check_padding(prompts, config.data.pad_prompt_to)
    return Gathered(
        config=config,
        root=root,
        folder=runs / config.name,
        base=base,
        base_sha256=digest,
        start=start,
        train=train,
        val=val,
        split=split,
        action_range=resolve_action_range(config.data, train),
        prompts=prompts,
        store=FrameStore(
            cache / "frames", size=kosmos.vision_config.image_size, resize=config.data.resize, cameras=cameras
        ),
        cache=cache,
    )


def _check_padding(prompts: dict[str, Tensor], pad_to: int | None) -> None:
    text = max(prompts, key=lambda each: len(prompts[each]))
    if pad_to is not None and len(prompts[text]) > pad_to:
        raise ConfigError(
            "a prompt is longer than data.pad_prompt_to",
            got=f"{len(prompts[text])} tokens: {text!r}",
            expected=f"at most {pad_to}",
            hint="shorten the instruction, or set a larger data.pad_prompt_to.",
        )


def prepare(gathered: Gathered, device: torch.device, bar: Bar = no_bar) -> Setup:
    """Do the long work: load the weights, resize the frames, compute image tokens where they stay what they are.

    Raises:
        BaseWeightsError, EpisodeError, StorageError: weights are missing, a frame is damaged, or the disk is full.
    """
    config = gathered.config
    policy = build_policy(config, gathered.base, action_range=gathered.action_range)
    policy.to(device)
    training_mode(policy)
    with bar("resizing frames", sum(map(len, gathered.episodes))) as advance:
        gathered.store.prepare(gathered.episodes, advance)
    train, val = gathered.train, gathered.val
    tokens: dict[str, TokenCache | None] = {"train": None, "val": None}
    if config.loop.cache_image_tokens and not reaches_vision(policy):
        cache = TokenCache(
            gathered.cache / "tokens",
            policy,
            base_sha256=gathered.base_sha256,
            store=gathered.store,
            pixel_norm=config.data.pixel_norm,
        )
        tokens["val"] = cache
        if not config.augment.changes_pixels:
            tokens["train"] = cache
        orientations = {0.0: [False], 1.0: [True]}.get(config.augment.mirror, [False, True])
        parts = [(val, [False])] + ([(train, orientations)] if tokens["train"] else [])
        total = sum(len(kinds) * sum(map(len, episodes)) for episodes, kinds in parts)
        with bar("encoding images", total) as advance:
            for episodes, kinds in parts:
                cache.prepare(episodes, kinds, advance)
    facts = facts_of(gathered)
    relative = _relative(gathered.base, gathered.folder / "checkpoints")
    return Setup(
        config=config,
        folder=gathered.folder,
        train=_source(gathered, train, tokens["train"], device, augment=True),
        val=_source(gathered, val, tokens["val"], device, augment=False),
        policy=policy,
        loss=loss_spec(config, train),
        facts=facts,
        checkpoint_config=checkpoint_config(config, policy, facts, base=relative),
        steps_per_epoch=gathered.steps_per_epoch,
        steps=gathered.steps,
    )


def _relative(base: Path, folder: Path) -> str:
    """The base as seen from a folder. Links on the way are followed first, as `..` leads out of where a link points to; the directory
    keeps its name, by which it is looked for where the path leads nowhere."""
    return os.path.relpath(base.parent.resolve() / base.name, folder.resolve())


def facts_of(gathered: Gathered) -> TrainingFacts:
    """What checkpoints of the run record."""
    data, model = gathered.config.data, gathered.config.model
    rates = [episode.fps for episode in gathered.episodes if episode.fps is not None]
    return TrainingFacts(
        packing=model.packing,
        x_attn_causal=False,
        resize=data.resize,
        pixel_norm=data.pixel_norm,
        action_names=data.actions,
        action_minimum=gathered.action_range[0],
        action_maximum=gathered.action_range[1],
        fps=data.fps or (float(np.median(rates)) if rates else None),
        base_sha256=gathered.base_sha256,
        prompt_template=data.prompt_template,
        pad_prompt_to=data.pad_prompt_to,
        classes=_class_table(gathered).spelled() if model.head == "classes" else None,
        relabel=model.relabel,
    )


def _class_table(gathered: Gathered) -> ClassTable:
    """The classes with their commands: as stated, else with the speed of the recordings, which is the largest along either axis."""
    config = gathered.config
    speed = 0.0
    if config.data.action_range != "auto":
        speed = config.data.action_range[1]
    else:
        linear = [index for index, name in enumerate(config.data.actions) if name != "angular_z"]
        speed = max(float(np.abs(episode.actions[:, linear]).max(initial=0.0)) for episode in gathered.train)
    return classes_of_model(config.model, speed=float(f"{speed:.7g}") or USUAL_SPEED_MPS)


def loss_spec(config: RunConfig, train: tuple[TrainingEpisode, ...]) -> LossSpec:
    """The loss, class weights resolved from the training episodes."""
    weights: tuple[float, ...] = ()
    if config.model.head == "classes":
        stated, table = config.loss.class_weights, classes_of_model(config.model)
        if stated == "balanced":
            labels = [table.labels(episode.actions, config.data.actions) for episode in train]
            weights = balanced_weights(np.concatenate(labels), len(table))
        elif stated == "none":
            weights = (1.0,) * len(table)
        else:
            weights = tuple(float(weight) for weight in stated)
    loss = config.loss
    return LossSpec(
        config.model.head,
        loss.huber_delta,
        loss.gripper_ratio,
        weights,
        loss.label_smoothing,
        loss.non_forward,
        loss.class_prior,
        loss.prior_weight,
    )


def _source(
    gathered: Gathered,
    episodes: tuple[TrainingEpisode, ...],
    tokens: TokenCache | None,
    device: torch.device,
    *,
    augment: bool,
) -> InputSource:
    config = gathered.config
    return InputSource(
        episodes=episodes,
        store=gathered.store,
        data=config.data,
        augmenter=Augmenter(config.augment) if augment else None,
        action_range=gathered.action_range,
        prompts=gathered.prompts,
        tokens=tokens,
        columns=head_spec(config).outputs,
        classes=classes_of_model(config.model),
        device=device,
    )
