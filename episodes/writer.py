"""Writes an episode in schema V1, frame by frame, so that a recorder, a converter and the tests all make the same file.

V1 is written because it is the one layout without ambiguity: RGB, an action and an event per frame, the instruction
inside the file. Frames may come from a generator; one is in memory at a time. The file appears complete or not at all
(`atomic_hdf5`).

Layout: `images` uint8 (T,H,W,3) gzip, one chunk per frame; `actions` float32 (T,3); `action_event_types`
variable-length text (T,); `language_instruction` (1,) S256; attributes `episode_name`, `total_duration` (seconds),
`num_frames`, `action_chunk_size`, `obstacle_layout_type`, `time_period`, `collection_datetime`. No other attribute:
some of them would make a reader take it for V6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError, FrameError
from episodes.actions import ACTION_NAMES, default_event_types
from episodes.atomic_hdf5 import Draft, atomic_hdf5
from episodes.layout import ACTIONS, EVENT_TYPES, HAND_IMAGES, IMAGES, INSTRUCTION

INSTRUCTION_BYTES = 256


def write_episode(
    path: str | Path,
    frames: Iterable[npt.NDArray[np.uint8]],
    actions: npt.ArrayLike,
    *,
    instruction: str | None,
    fps: float,
    event_types: Sequence[str] | None = None,
    action_chunk_size: int = 10,
    obstacle_layout_type: str = "unknown",
    time_period: str = "unknown",
    collected_at: datetime | None = None,
    hand_frames: Iterable[npt.NDArray[np.uint8]] | None = None,
) -> Path:
    """Write one V1 episode, replacing an older file of that name.

    Args:
        path: the final name; its folder must exist.
        frames: T frames, uint8 [H, W, 3] RGB, all of one size; a generator is consumed one frame at a time.
        actions: [T, 3] of linear_x, linear_y, angular_z, stored as float32; action i belongs to frame i.
        instruction: what the robot was told, at most 256 bytes of UTF-8; None stores none.
        fps: frames per second; stored as `total_duration`.
        event_types: T event names; by default those of `episodes.actions.default_event_types`.
        collected_at: time of recording; now if not given.
        hand_frames: T frames of a second camera, at the robot's hand; None stores none.

    Returns:
        `path`.

    Raises:
        EpisodeError: actions, events, instruction or the number of frames are not as above.
        FrameError: a frame is not as above.
        StorageError: the disk is full or refuses to write.
    """
    path = Path(path)
    commands = _checked_actions(actions, path)
    events = default_event_types(commands) if event_types is None else tuple(event_types)
    if len(events) != len(commands):
        raise EpisodeError(
            f"cannot write {path}: events and actions differ in number",
            got=f"{len(events)} event types",
            expected=f"{len(commands)}, one for each action",
            hint="pass one event type for each action, or none at all.",
        )
    if not (math.isfinite(fps) and fps > 0):
        raise EpisodeError(
            f"cannot write {path}: fps is not a rate", got=fps, expected="a number above 0", hint="pass fps=6.0."
        )
    text = None if instruction is None else check_instruction(instruction, path)
    with atomic_hdf5(path) as draft:
        write_raw_frames(draft, IMAGES["v1"], frames, len(commands))
        if hand_frames is not None:
            write_raw_frames(draft, HAND_IMAGES["v1"], hand_frames, len(commands))
        draft.file.create_dataset(
            ACTIONS, data=commands, fillvalue=np.nan, fletcher32=True
        )  # so that a zero was written
        draft.file.create_dataset(EVENT_TYPES, data=list(events), dtype=h5py.string_dtype())
        if text is not None:
            draft.file.create_dataset(INSTRUCTION, data=np.array([text], dtype=f"S{INSTRUCTION_BYTES}"))
        draft.file.attrs.update(
            episode_name=path.stem,
            total_duration=len(commands) / fps,
            num_frames=len(commands),
            action_chunk_size=action_chunk_size,
            obstacle_layout_type=obstacle_layout_type,
            time_period=time_period,
            collection_datetime=(collected_at or datetime.now()).isoformat(timespec="seconds"),
        )
    return path


def write_raw_frames(draft: Draft, name: str, frames: Iterable[object], count: int) -> None:
    """Store exactly `count` frames as gzip uint8 (count, H, W, 3), one chunk per frame, channels in the order given.

    Raises:
        EpisodeError: there are fewer or more frames.
        FrameError: a frame is not uint8 [H, W, 3], or not of the size of the first.
        StorageError: the disk refuses.
    """
    dataset: h5py.Dataset | None = None
    written = 0
    for given in frames:
        if written == count:
            raise frame_count_error(draft.path, f"more than {count} frames", count)
        frame = check_frame(given, written, None if dataset is None else dataset.shape[1:], draft.path)
        if dataset is None:
            shape = frame.shape
            # Chunk by frame: reading frame i decompresses frame i and nothing else.
            dataset = draft.file.create_dataset(name, (count, *shape), np.uint8, chunks=(1, *shape), compression="gzip")
        dataset[written] = frame
        draft.check()
        written += 1
    if written < count:
        raise frame_count_error(draft.path, f"{written} frames", count)


def frame_count_error(path: Path, got: str, count: int) -> EpisodeError:
    """The error for `got` frames where there are `count` actions."""
    return EpisodeError(
        f"cannot write {path}: frames and actions differ in number",
        got=got,
        expected=f"{count}, one for each action",
        hint="pass the action that was commanded while each frame was seen, and no other.",
    )


def check_frame(frame: object, index: int, size: tuple[int, ...] | None, path: Path) -> npt.NDArray[np.uint8]:
    """`frame` if it is uint8 [H, W, 3] and, where one is given, of shape `size`.

    Raises:
        FrameError: it is not.
    """
    if not isinstance(frame, np.ndarray):  # callers may be untyped
        got = type(frame).__name__
    elif (
        frame.dtype != np.uint8
        or frame.ndim != 3
        or frame.shape[2] != 3
        or 0 in frame.shape
        or frame.shape != (size or frame.shape)
    ):
        got = f"{frame.dtype} {frame.shape}"
    else:
        return frame
    raise FrameError(
        f"cannot write {path}: frame {index} is not an image of this episode",
        got=got,
        expected=f"uint8 {size or '(H, W, 3)'}",
        hint="convert each frame to uint8 RGB, and resize all of them to one size.",
    )


def _checked_actions(actions: npt.ArrayLike, path: Path) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        commands = np.asarray(actions, dtype=np.float32)
    if commands.ndim != 2 or commands.shape[1] != len(ACTION_NAMES) or len(commands) == 0:
        raise EpisodeError(
            f"cannot write {path}: actions have the wrong shape",
            got=commands.shape,
            expected=f"(T, {len(ACTION_NAMES)}) of {', '.join(ACTION_NAMES)} with T >= 1",
            hint="for a robot without one of these axes, fill its column with zeros.",
        )
    bad = np.argwhere(~np.isfinite(commands))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise EpisodeError(
            f"cannot write {path}: action {row} is not finite",
            got=f"{ACTION_NAMES[column]} = {commands[row, column]}",
            expected="finite velocities",
            hint="find out why the controller commanded it; do not record it.",
        )
    return commands


def check_instruction(instruction: str, path: Path) -> bytes:
    """The bytes to store for `instruction`.

    Raises:
        EpisodeError: it is blank, too long, contains NUL or cannot be encoded.
    """
    try:
        text = instruction.encode("utf-8")
        problem = "blank" if not instruction.strip() else "contains NUL" if b"\0" in text else f"{len(text)} bytes"
        valid = bool(instruction.strip()) and b"\0" not in text and len(text) <= INSTRUCTION_BYTES
    except UnicodeEncodeError:
        text, problem, valid = b"", "not encodable as UTF-8", False
    if not valid:
        raise EpisodeError(
            f"cannot write {path}: the instruction cannot be stored",
            got=problem,
            expected=f"text of 1 to {INSTRUCTION_BYTES} bytes of UTF-8",
            hint="shorten it; for an episode without instruction pass None.",
        )
    return text
