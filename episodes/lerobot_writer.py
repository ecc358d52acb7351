"""Writes HDF5 episodes as a LeRobot v3 dataset: tables, statistics, and images as JPEG files in the tables or as videos.

All episodes are opened and compared before the first image is read. One episode is in memory at a time, as JPEG files. The dataset
grows in a hidden folder beside its own (bundle/atomic.py) and gets its name when it is complete and on the disk. JPEG frames of V5
are stored as they are; others are encoded once, at quality 95.

The layout is that of episodes/lerobot_layout.py, with one row group for each episode. Needs pyarrow, and av for videos.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bundle.atomic import exclusive, staged_directory
from bundle.errors import EpisodeError
from episodes.lerobot_info import ACTION, INFO, TASKS
from episodes.lerobot_layout import (
    CAMERA,
    DATA,
    DATA_MB,
    EPISODES,
    FILES_PER_CHUNK,
    VIDEO,
    VIDEO_MB,
    info_of,
    rows_table,
    tasks_table,
)
from episodes.lerobot_stats import FrameStats, Stats, merge, stats_of
from episodes.reader import Episode, EpisodeWarning, open_episode
from episodes.writer_v5 import encode_jpeg

if TYPE_CHECKING:
    from episodes.lerobot_video import VideoWriter

_JPEG_QUALITY = 95
_SAME_RATE = 1.1


@dataclass(frozen=True)
class _Plan:
    """What all episodes have in common."""

    action_names: tuple[str, ...]
    fps: int
    tasks: tuple[str, ...]


@dataclass
class _Progress:
    """What has been written so far, and the files that are being written."""

    size: tuple[int, int] | None = None  # of the frames, height and width
    frames: int = 0
    files: dict[str, int] = field(default_factory=lambda: {"data": -1, "video": -1})
    data: pq.ParquetWriter | None = None
    data_bytes: int = 0
    video: VideoWriter | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Stats]] = field(default_factory=list)


def write_dataset(paths: Sequence[Path], folder: Path, *, fps: float | None, video: bool) -> None:
    """See episodes.lerobot.export_lerobot."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise EpisodeError(
            f"{folder} exists",
            expected="a new or empty folder",
            hint="name another folder; datasets are not overwritten.",
        )
    plan = _plan(paths, fps)
    with exclusive(folder), staged_directory(folder) as staging:
        progress = _Progress()
        with ExitStack() as files:
            for path in paths:
                with _open(path) as episode:
                    _write_episode(staging, episode, plan, progress, files, video=video)
        _write_meta(staging, plan, progress)


def _open(path: Path) -> Episode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # _plan says it for all files at once
        return open_episode(path)


def _plan(paths: Sequence[Path], fps: float | None) -> _Plan:
    """Compare the episodes; reads no image."""
    if not paths:
        raise EpisodeError(
            "there is nothing to export", got="no episodes", expected="at least one", hint="name some files."
        )
    tasks: dict[str, None] = {}
    rates: list[tuple[Path, float]] = []
    assumed = 0
    names: tuple[str, ...] | None = None
    for path in paths:
        with _open(path) as episode:
            episode.refuse_hand("the export to LeRobot")
            names = names or episode.action_names
            if episode.action_names != names:
                raise _differ(path, "axes", ", ".join(episode.action_names), ", ".join(names))
            if episode.instruction is None:
                raise EpisodeError(
                    f"{path} has no instruction",
                    got="none stored, and the file name does not name one side",
                    expected="what the robot was told: LeRobot stores a task with every frame",
                    hint="python episodes/doctor.py FILES --repair --out DIR --instruction TEXT stores one.",
                )
            tasks[episode.instruction] = None
            assumed += episode.instruction_source != "stored"
            if episode.fps is not None:
                rates.append((path, episode.fps))
    if assumed:
        message = f"{assumed} of {len(paths)} episodes store no instruction; it was taken from the file name"
        warnings.warn(message, EpisodeWarning, stacklevel=4)
    assert names is not None
    return _Plan(names, _whole_rate(rates, fps), tuple(tasks))


def _whole_rate(rates: list[tuple[Path, float]], fps: float | None) -> int:
    """The rate of all episodes as the whole number that LeRobot wants."""
    wanted = fps if fps is not None or not rates else median_low(rate for _, rate in rates)
    if wanted is None or not math.isfinite(wanted) or round(wanted) < 1 or fps not in (None, round(wanted)):
        raise EpisodeError(
            "the dataset has no frame rate" if wanted is None else f"{wanted:g} fps is not a rate that LeRobot knows",
            expected="a whole number of frames per second",
            hint="pass one, for example fps=6.",
        )
    for path, rate in rates:
        if max(rate / round(wanted), round(wanted) / rate) > _SAME_RATE:
            raise _differ(path, "frame rate", f"{rate:g} fps", f"within 10 % of {round(wanted)} fps")
    return round(wanted)


