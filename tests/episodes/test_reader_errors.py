"""Every way a file can be wrong has its own message, and none of them is a traceback of h5py."""

from __future__ import annotations

import fcntl
import os

import h5py
import numpy as np
import pytest

from bundle.errors import EpisodeError
from episodes.reader import open_episode

STEPS = np.ones((3, 3), np.float32)
TEXT = {"language_instruction": ["go"]}


def refusal(path, **options) -> str:
    """The message with which `path` is refused; it must be complete."""
    with pytest.raises(EpisodeError) as caught:
        open_episode(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n\nhint: " in message
    assert "expected: " in message
    return message


def test_missing(tmp_path):
    assert "not found" in refusal(tmp_path / "episode.h5")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "episode.h5"
    os.mkfifo(pipe)
    assert "is a named pipe" in refusal(pipe)


def test_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "got"),
    [(b"", "an empty file (0 bytes)"), (b"version https://git-lfs", "version https"), (bytes(4096), "4096 bytes")],
)
def test_not_hdf5(tmp_path, content, got):
    path = tmp_path / "episode.h5"
    path.write_bytes(content)
    message = refusal(path)
    assert "is not an HDF5 file" in message
    assert got in message


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.99])
def test_truncated(synthetic, kept):
    path = synthetic("v1")
    size = path.stat().st_size
    os.truncate(path, int(size * kept))
    message = refusal(path)
    assert "truncated or damaged" in message
    assert f"({int(size * kept)} bytes)" in message


def test_damaged_structure(synthetic):
    """The superblock is intact, what it points to is not."""
    path = synthetic("v1")
    with path.open("r+b") as raw:
        raw.seek(96)
        raw.write(b"\xee" * 400)
    assert "damaged" in refusal(path)


def test_being_written(synthetic):
    path = synthetic("v1")
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "locked by a program that is writing it" in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden(synthetic):
    path = synthetic("v1")
    path.chmod(0)
    assert "may not be read" in refusal(path)


def test_unknown_layout_lists_what_is_there(handmade, noise):
    message = refusal(handmade({"rgb/front": noise, "actions": STEPS}))
    assert "none of the known episode layouts" in message
    assert "actions float32(3, 3), rgb/front uint8(3, 24, 32, 3)" in message


def test_unknown_layout_without_anything(handmade):
    assert "no datasets at all" in refusal(handmade({}))


def test_a_long_list_is_cut(handmade):
    assert "and 5 more" in refusal(handmade({f"d{i:02}": i for i in range(25)}))


@pytest.mark.parametrize("both", [True, False])
def test_session_log(handmade, noise, both):
    content = {"observations/images": noise, "grounding/boxes": STEPS, "actions": STEPS, **TEXT}
    path = handmade(content, {"runtime_config": "{}"} if both else None)
    message = refusal(path)
    assert "is a session log, not an episode" in message
    assert "group 'grounding'" in message
    assert 'schema="v5"' in message
    with open_episode(path, schema="v5") as episode:
        assert len(episode) == 3


def test_override_that_does_not_fit(synthetic):
    message = refusal(synthetic("v1"), schema="v5")
    assert "has no dataset 'observations/images'" in message
    assert "images uint8(6, 24, 32, 3)" in message


def test_no_actions(handmade, noise):
    assert "has no dataset 'actions'" in refusal(handmade({"images": noise, **TEXT}))


@pytest.mark.parametrize("name", ["images", "observations/images"])
def test_empty(handmade, name):
    path = handmade({name: np.zeros((0, 4, 4, 3), np.uint8), "actions": np.zeros((0, 3), np.float32)})
    assert "it holds no frames" in refusal(path)


def test_empty_jpeg(tmp_path):
    path = tmp_path / "episode.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("observations/images", (0,), dtype=h5py.vlen_dtype(np.uint8))
        file["actions"] = np.zeros((0, 3), np.float32)
    assert "it holds no frames" in refusal(path)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 4, 5, 3), np.float32),
        np.zeros((3, 4, 5, 4), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 5, 3), np.uint8),
        np.zeros((3, 0, 5, 3), np.uint8),
        np.uint8(1),
        h5py.Empty("u1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["images", "observations/images"])
def test_wrong_images(handmade, name, images):
    message = refusal(handmade({name: images, "actions": STEPS, **TEXT}))
    assert f"{name} does not hold images of schema" in message
    assert "uint8 (T, H, W, 3)" in message


def test_unknown_encoding(synthetic):
    path = synthetic("v5_jpeg")
    with h5py.File(path, "a") as file:
        file["observations/images"].attrs["format"] = np.bytes_(b"webp")
    assert "format='webp'" in refusal(path)


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((3, 4), np.float32),
        np.zeros(3, np.float32),
        np.zeros((3, 3), np.int64),
        np.float32(0),
        h5py.Empty("f4"),
    ],
    ids=str,
)
def test_wrong_actions(handmade, noise, actions):
    assert "does not hold velocity commands" in refusal(handmade({"images": noise, "actions": actions, **TEXT}))


