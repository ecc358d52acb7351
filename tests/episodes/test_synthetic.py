"""Synthetic episodes look as their recorders made them, are deterministic, and drive consistently."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from bundle.errors import StorageError
from episodes.actions import CLASS_NAMES, classify_actions, default_event_types
from episodes.reader import EpisodeWarning, open_episode
from episodes.scene import draw_frame, plan_drive
from episodes.synthetic import SYNTHETIC_SCHEMAS, write_synthetic

SMALL = {"height": 24, "width": 32, "length": 6}


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ("v1", "episode_20251106_120003_1box_hori_right_core_medium.h5"),
        ("v5", "episode_20260406_120003_basket_right.h5"),
        ("v5_jpeg", "episode_20260407_120003_basket_right.h5"),
        ("v6", "episode_20260715_120003_weak_right_right_curve.h5"),
    ],
)
def test_names(tmp_path, schema, name):
    assert write_synthetic(tmp_path, schema, side="right", seed=3, **SMALL) == tmp_path / name


def test_names_never_collide_and_sort_by_seed(tmp_path):
    paths = [
        write_synthetic(tmp_path, schema, side=side, seed=seed, height=2, width=2, length=5)
        for schema in SYNTHETIC_SCHEMAS
        for seed in range(3)
        for side in ("left", "right")
    ]
    assert sorted(paths) == paths


@pytest.mark.parametrize("schema", SYNTHETIC_SCHEMAS)
def test_same_arguments_same_bytes(tmp_path, schema):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first = write_synthetic(one, schema, side="left", seed=5, **SMALL).read_bytes()
    assert write_synthetic(two, schema, side="left", seed=5, **SMALL).read_bytes() == first
    assert write_synthetic(two, schema, side="left", seed=6, **SMALL).read_bytes() != first


def test_defaults_are_full_size(tmp_path):
    with open_episode(write_synthetic(tmp_path, "v1", side="left", seed=0)) as episode:
        assert len(episode) == 18
        assert episode.frame(17).shape == (720, 1280, 3)


def test_v5_has_what_its_recorder_writes(tmp_path):
    raw, jpeg = (write_synthetic(tmp_path, schema, side="left", seed=0, **SMALL) for schema in ("v5", "v5_jpeg"))
    for path in (raw, jpeg):
        with h5py.File(path) as file:
            assert sorted(file) == ["actions", "language_instruction", "observations", "timestamps"]
            assert not file["actions"][-3:].any()
            assert file["actions"][-4].any()
    with h5py.File(jpeg) as file:
        assert file["observations/images"].attrs["format"] == "jpeg"
    with open_episode(raw) as exact, open_episode(jpeg) as lossy:
        difference = np.abs(exact.frame(2).astype(int) - lossy.frame(2))
    assert 0 < difference.mean() < 12


def test_v6_is_stored_bgr(tmp_path):
    path = write_synthetic(tmp_path, "v6", side="left", seed=0, **SMALL)
    drive = plan_drive("basket", "left", 0, 6, 0)
    expected = draw_frame(drive, 2, 24, 32)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["images"][2], expected[..., ::-1])
        np.testing.assert_array_equal(file["action_classes"], classify_actions(file["actions"][()]))
        assert "language_instruction" not in file
    with pytest.warns(EpisodeWarning), open_episode(path) as episode:
        np.testing.assert_array_equal(episode.frame(2), expected)


def test_what_may_be_left_out(tmp_path):
    v1 = write_synthetic(tmp_path, "v1", side="left", seed=0, store_instruction=False, **SMALL)
    v6 = write_synthetic(tmp_path, "v6", side="left", seed=0, store_classes=False, **SMALL)
    with h5py.File(v1) as first, h5py.File(v6) as second:
        assert "language_instruction" not in first
        assert "action_classes" not in second
    with pytest.warns(EpisodeWarning), open_episode(v6) as episode:
        assert episode.schema == "v6"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("target", ["bottle", "basket"])
@pytest.mark.parametrize("length", [3, 6, 18, 110])
@pytest.mark.parametrize("seed", range(4))
def test_drives_are_consistent(side, target, length, seed):
    drive = plan_drive(target, side, seed, length, 0)
    sign = 1 if side == "left" else -1
    values = np.float32([-1.15, 0, 1.15])
    assert np.isin(drive.actions, values).all()
    assert not drive.actions[0].any()
    assert (drive.actions[1:, 0] == values[2]).all()
    assert drive.actions[1, 1] == values[1 + sign]
    # Action i is what moves the robot from frame i to frame i + 1.
    forward, sideways = -np.diff(drive.distance_m), -np.diff(drive.offset_m)
    np.testing.assert_array_equal(np.sign(forward), np.sign(drive.actions[:-1, 0]))
    np.testing.assert_array_equal(np.sign(sideways), np.sign(drive.actions[:-1, 1]))
    assert abs(drive.offset_m[-1]) < abs(drive.offset_m[0])
    assert drive.distance_m[-1] >= 0.8


def target_columns(drive, index, width):
    """Columns of the frame in which the target's colour stands."""
    frame = draw_frame(drive, index, 90, width)
    return np.flatnonzero((frame == np.array(drive.target_colour, np.uint8)).all(axis=2).any(axis=0))


