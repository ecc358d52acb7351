"""Trials: the robot's own code on assignments, with what they share computed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.manifest import Form
from calib.frames import random_sample
from calib.sample import Stretch
from calib.trial import Blocks, Held, Trials, stage_times, stream
from runtime.chain import SECTIONS
from runtime.policy import Policy
from tests.calib.made import Prepared

ALL = Blocks({"vision.0", "vision.1", "vision.2", "projection", "language.0", "language.1", "action_head"})


def held(prepared: Prepared, index: int, length: int = 10) -> Held:
    told = prepared.manifest.prompt.instructions[index % 2].text
    pictures = random_sample(prepared.manifest, frames=length, seed=index)
    return Held(Stretch(Path("episode.h5"), 0, length, told), f"episode {index}", np.stack(pictures))


@pytest.fixture
def trials(fp32: Prepared) -> Iterator[Trials]:
    yield Trials(fp32.folder, fp32.manifest, fp32.graphs, fp32.integers, backend="ort:cpu", threads=1)
    for path in fp32.folder.glob(".try.*"):
        path.unlink()


def test_blocks_are_in_the_order_of_execution(trials: Trials) -> None:
    assert trials.blocks == (
        "vision.0",
        "vision.1",
        "vision.2",
        "projection",
        "language.0",
        "language.1",
        "action_head",
    )
    assert trials.stages_of({"projection"}) == ("vision",)
    assert trials.stages_of({"action_head", "language.1"}) == ("language", "action_head")
    assert trials.stages_of(()) == ()


def test_nothing_in_int8_is_the_bundle_itself(trials: Trials, fp32: Prepared) -> None:
    assert trials.view(Blocks()) is fp32.manifest


@pytest.mark.parametrize(("backend", "form"), [("ort:cpu", "ort-cpu"), ("ort:openvino", "openvino")])
def test_a_view_touches_only_the_stages_of_its_blocks(fp32: Prepared, backend: str, form: Form) -> None:
    trials = Trials(fp32.folder, fp32.manifest, fp32.graphs, fp32.integers, backend=backend)
    view = trials.view(Blocks({"language.1"}))
    assert view.precision == "int8"
    assert view.stages["vision"] == fp32.manifest.stages["vision"]
    assert view.stages["action_head"] == fp32.manifest.stages["action_head"]
    language = view.stages["language"]
    assert [graph.sequence for graph in language.graphs] == list(fp32.manifest.prompt.buckets)
    assert {graph.form for graph in language.graphs} == {form}
    assert language.key != trials.view(Blocks({"language.0"})).stages["language"].key
    for path in fp32.folder.glob(".try.*"):
        path.unlink()


@pytest.mark.parametrize("blocks", [ALL, ALL - {"vision.1"}, Blocks({"action_head"}), Blocks()], ids=len)
def test_actions_are_those_of_the_robot_step_by_step(trials: Trials, fp32: Prepared, blocks: Blocks) -> None:
    """Two stretches with different instructions, from a reset each; tokens of vision are kept between."""
    stretches = [held(fp32, 0), held(fp32, 1)]
    steps: list[int] = []
    policy = trials.policy(blocks)
    for _ in range(2):
        found = trials.actions(policy, blocks, stretches, lambda: steps.append(1))
        for each, actions in zip(stretches, found, strict=True):
            assert np.array_equal(actions, stream(policy, each, lambda: None))
    assert len(steps) == 2 * 20
    policy.close()


def test_vision_is_run_once_for_assignments_that_share_it(
    trials: Trials, fp32: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run = Policy.run_vision

    def counted(*arguments: Any) -> Any:
        ran.append(1)
        return run(*arguments)

    monkeypatch.setattr(Policy, "run_vision", counted)
    stretches = [held(fp32, 0, 3)]

    def try_(blocks: Blocks) -> int:
        ran.clear()
        policy = trials.policy(blocks)
        trials.actions(policy, blocks, stretches, lambda: None)
        policy.close()
        return len(ran)

    assert try_(ALL) == 3
    assert try_(ALL - {"language.0"}) == try_(ALL - {"action_head", "language.1"}) == 0
    for index in range(3):
        assert try_(ALL - {f"vision.{index}"}) == 3
    assert try_(ALL - {"vision.2", "language.0"}) == 0
    assert try_(ALL) == 3  # no longer kept


def test_int8_is_not_floating_point(trials: Trials, fp32: Prepared) -> None:
    stretch = held(fp32, 0)
    found = []
    for blocks in (ALL, Blocks()):
        policy = trials.policy(blocks)
        found.append(stream(policy, stretch, lambda: None))
        policy.close()
    assert 1e-4 < np.abs(found[0] - found[1]).max() < 0.5


def test_every_stage_is_timed(trials: Trials, fp32: Prepared) -> None:
    policies = [trials.policy(blocks) for blocks in (ALL, Blocks())]
    times = stage_times(policies, held(fp32, 0, 2), 3)
    assert [set(each) for each in times] == [set(SECTIONS)] * 2
    assert all(0 < ms < 1e4 for each in times for ms in each.values())
    for policy in policies:
        policy.close()
