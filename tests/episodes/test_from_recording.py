"""The command: recordings become episodes that open with the same actions and pictures, and nothing is lost without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mcap")
pytest.importorskip("h5py")

import h5py

from bundle.errors import EpisodeError
from episodes.reader import EpisodeWarning, open_episode
from episodes.recording import open_recording
from episodes.recording_convert import ConversionOptions, plan_pieces, write_piece
from episodes.recording_events import read_run
from episodes.recording_segments import cut
from runtime.cameras.base import Frame
from runtime.events import Event
from tests.recordings import GO_RIGHT, PERIOD_S, cut_off, decision, drive, pictures, published, record, run_info

ROOT = Path(__file__).resolve().parents[2]
START_S = 1000.0
BASKET_LEFT = "Navigate to the gray basket on the left"


def from_recording(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "episodes" / "from_recording.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "TZ": "UTC"},
    )


def convert(path: Path, folder: Path, **options: object) -> list[Path]:
    """In this process; every piece, however short."""
    chosen = ConversionOptions(**({"min_frames": 1} | options))  # type: ignore[arg-type]
    run = read_run(path)
    folder.mkdir(exist_ok=True)
    pieces = plan_pieces([(run, cut(run))], folder, chosen, force=False)
    for piece in pieces:
        if piece.target is not None:
            write_piece(piece, chosen)
    return [piece.target for piece in pieces if piece.target is not None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty frames to the left, then five to the right. Not to be changed."""
    second_s = START_S + 20 * PERIOD_S
    events: list[Event] = [
        *drive(20, START_S, instruction=BASKET_LEFT),
        *drive(5, second_s, instruction=GO_RIGHT, first=20, seed=1),
    ]
    return record(tmp_path_factory.mktemp("run"), events)


@pytest.mark.parametrize("actions", ["published", "decided"])
def test_v5_keeps_everything(run: Path, tmp_path: Path, actions: str) -> None:
    first, second = convert(run, tmp_path / "out", actions=actions)
    assert first.name.endswith("_recorded_left.h5")
    assert second.name.endswith("_recorded_right.h5")
    for index, path in enumerate((first, second)):
        with open_recording(f"{run}#{index}", actions=actions) as expected, open_episode(path) as episode:  # type: ignore[arg-type]
            assert (episode.schema, episode.instruction) == ("v5", expected.instruction)
            np.testing.assert_array_equal(episode.actions[:, :2], expected.actions)
            assert not episode.actions[:, 2].any()
            assert [episode.jpeg(i) for i in range(len(episode))] == [expected.jpeg(i) for i in range(len(expected))]
            assert episode.fps == pytest.approx(1 / PERIOD_S)
            assert episode.attributes["recorded_from"] == f"{run.name}#{index}"
            assert episode.attributes["recorded_actions"] == actions
            assert episode.event_types is not None
            assert episode.event_types[0] == "episode_start"
    with h5py.File(first) as file:
        np.testing.assert_allclose(file["timestamps"][()], np.arange(20) * PERIOD_S, atol=1e-6)


def test_v6_is_bgr_with_the_side_in_its_name(run: Path, tmp_path: Path) -> None:
    first, _ = convert(run, tmp_path / "out", layout="v6")
    with pytest.warns(EpisodeWarning, match="assuming 'Navigate to the gray basket on the left'"):
        episode = open_episode(first)
    with episode, open_recording(f"{run}#0") as expected:
        assert episode.schema == "v6"
        np.testing.assert_array_equal(episode.actions[:, :2], expected.actions)
        np.testing.assert_array_equal(episode.frame(7), expected.frame(7))
        assert episode.fps == pytest.approx(1 / PERIOD_S)
        assert episode.action_classes is not None
    with h5py.File(first) as file, open_recording(f"{run}#0") as expected:
        np.testing.assert_array_equal(file["images"][7], expected.frame(7)[..., ::-1])


@pytest.mark.parametrize("layout", ["v5", "v6"])
def test_stop_frames(run: Path, tmp_path: Path, layout: str) -> None:
    path, _ = convert(run, tmp_path / "out", layout=layout, stop_frames=3)
    with h5py.File(path) as file:
        assert len(file["actions"]) == 23
        assert not file["actions"][-3:].any()
        assert file["actions"][19].any()
        assert [text.decode() for text in file["action_event_types"][-3:]] == ["stop_action"] * 3
        images = file["observations/images" if layout == "v5" else "images"]
        assert len(images) == 23
        for index in (20, 21, 22):
            np.testing.assert_array_equal(images[index], images[19])
        if layout == "v5":
            np.testing.assert_allclose(np.diff(file["timestamps"][()]), PERIOD_S, atol=1e-6)


