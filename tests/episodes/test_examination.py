"""An examination finds every fault of a file, agrees with the reader on what can be used, and leaves good files alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from bundle.errors import EpisodeError
from episodes.examination import examine
from episodes.findings import Examination, from_json
from episodes.lerobot import export_lerobot
from episodes.reader import EpisodeWarning, open_episode
from episodes.synthetic import SYNTHETIC_SCHEMAS, write_synthetic
from episodes.writer import write_episode

LEFT = "Navigate to the gray basket on the left"


def codes(examination: Examination, severity: str | None = None) -> list[str]:
    return [problem.code for problem in examination.problems if severity in (None, problem.severity)]


def is_usable(path: Path) -> bool:
    """What the reader says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        try:
            with open_episode(path) as episode:
                for _ in episode.frames():
                    pass
        except EpisodeError:
            return False
    return True


def change_frame(path: Path, index: int, value: object) -> None:
    with h5py.File(path, "r+") as file:
        file["images"][index] = value


@pytest.mark.parametrize("schema", SYNTHETIC_SCHEMAS)
def test_a_good_file(synthetic, schema):
    path = synthetic(schema)
    found = examine(path)
    assert codes(found) == (["instruction_assumed"] if schema == "v6" else [])
    assert (found.frames, found.height, found.width) == (6, 24, 32)
    assert found.bytes == path.stat().st_size
    assert found.encoding == {"v5_jpeg": "jpeg", "v6": "raw bgr"}.get(schema, "raw rgb")
    assert found.instruction is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        episode = open_episode(path)
    with episode:
        assert (found.schema, found.fps, found.instruction) == (episode.schema, episode.fps, episode.instruction)
        assert [axis.maximum for axis in found.axes] == episode.actions.max(axis=0).tolist()
        assert found.left == (episode.actions[:, 1] > 0.3).sum()
    assert sum(found.classes.values()) == 6
    assert found.classes["forward_left"] == found.left > 0
    assert found.right == 0
    assert (found.corrupt, found.black) == ((), ())


def test_the_classes_are_counted_by_name(tmp_path, noise):
    path = write_episode(tmp_path / "e.h5", noise, [[0, 0, 0], [1, -1, 0], [0.2, 1, 0]], instruction="go", fps=6)
    found = examine(path)
    assert {name: count for name, count in found.classes.items() if count} == {"stop": 1, "forward_right": 1, "left": 1}
    assert (found.left, found.right) == (1, 1)


def test_colours_are_those_of_the_picture(tmp_path):
    frames = np.zeros((2, 16, 8, 3), np.uint8)
    frames[:, :8] = (200, 0, 10)
    frames[1, 8:] = (0, 0, 100)
    path = write_episode(tmp_path / "e.h5", frames, np.ones((2, 3)), instruction="go", fps=6)
    bands = examine(path).bands
    assert bands == ((200, 10),) * 4 + ((0, 50),) * 4


def no_actions(file):
    del file["actions"]


def one_action_less(file):
    actions = file["actions"][:-1]
    del file["actions"]
    file["actions"] = actions


def nan_action(file):
    file["actions"][2, 1] = np.nan


def no_images(file):
    file["pictures"] = file["images"][:]
    del file["images"]


def grey_images(file):
    grey = file["images"][..., 0]
    del file["images"]
    file["images"] = grey


def two_instructions(file):
    del file["language_instruction"]
    file["language_instruction"] = ["go left", "go right"]


def instruction_is_a_number(file):
    del file["language_instruction"]
    file["language_instruction"] = [1.5]


def one_event_less(file):
    events = file["action_event_types"][:-1]
    del file["action_event_types"]
    file["action_event_types"] = events


def session_log(file):
    file.attrs["runtime_config"] = "{}"


def damaged_frame(file):
    file["images"].id.write_direct_chunk((2, 0, 0, 0), b"no gzip data")


