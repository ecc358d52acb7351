"""Many sessions on one policy answer as many policies would, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.errors import BackendError, PromptError
from runtime.policy import ActionChunk, Policy
from runtime.service.refusal import Refusal
from runtime.service.sessions import SPARE_AFTER_S, Sessions
from tests.bundles import GO_LEFT, GO_RIGHT, WINDOW, random_frames

FRAMES = random_frames(12, seed=5)[:, 0]


class Watched:
    """A policy that counts, and fails on demand."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.manifest, self.backend, self.window = policy.manifest, policy.backend, policy.window
        self.resets = self.replayed = 0
        self.fail: Exception | None = None

    def reset(self, instruction: str) -> None:
        self.resets += 1
        self._policy.reset(instruction)

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk:
        if self.fail is not None:
            # The worst that a failed step can leave behind: a state that has gone on.
            self._policy.step(frame)
            raise self.fail
        return self._policy.step(frame)

    def run_action_head(self, feature: NDArray[np.float32]) -> NDArray[np.float32]:
        self.replayed += 1
        return self._policy.run_action_head(feature)

    def close(self) -> None:
        self._policy.close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watched(policy: Policy) -> Watched:
    return Watched(policy)


@pytest.fixture
def alone(bundle: Path) -> Iterator[list[Policy]]:
    policies = [Policy.load(bundle, "ort:cpu", threads=1) for _ in range(3)]
    yield policies
    for policy in policies:
        policy.close()


def test_interleaved_sessions_equal_separate_policies(watched: Watched, alone: list[Policy]) -> None:
    sessions = Sessions(watched)
    names = ("a", "b", "c")
    instructions = dict(zip(names, (GO_LEFT, GO_RIGHT, GO_LEFT), strict=True))
    policies = dict(zip(names, alone, strict=True))
    for name, policy in policies.items():
        policy.reset(instructions[name])
        sessions.reset(name, instructions[name])
    # Short and long histories, repeated turns, and more frames than the window.
    order = "abcaabbccabcbacabbbbbbacbcaaaaaacb"
    assert order.count("a") > 3 * WINDOW
    for index, name in enumerate(order):
        frame = FRAMES[(index * 5) % len(FRAMES)]
        expected = policies[name].step(frame)

        got = sessions.predict(name, frame)

        np.testing.assert_array_equal(got.chunk.values, expected.values)
        np.testing.assert_array_equal(got.chunk.normalized, expected.normalized)
        assert got.step == order[:index].count(name)
        assert got.reset == (got.step == 0)
        assert got.replayed <= WINDOW - 1
    assert watched.replayed > 0


def test_reset_in_the_middle_forgets_that_session_only(watched: Watched, alone: list[Policy]) -> None:
    sessions = Sessions(watched)
    first, second = alone[:2]
    first.reset(GO_LEFT)
    second.reset(GO_RIGHT)
    for frame in FRAMES[:5]:
        first.step(frame)
        second.step(frame)
        sessions.predict("a", frame, instruction=GO_LEFT)
        sessions.predict("b", frame, instruction=GO_RIGHT)
    first.reset(GO_RIGHT)
    sessions.reset("a", GO_RIGHT)
    for frame in FRAMES[5:]:
        a, b = sessions.predict("a", frame), sessions.predict("b", frame)
        np.testing.assert_array_equal(a.chunk.values, first.step(frame).values)
        np.testing.assert_array_equal(b.chunk.values, second.step(frame).values)
    assert (a.instruction, a.step, b.step) == (GO_RIGHT, 6, 11)


def test_a_session_alone_never_replays(watched: Watched) -> None:
    sessions = Sessions(watched)
    for frame in FRAMES:
        stepped = sessions.predict("a", frame, instruction=GO_LEFT)
        assert stepped.replayed == 0
    assert (watched.resets, watched.replayed) == (1, 0)


def test_another_instruction_is_a_reset(watched: Watched, policy: Policy) -> None:
    sessions = Sessions(watched)
    for frame in FRAMES[:4]:
        sessions.predict("a", frame, instruction=GO_LEFT)

    changed = sessions.predict("a", FRAMES[4], instruction=GO_RIGHT)

    assert (changed.step, changed.reset, changed.instruction) == (0, True, GO_RIGHT)
    policy.reset(GO_RIGHT)
    np.testing.assert_array_equal(changed.chunk.values, policy.step(FRAMES[4]).values)


