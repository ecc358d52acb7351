"""Episodes of two cameras: how they are stored, and that neither is mistaken for the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from bundle.errors import EpisodeError
from episodes.lerobot import export_lerobot, open_lerobot
from episodes.reader import CAMERAS, open_episode
from episodes.repair import RepairOptions, repair
from episodes.synthetic import SyntheticSchema, write_synthetic


def make(folder: Path, schema: SyntheticSchema, *, hand: bool = True) -> Path:
    return write_synthetic(folder, schema, side="left", seed=1, height=24, width=32, length=6, hand=hand)


@pytest.mark.filterwarnings("ignore::episodes.reader.EpisodeWarning")  # V6 stores no instruction
@pytest.mark.parametrize("schema", ["v1", "v6"])
def test_both_are_read_in_rgb(tmp_path: Path, schema: SyntheticSchema) -> None:
    with open_episode(make(tmp_path, schema)) as episode:
        assert episode.cameras == CAMERAS == ("hand", "static")
        assert episode.schema == schema  # a second dataset changes no layout
        for index in range(len(episode)):
            hand, static = episode.views(index, CAMERAS)
            np.testing.assert_array_equal(static, episode.frame(index))
            np.testing.assert_array_equal(hand, static[::-1])


def test_v5_keeps_it_beside_the_other_as_jpeg_too(tmp_path: Path) -> None:
    path = make(tmp_path, "v5_jpeg", hand=False)
    with h5py.File(path, "r+") as file:
        images = file["observations/images"]
        other = file.create_dataset("observations/hand_images", images.shape, images.dtype)
        for index in range(len(images)):
            other[index] = images[len(images) - 1 - index]
    with open_episode(path) as episode:
        np.testing.assert_array_equal(episode.frame(0, "hand"), episode.frame(len(episode) - 1))


def test_an_episode_of_one_camera_has_no_other(tmp_path: Path) -> None:
    with open_episode(make(tmp_path, "v1", hand=False)) as episode:
        assert episode.cameras == ("static",)
        episode.require_cameras(("static",))
        with pytest.raises(
            EpisodeError, match=r"has no hand camera(.|\n)*got:\s+static(.|\n)*hand_images beside images"
        ):
            episode.require_cameras(CAMERAS)
        with pytest.raises(EpisodeError, match="has no hand camera"):
            episode.frame(0, "hand")
        with pytest.raises(EpisodeError, match="has no top camera"):
            episode.frame(0, "top")


def test_another_number_of_frames_is_a_contradiction(tmp_path: Path) -> None:
    path = make(tmp_path, "v1")
    with h5py.File(path, "r+") as file:
        shorter = file["hand_images"][:-1]
        del file["hand_images"]
        file.create_dataset("hand_images", data=shorter)
    with pytest.raises(EpisodeError, match=r"different numbers of frames(.|\n)*5 in hand_images(.|\n)*6"):
        open_episode(path)


@pytest.mark.parametrize("video", [False, True], ids=["tables", "videos"])
def test_a_lerobot_dataset_of_two_cameras(tmp_path: Path, video: bool) -> None:
    """The hand's camera is told by its name; its pictures here are the other's, last first."""
    pq, wrist, front = pytest.importorskip("pyarrow.parquet"), "observation.images.wrist", "observation.images.front"
    pytest.importorskip("av")
    paths = [write_synthetic(tmp_path, "v1", side="left", seed=s, height=24, width=32, length=6) for s in (1, 2)]
    folder = export_lerobot(paths, tmp_path / "two", video=video)
    one = open_lerobot(folder)
    alone = [one.sha256(index, lambda path: path.name) for index in range(2)]
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"][wrist] = info["features"][front]
    (folder / "meta/info.json").write_text(json.dumps(info))
    if video:
        shutil.copytree(folder / "videos" / front, folder / "videos" / wrist)
        (meta,) = folder.glob("meta/episodes/*/*.parquet")
        table = pq.read_table(meta)
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            column = table.column(f"videos/{front}/{name}")
            # The hand of the one episode saw what the other's front did.
            order = [1, 0] if "timestamp" in name else [0, 1]
            table = table.append_column(f"videos/{wrist}/{name}", column.take(order))
        pq.write_table(table, meta)
    else:
        (data,) = folder.glob("data/*/*.parquet")
        table = pq.read_table(data)
        pq.write_table(table.append_column(wrist, table.column(front).take(list(range(len(table)))[::-1])), data)

    both = open_lerobot(folder)

    first, second = both.episode(0), both.episode(1)
    assert first.cameras == CAMERAS
    order = range(6) if video else reversed(range(6))
    for index, other in enumerate(order):
        np.testing.assert_array_equal(first.frame(index, "hand"), second.frame(other))
        np.testing.assert_array_equal(first.frame(index), one.episode(0).frame(index))
    assert [len(both.video_files(index)) for index in range(2)] == ([2, 2] if video else [0, 0])
    hashes = [both.sha256(index, lambda path: str(path)) for index in range(2)]
    assert not set(hashes) & set(alone)
    with open_episode(f"{folder}#1") as episode:
        episode.require_cameras(CAMERAS)


def test_what_would_lose_it_says_so(tmp_path: Path) -> None:
    path = make(tmp_path, "v1")
    with pytest.raises(EpisodeError, match=r"has a hand camera(.|\n)*the repair does not write"):
        repair(path, tmp_path / "out.h5", RepairOptions())
    pytest.importorskip("pyarrow")
    with pytest.raises(EpisodeError, match=r"has a hand camera(.|\n)*LeRobot does not write"):
        export_lerobot([path], tmp_path / "dataset")
