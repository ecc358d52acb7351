"""Training on a LeRobot dataset is training on the recordings that it was made of."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from bundle.errors import ConfigError, EpisodeError
from bundle.hashing import sha256_file
from episodes.lerobot import export_lerobot, open_lerobot
from episodes.reader import EpisodeWarning, open_episode
from episodes.resize import squash
from tests.training_data import write_schema, write_v1
from train import recordings as module
from train.episode_set import TrainingEpisode, read_episodes
from train.evaluation import episode_paths
from train.frame_store import FrameStore
from train.recordings import Recordings
from train.run_config import DataConfig, SourceConfig
from train.split import draw_split, part_episodes, save_split


def dataset(folder: Path, count: int = 4, *, video: bool = False, name: str = "left.v2") -> Path:
    """`count` drawn episodes that go left and right in turn."""
    paths = [write_schema(folder, "v5_jpeg", seed=seed) for seed in range(count)]
    return export_lerobot(paths, folder / name, video=video)


def read(folder: Path, *patterns: str, cache: Path | None = None) -> tuple[TrainingEpisode, ...]:
    sources = tuple(SourceConfig(files=(pattern,)) for pattern in patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the dataset is called left, which says nothing of its episodes
        return read_episodes(DataConfig(sources=sources), folder, cache=cache)


def test_episodes_are_those_that_were_exported(tmp_path: Path) -> None:
    dataset(tmp_path)
    parts, files = read(tmp_path, "left.v2"), read(tmp_path, "*.h5")
    assert [each.name for each in parts] == [f"left.v2#{index}" for index in range(4)]
    assert [each.stem for each in parts] == [each.name for each in parts]
    assert {each.schema for each in parts} == {"lerobot"}
    assert len({each.sha256 for each in (*parts, *files)}) == 8
    for part, file in zip(parts, files, strict=True):
        assert_array_equal(part.actions, file.actions)
        assert (part.instruction, part.side, part.fps) == (file.instruction, file.side, file.fps)


@pytest.mark.parametrize("video", [False, True])
def test_frames_are_those_of_the_dataset(tmp_path: Path, video: bool) -> None:
    folder = dataset(tmp_path, 2, video=video)
    store = FrameStore(tmp_path / "cache", size=16, resize="bilinear")
    parts = read(tmp_path, "left.v2")
    store.prepare(parts)
    assert len(list(store.folder.glob("*.npy"))) == 2
    for index, part in enumerate(parts):
        with open_lerobot(folder).episode(index) as episode:
            expected = [squash(frame, 16, "bilinear") for frame in episode.frames()]
        assert_array_equal(store.frames(part), expected)


def test_each_is_a_family_of_its_own(tmp_path: Path) -> None:
    """Otherwise nothing could be split: all of them have the name of the dataset."""
    dataset(tmp_path, 6)
    parts = read(tmp_path, "left.v2")
    split = draw_split(parts, val_share=0.34, seed=0)
    assert (len(split.train), len(split.val)) == (4, 2)
    train, val = part_episodes(parts, split)
    assert {each.side for each in val} == {"left", "right"}
    assert len(train) == 4
    save_split(tmp_path / "split.json", split)
    chosen = episode_paths([str(tmp_path / "left.v2")], split=tmp_path / "split.json", part="val")
    assert sorted(path.name for path in chosen) == sorted(split.val)
    with open_episode(chosen[0]) as episode:
        assert episode.schema == "lerobot"


def test_a_copy_is_found_in_another_dataset(tmp_path: Path) -> None:
    paths = [write_schema(tmp_path, "v5_jpeg", seed=seed) for seed in range(3)]
    export_lerobot(paths[:2], tmp_path / "one")
    export_lerobot(paths[1:], tmp_path / "two")
    with pytest.warns(EpisodeWarning, match="1 have the same content as another one: two#0"):
        read_episodes(DataConfig(sources=(SourceConfig(files=("one", "two")),)), tmp_path)


def test_hashes_of_videos_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path, 3, video=True)
    reads: list[Path] = []
    monkeypatch.setattr("train.file_hashes.sha256_file", lambda path: reads.append(path) or sha256_file(path))
    first = read(tmp_path, "left.v2", cache=tmp_path / "cache")
    assert [path.suffix for path in reads] == [".mp4"]  # one video holds all of them
    assert len({each.sha256 for each in first}) == 3
    again = read(tmp_path, "left.v2", cache=tmp_path / "cache")
    assert len(reads) == 1
    assert [each.sha256 for each in again] == [each.sha256 for each in first]


def test_a_dataset_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path)
    opened: list[Path] = []
    monkeypatch.setattr(module, "open_lerobot", lambda folder: opened.append(folder) or open_lerobot(folder))
    done: list[tuple[int, int]] = []
    sources = (SourceConfig(files=("left.v2",)), SourceConfig(files=("*.h5",)))
    read_episodes(DataConfig(sources=sources), tmp_path, lambda *counts: done.append(counts))
    assert opened == [tmp_path / "left.v2"]
    assert done == [(number, 8) for number in range(1, 9)]


def test_an_episode_that_is_not_there(tmp_path: Path) -> None:
    dataset(tmp_path, 2)
    for path in ("left.v2#2", "left.v2#77"):
        with pytest.raises(EpisodeError, match="has no episode"):
            Recordings().open(tmp_path / path, schema=None)
        with pytest.raises(EpisodeError, match=r"1 of 1 episodes cannot be trained on(.|\n)*has no episode"):
            read(tmp_path, path)


def test_a_schema_is_for_files(tmp_path: Path) -> None:
    dataset(tmp_path, 2)
    source = SourceConfig(files=("left.v2",), schema="v6")
    with pytest.raises(EpisodeError, match=r"2 of 2 episodes cannot(.|\n)*belongs to a LeRobot dataset \(schema v6\)"):
        read_episodes(DataConfig(sources=(source,)), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\] mixes(.|\n)*2 x lerobot, 2 x v5"):
        read_episodes(DataConfig(sources=(SourceConfig(files=("left.v2", "*.h5")),)), tmp_path)


def test_what_is_wrong_is_said_with_the_rest(tmp_path: Path) -> None:
    folder = dataset(tmp_path, 2)
    write_v1(tmp_path, "short.h5", length=1)
    (folder / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(EpisodeError, match="3 of 3 episodes cannot be trained on") as error:
        read(tmp_path, "left.v2", "short.h5")
    assert "short.h5 is too short" in str(error.value)
    assert "file-000.parquet is damaged" in str(error.value)


def test_the_instruction_of_the_source_is_for_episodes_without_one(tmp_path: Path) -> None:
    dataset(tmp_path, 1)
    source = SourceConfig(files=("left.v2",), instruction="Dance")
    (each,) = read_episodes(DataConfig(sources=(source,)), tmp_path)
    assert each.instruction.startswith("Navigate to the gray basket")
    assert each.actions.dtype == np.float32
