"""What write_episode writes is V1, is read back unchanged, and is there completely or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bundle.errors import EpisodeError, FrameError, StorageError
from episodes.atomic_hdf5 import atomic_hdf5
from episodes.reader import open_episode
from episodes.writer import write_episode

ROOT = Path(__file__).resolve().parents[2]
STEPS = np.zeros((3, 3), np.float32)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=64)
event_names = st.sampled_from(["episode_start", "start_action", "stop_action"])


@st.composite
def recordings(draw):
    length, height, width = (draw(st.integers(1, most)) for most in (5, 9, 9))
    frames = draw(arrays(np.uint8, (length, height, width, 3)))
    actions = draw(arrays(np.float32, (length, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    events = draw(st.none() | st.lists(event_names, min_size=length, max_size=length))
    instruction = draw(texts.filter(str.strip))
    fps = draw(st.floats(0.5, 120))
    return frames, actions, events, instruction, fps


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(recordings())
def test_round_trip(tmp_path_factory, recording):
    frames, actions, events, instruction, fps = recording
    path = tmp_path_factory.mktemp("round_trip") / "episode.h5"
    assert write_episode(path, iter(frames), actions, instruction=instruction, fps=fps, event_types=events) == path
    with open_episode(path) as episode:
        assert episode.schema == "v1"
        np.testing.assert_array_equal(np.stack(list(episode.frames())), frames)
        assert episode.actions.tobytes() == actions.tobytes()  # also the sign of zero
        assert episode.instruction == instruction
        assert episode.fps == pytest.approx(fps)
        if events is not None:
            assert episode.event_types == tuple(events)


def test_the_file_is_v1_to_the_letter(tmp_path, noise):
    path = tmp_path / "episode_20251106_120000_1box_hori_left_core_medium.h5"
    actions = np.array([[0, 0, 0], [1.15, -1.15, 0], [0, 0, 0]])
    when = datetime(2025, 11, 6, 12)
    details = {"obstacle_layout_type": "1box_hori", "time_period": "core", "collected_at": when}
    write_episode(path, noise, actions, instruction="go left", fps=6.0, **details)
    with h5py.File(path) as file:
        assert sorted(file) == ["action_event_types", "actions", "images", "language_instruction"]
        images = file["images"]
        assert (images.dtype, images.shape, images.chunks) == (np.uint8, (3, 24, 32, 3), (1, 24, 32, 3))
        assert images.compression == "gzip"
        assert (file["actions"].dtype, file["actions"].shape) == (np.float32, (3, 3))
        assert h5py.check_string_dtype(file["action_event_types"].dtype).length is None
        assert list(file["action_event_types"]) == [b"episode_start", b"start_action", b"stop_action"]
        assert (file["language_instruction"].dtype, file["language_instruction"].shape) == (np.dtype("S256"), (1,))
        assert dict(file.attrs) == {
            "episode_name": path.stem,
            "total_duration": 0.5,
            "num_frames": 3,
            "action_chunk_size": 10,
            "obstacle_layout_type": "1box_hori",
            "time_period": "core",
            "collection_datetime": "2025-11-06T12:00:00",
        }


def test_without_instruction_the_dataset_is_missing(tmp_path, noise):
    path = write_episode(tmp_path / "x.h5", noise, STEPS, instruction=None, fps=6)
    with h5py.File(path) as file:
        assert "language_instruction" not in file


def test_256_bytes_fit(tmp_path, noise):
    text = "é" * 128
    with open_episode(write_episode(tmp_path / "x.h5", noise, STEPS, instruction=text, fps=6)) as episode:
        assert episode.instruction == text


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"actions": np.zeros((3, 2))}, EpisodeError, r"\(3, 2\)"),
        ({"actions": np.zeros((0, 3)), "frames": []}, EpisodeError, "T >= 1"),
        ({"actions": [[0, 0, 0], [0, np.nan, 0], [0, 0, 0]]}, EpisodeError, "action 1 is not finite"),
        ({"actions": np.full((3, 3), 1e300)}, EpisodeError, "action 0 is not finite"),
        ({"actions": np.zeros((2, 3))}, EpisodeError, "more than 2 frames"),
        ({"actions": np.zeros((4, 3))}, EpisodeError, "got:      3 frames"),
        ({"event_types": ["episode_start"]}, EpisodeError, "1 event types"),
        ({"instruction": " "}, EpisodeError, "blank"),
        ({"instruction": "a\0b"}, EpisodeError, "contains NUL"),
        ({"instruction": "é" * 129}, EpisodeError, "258 bytes"),
        ({"instruction": "\ud800"}, EpisodeError, "not encodable"),
        ({"fps": 0}, EpisodeError, "fps is not a rate"),
        ({"fps": float("nan")}, EpisodeError, "fps is not a rate"),
        ({"frames": [np.zeros((4, 4, 3), np.float32)] * 3}, FrameError, "frame 0"),
        ({"frames": [np.zeros((4, 4), np.uint8)] * 3}, FrameError, "frame 0"),
        ({"frames": [[[[0, 0, 0]]]] * 3}, FrameError, "got:      list"),
        ({"frames": [np.zeros((4, w, 3), np.uint8) for w in (4, 4, 5)]}, FrameError, "frame 2"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, noise, change, error, part):
    arguments = {"frames": noise, "actions": STEPS, "instruction": "go", "fps": 6.0} | change
    with pytest.raises(error, match=part) as caught:
        write_episode(tmp_path / "x.h5", **arguments)
    assert "\n\nhint: " in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_exception_of_the_camera_passes_through_and_the_old_file_stays(tmp_path, noise):
    path = write_episode(tmp_path / "x.h5", noise, STEPS, instruction="first", fps=6)
    before = path.read_bytes()

    def camera():
        yield noise[0]
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match=r"^camera unplugged$"):
        write_episode(path, camera(), STEPS, instruction="second", fps=6)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_replaced(tmp_path, noise):
    for text in ("first", "second"):
        path = write_episode(tmp_path / "x.h5", noise, STEPS, instruction=text, fps=6)
    with open_episode(path) as episode:
        assert episode.instruction == "second"


def test_frames_are_taken_one_by_one(tmp_path):
    """While frame i is taken, the file already holds about i frames: they are not gathered first."""
    sizes = []
    random = np.random.default_rng(0)

    def camera():
        for _ in range(40):
            (partial,) = tmp_path.iterdir()
            sizes.append(partial.stat().st_size)
            yield random.integers(0, 256, (400, 400, 3), dtype=np.uint8)

    write_episode(tmp_path / "x.h5", camera(), np.zeros((40, 3)), instruction="go", fps=6)
    assert sizes[-1] > 20 * 400 * 400 * 3  # HDF5 holds back at most its chunk cache


def test_missing_folder(tmp_path, noise):
    with pytest.raises(StorageError, match="hint: create the folder first"):
        write_episode(tmp_path / "no" / "x.h5", noise, STEPS, instruction="go", fps=6)


def noise_frames(count):
    random = np.random.default_rng(1)
    return (random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count))


@contextmanager
def largest_file(size):
    """A real limit of the kernel, seen by the writer as a disk that refuses (EFBIG)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [0, 100, 2048, 50_000, 200_000])
