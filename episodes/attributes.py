"""Reads what an episode file says beside its images and actions: attributes, time stamps, and the frame rate that follows.

No recorder wrote the frame rate, so it is derived; where the numbers cannot be seconds there is none rather than a wrong one.
"""

from __future__ import annotations

import h5py
import numpy as np
import numpy.typing as npt

from episodes.layout import TIMESTAMPS

_PLAUSIBLE_FPS = (0.1, 240.0)


def read_attributes(file: h5py.File) -> dict[str, object]:
    """The attributes of an open file without numpy or h5py types: str, int, float, bool, None or nested lists of these."""
    return {str(name): _plain(file.attrs[name]) for name in file.attrs}


def read_timestamps(file: h5py.File, frames: int) -> npt.NDArray[np.float64] | None:
    """The time of each frame as stored, float64 [frames], or None where the file has none for each frame."""
    return next(iter(_all_timestamps(file, frames)), None)


def frame_rate(file: h5py.File, attributes: dict[str, object], frames: int) -> float | None:
    """Frames per second from the attribute `fps`, else the median step of the timestamps, else frames / total_duration.

    A value outside 0.1-240 fps means that the numbers are not seconds; it is passed over.
    """
    candidates = [attributes.get("fps")]
    for stamps in _all_timestamps(file, frames) if frames > 1 else ():
        step = float(np.median(np.diff(stamps)))
        candidates.append(1.0 / step if step > 0 else None)
    duration = attributes.get("total_duration")
    candidates.append(frames / duration if isinstance(duration, (int, float)) and duration > 0 else None)
    low, high = _PLAUSIBLE_FPS
    return next((float(fps) for fps in candidates if isinstance(fps, (int, float)) and low <= fps <= high), None)


def _all_timestamps(file: h5py.File, frames: int) -> list[npt.NDArray[np.float64]]:
    found = (file.get(name) for name in TIMESTAMPS)
    return [
        np.asarray(stamps[()], dtype=np.float64)
        for stamps in found
        if isinstance(stamps, h5py.Dataset) and stamps.shape == (frames,) and stamps.dtype.kind in "fiu"
    ]


def _plain(value: object) -> object:
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
