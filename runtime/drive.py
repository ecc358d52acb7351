"""A run on the robot: everything that a control loop needs is made, checked and, in whatever way the run ends, taken down again.

The order is the point. What can be refused is refused before the model is loaded; the robot is locked before its topic is opened; camera
and policy have shown that they work before anybody is asked to confirm; the watchdog stands ready before the first command. In a dry run
the way to the robot is never opened at all.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, TextIO

import msgspec

from bundle.errors import CameraError, CommandError, ConfigError, RobotLockedError, ServiceError
from bundle.manifest import Manifest
from runtime.cadence import Summary
from runtime.cameras.base import Frame
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.pair import PairedFrames
from runtime.cameras.select import open_camera
from runtime.commands.base import CommandSink
from runtime.commands.select import competitors, open_sink, robot_key
from runtime.control_loop import ControlLoop, Pace
from runtime.decisions import Decider, FrameSource, step_on
from runtime.events import Listener, RunInfo
from runtime.limits import AxisMap, Limits, axis_map, check_cadence, limits_of
from runtime.notes import Notes
from runtime.realtime import LOOP_PRIORITY, give_back_priority, take_priority
from runtime.robot_file import (
    CameraConfig,
    CommandConfig,
    ConsoleCommands,
    DdsCommands,
    LimitsFile,
    RobotFile,
    Ros2Commands,
    kind_of,
)
from runtime.robot_lock import lock_robot
from runtime.watchdog import Watchdog

# Cameras with an exposure to settle take a second or two; so does a service that has to be discovered.
_FIRST_FRAME_S = 15.0
_DRAWN = ("simulated", "episode", "video")
# What a frightened person types must not become an instruction: a line with one of the first, or of one of the second alone, stops.
_STOP_WORDS = frozenset(
    ("stop", "stopp", "stopping", "halt", "estop", "e-stop", "freeze", "wait", "don't", "dont", "abort", "cancel")
    + ("정지", "정지해", "멈춰", "멈춰요", "멈춰라", "멈추세요", "그만", "스톱")
)
_STOP_LINES = frozenset(("", "s", "q", "no", "quit", "exit"))
# Some senders of signals send two at once.
_AGAIN_S = 0.5
# The interpreter's own choice is 5 ms for which one thread may keep all others waiting: half of what jitter is allowed.
_SWITCH_S = 0.0001


@dataclass(frozen=True)
class DriveOptions:
    """How to drive, beside what bundle and robot file say.

    Attributes:
        instruction: what to do.
        dry_run: decide, and send nothing to the robot.
        confirm: wait for Enter before the first command.
        interactive: every line on stdin is a new instruction; an empty one, or one with a word like stop, stops; its end ends the run.
        seconds: end after so long; infinite runs until stopped.
    """

    instruction: str
    dry_run: bool = False
    confirm: bool = False
    interactive: bool = False
    seconds: float = math.inf


@dataclass(frozen=True)
class Plan:
    """All that is known before a model is loaded.

    Attributes:
        local: the limits file, if there is one.
        limits: the tightest of all.
    """

    manifest: Manifest
    robot: RobotFile
    local: LimitsFile | None
    limits: Limits
    axes: AxisMap
    pace: Pace

    @property
    def cameras(self) -> dict[str, CameraConfig]:
        """Those that the policy sees: `static`, and `hand` if it has one."""
        found = {"static": self.robot.camera}
        if "hand" in self.manifest.preprocessing.cameras and self.robot.hand_camera is not None:
            found["hand"] = self.robot.hand_camera
        return found


def make_plan(manifest: Manifest, robot: RobotFile, local: LimitsFile | None) -> Plan:
    """Check bundle, robot and limits against each other.

    Raises:
        ConfigError, LimitsError: they do not fit; see runtime/limits.py.
    """
    if "hand" in manifest.preprocessing.cameras and robot.hand_camera is None:
        raise ConfigError(
            f"the policy has a hand camera, and robot {robot.name} has none",
            got="no hand_camera in the robot file",
            expected=", ".join(manifest.preprocessing.cameras),
            hint="describe it in a section [hand_camera], with the keys of [camera].",
        )
    decide_hz = robot.loop.decide_hz or manifest.fps
    if decide_hz is None:
        raise ConfigError(
            "neither the bundle nor the robot file says how many decisions a second",
            expected="the cadence of the training episodes",
            hint="set loop.decide_hz in the robot file; the history window means what it meant in training only at that rate.",
        )
    pace = Pace(robot.loop.publish_hz, decide_hz, robot.loop.deadline_s or 1 / decide_hz)
    limits = limits_of(robot, manifest.action, local)
    check_cadence(limits, publish_hz=pace.publish_hz, decide_hz=pace.decide_hz)
    return Plan(manifest, robot, local, limits, axis_map(robot, manifest.action), pace)


def drive(
    plan: Plan,
    load: Callable[[], Decider],
    options: DriveOptions,
    listeners: Sequence[Listener],
    notes: Notes,
    *,
    bundle: str,
    show: Callable[[Decider], None] = lambda _: None,
    confirm: Callable[[], None] = lambda: None,
) -> Summary:
    """Run until stopped by time, a signal or an error.

    Args:
        load: makes the policy.
        listeners: told of the run and closed after it.
        notes: told of it too, and what the camera's notes go through.
        show: called when all is ready, before `confirm`, which may raise to refuse.

    Raises:
        JetvlaError: of whatever failed; the robot has been sent a zero if it had been sent anything.
    """
    with ExitStack() as stack:
        stack.enter_context(notes)
        if not options.dry_run and (key := robot_key(plan.robot.commands)):
            stack.enter_context(lock_robot(key))
        grabbers = {}
        for name, camera in plan.cameras.items():
            grabbers[name] = FrameGrabber(open_camera(camera), camera, on_note=notes)
            grabbers[name].start()
            stack.callback(grabbers[name].close)
        frames: FrameSource = grabbers["static"]
        if "hand" in grabbers:
            frames = PairedFrames(grabbers["static"], grabbers["hand"])
        policy = load()
        _warm_up(policy, _first_frame(frames, grabbers), options.instruction)
        commands = ConsoleCommands() if options.dry_run else plan.robot.commands
        _refuse_make_believe(plan, policy.backend, commands)
        with ExitStack() as way:
            sink, guard = _way_to_robot(plan, commands, way)
            show(policy)
            if options.confirm:
                confirm()
            info = _info(plan, policy, bundle)
            for listener in listeners:
                listener.start(info)
                stack.callback(listener.close)
            notes.hand_on(listeners)
            loop = ControlLoop(
                policy,
                frames,
                sink,
                guard,
                plan.limits,
                plan.axes,
                plan.robot.loop,
                plan.pace,
                (*listeners, notes),
                rivals=lambda: _rivals(sink, guard),
            )
            stack.callback(loop.close)
            stack.enter_context(_stopped_by_signals(loop))
            if options.interactive:
                threading.Thread(target=_obey, args=(loop, sys.stdin), name="stdin", daemon=True).start()
            with steady_threads():
                return loop.run(options.instruction, seconds=options.seconds, camera=lambda: _statistics(grabbers))


@contextmanager
def steady_threads() -> Iterator[None]:
    """While a loop runs on this thread: it comes first, and the others do not keep the interpreter to themselves for long."""
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    raised = take_priority(LOOP_PRIORITY)
    try:
        yield
    finally:
        sys.setswitchinterval(switch_s)
        if raised:
            give_back_priority()


def _way_to_robot(plan: Plan, commands: CommandConfig, stack: ExitStack) -> tuple[CommandSink, Watchdog | None]:
    sink = open_sink(commands)
    stack.callback(sink.close)
    if isinstance(commands, ConsoleCommands):
        return sink, None
    guard = Watchdog.start(commands, plan.limits.safety.watchdog_s)
    stack.callback(guard.close)
    if others := competitors(sink, exclude=(guard.identity,)):
        raise RobotLockedError(
            f"somebody else sends commands to robot {plan.robot.name}",
            got="; ".join(others),
            expected="nobody: two controllers on one robot fight",
            hint="stop the other one (ros2 topic info -v /cmd_vel shows who it is).",
        )
    return sink, guard


def _rivals(sink: CommandSink, guard: Watchdog | None) -> tuple[str, ...]:
    """Who else sends commands now; nobody where it cannot be told, which is no reason to stop."""
    if guard is None:
        return ()
    with suppress(CommandError):
        return competitors(sink, exclude=(guard.identity,), wait_s=0.0)
    return ()


def _statistics(grabbers: Mapping[str, FrameGrabber]) -> dict[str, Any]:
    """Of the static camera, and of the hand's below `hand`."""
    found = dict(vars(grabbers["static"].statistics))
    return found | {"hand": vars(grabbers["hand"].statistics)} if "hand" in grabbers else found


