"""A replay shows the policy the episode's frames in order, and compares like with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bundle.errors import BackendError, EpisodeError, PromptError
from bundle.manifest import Manifest
from runtime.backends.fake import FakeBackend
from runtime.policy import Policy
from runtime.preprocess import resize
from tests.bundles import GO_LEFT, GO_RIGHT, Tiny, edit_manifest, make_bundle
from tests.runtime.conftest import TinyBundle

h5py = pytest.importorskip("h5py")

from episodes.reader import EpisodeWarning, open_episode  # noqa: E402
from episodes.writer import write_episode  # noqa: E402
from runtime.replay import read_resized, replay  # noqa: E402

LENGTH = 5
FRAMES = np.random.default_rng(0).integers(0, 256, (LENGTH, 24, 32, 3), dtype=np.uint8)
ACTIONS = np.random.default_rng(1).uniform(-1.15, 1.15, (LENGTH, 3)).astype(np.float32)


@pytest.fixture
def episode(tmp_path: Path) -> Path:
    return write_episode(tmp_path / "episode.h5", FRAMES, ACTIONS, instruction=GO_LEFT, fps=6.0)


@pytest.fixture
def folder(tiny_bundle: TinyBundle) -> Path:
    return tiny_bundle(Tiny())


def spoil(path: Path, index: int) -> None:
    """Overwrite the stored bytes of one frame."""
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info_by_coord((index, 0, 0, 0))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\0" * chunk.size)


def test_the_policy_sees_every_frame_once_and_in_order(folder: Path, episode: Path) -> None:
    policy, other = (Policy.load(folder, "fake") for _ in range(2))
    policy.reset(GO_RIGHT)
    policy.step(FRAMES[3])  # what was before the replay must not matter
    advanced: list[int] = []
    with open_episode(episode) as opened:
        outcome = replay(policy, opened, advance=lambda: advanced.append(1))
    other.reset(GO_LEFT)
    expected = [other.step(frame).values[0] for frame in FRAMES]

    assert (outcome.instruction, outcome.axes, outcome.units) == (GO_LEFT, ("linear_x", "linear_y"), ("m/s", "m/s"))
    np.testing.assert_array_equal(outcome.predicted, expected)
    np.testing.assert_array_equal(outcome.recorded, ACTIONS[:, :2])
    assert len(advanced) == LENGTH
    assert list(outcome.timing) == ["preprocess", "vision", "language", "action_head", "total"]
    assert all(values.shape == (LENGTH,) for values in outcome.timing.values())


def test_rmse_and_json(folder: Path, episode: Path) -> None:
    with open_episode(episode) as opened:
        outcome = replay(Policy.load(folder, "fake"), opened)
    expected = [
        float(np.sqrt(np.mean([(float(p) - float(r)) ** 2 for p, r in zip(predicted, recorded, strict=True)])))
        for predicted, recorded in zip(outcome.predicted.T, outcome.recorded.T, strict=True)
    ]
    np.testing.assert_allclose(outcome.rmse, expected, rtol=1e-12)

    content = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert content["instruction"] == GO_LEFT
    assert content["frames"] == LENGTH
    assert content["axes"] == [
        {"name": name, "unit": "m/s", "rmse": pytest.approx(rmse)}
        for name, rmse in zip(("linear_x", "linear_y"), expected, strict=True)
    ]
    np.testing.assert_array_equal(np.float32(content["predicted"]), outcome.predicted)
    np.testing.assert_array_equal(np.float32(content["recorded"]), outcome.recorded)
    for section, values in outcome.timing.items():
        found = content["timing_ms"][section]
        assert sorted(found) == ["p50", "p95", "p99"]
        assert found["p50"] == pytest.approx(np.median(values))
        assert values.min() <= found["p50"] <= found["p95"] <= found["p99"] <= values.max()


def test_columns_are_compared_by_name(tmp_path: Path, episode: Path) -> None:
    """Not by place: a policy for rotation and forward speed drives an episode that has three axes in another order."""
    folder = make_bundle(tmp_path / "tiny.bundle")
    edit_manifest(
        folder,
        lambda manifest: msgspec.structs.replace(
            manifest,
            action=msgspec.structs.replace(
                manifest.action, names=("angular_z", "linear_x"), units=("rad/s", "m/s"), minimum=-2.0
            ),
        ),
    )
    policy = Policy.load(folder, "fake")
    with open_episode(episode) as opened:
        outcome = replay(policy, opened)
    assert (outcome.axes, outcome.units) == (("angular_z", "linear_x"), ("rad/s", "m/s"))
    np.testing.assert_array_equal(outcome.recorded, ACTIONS[:, [2, 0]])


def test_only_common_columns_are_compared(tiny_bundle: TinyBundle, episode: Path) -> None:
    policy = Policy.load(tiny_bundle(Tiny(head="actions_gripper")), "fake")
    with open_episode(episode) as opened:
        outcome = replay(policy, opened)
    assert outcome.axes == ("linear_x", "linear_y")
    assert outcome.predicted.shape == (LENGTH, 2)


def test_nothing_in_common(tmp_path: Path, episode: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    edit_manifest(
        folder,
        lambda manifest: msgspec.structs.replace(
            manifest, action=msgspec.structs.replace(manifest.action, names=("x", "y"))
        ),
    )
    policy = Policy.load(folder, "fake")
    with open_episode(episode) as opened, pytest.raises(EpisodeError) as caught:
        replay(policy, opened)
    assert str(caught.value) == (
        f"{episode} and the policy have no action in common\n  got:      linear_x, linear_y, angular_z\n"
        "  expected: x, y\n\nhint: state the policy's axes when building: --action-names linear_x linear_y"
    )


def test_another_instruction(folder: Path, episode: Path) -> None:
    policy = Policy.load(folder, "fake")
    with open_episode(episode) as opened:
        left, right = replay(policy, opened), replay(policy, opened, instruction=GO_RIGHT)
    assert (left.instruction, right.instruction) == (GO_LEFT, GO_RIGHT)
    assert (left.predicted != right.predicted).all()


def test_no_instruction_anywhere(folder: Path, tmp_path: Path) -> None:
    path = write_episode(tmp_path / "plain.h5", FRAMES, ACTIONS, instruction=None, fps=6.0)
    policy = Policy.load(folder, "fake")
    with pytest.warns(EpisodeWarning, match="the episode has no instruction"):
        opened = open_episode(path)
    with opened:
        with pytest.raises(EpisodeError, match=r"plain\.h5 has no instruction(?s:.*)hint: pass --instruction '\.\.\.'"):
            replay(policy, opened)
        assert replay(policy, opened, instruction=GO_LEFT).instruction == GO_LEFT


def test_an_empty_instruction_is_not_none(folder: Path, episode: Path) -> None:
    with open_episode(episode) as opened, pytest.raises(PromptError, match="the instruction is empty"):
        replay(Policy.load(folder, "fake"), opened, instruction="")


def test_an_instruction_that_the_bundle_does_not_know(folder: Path, tmp_path: Path) -> None:
    path = write_episode(tmp_path / "x.h5", FRAMES, ACTIONS, instruction="dance", fps=6.0)
    with open_episode(path) as opened, pytest.raises(PromptError, match="cannot tokenise 'dance'"):
        replay(Policy.load(folder, "fake"), opened)


def test_a_policy_sees_both_cameras_and_none_is_made_up(
    tiny_bundle: TinyBundle, episode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_bundle(Tiny(cameras=("hand", "static"))), "fake")
    with open_episode(episode) as opened, pytest.raises(EpisodeError, match=r"has no hand camera(.|\n)*hand_images"):
        replay(policy, opened)

    hand = [255 - frame for frame in FRAMES]
    path = write_episode(tmp_path / "both.h5", FRAMES, ACTIONS, instruction=GO_LEFT, fps=6.0, hand_frames=hand)
    shown: list[Any] = []
    real = policy.step

    def step(frame: Any, *, hand: Any = None) -> Any:
        shown.append((frame, hand))
        return real(frame, hand=hand)

    monkeypatch.setattr(policy, "step", step)
    with open_episode(path) as opened:
        replay(policy, opened)
    np.testing.assert_array_equal([static for static, _ in shown], FRAMES)
    np.testing.assert_array_equal([at_hand for _, at_hand in shown], hand)


def test_a_damaged_frame(folder: Path, episode: Path) -> None:
    spoil(episode, 3)
    advanced: list[int] = []
    with open_episode(episode) as opened, pytest.raises(EpisodeError, match="frame 3 of 5 is corrupt"):
        replay(Policy.load(folder, "fake"), opened, advance=lambda: advanced.append(1))
    assert len(advanced) == 3


def test_a_failing_backend(folder: Path, episode: Path) -> None:
    policy = Policy(folder, Manifest.load(folder), FakeBackend(fail_at=2))
    with open_episode(episode) as opened, pytest.raises(BackendError, match="planned failure"):
        replay(policy, opened)


@pytest.mark.parametrize(("limit", "count"), [(None, LENGTH), (2, 2), (99, LENGTH)])
@pytest.mark.parametrize("tiny", [Tiny(), Tiny(cameras=("hand", "static"), resize="bilinear")])
def test_frames_as_the_policy_sees_them(
    tiny_bundle: TinyBundle, episode: Path, tiny: Tiny, limit: int | None, count: int
) -> None:
    preprocessing = Manifest.load(tiny_bundle(tiny)).preprocessing
    if len(tiny.cameras) > 1:
        with pytest.raises(EpisodeError, match="has no hand camera"):
            read_resized(episode, preprocessing, 8)
        hand = [255 - frame for frame in FRAMES]
        episode = write_episode(episode, FRAMES, ACTIONS, instruction=GO_LEFT, fps=6.0, hand_frames=hand)
    read = read_resized(episode, preprocessing, 8, limit=limit)
    views = ([{"hand": 255 - frame, "static": frame}[camera] for camera in tiny.cameras] for frame in FRAMES[:count])
    expected = [[resize(view, preprocessing, 8) for view in each] for each in views]
    assert (read.frames.dtype, read.instruction) == (np.uint8, GO_LEFT)
    np.testing.assert_array_equal(read.frames, expected)
    np.testing.assert_array_equal(read.actions, ACTIONS[:count])
    assert read.action_names == ("linear_x", "linear_y", "angular_z")


def test_every_replay_starts_from_a_reset(folder: Path, episode: Path) -> None:
    policy = Policy.load(folder, "fake")
    with open_episode(episode) as opened:
        first, second = replay(policy, opened), replay(policy, opened)
    np.testing.assert_array_equal(first.predicted, second.predicted)