@pytest.mark.parametrize("target", ["bottle", "basket"])
@pytest.mark.parametrize("seed", range(5))
def test_the_picture_shows_the_drive(target, seed):
    left, right = (plan_drive(target, side, seed, 18, 0) for side in ("left", "right"))
    assert target_columns(left, 0, 160).max() < 80 < target_columns(right, 0, 160).min()
    for drive in (left, right):
        assert len(target_columns(drive, 17, 160)) > 2 * len(target_columns(drive, 0, 160))
        np.testing.assert_array_equal(draw_frame(drive, 0, 90, 160), draw_frame(drive, 1, 90, 160))
        assert (draw_frame(drive, 1, 90, 160) != draw_frame(drive, 2, 90, 160)).any()


def test_a_tiny_picture_still_shows_the_target():
    for side in ("left", "right"):
        assert len(target_columns(plan_drive("bottle", side, 0, 110, 0), 0, 16)) >= 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"schema": "v2"}, "one of v1, v5, v5_jpeg, v6"),
        ({"side": "middle"}, "left or right"),
        ({"length": 1}, "at least 2"),
        ({"schema": "v5", "length": 4}, "at least 5"),
        ({"height": 0}, "at least 1 x 1"),
    ],
)
def test_wrong_arguments(tmp_path, change, part):
    arguments = {"schema": "v1", "side": "left", "seed": 0, **SMALL} | change
    with pytest.raises(ValueError, match=part):
        write_synthetic(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    with pytest.raises(StorageError, match="create the folder"):
        write_synthetic(tmp_path / "no", "v6", side="left", seed=0, **SMALL)


def test_the_nine_classes():
    speed = 1.15
    axes = {"stop": (0, 0), "forward": (speed, 0), "backward": (-speed, 0), "left": (0, speed), "right": (0, -speed)}
    for ahead in ("forward", "backward"):
        for aside in ("left", "right"):
            axes[f"{ahead}_{aside}"] = (axes[ahead][0], axes[aside][1])
    actions = np.array([(*axes[name], 0) for name in CLASS_NAMES], np.float32)
    np.testing.assert_array_equal(classify_actions(actions), np.arange(9))
    np.testing.assert_array_equal(classify_actions(actions * 0.25), np.zeros(9))


def test_default_events():
    actions = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]], np.float32)
    assert default_event_types(actions) == ("episode_start", "stop_action", "start_action")


def test_episodes_needs_nothing_heavy():
    program = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('torch', 'transformers', 'onnx', 'cv2')})\n"
        "import episodes.reader, episodes.writer, episodes.synthetic\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'scipy', 'matplotlib', 'pandas'}))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"\[\]\n", done.stdout)