def _write_episode(
    staging: Path, episode: Episode, plan: _Plan, progress: _Progress, files: ExitStack, *, video: bool
) -> None:
    number, length, start = len(progress.rows), len(episode), progress.frames
    assert episode.instruction is not None
    task = plan.tasks.index(episode.instruction)
    columns: dict[str, npt.NDArray[np.generic]] = {
        ACTION: episode.actions,
        "timestamp": (np.arange(length) / plan.fps).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, number),
        "index": np.arange(start, start + length),
        "task_index": np.full(length, task),
    }
    place: dict[str, Any] = {}
    images: list[bytes] = []
    of_frames = FrameStats()
    for index in range(length):
        frame = episode.frame(index)
        progress.size = progress.size or frame.shape[:2]
        if frame.shape[:2] != progress.size:
            got, expected = (f"{height}x{width}" for height, width in (frame.shape[:2], progress.size))
            raise _differ(episode.path, "frame size", f"frame {index}: {got}", expected)
        of_frames.add(frame)
        if not video:
            images.append(episode.jpeg(index) or encode_jpeg(frame, _JPEG_QUALITY))
            continue
        if index == 0:
            place = _next_video(staging, progress, files, plan.fps, progress.size)
        assert progress.video is not None
        progress.video.add(frame, key=index == 0)
    if video:
        place[f"videos/{CAMERA}/to_timestamp"] = place[f"videos/{CAMERA}/from_timestamp"] + length / plan.fps
    place |= _write_rows(staging, rows_table(columns, images), progress, files)
    stats = {CAMERA: of_frames.stats()} | {name: stats_of(values) for name, values in columns.items()}
    progress.stats.append(stats)
    progress.rows.append(
        {"episode_index": number, "tasks": [plan.tasks[task]], "length": length}
        | place
        | {"dataset_from_index": start, "dataset_to_index": start + length}
        | {f"stats/{name}/{key}": value for name, part in stats.items() for key, value in part.as_dict().items()}
        | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    )
    progress.frames += length


def _write_rows(staging: Path, table: pa.Table, progress: _Progress, files: ExitStack) -> dict[str, Any]:
    """Append to the current table file, or to a new one where it would grow too large."""
    if progress.data is None or progress.data_bytes + table.nbytes > DATA_MB << 20:
        if progress.data is not None:
            progress.data.close()
        path = _next_file(staging, progress, "data", DATA)
        progress.data, progress.data_bytes = (
            files.enter_context(pq.ParquetWriter(path, table.schema, write_page_checksum=True)),
            0,
        )
    progress.data.write_table(table)
    progress.data_bytes += table.nbytes
    chunk, file = divmod(progress.files["data"], FILES_PER_CHUNK)
    return {"data/chunk_index": chunk, "data/file_index": file}


def _next_video(
    staging: Path, progress: _Progress, files: ExitStack, fps: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Where the episode that begins now is: in the current video, or in a new one where that is large."""
    from episodes.lerobot_video import VideoWriter  # needs av, which a dataset without videos does not

    if any(side % 2 for side in size):
        raise EpisodeError(
            f"frames of {size[0]}x{size[1]} cannot become a video",
            expected="an even height and width",
            hint="export without video.",
        )
    if progress.video is None or progress.video.bytes > VIDEO_MB << 20:
        if progress.video is not None:
            progress.video.close()
        path = _next_file(staging, progress, "video", VIDEO)
        progress.video = files.enter_context(VideoWriter(path, fps, size))
    chunk, file = divmod(progress.files["video"], FILES_PER_CHUNK)
    values = {"chunk_index": chunk, "file_index": file, "from_timestamp": progress.video.frames / fps}
    return {f"videos/{CAMERA}/{key}": value for key, value in values.items()}


def _next_file(staging: Path, progress: _Progress, kind: str, template: str) -> Path:
    progress.files[kind] += 1
    chunk, file = divmod(progress.files[kind], FILES_PER_CHUNK)
    path = staging / template.format(video_key=CAMERA, chunk_index=chunk, file_index=file)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_meta(staging: Path, plan: _Plan, progress: _Progress) -> None:
    meta = staging / EPISODES
    meta.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(progress.rows), meta, write_page_checksum=True)
    pq.write_table(tasks_table(plan.tasks), staging / TASKS, write_page_checksum=True)
    total = {name: merge([stats[name] for stats in progress.stats]).as_dict() for name in progress.stats[0]}
    (staging / "meta/stats.json").write_text(json.dumps(total, indent=4), encoding="utf-8")
    assert progress.size is not None
    info = info_of(
        action_names=plan.action_names,
        fps=plan.fps,
        size=progress.size,
        episodes=len(progress.rows),
        frames=progress.frames,
        tasks=len(plan.tasks),
        video=None if progress.video is None else progress.video.facts(),
    )
    (staging / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")


def _differ(path: Path, what: str, got: str, expected: str) -> EpisodeError:
    return EpisodeError(
        f"{path} differs from the other episodes in its {what}",
        got=got,
        expected=expected,
        hint="all episodes of a LeRobot dataset agree in it: export each kind into a dataset of its own.",
    )
