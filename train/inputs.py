"""From batches of numpy arrays to what the policy's forward pass takes: pixels or cached tokens, prompts, targets - on the device.

The seam between data (numpy, files) and model (torch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.action_classes import NINE, ClassTable
from train.augmentation import Augmenter, mirror_text, other_words
from train.batches import Batch, BatchStream, make_batch
from train.episode_set import TrainingEpisode
from train.fast_forward import FrameBatch, pixels_of
from train.frame_store import FrameStore
from train.losses import pad_targets
from train.run_config import DataConfig
from train.sampling import MicroBatch, View, Window
from train.token_cache import TokenCache


@dataclass(frozen=True)
class Targets:
    """What a batch should predict.

    Attributes:
        actions: float32 [B, W, n, A], as wide as the head.
        physical: float32 [B, W, n, a] of the recorded axes.
        classes: int64 [B, W, n].
        mask: bool [B, W, n].
    """

    actions: Tensor
    physical: Tensor
    classes: Tensor
    mask: Tensor


@dataclass(frozen=True)
class InputSource:
    """Everything needed to make a forward pass of windows of one part (training or validation) of the data.

    Attributes:
        episodes: what views count into.
        prompts: instruction -> token ids, of all that `instructions_of` gives.
        tokens: cached image tokens; None computes them from pixels.
        columns: width of the head's chunk step.
        classes: what actions are labelled as.
    """

    episodes: tuple[TrainingEpisode, ...]
    store: FrameStore
    data: DataConfig
    augmenter: Augmenter | None
    action_range: tuple[float, float]
    prompts: Mapping[str, Tensor]
    tokens: TokenCache | None
    columns: int
    device: torch.device
    classes: ClassTable = NINE

    def batch(self, windows: Sequence[Window], *, frames: bool = True) -> Batch:
        """The windows as numpy arrays; without `frames` only targets are made."""
        return make_batch(
            windows,
            self.episodes,
            self.store,
            self.data,
            self.augmenter,
            action_range=self.action_range,
            classes=self.classes,
            with_frames=frames and self.tokens is None,
        )

    def stream(self, plan: Sequence[MicroBatch], *, workers: int) -> BatchStream:
        """The batches of a plan, prepared ahead."""
        return BatchStream(
            plan,
            self.episodes,
            self.store,
            self.data,
            self.augmenter,
            action_range=self.action_range,
            classes=self.classes,
            with_frames=self.tokens is None,
            workers=workers,
        )

    def frames(self, batch: Batch) -> FrameBatch:
        """What the forward pass takes."""
        prompts = tuple(self.prompts[text].to(self.device) for text in batch.instructions)
        pixels = tokens = None
        if self.tokens is None:
            pixels = pixels_of(batch.frames, self.data.pixel_norm, self.device)
        else:
            tokens = self._tokens(batch)
        return FrameBatch(pixels, tokens, prompts, self._move(batch.instruction_of), self._move(batch.frame_of))

    def targets(self, batch: Batch) -> Targets:
        """What it should give."""
        actions = self._move(pad_targets(batch.actions, max(self.columns, batch.actions.shape[-1])))
        return Targets(actions, self._move(batch.physical), self._move(batch.classes), self._move(batch.mask))

    def _tokens(self, batch: Batch) -> Tensor:
        assert self.tokens is not None
        views = [batch.views[index] for index in batch.view_of]
        rows = [
            self.tokens.tokens(self.episodes[view.episode], mirrored=view.mirrored)[number]
            for view, number in zip(views, batch.frame_number, strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def as_recorded(episode: int) -> View:
    """The view of an episode without any augmentation."""
    return View(episode, mirrored=False, draw=None)


def instructions_of(episodes: Sequence[TrainingEpisode]) -> tuple[str, ...]:
    """Every instruction that training or validation can meet: as recorded, mirrored, in other words; in the order of first use."""
    texts = [text for episode in episodes for text in (episode.instruction, *episode.words)]
    return tuple(dict.fromkeys([*texts, *map(mirror_text, texts), *map(other_words, texts)]))
