"""A repaired episode says the same as the original, only better; what cannot be mended honestly is refused."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from bundle.errors import EpisodeError
from episodes.examination import examine
from episodes.reader import Episode, EpisodeWarning, open_episode
from episodes.repair import RepairOptions, plan_repairs, repair
from episodes.synthetic import SYNTHETIC_SCHEMAS, write_synthetic
from episodes.writer_v5 import encode_jpeg

DEFAULT = RepairOptions()
IMAGES = "observations/images"


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "episode.h5"


def opened(path: Path) -> Episode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        return open_episode(path)


def pictures(path: Path) -> np.ndarray:
    with opened(path) as episode:
        return np.stack(list(episode.frames())).astype(int)


def break_frames(path: Path, *indices: int) -> None:
    with h5py.File(path, "r+") as file:
        for index in indices:
            file[IMAGES][index] = np.zeros(0, np.uint8)


@pytest.mark.parametrize("schema", SYNTHETIC_SCHEMAS)
def test_every_schema_becomes_v5_jpeg(synthetic, target, schema):
    path = synthetic(schema)
    before = hashlib.sha256(path.read_bytes()).digest()
    result = repair(path, target, DEFAULT)
    assert (result.path, result.frames, result.dropped, result.copied) == (target, 6, 0, schema == "v5_jpeg")
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert not examine(target).problems
    with opened(path) as old, open_episode(target) as new:  # warnings are errors: the instruction is stored
        assert new.schema == "v5"
        assert new.jpeg(0) is not None
        np.testing.assert_array_equal(new.actions, old.actions)
        assert new.instruction == old.instruction is not None
        assert new.fps == pytest.approx(old.fps)
        assert new.event_types == old.event_types
        np.testing.assert_array_equal(new.action_classes, old.action_classes)
        kept = {name: value for name, value in new.attributes.items() if name != "repaired_from"}
        assert kept == old.attributes
        assert new.attributes["repaired_from"] == f"{old.schema} {path.name}"
    assert np.abs(pictures(target) - pictures(path)).mean() < (0.001 if schema == "v5_jpeg" else 6)


def test_jpeg_frames_are_not_compressed_twice(synthetic, target):
    path = synthetic("v5_jpeg")
    repair(path, target, DEFAULT)
    with h5py.File(path) as old, h5py.File(target) as new:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(old[IMAGES], new[IMAGES], strict=True))
        assert new[IMAGES].attrs["format"] == "jpeg"


def test_raw_frames_are_compressed_at_quality_95(synthetic, target):
    path = synthetic("v6")
    repair(path, target, DEFAULT)
    with opened(path) as old, open_episode(target) as new:
        assert all(new.jpeg(index) == encode_jpeg(old.frame(index), 95) for index in range(6))


@pytest.mark.parametrize("schema", ["v6", "v5_jpeg"])
def test_swapped_colours(synthetic, target, schema):
    path = synthetic(schema)
    assert not repair(path, target, RepairOptions(swap_colour=True)).copied
    assert np.abs(pictures(target) - pictures(path)[..., ::-1]).mean() < 6
    assert np.abs(pictures(target) - pictures(path)).mean() > 20
    with open_episode(target) as episode:
        assert episode.attributes["colour_swapped"] is True


def test_recorded_time_stamps_stay(synthetic, target):
    path = synthetic("v5")
    stamps = 1e9 + np.cumsum([0, 0.1, 0.2, 0.1, 0.3, 0.1])
    with h5py.File(path, "r+") as file:
        del file["timestamps"]
        file["observations/timestamp"] = stamps
    repair(path, target, DEFAULT)
    with h5py.File(target) as file:
        np.testing.assert_array_equal(file["timestamps"], stamps)


def test_without_a_frame_rate_no_time_is_made_up(synthetic, target):
    path = synthetic("v6")
    with h5py.File(path, "r+") as file:
        del file.attrs["total_duration"]
    repair(path, target, DEFAULT)
    with open_episode(target) as episode:
        assert episode.fps is None


@pytest.mark.parametrize(
    ("schema", "name", "given", "expected"),
    [
        ("v1", "plain.h5", "go", "Navigate around obstacles and reach the front of the beverage bottle on the left"),
        ("v6", "plain.h5", " go ", "go"),
        ("v6", "weak_left.h5", "go", "go"),
        ("v6", "weak_left.h5", None, "Navigate to the gray basket on the left"),
    ],
)
def test_instruction(synthetic, target, schema, name, given, expected):
    path = synthetic(schema)
    path = path.rename(path.with_name(name))
    repair(path, target, RepairOptions(instruction=given))
    with open_episode(target) as episode:
        assert episode.instruction == expected


@pytest.mark.parametrize(("given", "message"), [(None, "has no instruction"), ("x" * 257, "cannot be stored")])
def test_instruction_that_is_missing_or_too_long(synthetic, target, given, message):
    path = synthetic("v6")
    path = path.rename(path.with_name("plain.h5"))
    with pytest.raises(EpisodeError, match=message):
        repair(path, target, RepairOptions(instruction=given))
    assert list(target.parent.iterdir()) == []


def test_a_corrupt_end_is_dropped_only_if_asked(synthetic, target):
    path = synthetic("v5_jpeg")
    break_frames(path, 4, 5)
    with pytest.raises(EpisodeError, match="frame 5 of 6 is corrupt"):
        repair(path, target, DEFAULT)
    assert list(target.parent.iterdir()) == []
    result = repair(path, target, RepairOptions(drop_corrupt=True))
    assert (result.frames, result.dropped) == (4, 2)
    with open_episode(path) as old, open_episode(target) as new:
        np.testing.assert_array_equal(new.actions, old.actions[:4])
        assert new.fps == pytest.approx(6)


def test_lengths_follow_a_dropped_end(synthetic, target):
    path = synthetic("v6")
    with h5py.File(path, "r+") as file:
        file["images"].id.write_direct_chunk((5, 0, 0, 0), b"no gzip data")
    repair(path, target, RepairOptions(drop_corrupt=True))
    with open_episode(target) as episode:
        assert len(episode) == len(episode.event_types) == len(episode.action_classes) == 5
        assert episode.attributes["num_frames"] == 5
        assert episode.attributes["total_duration"] == pytest.approx(5 / 6)
        assert episode.fps == pytest.approx(6)


@pytest.mark.parametrize("broken", [(2,), (2, 5)])
def test_a_corrupt_middle_is_refused(synthetic, target, broken):
    path = synthetic("v5_jpeg")
    break_frames(path, *broken)
    with pytest.raises(EpisodeError, match="frame 2 of 6 is corrupt, and later ones are not"):
        repair(path, target, RepairOptions(drop_corrupt=True))
    assert list(target.parent.iterdir()) == []


def test_nothing_readable(synthetic, target):
    path = synthetic("v5_jpeg")
    break_frames(path, *range(6))
    with pytest.raises(EpisodeError, match="no frame can be read"):
        repair(path, target, RepairOptions(drop_corrupt=True))


def test_frames_of_different_size_are_refused(synthetic, tmp_path, target):
    path = synthetic("v5_jpeg")
    other = write_synthetic(tmp_path, "v5_jpeg", side="right", seed=1, height=10, width=20, length=6)
    with h5py.File(path, "r+") as file, h5py.File(other) as small:
        file[IMAGES][4] = small[IMAGES][4]
    with pytest.raises(EpisodeError, match="frame 4 has 10x20"):
        repair(path, target, DEFAULT)


def test_an_older_file_stays_when_the_repair_fails(synthetic, target):
    target.write_bytes(b"older")
    path = synthetic("v5_jpeg")
    break_frames(path, 2)
    with pytest.raises(EpisodeError):
        repair(path, target, DEFAULT)
    assert target.read_bytes() == b"older"


def test_plan(tmp_path):
    out = tmp_path / "out"
    paths = [tmp_path / "a.hdf5", tmp_path / "b.h5"]
    assert plan_repairs(paths, out, force=False) == (out / "a.h5", out / "b.h5")
    out.mkdir()
    (out / "b.h5").touch()
    with pytest.raises(EpisodeError, match=r"b\.h5 exists") as caught:
        plan_repairs(paths, out, force=False)
    assert "--force" in caught.value.hint
    assert plan_repairs(paths, out, force=True) == (out / "a.h5", out / "b.h5")


def test_plan_never_replaces_an_original(tmp_path):
    original = tmp_path / "a.h5"
    original.touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(EpisodeError, match="would replace the original"):
            plan_repairs([original], folder, force=True)


def test_plan_gives_no_name_twice(tmp_path):
    with pytest.raises(EpisodeError, match="two episodes would become"):
        plan_repairs([tmp_path / "x" / "a.h5", tmp_path / "y" / "a.hdf5"], tmp_path / "out", force=True)
