"""A recording replayed through the bundle that made it decides the same again, as far as JPEG lets it see the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("mcap")
pytest.importorskip("h5py")

from episodes.recording import open_recording
from runtime.cameras.base import Frame
from runtime.events import Decision, Event
from runtime.policy import Policy
from runtime.replay import replay
from tests.bundles import GO_LEFT, GO_RIGHT, Tiny
from tests.recordings import PERIOD_S, pictures, published, record, run_info

ROOT = Path(__file__).resolve().parents[3]
START_S = 1000.0


def driven(policy: Policy, scenes: NDArray[np.uint8], instructions: tuple[str, ...] = (GO_LEFT,)) -> list[Event]:
    """What a run says that shows these scenes to the policy, for each instruction from a reset."""
    events: list[Event] = []
    number = 0
    for instruction in instructions:
        policy.reset(instruction)
        for pixels in scenes:
            at_s = START_S + number * PERIOD_S
            chunk = policy.step(pixels)
            events.append(
                Decision(number, instruction, Frame(pixels, at_s), at_s, at_s + 0.02, chunk.values, chunk.timing, False)
            )
            x, y = (float(value) for value in chunk.values[0, :2])
            sent = published(at_s + 0.05, 0.5 * x, -0.5 * y)
            events.append(sent)
            number += 1
    return events


@pytest.fixture
def policy(tiny_bundle: Callable[[Tiny], Path]) -> Iterator[Policy]:
    """A network: pictures that differ little give actions that differ little, which the fake backend's do not."""
    pytest.importorskip("onnxruntime")
    loaded = Policy.load(tiny_bundle(Tiny()), "ort:cpu", threads=1)
    yield loaded
    loaded.close()


def test_the_same_decisions(tmp_path: Path, policy: Policy) -> None:
    """Grey squares of 8 x 8 survive JPEG of quality 100 to the bit, so everything after it must."""
    squares = np.random.default_rng(0).integers(0, 256, (7, 6, 8, 1), dtype=np.uint8)
    scenes = np.repeat(np.kron(squares[..., 0], np.ones((1, 8, 8), np.uint8))[..., None], 3, axis=-1)
    events = driven(policy, scenes)
    path = record(tmp_path, events, quality=100)
    with open_recording(path, actions="decided") as episode:
        np.testing.assert_array_equal(list(episode.frames()), scenes)
        outcome = replay(policy, episode)
    np.testing.assert_allclose(outcome.predicted, outcome.recorded, atol=1e-6)
    np.testing.assert_array_equal(outcome.recorded, [e.values[0] for e in events if isinstance(e, Decision)])
    with open_recording(path) as episode:  # what was sent is the same, but for the rounding of gain and back
        np.testing.assert_allclose(replay(policy, episode).recorded, outcome.recorded, atol=1e-6)


@pytest.mark.parametrize(("quality", "tolerance"), [(100, 0.005), (90, 0.02)])
def test_nearly_the_same_through_jpeg(tmp_path: Path, policy: Policy, quality: int, tolerance: float) -> None:
    path = record(tmp_path, driven(policy, pictures(7, height=96, width=128)), quality=quality)
    with open_recording(path, actions="decided") as episode:
        outcome = replay(policy, episode)
    assert 0 < np.abs(outcome.predicted - outcome.recorded).max() < tolerance


def test_each_piece_from_its_own_reset(tmp_path: Path, policy: Policy) -> None:
    scenes = pictures(5, height=96, width=128)
    path = record(tmp_path, driven(policy, scenes, (GO_LEFT, GO_RIGHT)), quality=100)
    for index, told in enumerate((GO_LEFT, GO_RIGHT)):
        with open_recording(f"{path}#{index}", actions="decided") as episode:
            outcome = replay(policy, episode)
        assert outcome.instruction == told
        np.testing.assert_allclose(outcome.predicted, outcome.recorded, atol=0.005)


def test_the_command(tmp_path: Path, tiny_bundle: Callable[[Tiny], Path], policy: Policy) -> None:
    path = record(tmp_path, driven(policy, pictures(4)), info=run_info())
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "runtime" / "run_robot.py",
            tiny_bundle(Tiny()),
            "--backend",
            "ort:cpu",
            "--replay",
            path,
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["frames"], result["instruction"]) == (4, GO_LEFT)
    assert [axis["name"] for axis in result["axes"]] == ["linear_x", "linear_y"]
    assert max(axis["rmse"] for axis in result["axes"]) < 0.05


def test_a_stopped_robot_is_compared_with_what_it_did(tmp_path: Path, policy: Policy) -> None:
    events = driven(policy, pictures(3))
    stopped = [e if isinstance(e, Decision) else published(e.at_s, 0, 0, level="stop") for e in events]
    path = record(tmp_path, stopped)
    with open_recording(path) as episode:
        assert not episode.actions.any()
        assert replay(policy, episode).predicted.any()
