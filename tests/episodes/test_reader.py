"""What open_episode makes of intact files of every schema."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
import warnings

import h5py
import numpy as np
import pytest
from PIL import Image

from bundle.errors import EpisodeError
from episodes.reader import EpisodeWarning, open_episode
from episodes.synthetic import write_synthetic

STEPS = np.ones((3, 3), np.float32)
BOTTLE = "Navigate around obstacles and reach the front of the beverage bottle on the left"
BASKET = "Navigate to the gray basket on the left"


@pytest.mark.parametrize(("kind", "schema"), [("v1", "v1"), ("v5", "v5"), ("v5_jpeg", "v5")])
def test_every_schema_with_text_reads_alike(synthetic, kind, schema):
    with open_episode(synthetic(kind)) as episode:
        assert episode.schema == schema
        assert len(episode) == 6
        assert episode.actions.shape == (6, 3)
        assert episode.actions.dtype == np.float32
        assert episode.action_names == ("linear_x", "linear_y", "angular_z")
        assert episode.instruction == (BOTTLE if schema == "v1" else BASKET)
        assert episode.instruction_source == "stored"
        assert episode.fps == pytest.approx(6.0)
        frames = list(episode.frames())
    assert len(frames) == 6
    assert all(frame.shape == (24, 32, 3) and frame.dtype == np.uint8 for frame in frames)


def test_v6_has_classes_events_and_no_text(synthetic):
    with pytest.warns(EpisodeWarning, match="assuming 'Navigate to the gray basket on the left' from the file name"):
        episode = open_episode(synthetic("v6"))
    with episode:
        assert episode.schema == "v6"
        assert episode.instruction_source == "file name"
        assert episode.event_types is not None
        assert episode.event_types[0] == "episode_start"
        assert episode.action_classes is not None
        assert episode.action_classes.dtype == np.int64
        assert episode.attributes["scenario"] == "weak_left"
        assert episode.fps == pytest.approx(6.0)


def test_the_warning_points_at_the_caller(synthetic):
    with pytest.warns(EpisodeWarning) as caught, open_episode(synthetic("v6")):
        pass
    assert caught[0].filename == __file__


def test_v6_bgr_becomes_rgb_and_v1_stays(handmade):
    red_in_rgb = np.zeros((3, 4, 5, 3), np.uint8)
    red_in_rgb[..., 0] = 255
    classes = np.zeros(3, np.int64)
    v1 = handmade({"images": red_in_rgb, "actions": STEPS, "language_instruction": ["go"]}, name="v1.h5")
    bgr = {"images": red_in_rgb[..., ::-1], "actions": STEPS, "language_instruction": ["go"], "action_classes": classes}
    v6 = handmade(bgr, name="v6.h5")
    with open_episode(v1) as first, open_episode(v6) as second:
        assert (first.schema, second.schema) == ("v1", "v6")
        np.testing.assert_array_equal(first.frame(0), red_in_rgb[0])
        np.testing.assert_array_equal(second.frame(0), red_in_rgb[0])
        assert second.frame(0).flags.c_contiguous


@pytest.mark.parametrize("name", ["scenario", "cx_position", "cx_path", "control_mode"])
def test_each_v6_attribute_is_enough(handmade, noise, name):
    path = handmade({"images": noise, "actions": STEPS, "language_instruction": ["go"]}, {name: "x"})
    with open_episode(path) as episode:
        assert episode.schema == "v6"
    with open_episode(path, schema="v1") as episode:
        np.testing.assert_array_equal(episode.frame(1), noise[1])


def test_jpeg_frames_are_what_pillow_decodes(synthetic):
    path = synthetic("v5_jpeg")
    with h5py.File(path) as file, open_episode(path) as episode:
        for index, stored in enumerate(file["observations/images"]):
            expected = np.asarray(Image.open(io.BytesIO(stored.tobytes())))
            np.testing.assert_array_equal(episode.frame(index), expected)


def test_jpeg_needs_no_format_attribute(synthetic):
    path = synthetic("v5_jpeg")
    with h5py.File(path, "a") as file:
        del file["observations/images"].attrs["format"]
    with open_episode(path) as episode:
        assert episode.frame(5).shape == (24, 32, 3)


def test_opening_reads_no_image(handmade, noise):
    """Every byte of pixel data on the disk is destroyed, and still the file opens; only reading a frame finds out."""
    path = handmade({"actions": STEPS, "language_instruction": ["go"]})
    with h5py.File(path, "a") as file:
        images = file.create_dataset("images", data=noise, chunks=(1, 24, 32, 3), compression="gzip")
        places = [images.id.get_chunk_info(i) for i in range(3)]
    with path.open("r+b") as raw:
        for place in places:
            raw.seek(place.byte_offset)
            raw.write(b"\xff" * place.size)
    with open_episode(path) as episode:
        assert len(episode) == 3
        with pytest.raises(EpisodeError, match="frame 2 of 3 is corrupt"):
            episode.frame(2)


def test_one_frame_in_memory(tmp_path):
    path = write_synthetic(tmp_path, "v1", side="right", seed=0, height=240, width=320, length=18)
    frame_bytes = 240 * 320 * 3
    with open_episode(path) as episode:
        tracemalloc.start()
        for frame in episode.frames():
            assert frame.nbytes == frame_bytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * frame_bytes


def test_every_frame_is_a_new_array(synthetic):
    with open_episode(synthetic("v1")) as episode:
        first = episode.frame(0)
        first[:] = 0
        assert episode.frame(0).any()


@pytest.mark.parametrize("index", [-1, 6, 10**9])
def test_index_outside_the_episode(synthetic, index):
    with open_episode(synthetic("v1")) as episode, pytest.raises(IndexError, match="6 frames"):
        episode.frame(index)


def test_closed_episode_keeps_its_small_data(synthetic):
    with open_episode(synthetic("v1")) as episode:
        pass
    assert episode.actions.any()
    with pytest.raises(ValueError, match="closed"):
        episode.frame(0)


def test_episode_is_frozen(synthetic):
    with open_episode(synthetic("v1")) as episode, pytest.raises(dataclasses.FrozenInstanceError):
        episode.instruction = "something else"


@pytest.mark.parametrize(
    "stored",
    [
        np.array([b"turn left \xec\x99\xbc"], dtype="S256"),
        np.array([b"turn left \xec\x99\xbc\0\0left-over"], dtype="S256"),
        ["turn left 왼"],
        "turn left 왼",
        ["turn left 왼", "turn left 왼"],
        ["", "turn left 왼"],
    ],
    ids=["S256", "S256 with garbage", "vlen", "scalar", "repeated", "blank and text"],
)
def test_stored_text(handmade, noise, stored):
    path = handmade({"images": noise, "actions": STEPS, "language_instruction": stored})
    with open_episode(path) as episode:
        assert episode.instruction == "turn left 왼"


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("episode_20251106_120000_1box_hori_left_core_medium.h5", BOTTLE),
        ("Episode_RIGHT.h5", BOTTLE.replace("left", "right")),
        ("episode_20260715_173157_weak_left_left_curve.h5", BOTTLE),
    ],
)
@pytest.mark.parametrize("blank", [None, b"", b"  "])
def test_side_in_the_name_stands_in_for_text(handmade, noise, name, instruction, blank):
    extra = {} if blank is None else {"language_instruction": np.array([blank], dtype="S256")}
    path = handmade({"images": noise, "actions": STEPS, **extra}, name=name)
    with pytest.warns(EpisodeWarning, match="from the file name"):
        episode = open_episode(path)
    with episode:
        assert episode.instruction == instruction
        assert episode.instruction_source == "file name"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("episode_20251106_120000.h5", "names no side"),
        ("episode_leftover_bright.h5", "names no side"),
        ("episode_20260715_weak_left_right_curve.h5", "names both left and right"),
    ],
)
def test_nothing_is_guessed_without_one_clear_side(handmade, noise, name, why):
    path = handmade({"images": noise, "actions": STEPS}, name=name)
    with pytest.warns(EpisodeWarning, match=why):
        episode = open_episode(path)
    with episode:
        assert episode.instruction is None
        assert episode.instruction_source == "none"


def test_a_warning_turned_into_an_error_leaves_the_file_closed(handmade, noise):
    path = handmade({"images": noise, "actions": STEPS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EpisodeWarning):
            open_episode(path)
    with h5py.File(path, "a"):  # would fail while a reader is open
        pass


@pytest.mark.parametrize(
    ("datasets", "attributes", "fps"),
    [
        ({}, {"fps": 5.0}, 5.0),
        ({}, {"total_duration": 0.5}, 6.0),
        ({}, {"total_duration": np.float64(0.5), "fps": np.int64(10)}, 10.0),
        ({"timestamps": np.array([1.0, 1.1, 1.2])}, {"total_duration": 99.0}, 10.0),
        ({"observations/timestamps": np.array([0, 1, 2])}, {}, None),
        ({"timestamps": np.array([5.0, 5.0, 5.0])}, {}, None),
        ({"timestamps": np.array([0, 200_000_000, 400_000_000])}, {}, None),
        ({"timestamps": np.array([np.nan, 1, 2])}, {}, None),
        ({"timestamps": np.array([0.0, 1.0])}, {}, None),
        ({}, {"total_duration": 0.0}, None),
        ({}, {"total_duration": "long"}, None),
        ({}, {}, None),
    ],
)
def test_frame_rate(handmade, noise, datasets, attributes, fps):
    content = {"images": noise, "actions": STEPS, "language_instruction": ["go"], **datasets}
    with open_episode(handmade(content, attributes)) as episode:
        assert episode.fps == (None if fps is None else pytest.approx(fps))


def test_attributes_are_plain_python(handmade, noise):
    attributes = {
        "name": "a",
        "raw": np.bytes_(b"b"),
        "count": np.int64(3),
        "list": np.array([1, 2]),
        "texts": np.array([b"x", b"y"]),
        "empty": h5py.Empty("f"),
    }
    path = handmade({"images": noise, "actions": STEPS, "language_instruction": ["go"]}, attributes)
    with open_episode(path) as episode:
        plain = {"name": "a", "raw": "b", "count": 3, "list": [1, 2], "texts": ["x", "y"], "empty": None}
        assert episode.attributes == plain
        assert type(episode.attributes["count"]) is int


def test_two_axes_keep_their_names(handmade, noise):
    path = handmade({"images": noise, "actions": STEPS[:, :2], "language_instruction": ["go"]})
    with open_episode(path) as episode:
        assert episode.action_names == ("linear_x", "linear_y")


def test_unknown_schema_argument(synthetic):
    with pytest.raises(ValueError, match="one of v1, v5, v6"):
        open_episode(synthetic("v1"), schema="v2")
