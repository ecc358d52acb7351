"""Reads a LeRobot v3 dataset: gives each episode in it as the same `Episode` that an HDF5 file gives.

Actions and texts are small and read at once for a whole table; images stay where they are, in tables (episodes/lerobot_tables.py) or
videos (episodes/lerobot_video.py), until a frame is asked for.

Needs pyarrow; episodes/lerobot.py says so where it is missing. Reads nothing outside of the dataset's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bundle.errors import EpisodeError
from bundle.reading_limits import EPISODE_FRAMES, EPISODE_TEXT
from episodes.container import reading
from episodes.lerobot_info import ACTION, COPY_AGAIN, TASKS, Camera, Info, read_info
from episodes.lerobot_tables import TableFrames, open_table, read_columns
from episodes.reader import Episode

_FRAME_TOLERANCE = 0.5  # of the frames that from_timestamp and to_timestamp enclose
_SMALL = ("episode_index", "frame_index", "task_index", ACTION)


@dataclass(frozen=True)
class _Entry:
    """Where the frames of an episode are: rows of a table, and seconds of a video (None where images are in the table)."""

    length: int
    data: Path
    video: Path | None
    video_start: float


@dataclass(frozen=True, eq=False)
class LeRobotDataset:
    """An open dataset; keeps no file open.

    Attributes:
        info: what it says about itself.
        camera: the one that is read.
    """

    info: Info
    camera: Camera
    _entries: tuple[_Entry, ...] = field(repr=False)
    _tasks: dict[int, str] = field(repr=False)
    _hand: LeRobotDataset | None = field(default=None, repr=False)
    _tables: dict[Path, pa.Table] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self._entries)

    def episode(self, index: int) -> Episode:
        """Open episode `index`; its `path` is the name FOLDER#INDEX.

        Raises:
            EpisodeError: there is none of that index; or a file is missing or damaged, or contradicts the others.
        """
        name, entry, first = self._locate(index)
        rows = self._table(entry.data).slice(first, entry.length)
        frames = self._frames(name, entry, first)
        instruction = self._instruction(name, rows)
        return Episode(
            path=Path(name),
            schema="lerobot",
            actions=self._actions(name, rows),
            action_names=self.info.action_names,
            instruction=instruction,
            instruction_source="none" if instruction is None else "stored",
            fps=self.info.fps,
            attributes={},
            event_types=None,
            action_classes=None,
            _file=frames,
            _frames=frames,
            _hand=None if self._hand is None else self._hand._frames(name, self._hand._entries[index], first),
        )

    def _frames(self, name: str, entry: _Entry, first: int) -> Any:
        """What reads the images of an episode."""
        if entry.video is None:
            return TableFrames(name, entry.data, self.camera.name, first, entry.length)
        from episodes.lerobot_video import VideoFrames  # needs av, which datasets without videos do not

        return VideoFrames(name, entry.video, entry.video_start, self.info.fps, entry.length)

    def video_files(self, index: int) -> tuple[Path, ...]:
        """The videos that hold the frames of episode `index`; none where they are in the table."""
        own = self._entries[index].video
        return (() if own is None else (own,)) + (() if self._hand is None else self._hand.video_files(index))

    def sha256(self, index: int, file_sha256: Callable[[Path], str]) -> str:
        """Hex sha256 of what an episode says: actions, axes, instruction, rate, and images as they are stored.

        Equal episodes of one or of two datasets have equal hashes where images are in tables. In a video of many episodes, the images are
        told by the hash of the video and by where the episode begins.

        Args:
            file_sha256: gives the hash of a video.

        Raises:
            EpisodeError: see `episode`; or a stored image cannot be read.
        """
        name, entry, first = self._locate(index)
        with self.episode(index) as episode:
            facts = (episode.action_names, episode.instruction, episode.fps, episode.actions.shape, self.camera.name)
            digest = hashlib.sha256(repr(facts).encode())
            digest.update(episode.actions.tobytes())
        if entry.video is not None:
            digest.update(f"{file_sha256(entry.video)} {entry.video_start!r}".encode())
        else:
            for image in TableFrames(name, entry.data, self.camera.name, first, entry.length).stored():
                digest.update(hashlib.sha256(image or b"").digest())
        if self._hand is not None:
            digest.update(self._hand.sha256(index, file_sha256).encode())
        return digest.hexdigest()

    def _locate(self, index: int) -> tuple[str, _Entry, int]:
        """Name, entry, and first row in its table."""
        if not 0 <= index < len(self):
            raise EpisodeError(
                f"{self.info.folder} has no episode {index}",
                got=f"{len(self)} episodes",
                expected=f"an index from 0 to {len(self) - 1}" if len(self) else "episodes",
                hint="count from 0.",
            )
        name, entry = f"{self.info.folder}#{index}", self._entries[index]
        table = self._table(entry.data)
        rows = np.flatnonzero(table.column("episode_index").to_numpy() == index)
        order = table.column("frame_index").to_numpy()[rows]
        if (
            len(rows) != entry.length
            or not np.array_equal(order, np.arange(entry.length))
            or rows[-1] - rows[0] != len(rows) - 1
        ):
            raise EpisodeError(
                f"{name} is incomplete in {entry.data}",
                got=f"{len(rows)} rows, frames {order[:1]} to {order[-1:]}",
                expected=f"{entry.length} rows in order, as meta/episodes says",
                hint=COPY_AGAIN,
            )
        return name, entry, int(rows[0])

    def _table(self, path: Path) -> pa.Table:
        """The small columns of a table, read once."""
        if path not in self._tables:
            self._tables[path] = read_columns(path, _SMALL)
        return self._tables[path]

    def _actions(self, name: str, rows: pa.Table) -> npt.NDArray[np.float32]:
        with reading(Path(name), ACTION):
            column = rows.column(ACTION).combine_chunks()
            values = column.flatten() if pa.types.is_nested(column.type) else column
            with np.errstate(over="ignore"):
                actions: npt.NDArray[np.float32] = (
                    values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(rows), -1)
                )
        if actions.shape[1] != len(self.info.action_names):
            raise EpisodeError(
                f"{name}: actions have another width than the dataset says",
                got=actions.shape,
                expected=f"(T, {len(self.info.action_names)})",
                hint=COPY_AGAIN,
            )
        if not np.isfinite(actions).all():
            row, column_index = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise EpisodeError(
                f"{name}: action {row} is not finite",
                got=f"{self.info.action_names[column_index]} = {actions[row, column_index]}",
                expected="finite velocities",
                hint="leave the episode out; a single NaN in a batch destroys the weights in training.",
            )
        return actions

    def _instruction(self, name: str, rows: pa.Table) -> str | None:
        indices = set(rows.column("task_index").to_pylist())
        unknown = indices - self._tasks.keys()
        if len(indices) > 1 or unknown:
            raise EpisodeError(
                f"{name} holds tasks that {TASKS} does not know"
                if unknown
                else f"{name} holds {len(indices)} instructions",
                got="; ".join(self._tasks.get(index, f"task {index}") for index in sorted(indices)[:3]),
                expected="one instruction for the whole episode",
                hint=COPY_AGAIN if unknown else "split the episode where the instruction changes.",
            )
        return self._tasks[indices.pop()].strip() or None


def open_dataset(folder: Path, camera: str | None) -> LeRobotDataset:
    """See episodes.lerobot.open_lerobot."""
    info = read_info(folder)
    chosen = info.camera(camera)
    beside = info.hand() if camera is None else None
    if chosen.is_video or (beside is not None and beside.is_video):
        import episodes.lerobot_video  # noqa: F401 - so that a missing av is said now
    tasks = _read_tasks(folder)
    hand = None if beside is None else LeRobotDataset(info, beside, _read_entries(info, beside), tasks)
    return LeRobotDataset(info, chosen, _read_entries(info, chosen), tasks, hand)


def _read_entries(info: Info, camera: Camera) -> tuple[_Entry, ...]:
    """The episodes in order, from all tables in meta/episodes."""
    wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    keys = [f"videos/{camera.name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    wanted += keys if camera.is_video else []
    rows: dict[int, _Entry] = {}
    disagreeing: list[tuple[int, float, int]] = []
    folder = info.folder / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    for path in paths:
        table = read_columns(path, wanted)
        with reading(path, "its values"):
            for row in table.to_pylist():
                number, length = int(row["episode_index"]), int(row["length"])
                video = info.video_file(camera.name, *(int(row[key]) for key in keys[:2])) if camera.is_video else None
                data = info.data_file(int(row["data/chunk_index"]), int(row["data/file_index"]))
                start = float(row[keys[2]]) if camera.is_video else 0.0
                seconds = float(row[keys[3]]) - start if camera.is_video else length / info.fps
                rows[number] = _Entry(length, data, video, start)
                if length > EPISODE_FRAMES:
                    raise ValueError(f"episode {number} of {length} frames, more than {EPISODE_FRAMES}")
                if not abs(seconds * info.fps - length) < _FRAME_TOLERANCE:
                    disagreeing.append((number, seconds, length))
    if sorted(rows) != list(range(info.episodes)) or any(entry.length < 1 for entry in rows.values()):
        raise EpisodeError(
            f"{folder} does not tell of all episodes",
            got=f"{len(rows)} episodes in {len(paths)} tables",
            expected=f"episodes 0 to {info.episodes - 1}, each with frames",
            hint=COPY_AGAIN,
        )
    if disagreeing:
        number, seconds, length = disagreeing[0]
        raise EpisodeError(
            f"{folder} gives episodes another length in the video than in the table",
            got=f"episode {number}: {seconds:.4f} s of video, {length} frames at {info.fps:g} per second"
            + (f", and {len(disagreeing) - 1} more" if len(disagreeing) > 1 else ""),
            expected=f"{length / info.fps:.4f} s: else every frame would be another one's",
            hint=COPY_AGAIN,
        )
    return tuple(rows[number] for number in range(info.episodes))


def _read_tasks(folder: Path) -> dict[int, str]:
    """Instruction by number. The texts were the index of a pandas table, so the name of their column is not fixed."""
    path = folder / TASKS
    with open_table(path) as file, reading(path, "its texts"):
        names = file.schema_arrow.names
    texts = [name for name in names if name != "task_index"]
    if "task_index" in names and len(texts) == 1:
        # A text that many rows name is read once.
        with open_table(path, read_dictionary=texts) as file, reading(path, "its texts"):
            table = file.read(use_threads=False)
            known: dict[int, str] = {}
            for numbers, coded in zip(*(table.column(name).chunks for name in ("task_index", texts[0])), strict=True):
                _require_short(coded.dictionary, path)
                words = [str(text) for text in coded.dictionary.to_pylist()]
                known |= {
                    int(number): words[place]
                    for number, place in zip(numbers.to_pylist(), coded.indices.to_pylist(), strict=True)
                }
            return known
    raise EpisodeError(
        f"{path} does not hold tasks",
        got=", ".join(names),
        expected="task_index and one column of texts",
        hint=COPY_AGAIN,
    )


def _require_short(texts: pa.Array, path: Path) -> None:
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    if longest > EPISODE_TEXT:
        raise EpisodeError(
            f"{path} holds a text of an absurd length",
            got=f"{longest} bytes",
            expected=f"at most {EPISODE_TEXT}",
            hint="leave the dataset out, or shorten its tasks.",
        )