def _first_frame(frames: FrameSource, grabbers: Mapping[str, FrameGrabber]) -> Frame:
    frame = frames.wait_newer(None, _FIRST_FRAME_S)
    if frame is None:
        name, grabber = next(
            ((name, each) for name, each in grabbers.items() if each.latest() is None), ("static", grabbers["static"])
        )
        raise CameraError(
            f"the {'' if name == 'static' else 'hand '}camera gave no good picture in {_FIRST_FRAME_S:g} s",
            got=f"{grabber.error or grabber.statistics}",
            hint="run_robot.py BUNDLE --robot ROBOT --doctor shows what the camera gives.",
        )
    return frame


def _warm_up(policy: Decider, frame: Frame, instruction: str) -> None:
    """The first step allocates and compiles; it is not one to drive by. An instruction that is refused is refused here."""
    end_s = time.monotonic() + _FIRST_FRAME_S
    while True:
        try:
            policy.reset(instruction)
            step_on(policy, frame)
        except ServiceError:  # a service warms up too, and its deadline is that of a step that is warm
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)
        else:
            return


def _info(plan: Plan, policy: Decider, bundle: str) -> RunInfo:
    settings = {"robot": plan.robot, "limits_file": plan.local, "safety": plan.limits.safety}
    return RunInfo(
        robot=plan.robot.name,
        bundle=bundle,
        manifest_sha256=policy.manifest.manifest_sha256,
        backend=policy.backend,
        precision=policy.manifest.precision,
        action_names=policy.manifest.action.names,
        action_units=policy.manifest.action.units,
        decide_hz=plan.pace.decide_hz,
        publish_hz=plan.pace.publish_hz,
        strategy=plan.robot.loop.strategy,
        settings=msgspec.json.encode(settings).decode(),
    )


