"""What the files of a LeRobot v3 dataset look like when jetvla writes them: names, limits, columns, and meta/info.json.

As lerobot 0.4 does it (its documentation: LeRobotDataset v3.0). The tables carry the notes by which pandas and `datasets` recognise
their index and their images; without them lerobot could not open them. Needs pyarrow. Writes nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from episodes.lerobot_info import ACTION

CAMERA = "observation.images.front"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FILES_PER_CHUNK = 1000
DATA_MB = 100
VIDEO_MB = 200
_SCALARS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def rows_table(columns: dict[str, npt.NDArray[np.generic]], images: list[bytes]) -> pa.Table:
    """The rows of one episode; without a column of images where there are none.

    Args:
        columns: `action`, float32 [T, A], and those of __SCALARS, [T].
        images: T files.
    """
    arrays: dict[str, pa.Array] = {}
    notes: dict[str, Any] = {}
    if images:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        arrays[CAMERA] = pa.array([{"bytes": image, "path": None} for image in images], type=kind)
        notes[CAMERA] = {"_type": "Image"}
    actions = columns[ACTION]
    arrays[ACTION] = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), actions.shape[1])
    value = {"dtype": "float32", "_type": "Value"}
    notes[ACTION] = {"feature": value, "length": actions.shape[1], "_type": "Sequence"}
    for name, dtype in _SCALARS.items():
        arrays[name] = pa.array(columns[name], type=pa.type_for_alias(dtype))
        notes[name] = {"dtype": dtype, "_type": "Value"}
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": notes}})})


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """The instructions, numbered; they are the index when pandas reads the table, by which lerobot finds them."""
    columns = [_pandas_column("task_index", "int64", "int64"), _pandas_column("task", "unicode", "object")]
    notes = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": columns,
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": np.arange(len(tasks)), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(notes)})


def _pandas_column(name: str, kind: str, numpy_kind: str) -> dict[str, Any]:
    return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}


def info_of(
    *,
    action_names: Sequence[str],
    fps: int,
    size: tuple[int, int],
    episodes: int,
    frames: int,
    tasks: int,
    video: Mapping[str, object] | None,
) -> dict[str, Any]:
    """The content of meta/info.json.

    Args:
        size: height and width of the frames.
        video: facts about the videos; None where images are in the tables.
    """
    camera: dict[str, Any] = {
        "dtype": "image" if video is None else "video",
        "shape": [*size, 3],
        "names": ["height", "width", "channels"],
    }
    if video is not None:
        camera["info"] = video
    action = {"dtype": "float32", "shape": [len(action_names)], "names": list(action_names)}
    scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _SCALARS.items()}
    return {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA,
        "video_path": None if video is None else VIDEO,
        "features": {CAMERA: camera, ACTION: action} | scalars,
    }
