"""What HDF5 would read as zeros, believe, or fetch from elsewhere on the machine: found before it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bundle.errors import EpisodeError
from episodes.examination import examine
from episodes.reader import open_episode

T, H, W = 8, 12, 16
FRAMES = np.random.default_rng(0).integers(1, 255, (T, H, W, 3), np.uint8)
ACTIONS = np.tile(np.array([1.0, 0.25, 0.0], np.float32), (T, 1))


def episode(path: Path, write: Callable[[h5py.File], object], *, actions: bool = True) -> Path:
    with h5py.File(path, "w") as file:
        file["language_instruction"] = np.array([b"Go left"], "S16")
        if actions:
            file["actions"] = ACTIONS
        write(file)
    return path


def refused(path: Path, match: str) -> EpisodeError:
    with pytest.raises(EpisodeError, match=match) as caught, open_episode(path) as opened:
        for _ in opened.frames():
            pass
    return caught.value


# --- layouts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.one_of(st.none(), st.tuples(st.integers(1, T), st.integers(1, H), st.integers(1, W), st.integers(1, 3))),
    filters=st.sampled_from(
        [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}]
    ),
    order=st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2"]),
)
def test_any_layout_is_read_as_h5py_reads_it(tmp_path: Path, chunks: Any, filters: dict[str, Any], order: str) -> None:
    def write(file: h5py.File) -> None:
        options = filters if chunks is not None else {}
        file.create_dataset("images", data=FRAMES, chunks=chunks, **options)
        file["actions"] = ACTIONS.astype(order)

    path = episode(tmp_path / "a_left.h5", write, actions=False)
    with open_episode(path) as opened:
        assert_array_equal(np.stack(list(opened.frames())), FRAMES)
        assert_array_equal(opened.actions, ACTIONS)


@pytest.mark.parametrize("chunks", [(1, H, W, 3), (4, H, W, 3), (1, 6, 8, 3)])
def test_chunks_that_were_never_written_are_found(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    def write(file: h5py.File) -> None:
        images = file.create_dataset("images", (T, H, W, 3), np.uint8, chunks=chunks)
        images[:4] = FRAMES[:4]

    error = refused(episode(tmp_path / "a_left.h5", write), "frame [45] of 8 is corrupt")
    assert "never written" in str(error.got)


def test_images_without_any_storage_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    path = episode(tmp_path / "a_left.h5", lambda file: file.create_dataset("images", (T, H, W, 3), np.uint8))
    refused(path, "images was never written to disk")


@pytest.mark.parametrize("chunks", [None, (T, 3)])
def test_actions_that_end_in_stops_which_nobody_commanded(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    """The room for all was there, the robot drove on, and half was written."""

    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        actions = file.create_dataset("actions", (T, 3), np.float32, chunks=chunks)
        actions[:3] = ACTIONS[:3]

    path = episode(tmp_path / "a_left.h5", write, actions=False)
    error = refused(path, "actions 3 to 7 were never written or were lost")
    assert "the pictures go on" in str(error.got)
    assert any(problem.code == "actions" and problem.severity == "error" for problem in examine(path).problems)


def test_a_robot_that_stands_at_the_end_is_believed(tmp_path: Path) -> None:
    frames = FRAMES.copy()
    frames[4:] = frames[4]
    actions = ACTIONS.copy()
    actions[4:] = 0

    def write(file: h5py.File) -> None:
        file["images"] = frames
        file["actions"] = actions

    with open_episode(episode(tmp_path / "a_left.h5", write, actions=False)) as opened:
        assert_array_equal(opened.actions, actions)


# --- elsewhere ----------------------------------------------------------------------------------------------------------


def external(folder: Path, stored: str, size: int) -> Path:
    path = folder / "a_left.h5"
    return episode(
        path,
        lambda file: file.create_dataset(
            "images", (T, H, W, 3), np.uint8, external=[(stored, 0, size)], efile_prefix=str(path.parent)
        ),
    )


def test_external_storage_beside_the_episode_is_read(tmp_path: Path) -> None:
    (tmp_path / "images.raw").write_bytes(FRAMES.tobytes())
    with open_episode(external(tmp_path, "images.raw", FRAMES.nbytes)) as opened:
        assert_array_equal(opened.frame(3), FRAMES[3])


def test_external_storage_that_is_cut_off_reads_no_zeros(tmp_path: Path) -> None:
    (tmp_path / "images.raw").write_bytes(FRAMES.tobytes()[:-100])
    refused(external(tmp_path, "images.raw", FRAMES.nbytes), "external storage of /images is cut off")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.raw"])
def test_no_file_of_the_machine_is_taken_for_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.raw").write_bytes(FRAMES.tobytes())
    (tmp_path / "inside").mkdir()
    refused(external(tmp_path / "inside", name, FRAMES.nbytes), "lies outside of the episode's folder")


def test_who_trusts_a_file_may_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.raw").write_bytes(FRAMES.tobytes())
    (tmp_path / "inside").mkdir()
    path = external(tmp_path / "inside", "../outside.raw", FRAMES.nbytes)
    monkeypatch.setenv("JETVLA_EPISODE_LINKS", "anywhere")
    with open_episode(path) as opened:
        assert_array_equal(opened.frame(0), FRAMES[0])


def test_a_linked_file_beside_the_episode_is_read_and_one_elsewhere_is_not(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for folder in (tmp_path, tmp_path / "inside"):
        with h5py.File(folder / "other.h5", "w") as file:
            file["pictures"] = FRAMES
    link = h5py.ExternalLink
    good = episode(
        tmp_path / "inside" / "a_left.h5", lambda file: file.__setitem__("images", link("other.h5", "/pictures"))
    )
    with open_episode(good) as opened:
        assert_array_equal(opened.frame(7), FRAMES[7])
    bad = episode(
        tmp_path / "inside" / "b_left.h5", lambda file: file.__setitem__("images", link("../other.h5", "/pictures"))
    )
    refused(bad, "lies outside of the episode's folder")


def test_a_pipe_behind_a_link_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = episode(
        tmp_path / "a_left.h5", lambda file: file.__setitem__("images", h5py.ExternalLink("pipe", "/pictures"))
    )
    refused(path, "is a named pipe")
    (tmp_path / "b_left.h5").symlink_to(tmp_path / "pipe")
    refused(tmp_path / "b_left.h5", "is a named pipe")


def virtual(folder: Path, parts: int, *, present: int) -> Path:
    rows = T // parts
    layout = h5py.VirtualLayout((T, H, W, 3), np.uint8)
    for part in range(parts):
        if part < present:
            with h5py.File(folder / f"part{part}.h5", "w") as file:
                file["images"] = FRAMES[part * rows : (part + 1) * rows]
        layout[part * rows : (part + 1) * rows] = h5py.VirtualSource(f"part{part}.h5", "images", (rows, H, W, 3))
    return episode(folder / "a_left.h5", lambda file: file.create_virtual_dataset("images", layout))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_whole_virtual_dataset_is_read(tmp_path: Path, parts: int) -> None:
    with open_episode(virtual(tmp_path, parts, present=parts)) as opened:
        assert_array_equal(np.stack(list(opened.frames())), FRAMES)


def test_a_virtual_dataset_without_a_source_reads_no_zeros(tmp_path: Path) -> None:
    refused(virtual(tmp_path, 4, present=3), r"part3\.h5(.|\n)*is missing")


# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((10**9, 8, 8, 3), (1, 8, 8, 3)), ((T, 30_000, 30_000, 3), (1, 3000, 3000, 3)), ((T, H, W, 3), (1, 1, 1, 1))],
)
def test_declared_sizes_are_held_against_the_file(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    path = episode(tmp_path / "a_left.h5", lambda file: file.create_dataset("images", shape, np.uint8, chunks=chunks))
    refused(path, r"absurd size|never written|than images|fewer")


def test_two_gigabytes_of_actions_in_two_megabytes_are_not_unpacked(tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        file.create_dataset("actions", (T, 3), np.float32, chunks=(T, 3), compression="gzip", shuffle=False)
        bomb = np.zeros(200 << 20, np.uint8).tobytes()
        import zlib

        file["actions"].id.write_direct_chunk((0, 0), zlib.compress(bomb, 9))

    path = episode(tmp_path / "a_left.h5", write, actions=False)
    refused(path, r"absurd size|corrupt|cannot be read")


def test_a_filter_that_is_not_installed_is_named_with_its_package(tmp_path: Path) -> None:
    path = tmp_path / "a_left.h5"
    with h5py.File(path, "w") as file:
        file["language_instruction"] = np.array([b"Go left"], "S16")
        file["actions"] = ACTIONS
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, H, W, 3))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((T, H, W, 3))
        h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, space, properties)
    if h5py.h5z.filter_avail(32015):
        pytest.skip("the filter is installed here")
    error = refused(path, "compressed with zstd, for which no filter is installed")
    assert "hdf5plugin" in error.hint


# --- attributes and times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        10,
        10.0,
        np.int64(10),
        np.float32(10),
        np.array([10.0]),
        np.array(10, ">i2"),
        "10",
        b"10",
        np.bytes_("10.0"),
        np.array(["10"], "S4"),
    ],
)
def test_a_frame_rate_in_every_usual_type(tmp_path: Path, value: object) -> None:
    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        file.attrs["fps"] = value

    with open_episode(episode(tmp_path / "a_left.h5", write)) as opened:
        assert opened.fps == 10.0


@pytest.mark.parametrize("value", [-6.0, 0.0, 1e9, np.nan, "fast", np.inf])
def test_a_frame_rate_that_no_camera_has_is_refused(tmp_path: Path, value: object) -> None:
    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        file.attrs["fps"] = value

    refused(episode(tmp_path / "a_left.h5", write), r"fps")


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (np.arange(T), "count frames"),
        (np.arange(T) * 100, "no seconds; as milliseconds"),
        (1_700_000_000_000_000_000 + np.arange(T, dtype=np.int64) * 100_000_000, "no seconds; as nanoseconds"),
        (np.zeros(T), "do not go forward"),
        (np.full(T, np.nan), "not all finite"),
    ],
)
def test_times_that_are_no_seconds_are_not_believed(tmp_path: Path, times: Any, said: str) -> None:
    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        file["timestamps"] = times

    path = episode(tmp_path / "a_left.h5", write)
    with open_episode(path) as opened:
        assert opened.fps is None
    assert any(said in problem.text for problem in examine(path).problems if problem.code == "times")


def test_an_attribute_of_300_megabytes_is_not_read(tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        file["images"] = FRAMES
        file.attrs.create("notes", np.zeros(2_000_000, np.uint8))

    with h5py.File(tmp_path / "probe.h5", "w", libver="latest") as file:
        file.attrs.create("notes", np.zeros(2_000_000, np.uint8))
    path = tmp_path / "a_left.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["language_instruction"] = np.array([b"Go left"], "S16")
        file["actions"] = ACTIONS
        write(file)
    refused(path, "attribute 'notes' is of an absurd size")
