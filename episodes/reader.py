"""Opens a recorded episode of any known schema as one and the same thing: RGB frames, actions, an instruction.

`open_episode` reads everything that is small (actions, texts, attributes), checks it, and leaves the images on disk, but for a few where
actions end in stops that may never have been written; `frame(i)` reads one. So opening a thousand files is cheap, and whatever is wrong
with a file but its images is known before training starts. Image damage shows when the frame is read, as an EpisodeError that names
file and frame.

    with open_episode("episode_20251106_120000_1box_hori_left_core_medium.h5") as episode:
        for frame, action in zip(episode.frames(), episode.actions): ...

Knows nothing about windows, resizing or normalisation, which belong to training, and does not judge whether a driver
drove well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from episodes.actions import ACTION_NAMES, read_action_classes, read_actions, read_event_types
from episodes.attributes import frame_rate, read_attributes
from episodes.container import open_container, reading, require_dataset
from episodes.first_contact import require_answer
from episodes.frames import FrameSource, open_frames
from episodes.instruction import EpisodeWarning, InstructionSource, read_stored_instruction, resolve_instruction
from episodes.layout import ACTIONS, HAND_IMAGES, SCHEMAS, Schema, detect_schema
from episodes.lerobot import open_lerobot, split_name
from episodes.recording import open_recording, split_recording
from episodes.unwritten import require_recorded_actions

__all__ = ["CAMERAS", "Episode", "EpisodeWarning", "InstructionSource", "Schema", "open_episode"]

CAMERAS = ("hand", "static")  # upstream's order of image tokens


class _Storage(Protocol):
    """What holds an episode; false once it is closed."""

    def __bool__(self) -> bool: ...

    def close(self) -> None: ...


class _Frames(Protocol):
    """What reads its images, by index."""

    def read(self, index: int) -> npt.NDArray[np.uint8]: ...

    def read_jpeg(self, index: int) -> bytes | None: ...


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode, open for reading; use it as a context manager or call `close`.

    Attributes:
        path: the file; for an episode of a LeRobot dataset its name, FOLDER#INDEX; of a flight recording NAME.mcap#INDEX.
        schema: "v1", "v5" or "v6"; or "lerobot" or "recording".
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
    schema: Schema | Literal["lerobot", "recording"]
    actions: npt.NDArray[np.float32]
    action_names: tuple[str, ...]
    instruction: str | None
    instruction_source: InstructionSource
    fps: float | None
    attributes: dict[str, object]
    event_types: tuple[str, ...] | None
    action_classes: npt.NDArray[np.int64] | None
    _file: _Storage = field(repr=False)
    _frames: _Frames = field(repr=False)
    _hand: _Frames | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def cameras(self) -> tuple[str, ...]:
        """What it shows, in the order in which policies see it."""
        return ("static",) if self._hand is None else CAMERAS

    def require_cameras(self, cameras: Sequence[str]) -> None:
        """Nothing, if the episode has these.

        Raises:
            EpisodeError: it lacks one. What a hand would have seen is never made up.
        """
        if missing := [camera for camera in cameras if camera not in self.cameras]:
            raise EpisodeError(
                f"{self.path} has no {' and no '.join(missing)} camera",
                got=", ".join(self.cameras),
                expected=", ".join(cameras),
                hint="such episodes hold hand_images beside images, or are LeRobot datasets with a second camera named hand, wrist or "
                "gripper.",
            )

    def refuse_hand(self, by: str) -> None:
        """Nothing, unless there is a hand camera, whose images `by` would lose.

        Raises:
            EpisodeError: there is one.
        """
        if "hand" in self.cameras:
            raise EpisodeError(
                f"{self.path} has a hand camera",
                expected="one camera",
                hint=f"{by} does not write a second camera; train on the episode as it is.",
            )

    def frame(self, index: int, camera: str = "static") -> npt.NDArray[np.uint8]:
        """Frame `index` as a new uint8 [H, W, 3] RGB array; with `views` the only call that reads an image.

        Raises:
            IndexError: not 0 <= index < len(episode).
            ValueError: the episode is closed.
            EpisodeError: the frame is damaged, or there is no such camera.
        """
        position = operator.index(index)
        if not 0 <= position < len(self):
            raise IndexError(f"frame {position} of an episode with {len(self)} frames")
        if not self._file:
            raise ValueError(f"episode is closed: {self.path}")
        return self._images(camera).read(position)

    def views(self, index: int, cameras: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
        """Frame `index` of each of the cameras; raises as `frame`."""
        return [self.frame(index, camera) for camera in cameras]

    def jpeg(self, index: int, camera: str = "static") -> bytes | None:
        """Frame `index` as the JPEG file in which it is stored, not decoded and so not checked; None where frames are stored raw.

        Raises:
            ValueError: the episode is closed.
            EpisodeError: it cannot be read, or there is no such camera.
        """
        if not self._file:
            raise ValueError(f"episode is closed: {self.path}")
        return self._images(camera).read_jpeg(index)

    def _images(self, camera: str) -> _Frames:
        if camera == "static":
            return self._frames
        self.require_cameras((camera,))
        assert self._hand is not None
        return self._hand

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
    """Open an episode and check all of it but its images. An HDF5 file is opened by another process first (episodes/first_contact.py).

    Args:
        path: an HDF5 file; FOLDER#INDEX, an episode of a LeRobot dataset; or a flight recording, NAME.mcap or NAME.mcap#INDEX.
        schema: of a file; overrides the sniffing (see `episodes.layout` for its rule), also for a session log.

    Raises:
        EpisodeError: the file is missing, damaged, of no known schema, empty, contradicts itself, or hangs or kills who reads it.
    """
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"schema must be one of {', '.join(SCHEMAS)}, not {schema!r}")
    path = Path(path)
    if (found := split_name(path)) is not None and schema is None:
        folder, index = found
        return open_lerobot(folder).episode(index)
    if split_recording(path) is not None and schema is None:
        return open_recording(path, stacklevel=2)
    require_answer(path, schema)
    return open_here(path, schema=schema, stacklevel=2)


def open_here(path: Path, *, schema: Schema | None = None, stacklevel: int = 1) -> Episode:
    """As `open_episode` opens an HDF5 file, but at once: damage may hang or kill this process.

    Args:
        stacklevel: of a warning, counted from the caller's line.
    """
    file = open_container(path)
    try:
        with reading(path, "its structure"):
            known = schema or detect_schema(file, path)
            frames = open_frames(file, known, path)
            hand = _open_hand(file, known, path, len(frames))
            actions = read_actions(file, path, len(frames))
            event_types = read_event_types(file, path, len(frames))
            action_classes = read_action_classes(file, path, len(frames))
            require_recorded_actions(
                require_dataset(file, ACTIONS, path),
                actions,
                frames.read,
                path,
                event_types=event_types,
                action_classes=action_classes,
            )
            stored = read_stored_instruction(file, path)
            attributes = read_attributes(file)
            fps = frame_rate(file, attributes, len(frames), path)
        instruction, source = resolve_instruction(stored, path, known, stacklevel=stacklevel + 1)
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
        _hand=hand,
    )


def _open_hand(file: h5py.File, schema: Schema, path: Path, count: int) -> FrameSource | None:
    """The images of the hand camera, if there is one."""
    name = HAND_IMAGES[schema]
    if name not in file:
        return None
    frames = open_frames(file, schema, path, name)
    if len(frames) != count:
        raise EpisodeError(
            f"{path} contradicts itself: its cameras have different numbers of frames",
            got=f"{len(frames)} in {name}",
            expected=f"{count}, as the other has",
            hint="copy the file again from the robot; if it is like this there too, leave the episode out.",
        )
    return frames
