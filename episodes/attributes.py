"""Reads what an episode file says beside its images and actions: attributes, time stamps, and the frame rate that follows.

Hardly a recorder wrote the frame rate, so it is derived from times. What is no time in seconds (frame numbers, milliseconds, a clock
that stands) is not believed and gives no rate rather than a wrong one; `time_problems` says why, for the doctor. A stated rate that no
camera has is an error.
"""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a

from bundle.errors import EpisodeError
from bundle.reading_limits import EPISODE_ATTRIBUTE_BYTES, EPISODE_ATTRIBUTES
from episodes.container import find_dataset, has_link
from episodes.layout import TIMESTAMPS
from episodes.storage import read_values

FPS = "fps"
DURATION = "total_duration"
_POSSIBLE_FPS = (0.01, 1000.0)  # stated
_PLAUSIBLE_FPS = (0.5, 240.0)  # derived from time stamps; so milliseconds are not taken for seconds
_PLAUSIBLE_MEAN_FPS = (0.1, 240.0)  # derived from the duration
_UNITS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_SMALLER = {"milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
_USUAL_FPS = (0.5, 240.0)
_AGREE = 1.25  # stamps and a stated rate or duration differ by less


def read_attributes(file: h5py.File) -> dict[str, object]:
    """The attributes of an open file without numpy or h5py types: str, int, float, bool, None or nested lists of these.

    Raises:
        EpisodeError: there are too many, or one is too large.
        OSError, ...: what h5py raises on damage.
    """
    if len(file.attrs) > EPISODE_ATTRIBUTES:
        raise EpisodeError(
            f"{file.filename} has an absurd number of attributes",
            got=len(file.attrs),
            expected=f"at most {EPISODE_ATTRIBUTES}",
            hint="leave the episode out; no recorder writes such a file.",
        )
    return {str(name): read_attribute(file, name) for name in file.attrs}


def read_attribute(item: h5py.File | h5py.Dataset, name: str) -> object:
    """One attribute as a plain Python value.

    Raises:
        EpisodeError: it is too large.
    """
    stored = h5a.open(item.id, name.encode())
    size = math.prod(stored.shape or ()) * stored.get_type().get_size()
    if size > EPISODE_ATTRIBUTE_BYTES:
        raise EpisodeError(
            f"{item.file.filename}: attribute {name!r} is of an absurd size",
            got=f"{size} bytes",
            expected=f"at most {EPISODE_ATTRIBUTE_BYTES}",
            hint="leave the episode out, or delete the attribute from it.",
        )
    return _plain(item.attrs[name])


def attribute_texts(value: object, what: str) -> tuple[str, ...]:
    """The texts of a plain attribute value: a text, a list of them, or nothing.

    Raises:
        EpisodeError: it is anything else; `what` names it.
    """
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(text for item in value for text in attribute_texts(item, what))
    if isinstance(value, str):
        return (value.split("\0", 1)[0],)
    raise EpisodeError(f"{what} does not hold text", got=repr(value)[:80], expected="text", hint="rewrite it as text.")


def read_timestamps(file: h5py.File, frames: int, path: Path) -> npt.NDArray[np.float64] | None:
    """The time of each frame in seconds as stored, float64 [frames], or None where the file has none that are believed."""
    return next((seconds for seconds, problem in _all_timestamps(file, frames, path) if problem is None), None)


def frame_rate(file: h5py.File, attributes: dict[str, object], frames: int, path: Path) -> float | None:
    """Frames per second as stated in `fps`, else by the median step of believed time stamps, else frames / total_duration.

    Raises:
        EpisodeError: a stated rate or duration is no number, negative, or one that no camera has.
    """
    return _rate(file, attributes, frames, path)[0]


def time_problems(file: h5py.File, attributes: dict[str, object], frames: int, path: Path) -> list[str]:
    """What is wrong with the time stamps of the file, a sentence each."""
    return _rate(file, attributes, frames, path)[1]


def _rate(file: h5py.File, attributes: dict[str, object], frames: int, path: Path) -> tuple[float | None, list[str]]:
    stated = _number(_stated(file, attributes, FPS, path), f"{path}: {FPS}")
    if stated is not None and not _POSSIBLE_FPS[0] <= stated <= _POSSIBLE_FPS[1]:
        raise _impossible(path, FPS, stated, f"{_POSSIBLE_FPS[0]:g} to {_POSSIBLE_FPS[1]:g} frames per second")
    problems: list[str] = []
    try:
        duration = _number(_stated(file, attributes, DURATION, path), DURATION)
    except EpisodeError as error:
        duration = None
        problems.append(f"{error.what} ({error.got})")
    if duration is not None and not 0 <= duration < math.inf:
        raise _impossible(path, DURATION, duration, "seconds")
    low, high = _PLAUSIBLE_MEAN_FPS
    mean = frames / duration if duration and low <= frames / duration <= high else None
    derived = None
    for seconds, problem in _all_timestamps(file, frames, path) if frames > 1 else ():
        if problem is not None:
            problems.append(problem)
        elif derived is None:
            derived = 1.0 / float(np.median(np.diff(seconds)))
    other = stated or mean
    if derived is not None and other is not None and not 1 / _AGREE < derived / other < _AGREE:
        name = FPS if stated else DURATION
        problems.append(f"the time stamps say {derived:.2f} frames per second, {name} says {other:.2f}")
        derived = None
        mean = None  # neither is believed; what is stated in so many words is
    return stated or derived or mean, problems


def _all_timestamps(file: h5py.File, frames: int, path: Path) -> list[tuple[npt.NDArray[np.float64], str | None]]:
    """Each stored series of stamps in seconds, and why it is none."""
    found = []
    for name in TIMESTAMPS:
        dataset = find_dataset(file, name, path)
        if dataset is None or dataset.shape != (frames,) or dataset.dtype.kind not in "fiu":
            continue
        stamps = np.asarray(read_values(dataset, path), dtype=np.float64)
        units = attribute_texts(read_attribute(dataset, "units"), name) if "units" in dataset.attrs else ()
        scale = _UNITS.get(units[0].strip().lower()) if units else None
        problem = _no_seconds(stamps, name, scale, first=dataset.dtype)
        found.append((stamps * (scale or 1.0), problem))
    return found


def _no_seconds(
    stamps: npt.NDArray[np.float64], name: str, scale: float | None, first: np.dtype[np.generic]
) -> str | None:
    """Why `stamps` are no times in seconds, or None. `scale` is their unit where the file states it."""
    if len(stamps) < 2:
        return None
    steps = np.diff(stamps)
    if not np.isfinite(stamps).all():
        return f"{name} are not all finite"
    if (steps <= 0).any():
        place = int(np.argmax(steps <= 0)) + 1
        return f"{name} do not go forward at frame {place} ({stamps[place - 1]:g}, then {stamps[place]:g})"
    step = float(np.median(steps))
    if scale is None and (stamps == np.round(stamps)).all():
        if (steps == 1).all():
            return f"{name} count frames ({stamps[0]:g}, {stamps[1]:g}, ...); they are no times"
        return f"{name} are whole numbers in steps of {step:g}, no seconds{_unit_of(step)}"
    if not _PLAUSIBLE_FPS[0] <= 1.0 / (step * (scale or 1.0)) <= _PLAUSIBLE_FPS[1]:
        return f"{name} are in steps of {step:g}, which are no seconds{_unit_of(step) if scale is None else ''}"
    if first.itemsize <= 4 and step < 8 * float(np.spacing(np.float32(np.abs(stamps).max()))):
        return f"{name} are too coarse: {first} at {stamps[0]:g} cannot tell frames apart"
    return None


def _unit_of(step: float) -> str:
    """The one unit in which `step` is the step of a usual camera, to say it."""
    fitting = [name for name, unit in _SMALLER.items() if _USUAL_FPS[0] <= 1.0 / (step * unit) <= _USUAL_FPS[1]]
    return (
        f"; as {fitting[0]} they are {1.0 / (step * _SMALLER[fitting[0]]):.2f} frames per second"
        if len(fitting) == 1
        else ""
    )


def _stated(file: h5py.File, attributes: dict[str, object], name: str, path: Path) -> object:
    """The attribute `name`, else the one value of a dataset of that name."""
    if attributes.get(name) is not None or not has_link(file, name):
        return attributes.get(name)
    dataset = find_dataset(file, name, path)
    return None if dataset is None or dataset.size != 1 else _plain(read_values(dataset, path))


def _number(value: object, what: str) -> float | None:
    """A number in any of the forms in which attributes hold one; None where nothing is stated.

    Raises:
        EpisodeError: it is no number.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise EpisodeError(
        f"{what} is not a number", got=repr(value)[:80], expected="a number", hint="rewrite or delete it."
    )


def _impossible(path: Path, name: str, value: float, expected: str) -> EpisodeError:
    return EpisodeError(
        f"{path}: {name} = {value:g} is impossible",
        got=value,
        expected=expected,
        hint=f"correct {name} in the file, or delete it so that the rate follows from time stamps.",
    )


def _plain(value: object) -> object:
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
