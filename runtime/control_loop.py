"""The control loop: at a fixed rate, what the robot is told now - whatever cameras, policies and disks do.

Three things run at their own pace and meet in single values: a camera thread leaves its newest good frame (runtime/cameras/grabber.py), the
decision thread leaves its newest chunk (runtime/decisions.py), and this loop, on the caller's thread, turns what is there into one command
per period through runtime/safety.py. It waits for nobody: what does not come grows old, and old means stop. A watchdog in a process of its
own hears from every round and stops the robot when it does not; when that happened, or the watchdog is gone, this loop ends rather than go
on.

However the loop ends, the last thing that it sends is a zero.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bundle.errors import CommandError
from runtime.cadence import Histogram, Summary, percentiles_ms
from runtime.commands.base import TWIST_FIELDS, ZERO, CommandSink, Twist
from runtime.commands.select import misfits
from runtime.decisions import Decider, DecisionThread, FrameSource, Progress
from runtime.events import Decision, Event, Listener, Note, Published
from runtime.execution import TimedChunk, make_execution
from runtime.limits import AxisMap, Limits
from runtime.robot_file import Loop
from runtime.safety import STILL, Request, State, Vector, step

# A best-effort transport may lose one.
_LAST_ZEROS = 3
_LISTENERS_EVERY_S, _RIVALS_EVERY_S = 0.5, 0.25
_NOT_FINITE = (math.nan,) * len(TWIST_FIELDS)


class Guard(Protocol):
    """What the loop needs of a watchdog; see runtime/watchdog.py."""

    def beat(self) -> None:
        """The loop is alive."""
        ...

    def check(self) -> None:
        """Raises WatchdogError where nothing may move any more."""
        ...

    def listeners(self) -> int | None:
        """See CommandSink.listeners: those that a watchdog's zero would reach."""
        ...


@dataclass(frozen=True)
class Pace:
    """The rates of a run; see robot_file.Loop."""

    publish_hz: float
    decide_hz: float
    deadline_s: float


