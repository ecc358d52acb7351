"""Reads one image of an episode at a time, as uint8 [H, W, 3] RGB, from raw or JPEG storage.

One frame per call, because a whole episode is 50-300 MB decoded. Everything downstream of here is RGB: V6 stores BGR
and this is the only place that knows it. JPEG bytes go through Pillow, in whose decoder the training pipeline saw
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError, PictureError
from bundle.reading_limits import EPISODE_FRAMES, FREE_PIXEL_BYTES, PICTURE_PIXELS, PIXEL_BYTES_A_BYTE
from episodes.container import reading, require_dataset
from episodes.layout import IMAGES, Schema
from episodes.pictures import decode_picture
from episodes.pixel_budget import PixelBudget
from episodes.storage import Chunks, chunk_problem, missing_chunks, written_chunks
from episodes.unwritten import lost_sectors

Encoding = Literal["raw rgb", "raw bgr", "jpeg"]


@dataclass(frozen=True)
class FrameSource:
    """The images dataset of an open file; frames are fetched when asked for."""

    path: Path
    dataset: h5py.Dataset
    encoding: Encoding
    chunks: Chunks | None = field(default=None, repr=False)  # None where the storage is one piece
    budget: PixelBudget = field(default_factory=lambda: PixelBudget(0), repr=False)

    def __len__(self) -> int:
        return int(self.dataset.shape[0])

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Frame `index` (0 <= index < len) as a new uint8 [H, W, 3] RGB array.

        Raises:
            EpisodeError: the stored frame is damaged; names the file and the index.
        """
        stored = self._stored(index)
        if self.encoding == "jpeg":
            return self._decode_jpeg(index, stored)
        return stored if self.encoding == "raw rgb" else np.ascontiguousarray(stored[..., ::-1])

    def read_jpeg(self, index: int) -> bytes | None:
        """The stored bytes of frame `index` where they are JPEG, unchecked, else None.

        Raises:
            EpisodeError: they cannot be read.
        """
        return self._stored(index).tobytes() if self.encoding == "jpeg" else None

    def _stored(self, index: int) -> npt.NDArray[np.uint8]:
        reason: str | None
        try:
            if self.chunks is None:
                reason = "its storage was never written" if missing_chunks(self.dataset) else None
            else:
                corners = self.chunks.of_row(index, self.dataset)
                reasons = (chunk_problem(self.dataset, self.chunks, corner) for corner in corners)
                reason = next(filter(None, reasons), None)
            if reason is None:
                stored: npt.NDArray[np.uint8] = np.asarray(self.dataset[index])
                reason = lost_sectors(self.dataset, index, stored)
        except Exception as error:  # whatever h5py makes of a flipped bit, for example a checksum of gzip that fails
            raise self._corrupt(index, " ".join(str(error).split())) from error
        if reason is not None:
            raise self._corrupt(index, reason)
        return stored

    def _decode_jpeg(self, index: int, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if stored.size == 0:
            raise self._corrupt(index, "0 bytes of JPEG")
        try:
            picture = decode_picture(stored.tobytes(), png=False)
        except PictureError as error:
            raise self._corrupt(index, f"{stored.size} bytes that are no JPEG image ({error.got})") from error

        if reason := self.budget.exceeded(index, picture.nbytes):
            raise self._corrupt(index, reason)
        return picture

    def _corrupt(self, index: int, got: str) -> EpisodeError:
        return EpisodeError(
            f"{self.path}: frame {index} of {len(self)} is corrupt",
            got=got,
            expected="a complete JPEG image" if self.encoding == "jpeg" else "intact image data",
            hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
        )


def open_frames(file: h5py.File, schema: Schema, path: Path, name: str | None = None) -> FrameSource:
    """Find the images and check their type and shape; reads no image.

    Args:
        name: of the dataset; by default that of the schema's only camera.

    Raises:
        EpisodeError: no images dataset, wrong dtype or rank, unknown encoding, or no frames.
    """
    name = name or IMAGES[schema]
    dataset = require_dataset(file, name, path)
    shape: tuple[int, ...] = dataset.shape or ()
    encoding: Encoding
    if schema == "v5" and h5py.check_vlen_dtype(dataset.dtype) == np.uint8:
        _require_jpeg(dataset, path)
        encoding, rank_ok, expected = "jpeg", len(shape) == 1, "variable-length uint8 (N,) of JPEG bytes"
    else:
        encoding = "raw bgr" if schema == "v6" else "raw rgb"
        rank_ok = dataset.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape[1:]
        expected = "uint8 (T, H, W, 3)" + (" or variable-length uint8 (N,) of JPEG bytes" if schema == "v5" else "")
    if not rank_ok:
        raise EpisodeError(
            f"{path}: {name} does not hold images of schema {schema}",
            got=f"{dataset.dtype} {shape}",
            expected=expected,
            hint="convert the episode with episodes.writer.write_episode, or leave it out.",
        )
    if shape[0] == 0:
        raise EpisodeError(
            f"{path} is empty: it holds no frames",
            got=f"{name} {shape}",
            expected="at least one frame",
            hint="the recording was stopped before the first image; delete the file.",
        )
    _require_bounds(dataset, shape, encoding, path)
    if missing_chunks(dataset) and not dataset.id.get_storage_size():
        raise EpisodeError(
            f"{path}: {name} was never written to disk",
            got=f"{shape[0]} frames declared, no storage",
            expected="the recorded images; HDF5 would read them as black",
            hint="the disk was full, or the recorder was killed, when this episode was recorded: leave it out.",
        )
    return FrameSource(path, dataset, encoding, written_chunks(dataset), PixelBudget(path.stat().st_size))


def _require_bounds(dataset: h5py.Dataset, shape: tuple[int, ...], encoding: Encoding, path: Path) -> None:
    """Refuse what no recorder writes, before anything of it is in memory.

    Raises:
        EpisodeError: too many frames or pixels, or far more pixels than the bytes that are stored can hold.
    """
    pixels = math.prod(shape[1:3]) if encoding != "jpeg" else 0
    frames = shape[0] * pixels * 3
    if shape[0] > EPISODE_FRAMES or pixels > PICTURE_PIXELS:
        got, expected = f"{dataset.dtype} {shape}", f"at most {EPISODE_FRAMES} frames of {PICTURE_PIXELS} pixels"
    elif not dataset.is_virtual and frames > FREE_PIXEL_BYTES + PIXEL_BYTES_A_BYTE * dataset.id.get_storage_size():
        got = f"{frames} bytes of pixels from {dataset.id.get_storage_size()} bytes in the file"
        expected = f"at most {PIXEL_BYTES_A_BYTE} times as many"
    else:
        return
    raise EpisodeError(
        f"{path}: {dataset.name} is of an absurd size",
        got=got,
        expected=expected,
        hint="leave the episode out; no recorder writes such a file.",
    )


def _require_jpeg(dataset: h5py.Dataset, path: Path) -> None:
    with reading(path, f"attribute 'format' of {dataset.name}"):
        stored = dataset.attrs.get("format", "jpeg")
    encoding = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored)
    if encoding.lower() not in ("jpeg", "jpg"):
        raise EpisodeError(
            f"{path}: {dataset.name} is encoded in a format that is not known",
            got=f"format={encoding!r}",
            expected="format='jpeg'",
            hint="re-encode the frames as JPEG or store them raw.",
        )
