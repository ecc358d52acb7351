"""The decision thread: cadence, what it does with gaps and refusals, and how it counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from bundle.errors import BackendError, NotFiniteError, PromptError, ServiceError
from bundle.manifest import Manifest
from runtime.cameras.base import Frame
from runtime.decisions import DecisionThread
from runtime.events import Decision, Note
from tests.bundles import Tiny
from tests.runtime.rig import ObedientPolicy

PERIOD = 0.05


class Frames:
    """Hands out what the test says is newest."""

    def __init__(self) -> None:
        self.newest: Frame | None = None
        self.steady = False

    @property
    def ended(self) -> bool:
        return False

    def latest(self) -> Frame | None:
        return self.newest

    def wait_newer(self, than: Frame | None, timeout_s: float) -> Frame | None:
        deadline = time.monotonic() + timeout_s
        while True:
            if self.steady:
                self.put(time.monotonic())
            if self.newest is not None and (than is None or self.newest is not than):
                return self.newest
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)

    def put(self, captured_s: float) -> None:
        self.newest = Frame(np.zeros((4, 4, 3), np.uint8), captured_s)


class Run:
    """A decision thread and everything that it said."""

    def __init__(self, manifest: Manifest) -> None:
        self.policy, self.frames = ObedientPolicy(manifest), Frames()
        self.decisions: list[tuple[Decision, int]] = []
        self.notes: list[Note] = []
        self.distrusted: list[bool] = []
        self.thread = DecisionThread(
            self.policy,
            self.frames,
            period_s=PERIOD,
            deadline_s=PERIOD,
            accept=lambda decision, generation: self.decisions.append((decision, generation)),
            note=self.notes.append,
            distrust=lambda: self.distrusted.append(True),
            clock=time.monotonic,
        )

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.decisions) < count:
            assert time.monotonic() < deadline, (self.notes, self.thread.fault)
            time.sleep(0.001)


@pytest.fixture
def manifest(tiny_bundle) -> Manifest:
    return Manifest.load(tiny_bundle(Tiny()))


@contextmanager
def running(manifest: Manifest, *, steady: bool = True) -> Iterator[Run]:
    run = Run(manifest)
    run.frames.steady = steady
    run.thread.instruct("go")
    run.thread.start()
    try:
        yield run
    finally:
        assert run.thread.close(10)


def test_it_decides_at_the_cadence_and_not_as_fast_as_it_can(manifest: Manifest) -> None:
    with running(manifest) as run:
        run.until(8)
    started = [decision.started_s for decision, _ in run.decisions]
    # A loaded machine makes it slower, never faster.
    assert np.diff(started).min() > 0.4 * PERIOD
    assert (started[7] - started[0]) / 7 > 0.9 * PERIOD
    assert [decision.number for decision, _ in run.decisions[:8]] == list(range(8))
    assert {decision.instruction for decision, _ in run.decisions} == {"go"}


def test_one_frame_is_decided_on_once(manifest: Manifest) -> None:
    with running(manifest, steady=False) as run:
        run.frames.put(time.monotonic())
        run.until(1)
        time.sleep(4 * PERIOD)
        assert run.policy.steps == 1
        run.frames.put(time.monotonic())
        run.until(2)


def test_an_overrun_is_not_made_up_for_by_a_burst(manifest: Manifest) -> None:
    with running(manifest) as run:
        run.until(2)
        run.policy.before = lambda: time.sleep(4 * PERIOD)
        run.until(3)
        run.policy.before = lambda: None
        run.until(7)
    started = [decision.started_s for decision, _ in run.decisions]
    assert np.diff(started).min() > 0.4 * PERIOD


def test_after_a_gap_longer_than_the_window_the_history_is_forgotten(manifest: Manifest) -> None:
    window_s = manifest.dimensions.window * PERIOD
    with running(manifest, steady=False) as run:
        begin = time.monotonic()
        for number, at in enumerate([0.0, 0.9 * window_s, 2.1 * window_s], start=1):
            run.frames.put(begin + at)
            run.until(number)
    assert run.policy.told == ["go", "go"]  # at the start, and before the third frame
    assert [note.kind for note in run.notes] == ["history"]


def test_what_failed_is_in_no_history(manifest: Manifest) -> None:
    """Frames that were tried and not decided on do not bridge a gap."""

    def fail() -> None:
        raise BackendError("no", hint="this is a test.")

    window_s = manifest.dimensions.window * PERIOD
    with running(manifest, steady=False) as run:
        begin = time.monotonic()
        run.frames.put(begin)
        run.until(1)
        run.policy.before = fail
        for step in range(1, 5):
            run.frames.put(begin + 0.5 * step * window_s)
            deadline = time.monotonic() + 30
            while run.policy.steps < 1 + step:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        run.policy.before = lambda: None
        run.frames.put(begin + 2.5 * window_s)
        run.until(2)
    # Once for each frame that was too far from the last one that the history had.
    assert run.policy.told.count("go") >= 2


def test_what_is_not_finite_is_reported_at_once(manifest: Manifest) -> None:
    def fail() -> None:
        raise NotFiniteError("NaN", hint="this is a test.")

    with running(manifest) as run:
        run.until(1)
        assert run.distrusted == []
        run.policy.before = fail
        deadline = time.monotonic() + 30
        while not run.distrusted:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_whatever_ends_the_thread_is_known(manifest: Manifest) -> None:
    def leave() -> None:
        raise SystemExit

    with running(manifest) as run:
        run.policy.before = leave
        deadline = time.monotonic() + 30
        while run.thread.fault is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert isinstance(run.thread.fault, SystemExit)


def test_time_that_runs_backwards_is_a_gap_too(manifest: Manifest) -> None:
    with running(manifest, steady=False) as run:
        run.frames.put(time.monotonic())
        run.until(1)
        run.frames.put(time.monotonic() - 100)
        run.until(2)
    assert run.policy.told == ["go", "go"]


def test_a_refused_instruction_leaves_the_policy_silent_until_the_next(manifest: Manifest) -> None:
    def refuse(text: str) -> None:
        if text == "too long":
            raise PromptError("the instruction is too long", got=99, hint="shorten it.")

    with running(manifest) as run:
        run.policy.on_reset = refuse
        run.until(1)
        generation = run.thread.instruct("too long")
        deadline = time.monotonic() + 30
        while not run.notes:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        count = len(run.decisions)
        time.sleep(3 * PERIOD)
        assert len(run.decisions) == count
        assert run.thread.fault is None
        assert "too long" in run.notes[0].text
        assert run.thread.instruct("go on") == generation + 1
        run.until(count + 1)
    assert run.decisions[-1][0].instruction == "go on"
    assert run.decisions[-1][1] == generation + 1


def test_a_server_that_is_away_is_asked_again(manifest: Manifest) -> None:
    left = [3]

    def away(_: str) -> None:
        if left[0]:
            left[0] -= 1
            raise ServiceError("no answer", hint="start it.")

    with running(manifest) as run:
        run.policy.on_reset = away
        run.thread.instruct("go on")
        run.until(1)
        while not any(decision.instruction == "go on" for decision, _ in run.decisions):
            time.sleep(0.001)
        assert left == [0]
        assert run.thread.fault is None


def test_what_is_overdue_counts_before_it_ends(manifest: Manifest) -> None:
    go_on = threading.Event()
    with running(manifest) as run:
        run.until(2)
        run.policy.before = lambda: go_on.wait(30)
        deadline = time.monotonic() + 30
        while run.thread.progress().misses < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        missed = run.thread.progress().misses
        go_on.set()
        count = len(run.decisions)
        run.until(count + 1)
        # Counted while it hung, and not once more when it ended.
        assert run.thread.progress().misses >= missed
        late = [decision for decision, _ in run.decisions if decision.missed]
        assert len(late) >= 1
        taken = sum(int((decision.finished_s - decision.started_s) / PERIOD) for decision in late)
        assert abs(run.thread.progress().misses - taken) <= 2