@contextmanager
def _stopped_by_signals(loop: ControlLoop) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run in order. Only the main thread can have handlers: elsewhere the caller stops."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_s = math.inf

    def stop(*_: object) -> None:
        nonlocal asked_s
        if time.monotonic() - asked_s > _AGAIN_S:
            os._exit(1)  # asked again: whatever does not end is left to the watchdog
        asked_s = min(asked_s, time.monotonic())
        loop.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _obey(loop: ControlLoop, lines: TextIO) -> None:
    """Until stdin ends, which ends the run: whoever typed cannot any more."""
    if isinstance(lines, TextIOWrapper):
        lines.reconfigure(errors="replace")
    try:
        for line in lines:
            words = {word.strip("!.,?").casefold() for word in line.split()}
            if words & _STOP_WORDS or " ".join(words) in _STOP_LINES:
                loop.halt("stopped by hand")
            else:
                loop.instruct(line.strip())
    finally:
        loop.halt("nobody is at the keyboard any more: the run ends")
        loop.stop()


def _refuse_make_believe(plan: Plan, backend: str, commands: CommandConfig) -> None:
    """A real robot does not move on what nobody sees or decides."""
    drawn = [kind for camera in plan.cameras.values() if (kind := kind_of(camera)) in _DRAWN]
    made_up = "backend fake" if backend == "fake" else f"camera {drawn[0]}" if drawn else ""
    if made_up and isinstance(commands, DdsCommands | Ros2Commands):
        raise ConfigError(
            f"robot {plan.robot.name} would really move",
            got=made_up,
            expected="a camera that sees and a policy that decides",
            hint="add --dry-run, or give the robot file commands of kind console or udp.",
        )
