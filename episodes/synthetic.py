"""Makes synthetic episode files of every schema, for tests, demos and a first training run without a robot.

Same arguments, same file. Each looks as its recorder made it: names, datasets, attributes, colour order and the STOP
frames at the end of V5. What is in the picture comes from `scene`; this module only puts it into files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np
import numpy.typing as npt

from episodes.actions import classify_actions, default_event_types
from episodes.atomic_hdf5 import Draft, atomic_hdf5
from episodes.instruction import Side, sentence
from episodes.layout import ACTION_CLASSES, ACTIONS, EVENT_TYPES, HAND_IMAGES, IMAGES
from episodes.scene import Drive, draw_frame, plan_drive
from episodes.writer import write_episode, write_raw_frames
from episodes.writer_v5 import write_episode_v5

SyntheticSchema = Literal["v1", "v5", "v5_jpeg", "v6"]
SYNTHETIC_SCHEMAS: tuple[SyntheticSchema, ...] = get_args(SyntheticSchema)

FPS = 6.0
JPEG_QUALITY = 90
V5_STOP_FRAMES = 3
# One day for each schema, one second for each seed: names never collide, and sort by seed.
_FIRST_RECORDING: dict[SyntheticSchema, datetime] = {
    "v1": datetime(2025, 11, 6, 12),
    "v5": datetime(2026, 4, 6, 12),
    "v5_jpeg": datetime(2026, 4, 7, 12),
    "v6": datetime(2026, 7, 15, 12),
}
_NAME_ENDING: dict[SyntheticSchema, str] = {
    "v1": "1box_hori_{side}_core_medium",
    "v5": "basket_{side}",
    "v5_jpeg": "basket_{side}",
    "v6": "weak_{side}_{side}_curve",
}


@dataclass(frozen=True)
class _Recording:
    drive: Drive
    size: tuple[int, int]
    side: Side
    recorded_at: datetime
    instruction: str | None

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        for index in range(len(self.drive.actions)):
            yield draw_frame(self.drive, index, *self.size)

    def hand_frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The same scene seen upside down: enough to tell the cameras apart."""
        for frame in self.frames():
            yield np.ascontiguousarray(frame[::-1])


def write_synthetic(
    folder: str | Path,
    schema: SyntheticSchema,
    *,
    side: Side,
    seed: int,
    height: int = 720,
    width: int = 1280,
    length: int = 18,
    store_instruction: bool = True,
    store_classes: bool = True,
    decoy: bool = False,
    hand: bool = False,
) -> Path:
    """Write one synthetic episode into `folder` under the name that its recorder would have given it.

    Args:
        schema: "v1", "v5" (raw frames), "v5_jpeg" or "v6" (BGR).
        side: where the target stands.
        seed: position, size and colours of the target; also the time in the file name.
        length: frames; at least 2, for V5 at least 5.
        store_instruction: False leaves the text out, as in many V1 files. V6 never has one.
        store_classes: False leaves `action_classes` out of V6, as before August 2026.
        decoy: a second target like the first stands on the other side, so that only the instruction tells where to go.
        hand: there is a second camera; not in V5.

    Raises:
        ValueError: an argument outside of the above.
        StorageError: the disk refuses.
    """
    if schema not in SYNTHETIC_SCHEMAS:
        raise ValueError(f"schema must be one of {', '.join(SYNTHETIC_SCHEMAS)}, not {schema!r}")
    if side not in get_args(Side):
        raise ValueError(f"side must be left or right, not {side!r}")
    if min(height, width) < 1:
        raise ValueError(f"frames must be at least 1 x 1, not {height} x {width}")
    is_v5 = schema in ("v5", "v5_jpeg")
    if hand and is_v5:
        raise ValueError(f"no hand camera is written in schema {schema}")
    instruction = sentence("v5" if is_v5 else "v1", side) if store_instruction and schema != "v6" else None
    recorded_at = _FIRST_RECORDING[schema] + timedelta(seconds=seed)
    target: Literal["bottle", "basket"] = "bottle" if schema == "v1" else "basket"
    drive = plan_drive(target, side, seed, length, V5_STOP_FRAMES if is_v5 else 0, decoy=decoy)
    recording = _Recording(drive, (height, width), side, recorded_at, instruction)
    path = Path(folder) / f"episode_{recorded_at:%Y%m%d_%H%M%S}_{_NAME_ENDING[schema].format(side=side)}.h5"
    if schema == "v1":
        return write_episode(
            path,
            recording.frames(),
            drive.actions,
            instruction=instruction,
            fps=FPS,
            obstacle_layout_type="1box_hori",
            time_period="core",
            collected_at=recorded_at,
            hand_frames=recording.hand_frames() if hand else None,
        )
    if is_v5:
        return write_episode_v5(
            path,
            recording.frames(),
            drive.actions,
            instruction=instruction,
            timestamps=np.arange(length) / FPS,
            jpeg_quality=JPEG_QUALITY if schema == "v5_jpeg" else None,
        )
    with atomic_hdf5(path) as draft:
        _write_v6(draft, recording, store_classes=store_classes)
        if hand:
            frames = (frame[..., ::-1] for frame in recording.hand_frames())
            write_raw_frames(draft, HAND_IMAGES["v6"], frames, length)
    return path


def _write_v6(draft: Draft, recording: _Recording, *, store_classes: bool) -> None:
    file, actions = draft.file, recording.drive.actions
    write_raw_frames(draft, IMAGES["v6"], (frame[..., ::-1] for frame in recording.frames()), len(actions))
    file.create_dataset(ACTIONS, data=actions, fillvalue=np.nan, fletcher32=True)
    file.create_dataset(EVENT_TYPES, data=list(default_event_types(actions)), dtype=h5py.string_dtype())
    if store_classes:
        file.create_dataset(ACTION_CLASSES, data=classify_actions(actions))
    file.attrs.update(
        episode_name=draft.path.stem,
        total_duration=len(actions) / FPS,
        num_frames=len(actions),
        action_chunk_size=10,
        obstacle_layout_type="none",
        time_period="unknown",
        collection_datetime=recording.recorded_at.isoformat(timespec="seconds"),
        scenario=f"weak_{recording.side}",
        cx_position=f"weak_{recording.side}",
        cx_path=f"{recording.side}_curve",
        control_mode="manual",
    )
