"""Reads chosen frames as the policy sees them, names a calibration set by its content, and makes pictures for want of any.

The pixels go through the runtime's own resize: ranges found on other pixels are those of another policy. Nothing is chosen here; see
calib/sample.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Manifest
from calib.candidates import opened
from calib.sample import Chosen, Sample, Stretch
from episodes.reader import Episode
from runtime.preprocess import resize


def calibration_frames(sample: Sample, manifest: Manifest) -> Iterator[tuple[Chosen, NDArray[np.uint8]]]:
    """Each calibration frame as uint8 [cameras, s, s, 3], one at a time; each file is opened once.

    Raises:
        EpisodeError: a file is gone or damaged, or has a camera too few.
    """
    for source, group in groupby(sample.calibration, key=lambda chosen: chosen.source):
        with opened(source) as episode:
            for chosen in group:
                yield chosen, _as_seen(episode, chosen.frame, manifest)


def stretch_frames(stretch: Stretch, manifest: Manifest) -> NDArray[np.uint8]:
    """The frames of a stretch, uint8 [T, cameras, s, s, 3].

    Raises:
        EpisodeError: the file is gone or damaged.
    """
    with opened(stretch.source) as episode:
        return np.stack([_as_seen(episode, index, manifest) for index in range(stretch.start, stretch.stop)])


def frames_sha256(frames: Iterable[tuple[Chosen | str, NDArray[np.uint8]]]) -> str:
    """Hex sha256 of a calibration set: of every frame's pixels and instruction, whatever the files are called and in any order.

    Args:
        frames: what `calibration_frames` gives; or instructions with frames.
    """
    digests = []
    for told, frame in frames:
        digest = hashlib.sha256(repr((told if isinstance(told, str) else told.instruction, frame.shape)).encode())
        digest.update(np.ascontiguousarray(frame).tobytes())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def random_sample(manifest: Manifest, *, frames: int, seed: int) -> list[NDArray[np.uint8]]:
    """Pictures for a policy without recordings, each uint8 [cameras, s, s, 3]: colour fields of all sizes, light to dark, with grain.

    Good enough to try a conversion; ranges found on them are not those of what a robot sees.
    """
    size, cameras = manifest.dimensions.image_size, len(manifest.preprocessing.cameras)
    rng = np.random.default_rng(seed)
    sample = []
    for _ in range(frames):
        picture = rng.normal(0, 0.02, (cameras, size, size, 3)) + rng.uniform(-0.25, 0.25)
        for cells in (2, 6, 24):
            side = -(-size // cells)
            fields = rng.uniform(0, 1 / 3, (cameras, cells, cells, 3))
            picture += fields.repeat(side, axis=1).repeat(side, axis=2)[:, :size, :size]
        sample.append((255 * picture.clip(0, 1)).astype(np.uint8))
    return sample


def _as_seen(episode: Episode, index: int, manifest: Manifest) -> NDArray[np.uint8]:
    preprocessing, size = manifest.preprocessing, manifest.dimensions.image_size
    return np.stack([resize(view, preprocessing, size) for view in episode.views(index, preprocessing.cameras)])
