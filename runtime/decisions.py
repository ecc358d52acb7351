"""The policy's own thread: at the training's cadence it takes the newest frame, asks the policy, and hands on what comes back.

The history window is only what the policy was trained on if its frames are as far apart as they were in training, so decisions start at
that cadence and not as fast as the machine can. A late decision is not followed by a burst; the next one starts at once, with the newest
frame. After a gap as long as the whole window the history is forgotten: it shows another situation. A policy that hangs hangs this thread
alone.

Knows nothing about commands: see runtime/control_loop.py.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError, FrameError, JetvlaError, NotFiniteError, PromptError, ServiceError
from bundle.manifest import Manifest
from runtime.cadence import Histogram
from runtime.cameras.base import Frame
from runtime.events import Decision, Note
from runtime.policy import ActionChunk

# So many failures in a row are no hiccup; the run ends, and whoever supervises it starts a new process.
MOST_FAILURES = 30
# How long to look for a newer frame before looking at orders again.
_LOOK_S = 0.05


class Decider(Protocol):
    """What the loop needs of a policy; runtime/policy.py and runtime/service/client.py have it."""

    manifest: Manifest
    backend: str

    def reset(self, instruction: str) -> None:
        """See Policy.reset."""
        ...

    def step(self, frame: NDArray[np.uint8], *, hand: NDArray[np.uint8] | None = None) -> ActionChunk:
        """See Policy.step."""
        ...


def step_on(policy: Decider, frame: Frame) -> ActionChunk:
    """Policy.step on what a frame shows; raises as it does."""
    return policy.step(frame.pixels) if frame.hand is None else policy.step(frame.pixels, hand=frame.hand)


class FrameSource(Protocol):
    """What the loop needs of a camera; see runtime/cameras/grabber.py."""

    @property
    def ended(self) -> bool:
        """A recording that plays as a camera is over."""
        ...

    def latest(self) -> Frame | None:
        """The newest good frame."""
        ...

    def wait_newer(self, than: Frame | None, timeout_s: float) -> Frame | None:
        """The newest good frame once it is another one than `than`; None if none came in time."""
        ...


@dataclass(frozen=True)
class Progress:
    """Decisions so far; a decision that is overdue counts as missed before it ends, once for every deadline that went by."""

    hits: int
    misses: int


class DecisionThread:
    """Runs the policy. All public methods may be called from any thread."""

    def __init__(
        self,
        policy: Decider,
        frames: FrameSource,
        *,
        period_s: float,
        deadline_s: float,
        accept: Callable[[Decision, int], None],
        note: Callable[[Note], None],
        distrust: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            period_s: between decisions.
            deadline_s: that a decision may take.
            accept: gets every decision, and the generation of the orders that it was made under (see `instruct`).
            note: gets what goes wrong.
            distrust: called when an action was not finite: what was accepted before is not to be followed any more.
        """
        self._policy, self._frames, self._accept, self._note, self._clock = policy, frames, accept, note, clock
        self._distrust = distrust
        self._period_s, self._deadline_s = period_s, deadline_s
        self._window_s = policy.manifest.dimensions.window * period_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._order: str | None = None
        self._generation = 0
        self._started_s: float | None = None
        self._hits = self._misses = self._failures_in_a_row = 0
        # The newest frame that the policy's history holds.
        self._remembered: Frame | None = None
        self._thread = threading.Thread(target=self._run, name="decisions", daemon=True)
        self.fault: BaseException | None = None
        """What ended this thread; None while it runs."""
        self.instruction: str | None = None
        """What the policy was told; None before the first order and after one that it refused."""
        self.decided = self.failed = 0
        self.spacing, self.sections = Histogram(), dict[str, Histogram]()

    def start(self) -> None:
        """Begin with what `instruct` was told."""
        self._thread.start()

    def instruct(self, instruction: str) -> int:
        """Before the next decision, tell the policy what to do and forget the history; the same text is a reset.

        Returns the generation of this order: decisions of an older one are not to be followed any more.
        """
        with self._lock:
            self._order = instruction
            self._generation += 1
            return self._generation

    def progress(self) -> Progress:
        """See Progress."""
        with self._lock:
            overdue = 0 if self._started_s is None else self._overdue(self._clock() - self._started_s)
            return Progress(self._hits, self._misses + overdue)

    def close(self, timeout_s: float) -> bool:
        """End after the decision that is being made; false if that does not come in time."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._decide_until_closed()
        except BaseException as error:  # whatever it is: the loop has to hear of it
            self.fault = error

    def _decide_until_closed(self) -> None:
        due_s, last = self._clock(), None
        while not self._closing.is_set():
            with self._lock:
                order, self._order, generation = self._order, None, self._generation
            if order is not None:
                self._reset(order)
            wait_s = min(due_s - self._clock(), self._period_s)
            if wait_s > 0 or self.instruction is None:
                self._closing.wait(min(max(wait_s, 0.0), _LOOK_S) or _LOOK_S)
                continue
            frame = self._frames.wait_newer(last, _LOOK_S)
            if frame is None:
                self._closing.wait(0.001)  # a source that is over answers at once
                continue
            now_s = self._clock()
            # Even spacing comes before the mean rate: after a delay of half a period the cadence starts anew.
            due_s = (due_s if 0 <= now_s - due_s < self._period_s / 2 else now_s) + self._period_s
            if last is not None:
                self.spacing.add(frame.captured_s - last.captured_s)
            last = frame
            gap_s = 0.0 if self._remembered is None else frame.captured_s - self._remembered.captured_s
            if not 0 <= gap_s <= self._window_s:
                self._note(Note(now_s, "history", f"{gap_s:.2f} s between frames; the history is forgotten"))
                if not self._reset(self.instruction):
                    continue
            decision = self._decide(frame)
            if decision is not None:
                self._accept(decision, generation)

    def _reset(self, instruction: str) -> bool:
        self._remembered = None
        try:
            self._policy.reset(instruction)
        except PromptError as error:
            self.instruction = None
            self._note(Note(self._clock(), "instruction", f"refused: {_line(error)}"))
        except ServiceError as error:
            self.instruction = None
            self._note(Note(self._clock(), "policy", _line(error)))
            with self._lock:
                self._order = (
                    instruction if self._order is None else self._order
                )  # a server comes back; a newer order comes first
            self._closing.wait(_LOOK_S)
        else:
            self.instruction = instruction
            return True
        return False

    def _decide(self, frame: Frame) -> Decision | None:
        assert self.instruction is not None
        started_s = self._clock()
        with self._lock:
            self._started_s = started_s
        try:
            chunk = step_on(self._policy, frame)
        except (BackendError, FrameError, ServiceError) as error:
            if isinstance(error, NotFiniteError):
                self._distrust()
            if getattr(error, "sticky", False):
                raise
            self._finish(started_s, failed=True)
            self._note(Note(self._clock(), "policy", _line(error)))
            # A server may be away for long; a backend of this process that never answers is broken.
            self._failures_in_a_row += not isinstance(error, ServiceError)
            if self._failures_in_a_row >= MOST_FAILURES:
                raise BackendError(
                    f"{MOST_FAILURES} decisions in a row failed",
                    got=_line(error),
                    hint="run_robot.py BUNDLE --check tells whether the backend computes rightly; --doctor looks at the camera.",
                ) from error
            return None
        except BaseException:
            self._finish(started_s, failed=True)
            raise
        finished_s = self._clock()
        missed = self._finish(started_s, failed=False)
        for section, milliseconds in chunk.timing.items():
            self.sections.setdefault(section, Histogram()).add(milliseconds / 1e3)
        self._failures_in_a_row, self._remembered = 0, frame
        self.decided += 1
        return Decision(
            self.decided - 1, self.instruction, frame, started_s, finished_s, chunk.values, dict(chunk.timing), missed
        )

    def _finish(self, started_s: float, *, failed: bool) -> bool:
        """Count what has just ended; true if it was late."""
        with self._lock:
            self._started_s = None
            overdue = self._overdue(self._clock() - started_s)
            self._misses += max(overdue, 1) if failed else overdue
            self._hits += not (overdue or failed)
            self.failed += failed
            return overdue > 0

    def _overdue(self, taken_s: float) -> int:
        return max(0, math.floor(taken_s / self._deadline_s))


def _line(error: JetvlaError) -> str:
    return f"{error.what} ({error.got})"