def test_v6_needs_a_side(tmp_path: Path) -> None:
    path = record(tmp_path, drive(3, START_S, instruction="go home"))
    assert convert(path, tmp_path / "six", layout="v6") == []
    (kept,) = convert(path, tmp_path / "five")
    assert kept.name.endswith("_recorded_run.h5")


def test_pieces_of_one_second_get_different_names(tmp_path: Path) -> None:
    events = [*drive(1, START_S), *drive(1, START_S + 0.001, first=5), *drive(1, START_S + 0.002, first=9)]
    paths = convert(record(tmp_path, events), tmp_path / "out")
    assert len({*paths}) == 3
    assert all(path.exists() for path in paths)


def test_axes_are_placed_by_name(tmp_path: Path) -> None:
    info = run_info(action_names=("angular_z", "linear_x"), action_units=("rad/s", "m/s"))
    path = record(tmp_path, drive(3, START_S), info=info)
    (target,) = convert(path, tmp_path / "out", actions="decided")
    with open_episode(target) as episode, open_recording(path, actions="decided") as expected:
        np.testing.assert_array_equal(episode.actions[:, [2, 0]], expected.actions)
        assert not episode.actions[:, 1].any()


def test_axes_that_episodes_do_not_hold(tmp_path: Path) -> None:
    info = run_info(action_names=("linear_x", "gripper"))
    path = record(tmp_path, drive(3, START_S), info=info)
    with pytest.raises(EpisodeError, match=r"has actions that HDF5 episodes do not hold\n  got:      gripper"):
        convert(path, tmp_path / "out", actions="decided")
    assert list((tmp_path / "out").iterdir()) == []


def test_pictures_of_different_sizes(tmp_path: Path) -> None:
    frames = [Frame(pictures(1, height=24 + 8 * index)[0], START_S + index * PERIOD_S) for index in range(2)]
    path = record(tmp_path, [*(decision(i, f, [[0, 0]]) for i, f in enumerate(frames)), published(START_S, 0, 0)])
    done = from_recording(path, "--out", tmp_path / "out", "--min-frames", "1", "--json")
    assert done.returncode == 1, done.stderr
    assert "frame 1 is not an image of this episode" in json.loads(done.stdout)[0]["failed"]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = from_recording(run, "--out", out, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "1 episodes would be written, 1 left out, 0 failed" in dry.stdout
    assert "left out: fewer than 18 frames" in dry.stdout
    assert not out.exists()

    done = from_recording(run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "1 episodes written, 1 left out, 0 failed" in done.stdout
    (path,) = out.iterdir()
    before = path.stat().st_mtime_ns

    again = from_recording(run, "--out", out)
    assert again.returncode == 1
    assert f"{path} exists" in again.stderr
    assert "hint: choose another --out, or replace it with --force." in again.stderr
    assert path.stat().st_mtime_ns == before
    assert from_recording(run, "--out", out, "--force").returncode == 0
    assert path.stat().st_mtime_ns > before


def test_json_and_one_piece(run: Path, tmp_path: Path) -> None:
    done = from_recording(f"{run}#1", "--out", tmp_path / "out", "--min-frames", "2", "--layout", "v6", "--json")
    assert done.returncode == 0, done.stderr
    (piece,) = json.loads(done.stdout)
    assert (piece["piece"], piece["frames"], piece["failed"]) == (f"{run}#1", 5, None)
    assert piece["remark"] == "will be read as 'Navigate to the gray basket on the right'"
    assert Path(piece["episode"]).exists()


def test_a_folder_and_a_recording_without_its_end(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in ("b.mcap", "a.mcap"):
        (folder / name).write_bytes(run.read_bytes())
    cut_off(folder / "b.mcap")
    done = from_recording(folder, "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert [Path(piece["piece"]).name for piece in json.loads(done.stdout)] == [
        "a.mcap#0",
        "a.mcap#1",
        "b.mcap#0",
        "b.mcap#1",
    ]
    assert "b.mcap has no end" in done.stderr
    size = (folder / "b.mcap").stat().st_size
    done = from_recording("recordings/*.mcap", "--out", "out", "--repair", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "repaired recordings/b.mcap" in done.stderr
    assert "has no end" not in done.stderr
    assert (folder / "b.mcap").stat().st_size > size
    assert len(list((tmp_path / "out").iterdir())) == 2  # both began at the same second


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no recording"),
        (("missing.mcap",), 1, "no recordings match 'missing.mcap'"),
        (("{run}#7",), 1, "has no episode 7"),
        (("{run}", "--min-frames", "0"), 2, "--min-frames or --stop-frames is out of range"),
        (("{run}", "--layout", "v1"), 2, "v5"),
        ((__file__,), 1, "is no MCAP file"),
        (("{run}", "--min-frames", "99", "--dry-run"), 1, ""),
    ],
)
def test_what_cannot_be_done(run: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = from_recording(*(argument.format(run=run) for argument in arguments), folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
