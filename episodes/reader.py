"""Opens a recorded episode of any known schema as one and the same thing: RGB frames, actions, an instruction.

`open_episode` reads everything that is small (actions, texts, attributes), checks it, and leaves the images on disk;
`frame(i)` reads one. So opening a thousand files is cheap, and whatever is wrong with a file but its images is known
before training starts. Image damage shows when the frame is read, as an EpisodeError that names file and frame.

    with open_episode("episode_20251106_120000_1box_hori_left_core_medium.h5") as episode:
        for frame, action in zip(episode.frames(), episode.actions): ...

Knows nothing about windows, resizing or normalisation, which belong to training, and does not judge whether a driver
drove well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
import numpy.typing as npt

from episodes.actions import ACTION_NAMES, read_action_classes, read_actions, read_event_types
from episodes.container import open_container, reading
from episodes.frames import FrameSource, open_frames
from episodes.instruction import EpisodeWarning, InstructionSource, read_stored_instruction, resolve_instruction
from episodes.layout import SCHEMAS, TIMESTAMPS, Schema, detect_schema

__all__ = ["Episode", "EpisodeWarning", "InstructionSource", "Schema", "open_episode"]

_PLAUSIBLE_FPS = (0.1, 240.0)


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode, open for reading; use it as a context manager or call `close`.

    Attributes:
        path: the file.
        schema: "v1", "v5" or "v6".
        actions: float32 [T, A]; action i was commanded while frame i was seen.
        action_names: names of the A columns.
        instruction: what the robot was told, or None.
        instruction_source: "stored", "file name" (assumed, with a warning) or "none".
        fps: frames per second, or None where the file does not tell.
        attributes: the file's attributes as plain Python values.
        event_types: the recorder's event of each action, or None.
        action_classes: the recorder's discrete class of each action, int64 [T], or None.
    """

    path: Path
    schema: Schema
    actions: npt.NDArray[np.float32]
    action_names: tuple[str, ...]
    instruction: str | None
    instruction_source: InstructionSource
    fps: float | None
    attributes: dict[str, object]
    event_types: tuple[str, ...] | None
    action_classes: npt.NDArray[np.int64] | None
    _file: h5py.File = field(repr=False)
    _frames: FrameSource = field(repr=False)

    def __len__(self) -> int:
        return len(self.actions)

    def frame(self, index: int) -> npt.NDArray[np.uint8]:
        """Frame `index` as a new uint8 [H, W, 3] RGB array; the only call that reads an image.

        Raises:
            IndexError: not 0 <= index < len(episode).
            ValueError: the episode is closed.
            EpisodeError: the frame is damaged.
        """
        position = operator.index(index)
        if not 0 <= position < len(self):
            raise IndexError(f"frame {position} of an episode with {len(self)} frames")
        if not self._file:
            raise ValueError(f"episode is closed: {self.path}")
        return self._frames.read(position)

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """All frames in order, one in memory at a time."""
        for index in range(len(self)):
            yield self.frame(index)

    def close(self) -> None:
        """Close the file; what is not an image stays usable."""
        self._file.close()

    def __enter__(self) -> Episode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_episode(path: str | Path, *, schema: Schema | None = None) -> Episode:
    """Open an episode and check all of it but its images.

    Args:
        path: an HDF5 file.
        schema: overrides the sniffing (see `episodes.layout` for its rule), also for a session log.

    Raises:
        EpisodeError: the file is missing, damaged, of no known schema, empty, or contradicts itself.
    """
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"schema must be one of {', '.join(SCHEMAS)}, not {schema!r}")
    path = Path(path)
    file = open_container(path)
    try:
        with reading(path, "its structure"):
            known = schema or detect_schema(file, path)
            frames = open_frames(file, known, path)
            actions = read_actions(file, path, len(frames))
            event_types = read_event_types(file, path, len(frames))
            action_classes = read_action_classes(file, path, len(frames))
            stored = read_stored_instruction(file, path)
            attributes = {str(name): _plain(file.attrs[name]) for name in file.attrs}
            fps = _frame_rate(file, attributes, len(frames))
        instruction, source = resolve_instruction(stored, path, known, stacklevel=2)
    except BaseException:
        file.close()
        raise
    return Episode(
        path=path,
        schema=known,
        actions=actions,
        action_names=ACTION_NAMES[: actions.shape[1]],
        instruction=instruction,
        instruction_source=source,
        fps=fps,
        attributes=attributes,
        event_types=event_types,
        action_classes=action_classes,
        _file=file,
        _frames=frames,
    )


def _frame_rate(file: h5py.File, attributes: dict[str, object], frames: int) -> float | None:
    """Frames per second from the attribute `fps`, else the median step of the timestamps, else frames / total_duration.

    A value outside 0.1-240 fps means that the numbers are not seconds; it is passed over.
    """
    candidates = [attributes.get("fps")]
    for name in TIMESTAMPS:
        stamps = file.get(name)
        if isinstance(stamps, h5py.Dataset) and stamps.shape == (frames,) and stamps.dtype.kind in "fiu" and frames > 1:
            step = float(np.median(np.diff(np.asarray(stamps[()], dtype=np.float64))))
            candidates.append(1.0 / step if step > 0 else None)
    duration = attributes.get("total_duration")
    candidates.append(frames / duration if isinstance(duration, (int, float)) and duration > 0 else None)
    low, high = _PLAUSIBLE_FPS
    return next((float(fps) for fps in candidates if isinstance(fps, (int, float)) and low <= fps <= high), None)


def _plain(value: object) -> object:
    """An HDF5 attribute without numpy or h5py types: str, int, float, bool, None or nested lists of these."""
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
