"""A sample of what scripts/try_hostile_episodes makes and reads, and the damage that it found once."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

pytest.importorskip("pyarrow")
pytest.importorskip("av")
pytest.importorskip("mcap")
pytest.importorskip("zstandard")

from bundle.errors import EpisodeError
from episodes.examination import examine
from episodes.filters import _lzf_size
from episodes.reader import EpisodeWarning, open_episode
from tests.hostile_episodes import Case, Sound, cases, make_sound
from tests.hostile_episodes_run import contents, run_case

# One of each, but for those that take seconds to make.
_SLOW = (
    "heap text", "attribute", "packed", "growing", "13,000", "many groups", "many datasets", "many vlen", "black frames", "table", "task",
    "video large", "lz4", "metadata",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make_sound(tmp_path_factory.mktemp("sound") / "sound")


@pytest.fixture(scope="module")
def good(sound: Sound) -> dict[str, list[str]]:
    return contents(sound)


def sample(sound: Sound) -> list[Case]:
    """The bombs that are made fast, and a little of the rest."""
    found = [
        case for case in cases(sound, scale=0.04) if not any(word in case.name.partition("bombs/")[2] for word in _SLOW)
    ]
    return [case for number, case in enumerate(found) if case.name.startswith("bombs/") or number % 3 == 0]


def test_nothing_hostile_breaks_a_promise(sound: Sound, good: dict[str, list[str]], tmp_path: Path) -> None:
    chosen = sample(sound)
    assert len(chosen) > 60
    assert {case.name.partition("/")[0] for case in chosen} == {
        "flipped bytes", "cut off", "zeroed sectors", "moved blocks", "structure", "bombs", "elsewhere",
    }  # fmt: skip
    broken = []
    for number, case in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = run_case(case, folder, good)
        # How long it takes is told by the script and not by a test, which may run anywhere.
        broken += [
            (case.name, fault, outcome.said)
            for fault in outcome.faults()
            if "10 s" not in fault or outcome.kind == "killed"
        ]
    assert broken == []


def refusal(path: Path) -> str:
    with pytest.raises(EpisodeError) as caught, open_episode(path) as episode:
        list(episode.frames())
    assert examine(path).errors
    return str(caught.value)


def copy(sound: Sound, name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes((sound.folder / name).read_bytes())
    return path


def test_a_lost_sector_of_the_heap_does_not_send_hdf5_in_a_circle(sound: Sound, tmp_path: Path) -> None:
    path = copy(sound, "v5_jpeg_left.h5", tmp_path)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"GCOL")
    start = -(-(place + 16) // 512) * 512
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    assert "texts or pictures cannot be read" in refusal(path) or "corrupt" in refusal(path)


def test_a_frame_that_names_two_gigabytes(sound: Sound, tmp_path: Path) -> None:
    path = copy(sound, "v5_jpeg_left.h5", tmp_path)
    with h5py.File(path) as file:
        start = file["observations/images"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[start : start + 4] = (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    assert "a text or picture of 2000000000 bytes" in refusal(path)


def test_storage_that_is_smaller_than_its_shape(sound: Sound, tmp_path: Path) -> None:
    """What lies beyond it is read as whatever is in memory."""
    path = copy(sound, "contiguous_left.h5", tmp_path)
    with h5py.File(path) as file:
        size = file["images"].id.get_storage_size()
        wanted = file["images"].id.get_offset().to_bytes(8, "little") + size.to_bytes(8, "little")
    data = path.read_bytes()
    assert data.count(wanted) == 1
    path.write_bytes(data.replace(wanted, wanted[:8] + (size // 2).to_bytes(8, "little")))
    assert f"{size // 2} bytes of storage" in refusal(path)


def test_a_chunk_of_lzf_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "a_left.h5"
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (2, 8, 8, 3), np.uint8, chunks=(1, 8, 8, 3), compression="lzf")
        images[:] = 7
        file["actions"], file["language_instruction"] = np.ones((2, 3), np.float32), ["Go"]
    with h5py.File(path, "a") as file:
        images = file["images"]
        _, raw = images.id.read_direct_chunk((1, 0, 0, 0))
        images.id.write_direct_chunk((1, 0, 0, 0), bytes([0, 7]))
    assert _lzf_size(bytes(raw)) == 8 * 8 * 3
    assert "a chunk of 192 bytes unpacks to 1" in refusal(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=400), repeated=st.integers(1, 40))
def test_the_size_of_lzf_is_told_from_its_bytes(tmp_path: Path, data: bytes, repeated: int) -> None:
    values = np.frombuffer(data * repeated, np.uint8)
    with h5py.File(tmp_path / "lzf.h5", "w") as file:
        stored = file.create_dataset("x", data=values, chunks=values.shape, compression="lzf")
        mask, raw = stored.id.read_direct_chunk((0,))
    if not mask:
        assert _lzf_size(bytes(raw)) == len(values)


def test_a_lost_sector_of_raw_pictures_is_found(sound: Sound, tmp_path: Path) -> None:
    path = copy(sound, "contiguous_left.h5", tmp_path)
    with h5py.File(path) as file:
        start = file["images"].id.get_offset()
    data = bytearray(path.read_bytes())
    sector = -(-(start + 3 * 24 * 32 * 3) // 512) * 512
    assert all(data[sector : sector + 512])
    data[sector : sector + 512] = bytes(512)
    path.write_bytes(data)
    assert "frame 3 of 8 is corrupt" in refusal(path)
    assert "512 bytes are zero, from one disk sector to another" in refusal(path)


def test_what_jetvla_writes_notices_a_flipped_bit(sound: Sound, tmp_path: Path) -> None:
    path = copy(sound, "v1_left.h5", tmp_path)
    with h5py.File(path) as file:
        found = file["actions"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[found.byte_offset + 5] ^= 1
    path.write_bytes(data)
    assert "actions" in refusal(path)


# --- layouts --------------------------------------------------------------------------------------------------------------

_TEXT = "Go to the b\u00e4sket"
_T = 6


def _texts(folder_text: str) -> st.SearchStrategy[object]:
    fixed = folder_text.encode()
    variable = h5py.string_dtype()
    return st.sampled_from(
        [
            folder_text, fixed, np.bytes_(fixed), np.array([fixed], "S64"), np.array([fixed], "S256"), np.array(fixed, "S80"),
            np.array([folder_text], object), np.array([folder_text] * 3, object), np.array([fixed + b"\0old"], "S64"),
            np.array([[folder_text]], variable), h5py.Empty("S1"), np.array([b"", fixed], "S64"),
        ]
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout_is_read_as_h5py_reads_it_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Layout, chunks, filters, types, byte order, places of texts: what opens is what h5py reads, whatever it is stored as."""
    draw = data.draw
    shape = (_T, draw(st.integers(1, 9)), draw(st.integers(1, 9)), 3)
    frames = np.random.default_rng(draw(st.integers(0, 9))).integers(1, 255, shape, np.uint8)
    actions = np.tile(np.array([1.15, -0.5, 0.25]), (_T, 1)).astype(
        draw(st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2", ">f2"]))
    )
    way = draw(st.sampled_from(["contiguous", "chunked", "compact", "external", "virtual", "linked"]))
    text, place = draw(_texts(_TEXT)), draw(st.sampled_from(["dataset", "attribute"]))
    path = tmp_path / "a.h5"
    for old in tmp_path.iterdir():
        old.unlink()
    with h5py.File(path, "w", libver=draw(st.sampled_from(["earliest", "latest"]))) as file:
        if way == "external":
            stored = file.create_dataset(
                "images", shape, np.uint8, external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
            )
            stored[...] = frames
        elif way in ("virtual", "linked"):
            with h5py.File(tmp_path / "part.h5", "w") as part:
                part["x/y"] = frames
            if way == "linked":
                file["images"] = h5py.ExternalLink("part.h5", "/x/y")
            else:
                layout = h5py.VirtualLayout(shape, np.uint8)
                layout[:4], layout[4:] = (
                    h5py.VirtualSource("part.h5", "x/y", shape)[part] for part in (slice(4), slice(4, None))
                )
                file.create_virtual_dataset("images", layout)
        elif way == "compact":
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.COMPACT)
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties)
            file["images"][...] = frames
        else:
            chunks = tuple(draw(st.integers(1, side)) for side in shape) if way == "chunked" else None
            kept = (
                draw(st.sampled_from([{}, {"compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}]))
                if chunks
                else {}
            )
            kept = kept | ({"shuffle": True, "maxshape": (None, *shape[1:])} if chunks and draw(st.booleans()) else {})
            file.create_dataset("images", data=frames, chunks=chunks, **kept)
        file["actions"] = actions
        if place == "dataset":
            file["language_instruction"] = text
        else:
            file.attrs["language_instruction"] = text
        file.attrs["fps"] = draw(
            st.sampled_from([5, 5.0, "5", b"5.0", np.float32(5), np.array([5]), np.array("5", "S1"), np.uint8(5)])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # that nothing was said, where the text is empty
        with open_episode(path) as episode:
            found = np.stack(list(episode.frames()))
    with h5py.File(tmp_path / "part.h5" if way == "linked" else path) as file:
        assert_array_equal(found, file["x/y" if way == "linked" else "images"][()])
    with h5py.File(path) as file:
        assert_array_equal(episode.actions, file["actions"][()].astype(np.float32))
    assert episode.instruction == (None if isinstance(text, h5py.Empty) else _TEXT)
    assert episode.fps == 5.0