FAULTS = [
    (no_actions, "actions"),
    (one_action_less, "actions"),
    (nan_action, "actions"),
    (no_images, "layout"),
    (grey_images, "images"),
    (two_instructions, "instruction"),
    (instruction_is_a_number, "instruction"),
    (one_event_less, "event_types"),
    (session_log, "session_log"),
    (damaged_frame, "corrupt_frames"),
]


@pytest.mark.parametrize(("fault", "code"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault(synthetic, fault, code):
    path = synthetic("v1")
    assert is_usable(path)
    with h5py.File(path, "r+") as file:
        fault(file)
    assert not is_usable(path)
    found = examine(path)
    assert codes(found, "error") == [code]
    assert all(problem.text and problem.hint and str(path) not in problem.text for problem in found.problems)
    assert from_json(json.loads(json.dumps(found.as_json()))) == found


def test_several_faults_are_all_found(synthetic):
    path = synthetic("v1")
    with h5py.File(path, "r+") as file:
        for fault in (nan_action, damaged_frame, two_instructions, one_event_less):
            fault(file)
    assert sorted(codes(examine(path), "error")) == ["actions", "corrupt_frames", "event_types", "instruction"]


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated(synthetic, kept):
    path = synthetic("v1")
    os.truncate(path, int(path.stat().st_size * kept))
    found = examine(path)
    assert codes(found) == ["unreadable"]
    assert found.bytes == path.stat().st_size


def test_missing(tmp_path):
    found = examine(tmp_path / "none.h5")
    assert codes(found) == ["unreadable"]
    assert found.bytes is None


def test_corrupt_frames_are_named(synthetic):
    path = synthetic("v5_jpeg")
    with h5py.File(path, "r+") as file:
        file["observations/images"][1] = np.zeros(0, np.uint8)
        file["observations/images"][3] = np.arange(20, dtype=np.uint8)
    found = examine(path)
    assert [(frame.index, frame.reason[:16]) for frame in found.corrupt] == [
        (1, "0 bytes of JPEG"),
        (3, "20 bytes that ar"),
    ]
    (problem,) = found.errors
    assert problem.text.startswith("2 of 6 frames: frame 1, 3 are corrupt; the first: 0 bytes of JPEG")
    assert "--drop-corrupt" not in problem.hint


def test_a_corrupt_end_can_be_dropped(synthetic):
    path = synthetic("v5_jpeg")
    with h5py.File(path, "r+") as file:
        file["observations/images"][5] = np.zeros(0, np.uint8)
    (problem,) = examine(path).errors
    assert "--drop-corrupt" in problem.hint


def test_frames_of_different_size(synthetic, tmp_path):
    path = synthetic("v5_jpeg")
    other = write_synthetic(tmp_path, "v5_jpeg", side="right", seed=1, height=10, width=20, length=6)
    with h5py.File(path, "r+") as file, h5py.File(other) as small:
        file["observations/images"][4] = small["observations/images"][4]
    found = examine(path)
    assert codes(found) == ["frame_sizes"]
    assert "5 of 24x32, 1 of 10x20" in found.problems[0].text


def test_a_camera_that_hangs(synthetic):
    path = synthetic("v1")
    with h5py.File(path) as file:
        images = file["images"][:]
        assert file["actions"][0].any() == 0
    assert examine(path).repeated == (1,)  # the robot stood still: no problem
    change_frame(path, 3, images[2])
    found = examine(path)
    assert found.repeated == (1, 3)
    assert codes(found, "warning") == ["frozen_frames"]
    assert "1 of 4 moves: frame 3 is the same" in found.problems[0].text
    for index in (4, 5):
        change_frame(path, index, images[2])
    assert codes(examine(path), "error") == ["frozen_frames"]


def test_a_frame_is_not_compared_across_a_gap(synthetic):
    path = synthetic("v1")
    with h5py.File(path) as file:
        images = file["images"][:]
    change_frame(path, 4, images[2])
    with h5py.File(path, "r+") as file:
        file["images"].id.write_direct_chunk((3, 0, 0, 0), b"no gzip data")
    found = examine(path)
    assert [frame.index for frame in found.corrupt] == [3]
    assert found.repeated == (1,)


def test_black_frames(synthetic):
    path = synthetic("v1")
    change_frame(path, 2, 3)
    found = examine(path)
    assert found.black == (2,)
    assert codes(found, "warning") == ["black_frames"]
    for index in range(6):
        change_frame(path, index, index)
    found = examine(path)
    assert codes(found, "error") == ["black_frames"]
    assert found.bands is None


def test_white_frames(synthetic):
    """12-bit values cut to 8 bits, as a mono16 picture becomes where nobody scales it, beside frames of too much light."""
    path = synthetic("v1")
    with h5py.File(path) as file:
        images = file["images"][:]
    twelve = np.minimum(np.random.default_rng(0).integers(0, 4096, (*images.shape[1:3], 1)), 255)
    change_frame(path, 2, twelve)
    bright = images[4].copy()
    bright[: len(bright) // 2 + 1] = 255
    change_frame(path, 4, bright)
    found = examine(path)
    assert (found.black, found.white, found.overexposed) == ((), (2,), (4,))
    assert codes(found, "warning") == ["white_frames", "overexposed"]
    assert "mono16" in found.problems[0].hint
    for index in range(6):
        change_frame(path, index, 255 - index)
    found = examine(path)
    assert codes(found, "error") == ["white_frames"]
    assert found.bands is None


@pytest.mark.parametrize(
    ("stem", "text", "sideways", "expected"),
    [
        ("plain", LEFT, (1, 1, 0), []),
        ("plain", LEFT, (1, -1, 0), []),  # round an obstacle
        ("plain", LEFT, (0, 0, 0), []),
        ("plain", LEFT, (-1, -1, 1), ["side_mismatch"]),
        ("plain", "오른쪽으로 가", (1, 1, 0), ["side_mismatch"]),
        ("plain", "pass left of the box, then turn right", (-1, -1, 0), []),
        ("episode_right_core", LEFT, (1, 1, 1), ["side_mismatch"]),
        ("episode_right_core", LEFT, (-1, -1, -1), ["side_mismatch", "side_mismatch"]),
        ("episode_left_core", LEFT, (1, 1, 1), []),
    ],
)
def test_sides_that_contradict_each_other(tmp_path, noise, stem, text, sideways, expected):
    actions = np.array([[1, side, 0] for side in sideways])
    path = write_episode(tmp_path / f"{stem}.h5", noise, actions, instruction=text, fps=6)
    found = examine(path)
    assert codes(found) == expected
    assert not found.errors


def test_what_is_not_stored(synthetic, tmp_path):
    path = synthetic("v6")
    with h5py.File(path, "r+") as file:
        del file.attrs["total_duration"]
    assert codes(examine(path), "warning") == ["instruction_assumed", "fps"]
    plain = shutil.move(path, tmp_path / "episode.h5")
    found = examine(Path(plain))
    assert codes(found, "warning") == ["no_instruction", "fps"]
    assert (found.instruction, found.instruction_source, found.fps) == (None, "none", None)


def test_a_lerobot_episode(synthetic, tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    path = synthetic("v1")
    change_frame(path, 2, 0)
    export_lerobot([path], tmp_path / "right")
    of_file, found = examine(path), examine(tmp_path / "right#0")
    assert found.schema == "lerobot"
    assert found.path == str(tmp_path / "right#0")
    for name in (
        "frames",
        "height",
        "width",
        "fps",
        "instruction",
        "instruction_source",
        "axes",
        "classes",
        "left",
        "black",
    ):
        assert getattr(found, name) == getattr(of_file, name), name
    # The folder is called "right" and the episode goes left: that is no contradiction.
    assert codes(found) == codes(of_file) == ["black_frames"]
    assert codes(examine(tmp_path / "right#7"), "error") == ["unreadable"]
    next((tmp_path / "right" / "data").rglob("*.parquet")).write_bytes(b"damaged")
    assert codes(examine(tmp_path / "right#0"), "error") == ["unreadable"]