class ControlLoop:
    """Drives; `run` until `stop` is called, or until something ends it."""

    def __init__(
        self,
        policy: Decider,
        frames: FrameSource,
        sink: CommandSink,
        guard: Guard | None,
        limits: Limits,
        axes: AxisMap,
        loop: Loop,
        pace: Pace,
        listeners: Sequence[Listener] = (),
        *,
        rivals: Callable[[], Sequence[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            guard: None only where the sink moves nothing.
            rivals: tells who else sends commands to the robot; asked four times a second.
            clock: monotonic seconds; the one that frames are stamped with.
        """
        self._sink, self._guard, self._frames = sink, guard, frames
        self._limits, self._axes, self._pace, self._clock = limits, axes, pace, clock
        self._rivals = rivals
        self._listeners = tuple(listeners)
        self._period_s = 1 / pace.publish_hz
        self._lock = threading.Lock()
        self._stopping = False
        self._execution = make_execution(loop, 1 / pace.decide_hz)
        self._generation = 0
        self._halt = ""
        self._distrusted = False
        self._decisions = DecisionThread(
            policy,
            frames,
            period_s=1 / pace.decide_hz,
            deadline_s=pace.deadline_s,
            accept=self._accept,
            note=self.tell,
            distrust=self._distrust,
            clock=clock,
        )
        self._state = State()
        self._seen = Progress(0, 0)
        self._no_listener, self._listeners_at_s, self._rivals_at_s = False, -math.inf, -math.inf
        self._misfits: tuple[str, ...] = ()
        self._unsent_since_s: float | None = None
        self._drove_s = math.inf
        self._jitter, self._overhead = Histogram(), Histogram()
        self._held_back_s: defaultdict[str, float] = defaultdict(float)
        self._published = self._late = 0
        self._zero_sent = False

    def instruct(self, instruction: str) -> None:
        """Do something else from now on; the same text is a reset. Until it is decided on, the robot stops. From any thread."""
        with self._lock:
            self._generation = self._decisions.instruct(instruction)
            self._execution.clear()
            self._halt = ""
            self._drove_s = self._clock()
        self.tell(Note(self._clock(), "instruction", instruction))

    def halt(self, reason: str) -> None:
        """Stand still until the next `instruct`. From any thread."""
        with self._lock:
            self._halt = reason
        self.tell(Note(self._clock(), "halt", reason))

    def stop(self) -> None:
        """End the run within a round. From any thread, and from signal handlers: those interrupt this very loop, so no lock is taken."""
        self._stopping = True

    def tell(self, event: Event) -> None:
        """Pass an event on to all listeners. From any thread."""
        for listener in self._listeners:
            listener.take(event)

    def run(
        self, instruction: str, *, seconds: float = math.inf, camera: Callable[[], Mapping[str, Any]] = dict
    ) -> Summary:
        """Drive.

        Args:
            instruction: unless `instruct` was told another one before.
            seconds: end after so long.
            camera: asked for its counts at the end.

        Raises:
            WatchdogError: the watchdog stopped the robot, or is gone.
            CommandError: commands do not reach the robot.
            Exception: whatever ended the decision thread.
        """
        begin_s = self._drove_s = self._clock()
        try:
            if not self._generation:
                with self._lock:
                    self._generation = self._decisions.instruct(instruction)
            self._decisions.start()
            self._publish_until_stopped(begin_s + seconds)
        finally:
            self._send_zeros()
        return self._summary(begin_s, camera())

    def close(self) -> None:
        """Wait a second for a decision that is under way. After the watchdog was told that all is over: this wait is no silence."""
        self._decisions.close(timeout_s=1.0)

    def _publish_until_stopped(self, end_s: float) -> None:
        due_s = last_s = self._clock()
        while not self._stopping:
            now_s = self._clock()
            if self._decisions.fault is not None:
                raise self._decisions.fault
            if not now_s < end_s or self._frames.ended:
                return
            late_s = now_s - due_s
            self._jitter.add(late_s)
            if abs(late_s) > self._period_s:
                # Rounds that were missed are not made up for; and a clock that jumped back must not make the loop wait for it.
                self._late += late_s > 0
                due_s = now_s
            self._tick(now_s, now_s - last_s)
            last_s = now_s
            done_s = self._clock()
            self._overhead.add(done_s - now_s)
            due_s += self._period_s
            time.sleep(min(max(due_s - done_s, 0.0), self._period_s))

    def _tick(self, now_s: float, dt_s: float) -> None:
        progress = self._decisions.progress()
        # The frame before the time, so that it cannot be younger than now.
        frame = self._frames.latest()
        now_s = max(now_s, self._clock()) if frame is not None and frame.captured_s > now_s else now_s
        with self._lock:
            row, action_age_s = self._execution.command(now_s)
            halt = self._halt
            distrusted, self._distrusted = self._distrusted, False
        wanted = _NOT_FINITE if distrusted else None if row is None else self._axes(row)
        frame_age_s = math.inf if frame is None else now_s - frame.captured_s
        request = Request(
            wanted=wanted,
            frame_age_s=frame_age_s,
            action_age_s=action_age_s,
            misses=progress.misses - self._seen.misses,
            hits=progress.hits - self._seen.hits,
            halt=halt or self._cut_off(now_s),
        )
        self._seen = progress
        state, verdict = step(self._state, request, self._limits, dt_s, self._period_s)
        if self._guard is not None:
            self._guard.check()
            # This process may have stood still since the command was made up; then the watchdog speaks, and not this old word.
            if self._clock() - now_s > self._limits.safety.watchdog_s / 2:
                self._state = replace(state, published=self._state.published)
                return
            # Before the first command, which must not go out unwatched. Not while none gets out: the watchdog has a way of its own to try.
            if self._unsent_since_s is None:
                self._guard.beat()
        try:
            self._sink.send(verdict.twist)
        except CommandError as error:
            self._not_sent(now_s, error)
            return
        self._unsent_since_s = None
        self._state = state
        self._published += 1
        for reason in verdict.reasons:
            self._held_back_s[reason] += max(dt_s, 0.0)
        wishes: dict[str, float] = {}
        if wanted is not None and all(map(math.isfinite, wanted)):
            moved = zip(TWIST_FIELDS, wanted, self._limits.max_speed, strict=True)
            wishes = {name: value for name, value, most in moved if most > 0}
        self.tell(Published(now_s, verdict.twist, wishes, verdict.level, verdict.reasons, frame_age_s, action_age_s))
        self._stay_where_it_stood(now_s, verdict.twist, wanted)

    def _not_sent(self, now_s: float, error: CommandError) -> None:
        """No reason to end: only zeros until one gets out, and from zero then. Raises where that takes too long."""
        if self._unsent_since_s is None:
            self._unsent_since_s = now_s
            self.tell(Note(now_s, "robot", f"{error.what} ({error.got})"))
        if now_s - self._unsent_since_s > self._limits.safety.watchdog_s:
            raise error
        self._state = replace(self._state, published=STILL)

    def _stay_where_it_stood(self, now_s: float, twist: Twist, wanted: Vector | None) -> None:
        """A robot that was held for long while it wanted to move is not to drive off by itself when whatever held it has passed."""
        if not twist.is_zero or (wanted is not None and not any(wanted)):
            self._drove_s = now_s
        elif now_s - self._drove_s > self._limits.safety.resume_within_s and not self._halt:
            self.halt(f"stood for {now_s - self._drove_s:.0f} s; goes on after a new instruction or a new start")

    def _cut_off(self, now_s: float) -> str:
        """Why nothing may be sent but zeros, as far as it lies with the way to the robot; else empty."""
        if self._unsent_since_s is not None:
            return "commands do not get out"
        if not 0 <= now_s - self._rivals_at_s < _RIVALS_EVERY_S:
            self._rivals_at_s = now_s
            if (others := self._rivals()) and not self._halt:
                self.halt(f"somebody else sends commands to the robot: {'; '.join(others)}")
        return self._nobody_listens(now_s)

    def _nobody_listens(self, now_s: float) -> str:
        """A robot that comes back to the network starts from zero, and not with what it missed."""
        if not 0 <= now_s - self._listeners_at_s < _LISTENERS_EVERY_S:
            self._listeners_at_s = now_s
            # The watchdog's way to the robot is another one, and must work before it is needed.
            nobody = 0 in (self._sink.listeners(), None if self._guard is None else self._guard.listeners())
            if nobody != self._no_listener:
                self._no_listener = nobody
                self.tell(
                    Note(now_s, "robot", "nobody listens to the commands" if nobody else "the commands have a listener")
                )
            found = misfits(self._sink) if nobody else ()
            if found != self._misfits:
                self._misfits = found
                for why in found:
                    self.tell(Note(now_s, "robot", f"on the topic of the commands, {why}"))
        return "nobody listens" if self._no_listener else ""

    def _distrust(self) -> None:
        with self._lock:
            self._execution.clear()
            self._distrusted = True

    def _accept(self, decision: Decision, generation: int) -> None:
        with self._lock:
            # Made under an order that has been changed since.
            current = generation == self._generation
            if current:
                self._execution.add(TimedChunk(decision.values, decision.frame.captured_s))
        self.tell(decision)

    def _send_zeros(self) -> None:
        for _ in range(_LAST_ZEROS):
            try:
                self._sink.send(ZERO)
            except Exception as error:  # whatever it is, the watchdog goes on trying
                self.tell(Note(self._clock(), "robot", f"the last zero could not be sent: {error}"))
                return
            self._zero_sent = True
            self.tell(Published(self._clock(), ZERO, {}, "stop", ("end of the run",), math.inf, math.inf))

    def _summary(self, begin_s: float, camera: Mapping[str, Any]) -> Summary:
        seconds = max(self._clock() - begin_s, 1e-9)
        decisions = self._decisions
        sections = dict(decisions.sections)
        whole = sections.pop("total", Histogram())
        progress = decisions.progress()
        return Summary(
            seconds=seconds,
            published=self._published,
            late_ticks=self._late,
            jitter_ms=percentiles_ms(self._jitter, 50, 99),
            overhead_ms=percentiles_ms(self._overhead, 50, 99),
            decisions=decisions.decided,
            missed=progress.misses,
            failed=decisions.failed,
            decide_hz=decisions.decided / seconds,
            wanted_decide_hz=self._pace.decide_hz,
            spacing_ms=percentiles_ms(decisions.spacing, 50, 95),
            section_ms={name: found.percentile(50) * 1e3 for name, found in sections.items()},
            section_share={name: found.total_s / max(whole.total_s, 1e-9) for name, found in sections.items()},
            held_back_s=dict(self._held_back_s),
            zero_sent=self._zero_sent,
            camera=camera,
        )