def test_a_failed_step_leaves_the_session_as_it_was(watched: Watched, alone: list[Policy]) -> None:
    sessions = Sessions(watched)
    alone[0].reset(GO_LEFT)
    for frame in FRAMES[:4]:
        alone[0].step(frame)
        sessions.predict("a", frame, instruction=GO_LEFT)
    for instruction in (None, GO_RIGHT):
        watched.fail = BackendError("the device failed", hint="none")
        with pytest.raises(BackendError):
            sessions.predict("a", FRAMES[4], instruction=instruction)
    watched.fail = None

    with pytest.raises(PromptError):
        sessions.reset("a", "an instruction without tokens")

    again = sessions.predict("a", FRAMES[4], expect_step=4)

    np.testing.assert_array_equal(again.chunk.values, alone[0].step(FRAMES[4]).values)


def test_a_session_that_never_began_is_not_there(watched: Watched) -> None:
    sessions = Sessions(watched)
    with pytest.raises(Refusal, match="there is no session a") as caught:
        sessions.predict("a", FRAMES[0])
    assert caught.value.status == 404
    watched.fail = BackendError("the device failed", hint="none")
    with pytest.raises(BackendError):
        sessions.predict("a", FRAMES[0], instruction=GO_LEFT)
    assert len(sessions) == 0


def test_an_unexpected_step_is_refused_with_the_right_one(watched: Watched) -> None:
    sessions = Sessions(watched)
    with pytest.raises(Refusal, match="no such session") as caught:
        sessions.predict("a", FRAMES[0], instruction=GO_LEFT, expect_step=3)
    assert (caught.value.status, caught.value.step) == (409, None)
    sessions.predict("a", FRAMES[0], instruction=GO_LEFT, expect_step=0)
    sessions.predict("a", FRAMES[1], expect_step=1)

    with pytest.raises(Refusal, match="step 2 comes next") as caught:
        sessions.predict("a", FRAMES[1], expect_step=1)

    assert (caught.value.status, caught.value.step) == (409, 2)
    assert sessions.predict("a", FRAMES[2], expect_step=2).step == 2


def test_an_unused_session_expires(watched: Watched) -> None:
    clock = Clock()
    sessions = Sessions(watched, expiry_s=10, clock=clock)
    sessions.predict("a", FRAMES[0], instruction=GO_LEFT)
    clock.now += 9
    sessions.predict("a", FRAMES[1])
    clock.now += 9
    assert sessions.predict("a", FRAMES[2]).step == 2
    clock.now += 11

    with pytest.raises(Refusal, match="it to be") as caught:
        sessions.predict("a", FRAMES[3], instruction=GO_LEFT, expect_step=3)
    assert caught.value.step is None

    # Who does not ask for a number is told by it.
    silent = sessions.predict("a", FRAMES[3], instruction=GO_LEFT)
    assert (silent.step, silent.reset) == (0, True)


def test_a_full_service_refuses_until_a_session_has_been_idle(watched: Watched) -> None:
    clock = Clock()
    sessions = Sessions(watched, max_sessions=2, clock=clock)
    sessions.reset("a", GO_LEFT)
    clock.now += 5
    sessions.reset("b", GO_LEFT)
    for ask in (lambda: sessions.reset("c", GO_LEFT), lambda: sessions.predict("c", FRAMES[0], instruction=GO_LEFT)):
        with pytest.raises(Refusal, match="too many sessions") as caught:
            ask()
        assert (caught.value.status, caught.value.retry_after_s) == (503, SPARE_AFTER_S - 5)
    clock.now += SPARE_AFTER_S - 5

    sessions.reset("c", GO_LEFT)

    assert len(sessions) == 2
    assert sessions.predict("b", FRAMES[0]).step == 0
    with pytest.raises(Refusal, match="no session a"):
        sessions.predict("a", FRAMES[0])


def test_the_number_of_kept_features_is_bounded(watched: Watched) -> None:
    sessions = Sessions(watched)
    for frame in FRAMES:
        sessions.predict("a", frame, instruction=GO_LEFT)
    sessions.reset("b", GO_LEFT)

    assert sessions.predict("a", FRAMES[0]).replayed == WINDOW - 1
