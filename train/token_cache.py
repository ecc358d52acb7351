"""Image tokens of episodes, computed once: where nothing that trains reaches the vision tower, they never change.

One file per episode and orientation, float32 [T, N, D] with the tokens of all cameras, named by everything that decides its content: base
weights and the code that computes with them, RoboVLMs' resampler where there is one (the base does not hold it), preprocessing, the
episode's bytes and schema (its colour order), and whether it is mirrored. Always computed in fp32, whatever the run's precision. Half a
megabyte per frame for the real Kosmos-2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from bundle.atomic import disk_errors
from train.augmentation import mirror_frame
from train.base import tensors_sha256
from train.episode_set import TrainingEpisode
from train.fast_forward import image_tokens, pixels_of
from train.frame_store import FrameStore
from train.large_files import replacing
from train.policy import KosmosPolicy

_AT_ONCE = 8  # frames per forward pass


class TokenCache:
    """Fetches image tokens, computing what is missing.

    Args:
        folder: of the files.
        policy: its vision tower and projection are frozen.
        base_sha256: hash of their weights.
        store: resized frames.
        pixel_norm: see DataConfig.
    """

    def __init__(
        self, folder: Path, policy: KosmosPolicy, *, base_sha256: str, store: FrameStore, pixel_norm: str
    ) -> None:
        self._folder = folder
        self._policy = policy
        self._store = store
        self._pixel_norm = pixel_norm
        several = " ".join(store.cameras) if len(store.cameras) > 1 else ""
        self._prefix = (
            f"{base_sha256} {_code_of(policy)} {pixel_norm} {store.size} {store.resize}{several}{_resampler_of(policy)}"
        )

    def tokens(self, episode: TrainingEpisode, *, mirrored: bool) -> NDArray[np.float32]:
        """Memory-mapped float32 [T, N, D].

        Raises:
            StorageError: the disk is full.
        """
        path = self._path(episode, mirrored=mirrored)
        shape = self._shape(episode)
        found = _open(path, shape)
        if found is None:
            self._compute(path, episode, mirrored=mirrored)
            found = np.load(path, mmap_mode="r")
        return found

    def prepare(
        self, episodes: Sequence[TrainingEpisode], orientations: Sequence[bool], advance: Callable[[int], None]
    ) -> None:
        """Compute what is missing; `advance` gets the frames of each episode."""
        for episode in episodes:
            for mirrored in orientations:
                self.tokens(episode, mirrored=mirrored)
                advance(len(episode))

    def bytes_needed(self, episodes: Sequence[TrainingEpisode], orientations: int) -> int:
        """Size of all files."""
        return sum(4 * int(np.prod(self._shape(episode))) for episode in episodes) * orientations

    def _shape(self, episode: TrainingEpisode) -> tuple[int, int, int]:
        kosmos = self._policy.kosmos
        return len(episode), len(self._store.cameras) * kosmos.latent_query_num, kosmos.text_config.embed_dim

    def _path(self, episode: TrainingEpisode, *, mirrored: bool) -> Path:
        key = hashlib.sha256(f"{self._prefix} {episode.sha256} {episode.schema} {mirrored}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.npy"

    @torch.no_grad()
    def _compute(self, path: Path, episode: TrainingEpisode, *, mirrored: bool) -> None:
        frames = self._store.frames(episode)
        device = self._policy.action_token.device
        parts = []
        for start in range(0, len(episode), _AT_ONCE):
            chunk = np.asarray(frames[start : start + _AT_ONCE])
            if mirrored:
                chunk = mirror_frame(chunk)
            parts.append(image_tokens(self._policy, pixels_of(chunk, self._pixel_norm, device)).cpu().numpy())
        with disk_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            # Through `write`: numpy's own `tofile` hides what the system said of a full disk.
            array = np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B"))


def _code_of(policy: KosmosPolicy) -> str:
    """What decides image tokens beside the weights: dimensions that no tensor shows, and the library that computes with them."""
    vision, text = policy.kosmos.vision_config, policy.kosmos.text_config
    return (
        f"transformers {transformers.__version__} {vision.hidden_act} {vision.layer_norm_eps} "
        f"{vision.num_attention_heads} {text.attention_heads}"
    )


def _resampler_of(policy: KosmosPolicy) -> str:
    """RoboVLMs' resampler: new ones are drawn by the run's seed, others come from the weights to start from."""
    if not policy.spec.vision_resampler:
        return ""
    return f" {tensors_sha256({name: tensor.cpu() for name, tensor in policy.vision_resampler.state_dict().items()})}"


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """The file if it is whole; a damaged one counts as missing."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.float32 else None
