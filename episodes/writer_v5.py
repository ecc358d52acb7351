"""Writes an episode in schema V5, with JPEG or raw frames.

V5 with JPEG frames is what repaired episodes become: much smaller than raw ones, RGB without doubt, the instruction and a time
stamp for each frame inside the file. It also holds the events and classes of V1 and V6, which readers of V5 may ignore.

Layout: `observations/images` variable-length uint8 (T,) with attribute `format` = "jpeg", or uint8 (T,H,W,3) gzip; `actions` float32
(T,A); `timestamps` float64 (T,); `language_instruction` (1,) S256. The file appears complete or not at all (`atomic_hdf5`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from episodes.atomic_hdf5 import Draft, atomic_hdf5
from episodes.layout import ACTION_CLASSES, ACTIONS, EVENT_TYPES, IMAGES, INSTRUCTION, TIMESTAMPS
from episodes.writer import INSTRUCTION_BYTES, check_frame, check_instruction, frame_count_error, write_raw_frames


def write_episode_v5(
    path: Path,
    frames: Iterable[npt.NDArray[np.uint8] | bytes],
    actions: npt.NDArray[np.float32],
    *,
    instruction: str | None,
    timestamps: npt.NDArray[np.float64] | None,
    jpeg_quality: int | None = 95,
    event_types: Sequence[str] | None = None,
    action_classes: npt.NDArray[np.int64] | None = None,
    attributes: Mapping[str, str | int | float | bool] | None = None,
) -> Path:
    """Write one V5 episode, replacing an older file of that name.

    Args:
        path: the final name; its folder must exist.
        frames: T frames, uint8 [H, W, 3] RGB of one size, or JPEG files of one size, which are stored as they are; one is in memory at
            a time.
        actions: [T, A], A = 2 or 3, finite; action i belongs to frame i.
        instruction: what the robot was told, at most 256 bytes of UTF-8; None stores none.
        timestamps: [T] in seconds; None stores none.
        jpeg_quality: of Pillow, 1-95; None stores raw frames.

    Raises:
        EpisodeError: the instruction or the number of frames is not as above.
        FrameError: a frame is not as above.
        StorageError: the disk is full or refuses to write.
    """
    text = None if instruction is None else check_instruction(instruction, path)
    with atomic_hdf5(path) as draft:
        file = draft.file
        if jpeg_quality is None:
            write_raw_frames(draft, IMAGES["v5"], frames, len(actions))
        else:
            _write_jpeg_frames(draft, frames, len(actions), jpeg_quality)
        file.create_dataset(ACTIONS, data=actions, fillvalue=np.nan, fletcher32=True)  # so that a zero was written
        if timestamps is not None:
            file.create_dataset(TIMESTAMPS[0], data=timestamps)
        if text is not None:
            file.create_dataset(INSTRUCTION, data=np.array([text], dtype=f"S{INSTRUCTION_BYTES}"))
        if event_types is not None:
            file.create_dataset(EVENT_TYPES, data=list(event_types), dtype=h5py.string_dtype())
        if action_classes is not None:
            file.create_dataset(ACTION_CLASSES, data=action_classes)
        file.attrs.update(attributes or {})
    return path


def encode_jpeg(frame: npt.NDArray[np.uint8], quality: int) -> bytes:
    """`frame` (uint8 [H, W, 3] RGB) as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _write_jpeg_frames(draft: Draft, frames: Iterable[npt.NDArray[np.uint8] | bytes], count: int, quality: int) -> None:
    images = draft.file.create_dataset(IMAGES["v5"], (count,), dtype=h5py.vlen_dtype(np.uint8))
    images.attrs["format"] = "jpeg"
    size: tuple[int, ...] | None = None
    written = 0
    for frame in frames:
        if written == count:
            raise frame_count_error(draft.path, f"more than {count} frames", count)
        if isinstance(frame, bytes):
            stored = frame
        else:
            image = check_frame(frame, written, size, draft.path)
            size, stored = image.shape, encode_jpeg(image, quality)
        images[written] = np.frombuffer(stored, dtype=np.uint8)
        draft.check()
        written += 1
    if written < count:
        raise frame_count_error(draft.path, f"{written} frames", count)
