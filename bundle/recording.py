"""What the reference policy did with known frames: the yardstick of every backend, on every machine.

Recorded once, when the bundle is built (torch is needed for it), and kept in it, so that a robot can prove its own engines against the
checkpoint without torch. Knows nothing about how the numbers are compared: see export/parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BundleError

RECORDING_NAME = "recording.npz"


@dataclass(frozen=True)
class Episode:
    """Frames of one verification episode: uint8 [T, cameras, s, s, 3], already resized; token_ids and mask [L]."""

    frames: NDArray[np.uint8]
    token_ids: tuple[int, ...]
    mask: tuple[int, ...]


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the reference, float32 numpy: image_tokens [cameras * latents, D], feature [latent * D], action [n, A].

    A saved recording has image_tokens for the last step of an episode only: they are large, and one frame tells enough.
    """

    image_tokens: NDArray[np.float32]
    feature: NDArray[np.float32]
    action: NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """Episodes and, for each, the reference's steps."""

    episodes: tuple[Episode, ...]
    steps: tuple[tuple[ReferenceStep, ...], ...]

    @classmethod
    def of(cls, episodes: Sequence[Episode], steps: Sequence[Sequence[ReferenceStep]]) -> Recording:
        return cls(tuple(episodes), tuple(tuple(run) for run in steps))

    def save(self, folder: Path) -> None:
        """Write folder/recording.npz."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for index, (episode, steps) in enumerate(zip(self.episodes, self.steps, strict=True)):
            arrays |= {
                f"{index}.frames": episode.frames,
                f"{index}.token_ids": np.array(episode.token_ids, np.int64),
                f"{index}.mask": np.array(episode.mask, np.int64),
                f"{index}.features": np.stack([step.feature for step in steps]),
                f"{index}.actions": np.stack([step.action for step in steps]),
                f"{index}.image_tokens": steps[-1].image_tokens,
            }
        with (folder / RECORDING_NAME).open("wb") as file:
            # numpy 1 would store allow_pickle=False as one more array.
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> Recording:
        """Read folder/recording.npz (arrays only; pickled objects are refused).

        Raises:
            BundleError: it is missing or damaged.
        """
        path = folder / RECORDING_NAME
        try:
            with np.load(path, allow_pickle=False) as arrays:
                count = len({name.split(".")[0] for name in arrays})
                return cls.of(*zip(*(_read(arrays, index) for index in range(count)), strict=True))
        except (ValueError, KeyError, EOFError, OSError, BadZipFile, TypeError) as error:
            raise BundleError(
                f"{path} is {'damaged' if path.exists() else 'missing'}",
                got=error,
                expected="the reference's recorded steps",
                hint="bundles have it since jetvla 0.2; rebuild with export/build_engines.py CKPT, or copy it again.",
            ) from None


def _read(arrays: np.lib.npyio.NpzFile, index: int) -> tuple[Episode, tuple[ReferenceStep, ...]]:
    features, actions = arrays[f"{index}.features"], arrays[f"{index}.actions"]
    tokens = arrays[f"{index}.image_tokens"]
    ids, mask = (tuple(int(value) for value in arrays[f"{index}.{name}"]) for name in ("token_ids", "mask"))
    episode = Episode(arrays[f"{index}.frames"], ids, mask)
    last = len(features) - 1
    steps = tuple(
        ReferenceStep(tokens if number == last else tokens[:0], feature, action)
        for number, (feature, action) in enumerate(zip(features, actions, strict=True))
    )
    return episode, steps
