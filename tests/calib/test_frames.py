from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("h5py")

from bundle.manifest import Manifest
from calib.candidates import brightness, opened
from calib.frames import calibration_frames, frames_sha256, random_sample, stretch_frames
from calib.sample import Sample, draw
from episodes.instruction import Side
from episodes.reader import Episode, open_episode
from episodes.sources import find_sources
from episodes.synthetic import write_synthetic
from runtime.preprocess import resize
from tests.bundles import GO_LEFT, IMAGE_SIZE, Tiny, make_bundle


@pytest.fixture(params=[("static",), ("static", "hand")], ids=["one camera", "two cameras"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    return Manifest.load(make_bundle(tmp_path / "bundle", Tiny(cameras=request.param)))


@pytest.fixture
def sample(manifest: Manifest, tmp_path: Path) -> Sample:
    folder = tmp_path / "recorded"
    folder.mkdir()
    for seed in range(5):
        # V6 stores BGR and no instruction: the reader has to do its part.
        side: Side = "right" if seed % 2 else "left"
        hand = len(manifest.preprocessing.cameras) > 1
        write_synthetic(folder, "v6", side=side, seed=seed, height=24, width=32, hand=hand)
    return draw(find_sources([str(folder)]), manifest=manifest, frames=16, search_frames=8, test_frames=8)


def seen(source: Path, index: int, manifest: Manifest) -> list[NDArray[np.uint8]]:
    with opened(source) as episode:
        views = {"static": episode.frame(index)}
        if "hand" in manifest.preprocessing.cameras:
            views["hand"] = views["static"][::-1]  # as the synthetic recorder has it
        cameras = manifest.preprocessing.cameras
        return [resize(np.ascontiguousarray(views[camera]), manifest.preprocessing, IMAGE_SIZE) for camera in cameras]


def test_frames_are_what_the_runtime_feeds_and_files_are_opened_once(
    sample: Sample, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [seen(chosen.source, chosen.frame, manifest) for chosen in sample.calibration]
    files: list[Path] = []

    def counted(path: Path) -> Episode:
        files.append(path)
        return open_episode(path)

    monkeypatch.setattr("calib.candidates.open_episode", counted)

    read = list(calibration_frames(sample, manifest))

    assert tuple(chosen for chosen, _ in read) == sample.calibration
    assert all(frame.dtype == np.uint8 for _, frame in read)
    np.testing.assert_array_equal([frame for _, frame in read], expected)
    assert sorted(files) == sorted({chosen.source for chosen in sample.calibration})


def test_a_stretch_is_its_frames_in_order(sample: Sample, manifest: Manifest) -> None:
    stretch = sample.test[0]

    frames = stretch_frames(stretch, manifest)

    assert frames.shape == (len(stretch), len(manifest.preprocessing.cameras), IMAGE_SIZE, IMAGE_SIZE, 3)
    expected = [seen(stretch.source, index, manifest) for index in range(stretch.start, stretch.stop)]
    np.testing.assert_array_equal(frames, expected)


def test_the_id_is_of_pixels_and_instructions_only(sample: Sample, manifest: Manifest) -> None:
    read = list(calibration_frames(sample, manifest))
    name = frames_sha256(calibration_frames(sample, manifest))

    assert len(name) == 64
    assert frames_sha256([(chosen.instruction, frame) for chosen, frame in reversed(read)]) == name

    chosen, frame = read[3]
    pixel = frame.copy()
    pixel[0, 2, 5, 1] ^= 1
    assert frames_sha256([*read[:3], (chosen, pixel), *read[4:]]) != name
    assert frames_sha256([*read[:3], ("go elsewhere", frame), *read[4:]]) != name
    assert frames_sha256(read[1:]) != name
    assert frames_sha256([*read, read[0]]) != name


def test_random_pictures_are_structured_varied_and_repeatable(manifest: Manifest) -> None:
    pictures = random_sample(manifest, frames=12, seed=3)

    cameras = len(manifest.preprocessing.cameras)
    assert [(picture.shape, picture.dtype) for picture in pictures] == [
        ((cameras, IMAGE_SIZE, IMAGE_SIZE, 3), np.dtype(np.uint8))
    ] * 12
    light = [brightness(picture[0]) for picture in pictures]
    assert None not in light
    assert np.ptp(np.array(light, float)) > 30
    np.testing.assert_array_equal(pictures, random_sample(manifest, frames=12, seed=3))
    told = [(GO_LEFT, picture) for picture in pictures]
    assert frames_sha256(told) != frames_sha256(
        [(GO_LEFT, each) for each in random_sample(manifest, frames=12, seed=4)]
    )