def test_a_disk_that_refuses(tmp_path, size):
    """libhdf5 crashes the process after a failed flush; that this test lives on is half of what it checks."""
    path = tmp_path / "x.h5"
    with pytest.raises(StorageError) as caught, largest_file(size):
        write_episode(path, noise_frames(20), np.zeros((20, 3)), instruction="go", fps=6)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())
    write_episode(path, noise_frames(20), np.zeros((20, 3)), instruction="go", fps=6)


@pytest.mark.parametrize("good_writes", [0, 1, 5])
def test_a_full_disk(tmp_path, monkeypatch, good_writes):
    path = tmp_path / "x.h5"
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > good_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_episode(path, noise_frames(20), np.zeros((20, 3)), instruction="go", fps=6)
    assert "hint: free some space" in str(caught.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write_episode(path, noise_frames(20), np.zeros((20, 3)), instruction="go", fps=6)


def test_what_the_disk_refused_can_still_be_read_until_hdf5_has_closed(tmp_path):
    values = np.arange(200_000)
    read_back = []

    def write_and_read():
        with largest_file(4096), atomic_hdf5(tmp_path / "x.h5") as draft:
            draft.file["values"] = values
            draft.file.flush()
            read_back.append(draft.file["values"][()])

    with pytest.raises(StorageError):
        write_and_read()
    np.testing.assert_array_equal(read_back[0], values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [False, True])
def test_killed_while_writing(tmp_path, noise, old):
    path = tmp_path / "x.h5"
    if old:
        write_episode(path, noise, STEPS, instruction="old", fps=6)
    program = (
        "import os, signal, sys, numpy as np\n"
        "from episodes.writer import write_episode\n"
        "def camera():\n"
        "    for i in range(20):\n"
        "        if i == 12: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield np.random.default_rng(i).integers(0, 256, (400, 400, 3), dtype=np.uint8)\n"
        "write_episode(sys.argv[1], camera(), np.zeros((20, 3)), instruction='new', fps=6)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == old
    assert list(tmp_path.glob("*.h5")) == ([path] if old else [])  # what is left over is hidden and is no .h5
    if old:
        with open_episode(path) as episode:
            assert episode.instruction == "old"