@pytest.mark.parametrize(("count", "word"), [(2, "fewer"), (4, "more"), (0, "fewer")])
def test_as_many_actions_as_images(handmade, noise, count, word):
    message = refusal(handmade({"images": noise, "actions": np.zeros((count, 3), np.float32), **TEXT}))
    assert f"there are {word} actions than images" in message
    assert f"got:      {count} actions for 3 images" in message


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "f4"), (np.inf, "f4"), (-np.inf, "f8"), (1e300, "f8")])
def test_actions_must_be_finite(handmade, noise, value, dtype):
    actions = np.zeros((3, 3), dtype)
    actions[1, 2] = value
    message = refusal(handmade({"images": noise, "actions": actions, **TEXT}))
    assert "action 1 is not finite" in message
    assert "angular_z = " in message


@pytest.mark.parametrize("chunks", [None, (1, 3)])
def test_actions_that_never_reached_the_disk_are_not_zeros(handmade, noise, chunks):
    path = handmade({"images": noise, **TEXT})
    with h5py.File(path, "a") as file:
        file.create_dataset("actions", (3, 3), np.float32, chunks=chunks)
    assert "actions was never written to disk" in refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("action_event_types", ["episode_start"], "1 action_event_types for 3 images"),
        ("action_event_types", np.zeros(3), "does not hold text"),
        ("action_classes", np.zeros(4, np.int64), "4 action_classes for 3 images"),
        ("action_classes", np.zeros(3), "does not hold class numbers"),
        ("language_instruction", np.zeros(1), "does not hold text"),
        ("language_instruction", ["go left", "go right"], "2 different instructions"),
        ("language_instruction", np.array([b"\xff\xfe"]), "is not UTF-8"),
    ],
)
def test_wrong_companions(handmade, noise, name, value, part):
    assert part in refusal(handmade({"images": noise, "actions": STEPS, name: value}))


def corrupt_frames(path) -> dict[int, str]:
    """Frame index -> message, for each frame of `path` that cannot be read."""
    found = {}
    with open_episode(path) as episode:
        for index in range(len(episode)):
            try:
                episode.frame(index)
            except EpisodeError as error:
                found[index] = str(error)
                assert f"{path}: frame {index} of {len(episode)} is corrupt" in found[index]
                assert "\n\nhint: " in found[index]
    return found


def test_flipped_bit_in_a_gzip_chunk(synthetic):
    path = synthetic("v1")
    with h5py.File(path) as file:
        place = file["images"].id.get_chunk_info(4)
    with path.open("r+b") as raw:
        raw.seek(place.byte_offset + place.size // 2)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 0x10]))
    assert list(corrupt_frames(path)) == [4]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: data[:0], "0 bytes of JPEG"),
        (lambda data: data[: len(data) // 2], "no JPEG image"),
        (lambda data: data[2:], "no JPEG image"),
        (lambda data: np.zeros_like(data), "no JPEG image"),
        (lambda data: np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(50), np.uint8), "no JPEG image"),
    ],
    ids=["empty", "truncated", "without head", "zeros", "png"],
)
def test_bad_jpeg(synthetic, damage, part):
    path = synthetic("v5_jpeg")
    with h5py.File(path, "a") as file:
        images = file["observations/images"]
        images[2] = damage(images[2])
    found = corrupt_frames(path)
    assert list(found) == [2]
    assert part in found[2]
    assert "a complete JPEG image" in found[2]


@pytest.mark.parametrize("chunks", [(1, 24, 32, 3), (2, 7, 32, 3)])
def test_frames_that_never_reached_the_disk_are_not_black(handmade, noise, chunks):
    path = handmade({"actions": STEPS, **TEXT})
    with h5py.File(path, "a") as file:
        file.create_dataset("images", noise.shape, np.uint8, chunks=chunks, compression="gzip")[:2] = noise[:2]
    found = corrupt_frames(path)
    assert list(found) == [2]
    assert "never written" in found[2]


def test_unallocated_contiguous_images(handmade, noise):
    path = handmade({"actions": STEPS, **TEXT})
    with h5py.File(path, "a") as file:
        file.create_dataset("images", noise.shape, np.uint8)
    assert "images was never written" in refusal(path)
