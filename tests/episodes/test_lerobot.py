"""A LeRobot v3 dataset gives back what was exported into it, frame for frame; what is damaged or not understood is refused by name."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pa = pytest.importorskip("pyarrow")
av = pytest.importorskip("av")

import pyarrow.parquet as pq  # noqa: E402

from bundle.errors import EpisodeError, StorageError  # noqa: E402
from episodes import lerobot_video, lerobot_writer  # noqa: E402
from episodes.lerobot import (  # noqa: E402
    episode_names,
    export_lerobot,
    is_lerobot,
    open_lerobot,
    split_name,
)
from episodes.lerobot_info import read_info  # noqa: E402
from episodes.reader import EpisodeWarning, open_episode  # noqa: E402
from episodes.synthetic import SYNTHETIC_SCHEMAS, write_synthetic  # noqa: E402
from episodes.writer import write_episode  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 48, 64
FRONT = "observation.images.front"
Edit = Callable[[dict[str, object]], object]


def numbered(folder: Path, name: str, length: int, first: int = 0, text: str | None = "Go left") -> Path:
    """A V1 file whose frame i says first + i in black and white bars, and whose action i is (first + i, 0.5, -i)."""
    frames = (bars(first + index) for index in range(length))
    actions = [[first + index, 0.5, -index] for index in range(length)]
    return write_episode(folder / name, frames, actions, instruction=text, fps=6.0)


def bars(number: int) -> np.ndarray:
    """`number` as eight bars that any codec keeps."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for bit in range(8):
        frame[:, bit * WIDTH // 8 : (bit + 1) * WIDTH // 8] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    centres = frame[HEIGHT // 2, WIDTH // 16 :: WIDTH // 8, 1]
    return sum(1 << bit for bit, value in enumerate(centres) if value > 127)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One episode of each schema, of different lengths."""
    folder = tmp_path_factory.mktemp("recordings")
    return [
        write_synthetic(
            folder, schema, side="right" if i % 2 else "left", seed=i, height=HEIGHT, width=WIDTH, length=8 + i
        )
        for i, schema in enumerate(SYNTHETIC_SCHEMAS)
    ]


@pytest.fixture(scope="module")
def exported(recordings: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recordings` as a dataset with images in its table. Tests must not change it; see `dataset`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        return export_lerobot(recordings, tmp_path_factory.mktemp("exported") / "set")


@pytest.fixture
def dataset(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "set"))


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A dataset with a video that says 0 to 39 in two episodes of 17 and 23 frames."""
    paths = [numbered(tmp_path, "a.h5", 17), numbered(tmp_path, "b.h5", 23, first=17, text="Go right")]
    return export_lerobot(paths, tmp_path / "counted", video=True)


def edit_info(folder: Path, edit: Edit) -> None:
    path = folder / "meta" / "info.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_table(path: Path, edit: Callable[[dict[str, list[object]]], object]) -> None:
    """Change the columns of a table as Python lists."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    edit(columns)
    kept = pa.schema([table.schema.field(name) for name in columns])
    pq.write_table(pa.table(columns, schema=kept), path)


DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.filterwarnings("ignore::episodes.reader.EpisodeWarning")
def test_what_goes_in_comes_out(recordings: list[Path], tmp_path: Path, video: bool) -> None:
    folder = export_lerobot(recordings, tmp_path / "set", video=video)
    found = open_lerobot(folder)
    assert len(found) == len(recordings)
    for index, path in enumerate(recordings):
        with open_episode(path) as before, found.episode(index) as after:
            assert after.schema == "lerobot"
            assert (after.path.name, after.fps) == (f"set#{index}", 6.0)
            assert (after.instruction, after.instruction_source) == (before.instruction, "stored")
            assert after.action_names == before.action_names
            assert after.actions.dtype == np.float32
            assert after.actions.flags.c_contiguous
            np.testing.assert_array_equal(after.actions, before.actions)
            assert len(after) == len(before) == len(list(after.frames()))
            for one, other in zip(before.frames(), after.frames(), strict=True):
                assert other.shape == one.shape
                assert other.dtype == np.uint8
                assert np.abs(one.astype(int) - other).mean() < (7 if video else 5)  # red and blue exchanged: 40


def test_jpeg_frames_are_stored_as_they_are(recordings: list[Path], exported: Path) -> None:
    index = SYNTHETIC_SCHEMAS.index("v5_jpeg")
    with open_episode(recordings[index]) as before, open_lerobot(exported).episode(index) as after:
        assert after.jpeg(3) == before.jpeg(3) is not None
        np.testing.assert_array_equal(after.frame(3), before.frame(3))


def test_frame_i_of_a_video_is_frame_i(counted: Path) -> None:
    found = open_lerobot(counted)
    for index, (first, length) in enumerate([(0, 17), (17, 23)]):
        with found.episode(index) as episode:
            assert [number_of(frame) for frame in episode.frames()] == list(range(first, first + length))
            order = np.random.default_rng(0).permutation(np.repeat(np.arange(length), 2))
            for i in [length - 1, 0, length - 1, *order.tolist()]:
                assert number_of(episode.frame(i)) == first + i == episode.actions[i, 0]


def test_videos_of_others_have_few_key_frames_and_frames_out_of_order(counted: Path) -> None:
    """B-frames: what is decoded first is not shown first, and times of key frames are no decoding times."""
    path = next((counted / "videos").rglob("*.mp4"))
    path.unlink()
    options = {"crf": "18", "bf": "3", "g": "12", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(number), format="rgb24")))
        container.mux(stream.encode(None))
    found = open_lerobot(counted)
    for index, (first, length) in enumerate([(0, 17), (17, 23)]):
        with found.episode(index) as episode:
            order = np.random.default_rng(1).permutation(length).tolist()
            assert [number_of(episode.frame(i)) - first for i in order] == order


def test_times_of_video_frames_are_those_that_lerobot_asks_for(counted: Path) -> None:
    """It refuses frames that are more than 0.1 ms off."""
    with av.open(str(next((counted / "videos").rglob("*.mp4")))) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(40) / 6, atol=1e-4, rtol=0)
    rows = pq.read_table(counted / EPISODES).to_pylist()
    assert [row[f"videos/{FRONT}/from_timestamp"] for row in rows] == [0.0, pytest.approx(17 / 6)]
    assert rows[0][f"videos/{FRONT}/to_timestamp"] == rows[1][f"videos/{FRONT}/from_timestamp"]


def test_the_layout_is_that_of_version_3(exported: Path, recordings: list[Path]) -> None:
    info = json.loads((exported / "meta/info.json").read_text())
    lengths = [8, 9, 10, 11]
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 6, None)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, sum(lengths), 3)
    assert info["splits"] == {"train": "0:4"}
    assert info["features"][FRONT] == {
        "dtype": "image",
        "shape": [HEIGHT, WIDTH, 3],
        "names": ["height", "width", "channels"],
    }
    assert info["features"]["action"]["names"] == ["linear_x", "linear_y", "angular_z"]
    data = pq.ParquetFile(exported / DATA)
    assert data.metadata.num_row_groups == 4  # one for each episode, so that an episode can be read alone
    table = data.read()
    assert set(table.column_names) == set(info["features"])
    assert table.column("index").to_pylist() == list(range(sum(lengths)))
    assert table.column("episode_index").to_pylist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert table.schema.field("action").type == pa.list_(pa.float32(), 3)
    np.testing.assert_allclose(table.column("timestamp").to_numpy()[:8], np.arange(8) / 6, rtol=1e-6)
    rows = pq.read_table(exported / EPISODES).to_pylist()
    assert [row["length"] for row in rows] == lengths
    assert [row["dataset_from_index"] for row in rows] == [0, 8, 17, 27]
    assert [row["dataset_to_index"] for row in rows] == [8, 17, 27, 38]
    tasks = pq.read_table(exported / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert len(recordings) == 4


def test_statistics(exported: Path) -> None:
    found = open_lerobot(exported)
    actions, frames = [], []
    for index in range(len(found)):
        with found.episode(index) as episode:
            actions.append(episode.actions)
            frames += [frame / 255.0 for frame in episode.frames()]
    stats = json.loads((exported / "meta/stats.json").read_text())
    everything = np.concatenate(actions)
    for name, value in {"min": everything.min(0), "max": everything.max(0), "mean": everything.mean(0)}.items():
        np.testing.assert_allclose(stats["action"][name], value, atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], everything.std(0), atol=1e-6)
    assert stats["action"]["count"] == stats[FRONT]["count"] == [38]
    assert np.shape(stats[FRONT]["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(stats[FRONT]["mean"]), np.mean(frames, axis=(0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(np.ravel(stats[FRONT]["std"]), np.std(frames, axis=(0, 1, 2)), atol=0.01)
    row = pq.read_table(exported / EPISODES).to_pylist()[1]
    np.testing.assert_allclose(row["stats/action/max"], actions[1].max(0), atol=1e-6)
    assert row["stats/action/count"] == [9]


def test_names(exported: Path, tmp_path: Path) -> None:
    assert is_lerobot(exported)
    assert not is_lerobot(tmp_path)
    names = episode_names(exported)
    assert [name.name for name in names] == ["set#0", "set#1", "set#2", "set#3"]
    assert split_name(names[2]) == (exported, 2)
    assert split_name(exported) is None
    (tmp_path / "set").mkdir()
    assert split_name(tmp_path / "set#2") is None
    with open_episode(names[1]) as episode:
        assert (episode.path, len(episode)) == (names[1], 9)
    with pytest.raises(EpisodeError, match=r"set has no episode 4(.|\n)*4 episodes"):
        open_episode(Path(f"{exported}#4"))
    with pytest.raises(EpisodeError, match="not found"):
        open_episode(names[1], schema="v1")
    # A file of such a name is a file.
    odd = numbered(tmp_path, "odd#3", 2)
    assert split_name(odd) is None
    with open_episode(odd) as episode:
        assert episode.schema == "v1"


def test_a_closed_episode(exported: Path, counted: Path) -> None:
    for folder in (exported, counted):
        with open_lerobot(folder).episode(0) as episode:
            episode.frame(1)
        with pytest.raises(ValueError, match="closed"):
            episode.frame(1)
        assert len(episode.actions) == len(episode)
        with pytest.raises(IndexError, match=r"frame (8|17) of an episode with"):
            open_lerobot(folder).episode(0).frame(len(episode))


def test_hashes_tell_contents_apart(recordings: list[Path], exported: Path, counted: Path, tmp_path: Path) -> None:
    def no_video(path: Path) -> str:
        raise AssertionError(path)

    found = open_lerobot(exported)
    hashes = [found.sha256(index, no_video) for index in range(4)]
    assert len(set(hashes)) == 4
    assert found.video_files(0) == ()
    alone = open_lerobot(export_lerobot(recordings[1:2], tmp_path / "alone"))
    assert alone.sha256(0, no_video) == hashes[1]  # wherever it stands
    videos = open_lerobot(counted)
    (path,) = {*videos.video_files(0), *videos.video_files(1)}
    assert path is not None
    of_first = videos.sha256(0, {path: "a"}.__getitem__)
    assert of_first == videos.sha256(0, {path: "a"}.__getitem__)
    assert of_first != videos.sha256(0, {path: "b"}.__getitem__)
    assert of_first != videos.sha256(1, {path: "a"}.__getitem__)


def test_an_image_that_changes_changes_the_hash(dataset: Path) -> None:
    before = open_lerobot(dataset).sha256(0, str)

    def other(columns: dict[str, list[object]]) -> None:
        columns[FRONT][7] = {"bytes": columns[FRONT][6]["bytes"], "path": None}  # type: ignore[index]

    edit_table(dataset / DATA, other)
    assert open_lerobot(dataset).sha256(0, str) != before


def test_png_images_and_tables_in_one_piece(dataset: Path) -> None:
    """As lerobot records images, and as older versions of it wrote tables."""

    def as_png(columns: dict[str, list[object]]) -> None:
        for row, number in enumerate(range(len(columns[FRONT]))):
            buffer = io.BytesIO()
            Image.fromarray(bars(number)).save(buffer, format="PNG")
            columns[FRONT][row] = {"bytes": buffer.getvalue(), "path": f"frame-{row}.png"}

    edit_table(dataset / DATA, as_png)
    assert pq.ParquetFile(dataset / DATA).metadata.num_row_groups == 1
    with open_lerobot(dataset).episode(2) as episode:
        assert [number_of(frame) for frame in episode.frames()] == list(range(17, 27))
        np.testing.assert_array_equal(episode.frame(4), bars(21))
        assert episode.jpeg(0) is None


def test_several_files_and_chunks(dataset: Path) -> None:
    """Episodes 2 and 3 move into a second table of a second chunk, the notes on episode 3 into a second one of theirs."""
    table = pq.read_table(dataset / DATA)
    (dataset / "data/chunk-001").mkdir()
    pq.write_table(table.slice(0, 17), dataset / DATA)
    pq.write_table(table.slice(17), dataset / "data/chunk-001/file-005.parquet")
    rows = pq.read_table(dataset / EPISODES).to_pylist()
    for row in rows[2:]:
        row |= {"data/chunk_index": 1, "data/file_index": 5}
    pq.write_table(pa.Table.from_pylist(rows[3:]), dataset / EPISODES)
    pq.write_table(pa.Table.from_pylist(rows[:3]), (dataset / EPISODES).with_name("file-001.parquet"))
    found = open_lerobot(dataset)
    assert [len(found.episode(index)) for index in range(4)] == [8, 9, 10, 11]
    assert found.episode(3).frame(10).shape == (HEIGHT, WIDTH, 3)


def test_large_exports_become_several_files(
    recordings: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [numbered(tmp_path, f"{number}.h5", 20, first=20 * number) for number in range(5)]
    for name, value in {"DATA_MB": 0, "VIDEO_MB": 0, "FILES_PER_CHUNK": 2}.items():
        monkeypatch.setattr(lerobot_writer, name, value)
    for video in (False, True):
        folder = export_lerobot(paths, tmp_path / f"set-{video}", video=video)
        assert sorted(path.relative_to(folder).as_posix() for path in (folder / "data").rglob("*.parquet")) == [
            "data/chunk-000/file-000.parquet",
            "data/chunk-000/file-001.parquet",
            "data/chunk-001/file-000.parquet",
            "data/chunk-001/file-001.parquet",
            "data/chunk-002/file-000.parquet",
        ]
        found = open_lerobot(folder)
        for index in range(5):
            with found.episode(index) as episode:
                assert number_of(episode.frame(19)) == 20 * index + 19 == episode.actions[19, 0]
    assert len(list((folder / "videos").rglob("*.mp4"))) > 1


def test_axes_have_many_names(dataset: Path) -> None:
    def names(value: object) -> Edit:
        return lambda info: info["features"]["action"].update(names=value)  # type: ignore[index]

    for value, expected in (
        (["linear.x", "Linear.Y", "angular z"], ("linear_x", "linear_y", "angular_z")),
        ({"axes": ["vx", "vy", "wz"]}, ("linear_x", "linear_y", "angular_z")),
        (["x.vel", "y.vel", "theta.vel"], ("linear_x", "linear_y", "theta.vel")),  # degrees per second
    ):
        edit_info(dataset, names(value))
        assert open_lerobot(dataset).episode(0).action_names == expected
    for wrong in (None, ["a", "b"], ["a", "b", 3], {"a": 0, "b": 1, "c": 2}, "xyz"):
        edit_info(dataset, names(wrong))
        with pytest.raises(EpisodeError, match="does not name the columns of `action`"):
            open_lerobot(dataset)
    edit_info(dataset, names(["vx", "linear_x", "wz"]))
    with pytest.raises(EpisodeError, match=r"damaged(.|\n)*different names"):
        open_lerobot(dataset)


def test_cameras(dataset: Path) -> None:
    def second(info: dict[str, object]) -> None:
        features = info["features"]
        assert isinstance(features, dict)
        features["observation.images.depth"] = {"dtype": "video", "info": {"is_depth_map": True}}
        features["observation.images.wrist"] = dict(features[FRONT])

    edit_info(dataset, second)
    both = open_lerobot(dataset)
    assert both.camera.name == FRONT
    assert both.episode(0).cameras == ("hand", "static")  # by their names

    def third(info: dict[str, object]) -> None:
        features = info["features"]
        assert isinstance(features, dict)
        features["observation.images.side"] = dict(features[FRONT])

    edit_info(dataset, third)
    with pytest.raises(EpisodeError, match=r"has 3 cameras(.|\n)*front, observation\.images\.wrist(.|\n)*pass camera="):
        open_lerobot(dataset)
    with pytest.raises(EpisodeError, match="has no camera 'top'"):
        open_lerobot(dataset, camera="top")
    assert open_lerobot(dataset, camera=FRONT).episode(0).frame(0).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(EpisodeError, match=r"wrist.* cannot be read"):
        open_lerobot(dataset, camera="observation.images.wrist").episode(0).frame(0)

    def none(info: dict[str, object]) -> None:
        info["features"] = {"action": info["features"]["action"]}  # type: ignore[index]

    edit_info(dataset, none)
    with pytest.raises(EpisodeError, match=r"has 0 cameras(.|\n)*leave this dataset out"):
        open_lerobot(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v2.1"}, r"another version(.|\n)*v2\.1(.|\n)*convert_dataset_v21_to_v30"),
        ({"codebase_version": "v4.0"}, r"another version(.|\n)*reads v3 only"),
        ({"codebase_version": None}, "another version"),
        ({"fps": 0}, "info.json is damaged(.|\n)*fps = 0"),
        ({"fps": True}, "fps = True"),
        ({"fps": float("nan")}, "fps = nan"),
        ({"total_episodes": 5}, "does not tell of all episodes(.|\n)*4 episodes in 1 tables(.|\n)*0 to 4"),
        ({"total_episodes": -1}, "total_episodes = -1"),
        ({"total_episodes": 10**15}, "total_episodes = "),
        ({"features": []}, "no table of features"),
        ({"features": {"action": 3}}, "no table of features"),
        ({"features": {}}, "no feature `action`"),
        ({"data_path": None}, "data_path = None"),
        ({"data_path": "../../{chunk_index}.parquet"}, "path template(.|\n)*below the dataset's folder"),
        ({"data_path": "/etc/passwd"}, "path template"),
        ({"data_path": "{chunk_index.x}"}, "path template"),
        ({"data_path": "{nothing}"}, "path template"),
        ({"data_path": "data/missing.parquet"}, "missing.parquet does not exist"),
    ],
)
def test_an_info_that_cannot_be(dataset: Path, change: dict[str, object], message: str) -> None:
    edit_info(dataset, lambda info: info.update(change))
    with pytest.raises(EpisodeError, match=message):
        open_lerobot(dataset).episode(0)


def test_no_info(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(EpisodeError, match="is not a LeRobot dataset"):
        open_lerobot(tmp_path)
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (dataset / "meta/info.json").write_bytes(content)
        with pytest.raises(EpisodeError, match=r"info\.json is damaged"):
            open_lerobot(dataset)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["codebase_version", "fps", "total_episodes", "features", "data_path", "video_path"]),
    inner=st.sampled_from([None, "action", FRONT]),
    value=json_values,
)
def test_any_info_is_read_or_refused(
    exported: Path, tmp_path: Path, key: str, inner: str | None, value: object
) -> None:
    content = json.loads((exported / "meta/info.json").read_text())
    if inner is None:
        content[key] = value
    else:
        content["features"][inner] = value
    (tmp_path / "meta").mkdir(exist_ok=True)
    (tmp_path / "meta/info.json").write_text(json.dumps(content))
    with suppress(EpisodeError):
        assert tmp_path in read_info(tmp_path).data_file(0, 0).parents


@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/tasks.parquet"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "column", "values"])
def test_a_damaged_table_is_named(dataset: Path, name: str, damage: str) -> None:
    path = dataset / name
    column = "length" if name == EPISODES else "task_index"
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "column":
            edit_table(path, lambda columns: columns.pop(column))
        case "values":
            edit_table(path, lambda columns: columns[column].__setitem__(0, None))
    with pytest.raises(EpisodeError) as error:
        open_lerobot(dataset).episode(0)
    named = dataset / "meta" / "episodes" if damage == "missing" and name == EPISODES else path
    assert str(named) in str(error.value)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("action", 2, [1.0, float("nan"), 0.0], r"set#0: action 2 is not finite(.|\n)*linear_y = nan"),
        ("action", 2, [1e39, 0.0, 0.0], r"action 2 is not finite"),
        ("task_index", 2, 1, r"set#0 holds 2 instructions(.|\n)*bottle on the left; .*basket on the right"),
        ("task_index", 2, 7, r"does not know(.|\n)*task 7"),
        ("episode_index", 2, 3, r"set#0 is incomplete(.|\n)*7 rows"),
        ("frame_index", 2, 3, r"set#0 is incomplete"),
    ],
)
def test_rows_that_contradict(dataset: Path, column: str, row: int, value: object, message: str) -> None:
    edit_table(dataset / DATA, lambda columns: columns[column].__setitem__(row, value))
    with pytest.raises(EpisodeError, match=message):
        open_lerobot(dataset).episode(0)


def test_damaged_images_are_named(dataset: Path) -> None:
    def damage(columns: dict[str, list[object]]) -> None:
        images = columns[FRONT]
        images[1] = {"bytes": None, "path": "frame.png"}
        images[2] = {"bytes": images[2]["bytes"][:200], "path": None}  # type: ignore[index]
        images[3] = {"bytes": b"GIF89a", "path": None}
        images[4] = None

    edit_table(dataset / DATA, damage)
    with open_lerobot(dataset).episode(0) as episode:
        for index in (1, 2, 3, 4):
            with pytest.raises(EpisodeError, match=rf"set#0: frame {index} of 8 is corrupt"):
                episode.frame(index)
        assert episode.frame(5).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "short", "other"])
def test_a_damaged_video_is_named(counted: Path, tmp_path: Path, damage: str) -> None:
    path = next((counted / "videos").rglob("*.mp4"))
    if damage == "missing":
        path.unlink()
    elif damage == "short":  # the second episode is not in it
        shorter = export_lerobot([tmp_path / "a.h5"], tmp_path / "shorter", video=True)
        shutil.copy(next((shorter / "videos").rglob("*.mp4")), path)
    else:
        path.write_bytes({"empty": b"", "text": b"no video" * 50, "other": path.read_bytes()[:400]}[damage])
    with open_lerobot(counted).episode(1) as episode:
        for _ in range(2):
            with pytest.raises(EpisodeError, match=r"counted#1: frame 3 of 23 is corrupt(.|\n)*file-000\.mp4"):
                episode.frame(3)


def test_what_cannot_be_one_dataset(tmp_path: Path, recordings: list[Path]) -> None:
    base = numbered(tmp_path, "base.h5", 3)
    frames = [np.zeros((10, 10, 3), np.uint8)] * 2
    small = write_episode(tmp_path / "small.h5", frames, np.zeros((2, 3)), instruction="Go", fps=6.0)
    fast = write_episode(tmp_path / "fast.h5", [bars(0)] * 2, np.zeros((2, 3)), instruction="Go", fps=12.0)
    slow = write_episode(tmp_path / "slow.h5", [bars(0)] * 2, np.zeros((2, 3)), instruction="Go", fps=0.3)
    silent = numbered(tmp_path, "silent.h5", 3, text=None)
    folder = tmp_path / "set"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for paths, fps, message in (
            ([], None, "nothing to export"),
            (
                [base, small],
                None,
                r"small\.h5 differs from the other episodes in its frame size(.|\n)*10x10(.|\n)*48x64",
            ),
            ([base, fast, base], None, r"fast\.h5 differs from the other episodes in its frame rate(.|\n)*12 fps"),
            ([base], 12, r"base\.h5 differs from the other episodes in its frame rate"),
            ([base], 6.5, "6.5 fps is not a rate that LeRobot knows"),
            ([slow], None, "0.3 fps is not a rate"),
            ([base, silent], None, r"silent\.h5 has no instruction(.|\n)*--repair"),
            ([tmp_path / "missing.h5"], None, "not found"),
        ):
            with pytest.raises(EpisodeError, match=message):
                export_lerobot(paths, folder, fps=fps)
            assert not folder.exists()
    odd = write_episode(tmp_path / "odd.h5", [bars(0)[:47]] * 2, np.zeros((2, 3)), instruction="Go", fps=6.0)
    with pytest.raises(EpisodeError, match="47x64 cannot become a video"):
        export_lerobot([odd], folder, video=True)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith(".set")) in ([], [".lock"])


def test_two_axes(tmp_path: Path) -> None:
    paths = [numbered(tmp_path, "three.h5", 3), numbered(tmp_path, "two.h5", 3)]
    with h5py.File(paths[1], "r+") as file:
        actions = file["actions"][:, :2]
        del file["actions"]
        file["actions"] = actions
    with pytest.raises(
        EpisodeError, match=r"two\.h5 differs from the other episodes in its axes(.|\n)*linear_x, linear_y\n"
    ):
        export_lerobot(paths, tmp_path / "set")
    with open_lerobot(export_lerobot(paths[1:], tmp_path / "set")).episode(0) as episode:
        assert episode.action_names == ("linear_x", "linear_y")
        np.testing.assert_array_equal(episode.actions, actions)


def test_assumed_instructions_are_said_once(tmp_path: Path) -> None:
    paths = [numbered(tmp_path, f"{number}_left.h5", 2, text=None) for number in range(3)]
    with pytest.warns(EpisodeWarning) as caught:
        export_lerobot(paths, tmp_path / "set")
    (warning,) = caught
    assert "3 of 3 episodes store no instruction" in str(warning.message)
    assert warning.filename == __file__
    assert "left" in str(open_lerobot(tmp_path / "set").episode(0).instruction)


def test_nothing_is_overwritten(tmp_path: Path, exported: Path) -> None:
    path = numbered(tmp_path, "a.h5", 2)
    before = (exported / "meta/info.json").read_bytes()
    for folder in (exported, path):
        with pytest.raises(EpisodeError, match=r"exists(.|\n)*not overwritten"):
            export_lerobot([path], folder)
    assert (exported / "meta/info.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert is_lerobot(export_lerobot([path], tmp_path / "empty"))


def test_a_damaged_recording_leaves_nothing(tmp_path: Path) -> None:
    good, bad = numbered(tmp_path, "a.h5", 3), numbered(tmp_path, "b.h5", 3)
    with h5py.File(bad, "r") as file:
        info = file["images"].id.get_chunk_info(1)
    with bad.open("r+b") as raw:
        raw.seek(info.byte_offset)
        raw.write(b"\xff" * info.size)
    for video in (False, True):
        with pytest.raises(EpisodeError, match=r"b\.h5: frame 1 of 3 is corrupt"):
            export_lerobot([good, bad], tmp_path / "set", video=video)
    assert {path.name for path in tmp_path.iterdir()} - {".set.lock"} == {"a.h5", "b.h5"}


LIMITED = """
import resource, sys
from pathlib import Path
from bundle.errors import StorageError
from episodes.lerobot import export_lerobot

resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    export_lerobot([sys.argv[1]], sys.argv[2], video=sys.argv[3] == "True")
except StorageError as error:
    print("StorageError", error)
"""


@pytest.mark.parametrize("video", [False, True])
def test_a_full_disk(tmp_path: Path, video: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write_episode(tmp_path / "a.h5", noise, np.zeros((20, 3)), instruction="Go", fps=6.0)
    command = [sys.executable, "-c", LIMITED, str(path), str(tmp_path / "set"), str(video)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("StorageError")
    assert {path.name for path in tmp_path.iterdir()} - {".set.lock"} == {"a.h5"}


KILLED = """
import sys, time
from episodes import lerobot_writer
from episodes.lerobot import export_lerobot

real = lerobot_writer.FrameStats.add

def slow(self, frame):
    print("frame", flush=True)
    time.sleep(0.2)
    return real(self, frame)

lerobot_writer.FrameStats.add = slow
export_lerobot(sys.argv[1:-1], sys.argv[-1])
"""


def test_a_killed_export_leaves_no_dataset(tmp_path: Path) -> None:
    paths = [numbered(tmp_path, "a.h5", 2), numbered(tmp_path, "b.h5", 20)]
    command = [sys.executable, "-c", KILLED, *map(str, paths), str(tmp_path / "set")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "frame\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert not (tmp_path / "set").exists()
    found = open_lerobot(export_lerobot(paths, tmp_path / "set"))
    assert len(found) == 2
    assert not list(tmp_path.glob(".set.building*"))


@pytest.mark.parametrize(("missing", "video"), [("pyarrow", False), ("av", True)])
def test_what_is_not_installed_is_said(
    tmp_path: Path, counted: Path, exported: Path, missing: str, video: bool
) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
from bundle.errors import EpisodeError
from episodes.lerobot import episode_names, export_lerobot, open_lerobot
assert len(episode_names(__import__("pathlib").Path(sys.argv[1]))) > 0
for call in (lambda: open_lerobot(sys.argv[1]), lambda: export_lerobot([sys.argv[2]], sys.argv[3], video={video})):
    try:
        call()
    except EpisodeError as error:
        print(error)
"""
    folder = counted if video else exported
    arguments = [str(folder), str(tmp_path / "a.h5"), str(tmp_path / "new")]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('pip install "jetvla[lerobot]"') == 2
    assert f"no module {missing}" in result.stdout


def test_without_h264_it_is_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codecs = {"no such codec": {}} | {name: value for name, value in lerobot_video._CODECS.items() if name == "mpeg4"}
    monkeypatch.setattr(lerobot_video, "_CODECS", codecs)
    folder = export_lerobot([numbered(tmp_path, "a.h5", 30)], tmp_path / "set", video=True)
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["features"][FRONT]["info"]["video.codec"] == "mpeg4"
    with open_lerobot(folder).episode(0) as episode:
        assert [number_of(episode.frame(i)) for i in (29, 0, 13)] == [29, 0, 13]


def test_a_locked_disk_is_a_storage_error(tmp_path: Path) -> None:
    path = numbered(tmp_path, "a.h5", 2)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        export_lerobot([path], tmp_path / "file" / "set")


def shift(folder: Path, seconds: float, *, both: bool) -> None:
    """Let the second episode begin (and, with `both`, end) later in the video than it does."""
    path = next((folder / "meta" / "episodes").rglob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    for key in ("from_timestamp", "to_timestamp")[: 1 + both]:
        rows[1][f"videos/{FRONT}/{key}"] += seconds
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("seconds", [0.001, 0.02, -0.05])
def test_a_video_is_held_to_the_times_of_the_table(counted: Path, seconds: float) -> None:
    shift(counted, seconds, both=True)
    with (
        open_lerobot(counted).episode(1) as episode,
        pytest.raises(EpisodeError, match=r"nearest frame is (.|\n)* off"),
    ):
        episode.frame(0)


def test_rounding_of_times_is_no_shift(counted: Path) -> None:
    shift(counted, 0.00009, both=True)
    with open_lerobot(counted).episode(1) as episode:
        episode.frame(0)


def test_an_episode_has_as_many_frames_in_the_video_as_in_the_table(counted: Path) -> None:
    shift(counted, 1 / 6, both=False)
    with pytest.raises(
        EpisodeError, match=r"another length in the video(.|\n)*episode 1: 3\.6667 s of video, 23 frames"
    ):
        open_lerobot(counted)


@pytest.mark.parametrize(("rate", "start", "said"), [(12, 0, "12.000 frames per second"), (6, 3, "begins at 0.5000 s")])
def test_a_video_of_another_rate_or_beginning(counted: Path, rate: int, start: int, said: str) -> None:
    path = next((counted / "videos").rglob("*.mp4"))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number + start, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with open_lerobot(counted).episode(0) as episode, pytest.raises(EpisodeError, match=said):
        episode.frame(0)


def test_what_lerobot_adds_to_is_there(exported: Path) -> None:
    """Recording more into a dataset aggregates every statistic that LeRobot itself writes, for each feature."""
    stats = json.loads((exported / "meta" / "stats.json").read_text())
    for feature in stats.values():
        assert feature.keys() == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    (rows,) = [pq.read_table(path) for path in (exported / "meta" / "episodes").rglob("*.parquet")]
    assert {"stats/action/q01", "stats/action/q99", f"stats/{FRONT}/q50"} <= set(rows.column_names)


def test_the_hint_for_older_datasets_is_a_command_for_this_folder(dataset: Path) -> None:
    edit_info(dataset, lambda info: info.update(codebase_version="v2.1"))
    with pytest.raises(EpisodeError) as caught:
        open_lerobot(dataset)
    assert f"--root {dataset.parent} --repo-id {dataset.name} --push-to-hub false" in caught.value.hint
