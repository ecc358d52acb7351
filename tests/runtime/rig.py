"""A robot in pieces that tests can break: the real loop, grabber, watchdog and UDP sink around a drawn camera, a policy that does as it is
told, and a base that coasts (runtime/commands/fake_plant.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Manifest
from runtime.cadence import Summary
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.simulated import SimulatedCamera
from runtime.commands.base import CommandSink, Twist
from runtime.commands.fake_plant import FakePlant
from runtime.commands.select import open_sink
from runtime.control_loop import ControlLoop
from runtime.decisions import Decider
from runtime.drive import Plan, make_plan
from runtime.events import Decision, Event, Note, Published, RunInfo
from runtime.policy import ActionChunk
from runtime.robot_file import RobotFile, UdpCommands
from runtime.robot_file import SimulatedCamera as SimulatedConfig
from runtime.watchdog import Watchdog
from tests.bundles import GO_LEFT
from tests.robots import robot_file

# What a loaded machine may add to a bound that is stated for one that is not.
SLACK_S = 1.5
FORWARD = np.array([1.0, 0.0], np.float32)


class ObedientPolicy:
    """Wants `row` at every step of every chunk; `before` runs inside each step and may sleep, hang or raise."""

    backend = "obedient"

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.row: NDArray[np.float32] = FORWARD
        self.chunk: Callable[[], NDArray[np.float32]] = lambda: np.tile(self.row, (4, 1))
        self.before: Callable[[], None] = lambda: None
        self.on_reset: Callable[[str], None] = lambda _: None
        self.told: list[str | None] = []
        self.steps = 0

    def reset(self, instruction: str | None = None) -> None:
        self.on_reset(instruction or "")
        self.told.append(instruction)

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk:
        self.steps += 1
        values = self.chunk()  # decided on when it was asked, however long the answer takes
        self.before()
        return ActionChunk(values, values, np.zeros(1, np.float32), {"vision": 0.1, "total": 0.2}, 0.1)


@dataclass
class Heard:
    """A listener that keeps everything."""

    events: list[Event] = field(default_factory=list)

    def start(self, info: RunInfo) -> None:
        """Nothing to keep."""

    def take(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing to end."""

    @property
    def notes(self) -> list[Note]:
        return [event for event in self.events if isinstance(event, Note)]

    @property
    def published(self) -> list[Published]:
        return [event for event in self.events if isinstance(event, Published)]

    @property
    def decisions(self) -> list[Decision]:
        return [event for event in self.events if isinstance(event, Decision)]


class Rig:
    """A context manager: inside, the loop runs on a thread of its own; `result` waits for its end.

    Args:
        robot: by default tests.robots' with this rig's plant.
        sink: wraps or replaces the way to the robot.
        guarded: with a watchdog.
        policy: instead of the obedient one.
        rivals: see ControlLoop.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        robot: RobotFile | None = None,
        sink: Callable[[CommandSink], CommandSink] = lambda sink: sink,
        clock: Callable[[], float] = time.monotonic,
        guarded: bool = True,
        policy: Decider | None = None,
        rivals: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._rivals = rivals
        self.policy = ObedientPolicy(manifest)
        self._decider = policy or self.policy
        self.instruction = "go" if policy is None else GO_LEFT
        self.heard = Heard()
        self._given, self._wrap, self._clock, self._guarded = robot, sink, clock, guarded
        self._stack = ExitStack()
        self._error: BaseException | None = None
        self._summary: Summary | None = None

    def __enter__(self) -> Rig:
        with ExitStack() as stack:
            self.plant = stack.enter_context(FakePlant())
            commands = UdpCommands(host="127.0.0.1", port=self.plant.port)
            self.robot = msgspec.structs.replace(self._given or robot_file(), commands=commands)
            self.plan: Plan = make_plan(self.policy.manifest, self.robot, None)
            assert isinstance(self.robot.camera, SimulatedConfig)
            self.camera = SimulatedCamera(self.robot.camera)
            self.grabber = FrameGrabber(
                self.camera, self.robot.camera, clock=self._clock, on_note=lambda note: self.heard.take(note)
            )
            self.grabber.start()
            stack.callback(self.grabber.close)
            assert self.grabber.wait_newer(None, 30) is not None
            self.watchdog = Watchdog.start(commands, self.plan.limits.safety.watchdog_s) if self._guarded else None
            if self.watchdog is not None:
                stack.callback(self.watchdog.close)
            sink = self._wrap(open_sink(commands))
            stack.callback(sink.close)
            self.loop = ControlLoop(
                self._decider,
                self.grabber,
                sink,
                self.watchdog,
                self.plan.limits,
                self.plan.axes,
                self.robot.loop,
                self.plan.pace,
                [self.heard],
                rivals=self._rivals,
                clock=self._clock,
            )
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def until_moving(self) -> None:
        """Wait until the robot has reached what is wanted."""
        if self._decider is not self.policy:
            self.until(lambda: not self.plant.velocity.is_zero)
            return
        wanted = min(abs(float(self.plan.axes(self.policy.row)[0])), self.plan.limits.max_speed[0])
        self.until(lambda: abs(self.plant.velocity.linear_x) > 0.95 * wanted)

    def until_standing(self) -> None:
        """Wait until the robot has been told zero."""
        self.until(lambda: self.plant.velocity.is_zero)

    def until(self, reached: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait; fails soon where the loop has ended."""
        deadline, ended = time.monotonic() + timeout_s, False
        while not reached():
            if not ended and not self._thread.is_alive():
                # What it sent last may be on its way.
                deadline, ended = min(deadline, time.monotonic() + 2), True
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{'the loop has ended' if ended else 'not reached'}: {self.heard.notes}"
                ) from self._error
            time.sleep(0.002)

    def result(self, timeout_s: float = 30) -> Summary:
        """Wait for the loop to end; raises what ended it."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the loop goes on"
        if self._error is not None:
            raise self._error
        assert self._summary is not None
        return self._summary

    def _run(self) -> None:
        def camera() -> Mapping[str, Any]:
            return vars(self.grabber.statistics)

        try:
            self._summary = self.loop.run(self.instruction, camera=camera)
        except BaseException as error:
            self._error = error

    def _end(self) -> None:
        self.loop.stop()
        self._thread.join(10)
        self.loop.close()


def fastest(log: list[tuple[float, Twist]]) -> float:
    """The highest speed on any axis that was commanded."""
    return max((abs(value) for _, twist in log for value in twist.values), default=0.0)
