"""What a run takes from recordings, and which recordings it does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import EpisodeError
from bundle.manifest import Manifest
from calib.config import QuantizeConfig
from calib.data import Data, frame_finder, held_sha256, read_data, strata
from episodes.writer import write_episode
from export.console import Reporter
from tests.bundles import GO_LEFT, WINDOW, Tiny, make_bundle


def record(folder: Path, *lengths: int) -> Path:
    """An episode of noise for each length."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for index, length in enumerate(lengths):
        frames = rng.integers(0, 256, (length, 24, 32, 3), dtype=np.uint8)
        actions = rng.uniform(-1, 1, (length, 3))
        write_episode(folder / f"episode_{index:02d}.h5", iter(frames), actions, instruction=GO_LEFT, fps=6.0)
    return folder


def read(tmp_path: Path, *, cameras: tuple[str, ...] = ("static",), **options: Any) -> Data:
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny(cameras=cameras))
    given: dict[str, Any] = {"episodes": (str(tmp_path / "made"),), "frames": 16, "held_out": 12}
    return read_data(QuantizeConfig(bundle, **(given | options)), Manifest.load(bundle), Reporter(1, quiet=True))


def test_three_parts_and_what_they_are_called(tmp_path: Path) -> None:
    record(tmp_path / "made", *[18] * 6)
    data = read(tmp_path)
    assert len(data.seen) == 16
    assert {each.instruction for each in data.seen} == {GO_LEFT}
    assert sum(strata(data.sample).values()) == 16
    names = [{Path(each.episode).name for each in data.seen}]
    names += [{each.episode for each in part} for part in (data.search, data.test)]
    assert all(names)
    assert len(set.union(*names)) == sum(map(len, names))
    held = data.test[0]
    assert len(held.frames) == len(held.stretch)
    at = held.stretch.start + 1
    assert np.array_equal(frame_finder(data)(held.episode, at), held.frames[1][-1])
    assert held_sha256(data) == held_sha256(read(tmp_path))
    assert data.sha256 == read(tmp_path).sha256


def test_a_policy_with_a_hand_camera_wants_recordings_of_it(tmp_path: Path) -> None:
    """The same picture in both would calibrate, and judge, another robot."""
    record(tmp_path / "made", *[18] * 6)
    with pytest.raises(EpisodeError, match="has no hand camera"):
        read(tmp_path, cameras=("static", "hand"))
    made_up = read(tmp_path, cameras=("static", "hand"), episodes=(), allow_random=True)
    assert made_up.sample is None
    assert made_up.seen[0].frame.shape[0] == 2


@pytest.mark.parametrize(("longer", "name"), [(0, "search"), (1, "search"), (2, None)])
def test_every_held_out_part_is_longer_than_the_memory(tmp_path: Path, longer: int, name: str | None) -> None:
    """One long episode is the test's, so the search is without; two are enough."""
    record(tmp_path / "made", *[WINDOW] * 15, *[WINDOW + 1] * longer)
    if name is None:
        data = read(tmp_path)
        assert all(max(len(each.stretch) for each in part) == WINDOW + 1 for part in (data.search, data.test))
        return
    with pytest.raises(EpisodeError, match=f"no episode to {name} by is longer than the policy's memory") as refused:
        read(tmp_path)
    assert (refused.value.got, refused.value.expected) == (f"{WINDOW} frames at most", f"more than {WINDOW}")


def test_both_held_out_parts_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test frames too, whoever deals the episodes."""
    record(tmp_path / "made", *[18] * 6)
    from calib import data
    from calib.sample import Sample, Stretch

    def cut(*_: object, **__: object) -> Sample:
        short = Stretch(tmp_path / "made" / "episode_00.h5", 0, WINDOW, GO_LEFT)
        return Sample((), (Stretch(short.source, 0, WINDOW + 1, GO_LEFT),), (short,), ())

    monkeypatch.setattr(data, "draw", cut)
    with pytest.raises(EpisodeError, match="no episode to test by"):
        read(tmp_path)
