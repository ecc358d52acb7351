"""Frames of the store are the robot's to the bit; files are whole or absent, whoever dies or writes at the same time."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bundle.errors import EpisodeError, StorageError
from bundle.manifest import Preprocessing
from episodes.reader import open_episode
from episodes.resize import ResizeFilter
from runtime.preprocess import resize
from tests.training_data import read, write_schema, write_v1
from train import frame_store
from train.episode_set import TrainingEpisode, read_episodes
from train.frame_store import FrameStore
from train.run_config import DataConfig, SourceConfig

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16


@pytest.fixture
def episodes(tmp_path: Path) -> tuple[TrainingEpisode, ...]:
    write_v1(tmp_path, "a.h5", length=5)
    write_v1(tmp_path, "b.h5", length=3)
    return read(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    return FrameStore(tmp_path / "cache" / "frames", size=SIZE, resize="bilinear")


def files(store: FrameStore) -> list[Path]:
    return sorted(store.folder.glob("*.npy"))


@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear", "letterbox"])
@pytest.mark.filterwarnings("ignore::episodes.reader.EpisodeWarning")
def test_frames_are_those_that_the_robot_will_see(tmp_path: Path, filter_name: ResizeFilter) -> None:
    preprocessing = Preprocessing("RGB", filter_name, (0.0,) * 3, (1.0,) * 3, ("static",))
    for schema in ("v1", "v5", "v5_jpeg", "v6"):
        write_schema(tmp_path, schema)
    store = FrameStore(tmp_path / "cache", size=SIZE, resize=filter_name)
    for each in read(tmp_path):
        frames = store.frames(each)
        assert isinstance(frames, np.memmap)
        assert frames.shape == (12, SIZE, SIZE, 3)
        assert not frames.flags.writeable
        with open_episode(each.path) as recorded:
            for stored, frame in zip(frames, recorded.frames(), strict=True):
                assert_array_equal(stored, resize(frame, preprocessing, SIZE))


def test_each_file_is_made_once(
    episodes: tuple[TrainingEpisode, ...], store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    store.prepare(episodes, done.append)
    assert done == [5, 3]
    monkeypatch.setattr(frame_store, "open_episode", None)
    assert_array_equal(store.frames(episodes[0])[2], np.full((SIZE, SIZE, 3), 20))


def test_whatever_decides_the_content_decides_the_name(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5")
    as_v1, as_v6 = (
        read_episodes(DataConfig(sources=(SourceConfig(files=("a.h5",), schema=schema),)), tmp_path)[0]
        for schema in ("v1", "v6")
    )
    assert as_v1.sha256 == as_v6.sha256  # one file, two colour orders
    for size, filter_name in ((8, "bilinear"), (16, "bilinear"), (16, "bicubic")):
        store = FrameStore(tmp_path / "cache", size=size, resize=filter_name)
        store.prepare([as_v1, as_v6])
        store.prepare([as_v1, as_v6])
    assert len(files(store)) == 6


def test_bytes_needed_are_those_that_are_written(episodes: tuple[TrainingEpisode, ...], store: FrameStore) -> None:
    needed = store.bytes_needed(episodes)
    store.prepare(episodes[:1])
    assert 0 < store.bytes_needed(episodes) < needed
    store.prepare(episodes)
    assert store.bytes_needed(episodes) == 0
    assert needed == sum(path.stat().st_size for path in files(store))


@pytest.mark.parametrize("damage", ["empty", "header", "short", "long", "other shape", "other type", "zip"])
def test_a_damaged_file_is_made_again(episodes: tuple[TrainingEpisode, ...], store: FrameStore, damage: str) -> None:
    expected = np.array(store.frames(episodes[0]))
    (path,) = files(store)
    content = path.read_bytes()
    if damage == "other shape":
        np.save(path, expected[:-1])
    elif damage == "other type":
        np.save(path, expected.astype(np.int8))
    else:
        damaged = {"empty": b"", "header": b"x" + content[1:], "short": content[:-1], "long": content + b"x"}
        path.write_bytes(damaged.get(damage, b"PK\x03\x04" + content[4:]))
    assert store.bytes_needed(episodes[:1]) == len(content)
    assert_array_equal(store.frames(episodes[0]), expected)
    assert path.read_bytes() == content


def test_a_damaged_frame_is_named(tmp_path: Path, store: FrameStore) -> None:
    path = write_v1(tmp_path, "a.h5", length=4)
    with h5py.File(path, "r") as file:
        info = file["images"].id.get_chunk_info(2)
    with path.open("r+b") as raw:
        raw.seek(info.byte_offset)
        raw.write(b"\xff" * info.size)
    (each,) = read(tmp_path)
    with pytest.raises(EpisodeError, match=r"a\.h5: frame 2 of 4 is corrupt"):
        store.prepare([each])
    assert [path.name for path in store.folder.iterdir()] in ([".frames.lock"], [])


def test_an_episode_that_was_replaced_meanwhile(
    episodes: tuple[TrainingEpisode, ...], tmp_path: Path, store: FrameStore
) -> None:
    write_v1(tmp_path, "a.h5", length=9)
    with pytest.raises(EpisodeError, match=r"a\.h5 has changed since(.|\n)*9 frames(.|\n)*5"):
        store.frames(episodes[0])
    assert files(store) == []


def test_a_full_disk_is_a_storage_error(
    episodes: tuple[TrainingEpisode, ...], store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    class Full:
        """A file whose disk is full after the header."""

        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def write(self, data: bytes) -> int:
            if len(data) > 200:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))  # type: ignore[attr-defined]

    def opened(self: Path, mode: str = "r", *arguments: object, **named: object) -> object:
        file = real(self, mode, *arguments, **named)  # type: ignore[call-overload]
        return Full(file) if self.suffix == ".tmp" else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(StorageError, match="No space left"):
        store.prepare(episodes)
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir()] in ([".frames.lock"], [])
    store.prepare(episodes)


def test_a_folder_that_cannot_be_made(episodes: tuple[TrainingEpisode, ...], tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        FrameStore(tmp_path / "locked" / "frames", size=SIZE, resize="bilinear").prepare(episodes)


PREPARE = """
import sys, time
from pathlib import Path
from tests.training_data import read
from train import frame_store
from train.frame_store import FrameStore

real, slow = frame_store.squash, float(sys.argv[2])

def squash(*arguments):
    print("frame", flush=True)
    time.sleep(slow)
    return real(*arguments)

frame_store.squash = squash
folder = Path(sys.argv[1])
FrameStore(folder / "cache" / "frames", size=16, resize="bilinear").prepare(read(folder))
"""


def start(folder: Path, slow: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(folder), str(slow)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_the_work(episodes: tuple[TrainingEpisode, ...], tmp_path: Path, store: FrameStore) -> None:
    processes = [start(tmp_path, 0.02) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert sum(out.count("frame") for out, _ in results) == 8  # each frame once
    assert store.bytes_needed(episodes) == 0


def test_a_killed_process_leaves_nothing_that_looks_whole(
    episodes: tuple[TrainingEpisode, ...], tmp_path: Path, store: FrameStore
) -> None:
    process = start(tmp_path, 0.3)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert files(store) == []
    store.prepare(episodes)  # the lock died with its holder
    assert len(files(store)) == 2
    assert not list(store.folder.glob(".*.tmp"))


def test_a_store_travels_to_workers(episodes: tuple[TrainingEpisode, ...], store: FrameStore) -> None:
    store.prepare(episodes)
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes, as multiprocessing sends them
    assert_array_equal(copy.frames(episodes[1]), store.frames(episodes[1]))
