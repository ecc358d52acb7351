"""Every fault of docs/safety.md, caused for real: after each the robot stands still in time, or goes on as it should.

The base is one that coasts for ever (runtime/commands/fake_plant.py). Here the loop runs in this process, see tests/runtime/rig.py; what
kills, freezes or starves a process is in test_faults_of_processes.py.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from bundle.errors import BackendError, BundleError, CommandError, WatchdogError
from bundle.manifest import Manifest
from runtime.cameras.simulated import Fault as CameraFault
from runtime.commands.base import CommandSink, Twist
from runtime.commands.select import competitors, open_sink
from runtime.policy import Policy
from runtime.robot_file import DdsCommands
from runtime.safety import LEVELS
from tests.bundles import Tiny
from tests.robots import EAGER, SAFETY, robot_file
from tests.runtime.faults import (
    DECIDE_S,
    LATE_S,
    PERIOD_S,
    RAMP_S,
    RIVALS_S,
    STALE_S,
    UNDECIDED_S,
    WATCHDOG_S,
    Fault,
    fault,
    judge,
)
from tests.runtime.rig import FORWARD, SLACK_S, Rig, fastest

# Late decisions alone never stop.
FORGIVING = {"misses_to_hold": 999, "misses_to_slow": 999, "misses_to_stop": 999}


@pytest.fixture
def manifest(tiny_bundle) -> Manifest:
    return Manifest.load(tiny_bundle(Tiny()))


def stands_after(rig: Rig, cause: Callable[[], object]) -> float:
    """Seconds from a fault to a robot that stands, and goes on standing."""
    rig.until_moving()
    begin = time.monotonic()
    cause()
    rig.until_standing()
    stopped = rig.plant.stopped_at()
    assert stopped is not None
    time.sleep(0.2)
    assert rig.plant.velocity.is_zero
    return stopped - begin


def recovers(rig: Rig, mend: Callable[[], object]) -> None:
    """Once mended, it drives again, gently."""
    before = len(rig.plant.log)
    mend()
    rig.until_moving()
    again = [twist for _, twist in rig.plant.log[before:]]
    first = next(twist for twist in again if not twist.is_zero)
    assert abs(first.linear_x) <= rig.plan.limits.max_acceleration[0] * 2 * PERIOD_S + 1e-9


# --- the camera ---------------------------------------------------------------------------------------------------------------------

STALE = "stale_frame_s + stop_within_s + 2 rounds"
CAMERA = {
    CameraFault.FREEZE: fault("frame freeze", "stands still, drives on when pictures change again", STALE_S, STALE),
    CameraFault.LATE: fault("late frames", "as if there were none: what is old is not driven by", STALE_S, STALE),
    CameraFault.DUPLICATE: fault("duplicate timestamps", "a repeated stamp is no new frame", STALE_S, STALE),
    CameraFault.UNPLUGGED: fault("camera unplugged and back", "stands still; opened again, drives on", STALE_S, STALE),
    CameraFault.BLACK: fault("black frame", "no light is no picture", STALE_S, STALE),
    CameraFault.WRONG_SIZE: fault("wrong size", "another size is no picture of this camera", STALE_S, STALE),
}


@pytest.mark.parametrize("kind", CAMERA)
def test_camera(manifest: Manifest, kind: CameraFault) -> None:
    with Rig(manifest) as rig:
        seen = stands_after(rig, lambda: setattr(rig.camera, "fault", kind))
        recovers(rig, lambda: setattr(rig.camera, "fault", None))
    judge(CAMERA[kind], seen)


# --- the policy ---------------------------------------------------------------------------------------------------------------------

NAN = fault(
    "NaN action",
    "zero at once, no ramp: nothing that computed it is believed",
    DECIDE_S + 2 * PERIOD_S,
    "a decision + 2 rounds",
)
RAISES = fault(
    "backend exception",
    "the last good action ages; drives on when decisions come again",
    UNDECIDED_S,
    "stale_action_s + stop_within_s + 2 rounds",
)
HANGS = fault(
    "backend hang",
    "late decisions degrade to a stop; the round goes on without the policy",
    LATE_S,
    "misses_to_stop deadlines + stop_within_s + 2 rounds",
)
SLOW = fault(
    "slow inference x5",
    "each decision misses its deadline: hold, slow, stop; drives on when punctual again",
    LATE_S + 5 * DECIDE_S,
    "as a hang, + a decision",
)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_action_that_is_no_number(tiny_bundle, value: float) -> None:
    """Through the real policy, which refuses what its last stage gave."""
    policy = Policy.load(tiny_bundle(Tiny()), "ort:cpu", threads=1)
    spoilt = np.full((1, policy.manifest.dimensions.chunk, 2), value, np.float32)
    with Rig(policy.manifest, robot=robot_file(axes=EAGER), policy=policy) as rig:
        rig.until(lambda: fastest(rig.plant.log[-3:]) > 0.3)
        seen = stands_after(rig, lambda: setattr(policy._chain, "run_action_head", lambda _: spoilt))
        last = [twist for _, twist in rig.plant.log if not twist.is_zero][-1]
        assert max(map(abs, last.values)) > 0.2  # at once: between driving and zero there is no ramp
        assert any("not finite" in published.reasons for published in rig.heard.published)
        before = len(rig.plant.log)
        del policy._chain.run_action_head  # type: ignore[attr-defined] # the class has the good one
        rig.until(lambda: fastest(rig.plant.log[before:]) > 0.1)
    judge(NAN, seen)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_chunk_that_is_no_number(manifest: Manifest, value: float) -> None:
    """Of a policy that hands it on, which ours do not."""
    with Rig(manifest) as rig:
        seen = stands_after(rig, lambda: setattr(rig.policy, "chunk", lambda: np.full((4, 2), value, np.float32)))
        moving = [twist for at, twist in rig.plant.log if not twist.is_zero]
        assert abs(moving[-1].linear_x) == pytest.approx(rig.plan.limits.max_speed[0])
    assert seen <= DECIDE_S + 2 * PERIOD_S + SLACK_S


NETS = {
    # For each net the two others are so wide that it is the only one that can catch.
    "stale frame": msgspec.structs.replace(SAFETY, stale_action_s=5.0, **FORGIVING),
    "stale action": msgspec.structs.replace(SAFETY, stale_frame_s=5.0, **FORGIVING),
    "late decisions: stop": msgspec.structs.replace(SAFETY, stale_frame_s=5.0, stale_action_s=5.0),
}


@pytest.mark.parametrize("reason", NETS)
def test_each_net_holds_by_itself(manifest: Manifest, reason: str) -> None:
    forever = threading.Event()
    with Rig(manifest, robot=robot_file(safety=NETS[reason])) as rig:
        cause = {
            "stale frame": lambda: setattr(rig.camera, "fault", CameraFault.FREEZE),
            "stale action": lambda: setattr(rig.policy, "before", lambda: forever.wait(60)),
            "late decisions: stop": lambda: setattr(rig.policy, "before", lambda: forever.wait(60)),
        }
        stands_after(rig, cause[reason])
        held = [published for published in rig.heard.published if published.twist.is_zero and published.wanted]
        assert reason in held[-1].reasons
        assert set(NETS) & set(held[-1].reasons) == {reason}
        ages = [published.frame_age_s for published in rig.heard.published if "stale frame" not in published.reasons]
        assert max(ages) <= rig.plan.limits.safety.stale_frame_s
        forever.set()


def test_a_backend_that_raises(manifest: Manifest) -> None:
    def fail() -> None:
        raise BackendError("the GPU hiccups", got="planned failure", hint="this is a test.")

    with Rig(manifest) as rig:
        seen = stands_after(rig, lambda: setattr(rig.policy, "before", fail))
        recovers(rig, lambda: setattr(rig.policy, "before", lambda: None))
        assert any("hiccups" in note.text for note in rig.heard.notes)
    judge(RAISES, seen)


def test_a_backend_that_never_works_again_ends_the_run(manifest: Manifest) -> None:
    def fail() -> None:
        raise BackendError("the GPU is gone", got="planned failure", hint="this is a test.")

    with Rig(manifest) as rig:
        stands_after(rig, lambda: setattr(rig.policy, "before", fail))
        with pytest.raises(BackendError, match="30 decisions in a row"):
            rig.result()
        assert rig.plant.velocity.is_zero


def test_a_defect_of_the_program_ends_the_run(manifest: Manifest) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with Rig(manifest) as rig:
        stands_after(rig, lambda: setattr(rig.policy, "before", fail))
        with pytest.raises(ZeroDivisionError):
            rig.result()


def test_a_backend_that_hangs(manifest: Manifest) -> None:
    forever = threading.Event()
    with Rig(manifest) as rig:
        seen = stands_after(rig, lambda: setattr(rig.policy, "before", lambda: forever.wait(60)))
        rounds = len(rig.heard.published)
        rig.until(lambda: len(rig.heard.published) > rounds + 5)  # the loop itself goes on
        rig.policy.before = lambda: None
        recovers(rig, forever.set)
    judge(HANGS, seen)


def test_a_policy_five_times_too_slow(manifest: Manifest) -> None:
    with Rig(manifest) as rig:
        seen = stands_after(rig, lambda: setattr(rig.policy, "before", lambda: time.sleep(5 * DECIDE_S)))
        levels = list(dict.fromkeys(published.level for published in rig.heard.published))
        assert levels == sorted(levels, key=LEVELS.index)
        assert {"drive", "stop"} < set(levels)
        recovers(rig, lambda: setattr(rig.policy, "before", lambda: None))
        assert any(decision.missed for decision in rig.heard.decisions)
    judge(SLOW, seen)


# --- time and orders ----------------------------------------------------------------------------------------------------------------

CLOCK = fault(
    "clock jump backwards",
    "frames from the future are not believed until time has passed them",
    RAMP_S + PERIOD_S,
    "stop_within_s + 3 rounds",
)
CHANGED = fault(
    "instruction change mid-run",
    "nothing decided under the old one is driven; stands or slows until the first new decision",
    RAMP_S + PERIOD_S,
    "stop_within_s + 3 rounds, if the policy stays silent",
)
RESET = fault(
    "reset mid-chunk",
    "the chunk is dropped; the history begins anew",
    RAMP_S + PERIOD_S,
    "stop_within_s + 3 rounds, if the policy stays silent",
)


def test_the_clock_jumps_back(manifest: Manifest) -> None:
    offset = [0.0]
    with Rig(manifest, clock=lambda: time.monotonic() + offset[0], guarded=False) as rig:
        seen = stands_after(rig, lambda: offset.__setitem__(0, -3600.0))
        rounds = len(rig.heard.published)
        rig.until(lambda: len(rig.heard.published) > rounds + 5)  # it does not wait an hour for its next round
    judge(CLOCK, seen)


@pytest.mark.parametrize("case", [CHANGED, RESET])
def test_new_orders(manifest: Manifest, case: Fault) -> None:
    """What was decided before the order, and what is being decided when it comes, is not followed for a single round."""
    new = "go" if case is RESET else "go somewhere else"
    answers = threading.Semaphore(0)
    # No age and no lateness stops here, only the order.
    patient = msgspec.structs.replace(SAFETY, stale_action_s=5.0, **FORGIVING)
    with Rig(manifest, robot=robot_file(safety=patient)) as rig:
        rig.until_moving()
        rig.policy.before = lambda: answers.acquire(timeout=60)
        asked = rig.policy.steps
        rig.until(lambda: rig.policy.steps > asked)
        seen = stands_still_after_order(rig, new)
        before, decided = len(rig.plant.log), len(rig.heard.decisions)
        rig.policy.row = np.array([-1.0, 0.0], np.float32)
        answers.release()  # to the question from before the order: forward
        rig.until(lambda: len(rig.heard.decisions) > decided)
        assert rig.plant.wait_for_commands(4, 30)
        assert rig.plant.velocity.is_zero
        answers.release()
        rig.until(lambda: rig.plant.velocity.linear_x < -0.3)
        assert all(twist.linear_x <= 0 for _, twist in rig.plant.log[before:])
        assert rig.policy.told == ["go", new]
        assert [note.text for note in rig.heard.notes if note.kind == "instruction"] == [new]
        rig.policy.before = lambda: None
        answers.release()
    judge(case, seen)


def stands_still_after_order(rig: Rig, instruction: str) -> float:
    begin = time.monotonic()
    rig.loop.instruct(instruction)
    rig.until_standing()
    stopped = rig.plant.stopped_at()
    assert stopped is not None
    return stopped - begin


def test_a_halt_lasts_until_the_next_order(manifest: Manifest) -> None:
    with Rig(manifest) as rig:
        assert stands_after(rig, lambda: rig.loop.halt("by hand")) < RAMP_S + PERIOD_S + SLACK_S
        recovers(rig, lambda: rig.loop.instruct("go"))


def test_a_bundle_that_is_replaced_ends_the_run_at_the_next_order(manifest: Manifest) -> None:
    def refuse(_: str) -> None:
        raise BundleError("the bundle was replaced", hint="this is a test.")

    with Rig(manifest) as rig:
        rig.until_moving()
        rig.policy.on_reset = refuse
        stands_after(rig, lambda: rig.loop.instruct("go on"))
        with pytest.raises(BundleError):
            rig.result()


# --- the way to the robot -----------------------------------------------------------------------------------------------------------

PEER = fault(
    "DDS peer gone",
    "nobody listens: what is sent goes to zero, so that a robot that comes back starts from zero",
    0.5 + RAMP_S,
    "0.5 s to notice + stop_within_s + 2 rounds",
)


class Listened:
    """A sink that can tell who listens, as DDS can; see tests/runtime/commands for the real one."""

    def __init__(self, sink: CommandSink) -> None:
        self._sink = sink
        self.count = 1
        self.fail = 0
        self.wrong: list[str] = []

    def send(self, twist: Twist) -> None:
        if self.fail:
            self.fail -= 1
            raise CommandError("the network is gone", hint="this is a test.")
        self._sink.send(twist)

    def listeners(self) -> int | None:
        return self.count

    def misfits(self) -> list[str]:
        return self.wrong

    def close(self) -> None:
        self._sink.close()


def listened(rig: list[Listened]) -> Callable[[CommandSink], CommandSink]:
    def wrap(sink: CommandSink) -> CommandSink:
        rig.append(Listened(sink))
        return rig[-1]

    return wrap


def test_nobody_listens(manifest: Manifest) -> None:
    sinks: list[Listened] = []
    with Rig(manifest, sink=listened(sinks)) as rig:
        seen = stands_after(rig, lambda: setattr(sinks[0], "count", 0))
        recovers(rig, lambda: setattr(sinks[0], "count", 1))
        assert [note.text for note in rig.heard.notes if note.kind == "robot"] == [
            "nobody listens to the commands",
            "the commands have a listener",
        ]
    judge(PEER, seen)


def test_a_base_that_takes_the_other_type_is_named(manifest: Manifest) -> None:
    sinks: list[Listened] = []
    with Rig(manifest, sink=listened(sinks)) as rig:
        sinks[0].wrong = ["1 subscriber takes something else"]
        stands_after(rig, lambda: setattr(sinks[0], "count", 0))
        recovers(rig, lambda: setattr(sinks[0], "count", 1))
        assert [note.text for note in rig.heard.notes if note.kind == "robot"] == [
            "nobody listens to the commands",
            "on the topic of the commands, 1 subscriber takes something else",
            "the commands have a listener",
        ]


def test_a_command_that_does_not_get_out_ends_nothing(manifest: Manifest) -> None:
    sinks: list[Listened] = []
    with Rig(manifest, sink=listened(sinks)) as rig:
        rig.until_moving()
        sinks[0].fail = 1
        rig.until(lambda: any("the network is gone" in note.text for note in rig.heard.notes))
        # From zero: what the robot did in the meantime nobody knows.
        rig.until_standing()
        rig.until_moving()


def test_commands_that_never_get_out_end_the_run_and_the_watchdog_goes_its_own_way(manifest: Manifest) -> None:
    sinks: list[Listened] = []
    with Rig(manifest, sink=listened(sinks)) as rig:
        rig.until_moving()
        begin, sinks[0].fail = time.monotonic(), 10**9
        with pytest.raises((CommandError, WatchdogError)):
            rig.result()
        assert rig.plant.wait_for(lambda twist: twist.is_zero, 30)
        seen = (rig.plant.stopped_at() or math.inf) - begin
    assert seen <= WATCHDOG_S + SLACK_S


def test_a_second_controller_that_comes_later_is_given_way_to(manifest: Manifest) -> None:
    others: list[str] = []
    with Rig(manifest, rivals=lambda: others) as rig:
        stands_after(rig, lambda: others.append("a joystick"))
        assert any("a joystick" in note.text for note in rig.heard.notes)


def test_others_are_looked_for_several_times_a_second(manifest: Manifest) -> None:
    """In rounds, of which there are 20 a second at most: on a slow machine fewer lie between two looks, never more."""
    looks: list[int] = []

    def look() -> tuple[str, ...]:
        looks.append(len(rig.heard.published))
        return ()

    rig = Rig(manifest, rivals=look)
    with rig:
        rig.until(lambda: len(looks) >= 6)
    assert max(np.diff(looks)) <= RIVALS_S / PERIOD_S + 2


RIVAL = fault(
    "a second controller for an instant",
    "given way to until a new instruction, also where it was gone before anybody looked (DDS)",
    RIVALS_S + RAMP_S,
    "0.25 s to notice + stop_within_s + 2 rounds",
)


def test_a_second_controller_that_is_gone_again_is_given_way_to(manifest: Manifest, domain: int) -> None:
    pytest.importorskip("cyclonedds")
    topic = DdsCommands(domain=domain)
    ours = open_sink(topic)
    holding = threading.Event()

    def look() -> tuple[str, ...]:
        return () if holding.is_set() else competitors(ours, wait_s=0.0)

    def come_and_go() -> None:
        holding.set()  # so that it is over before anybody has looked, however fast the loop is
        open_sink(topic).close()
        holding.clear()

    with Rig(manifest, rivals=look) as rig:
        seen = stands_after(rig, come_and_go)
        assert any("somebody else sends commands" in note.text for note in rig.heard.notes)
        recovers(rig, lambda: rig.loop.instruct("go"))
    ours.close()
    judge(RIVAL, seen)


def test_a_robot_that_stood_for_long_does_not_drive_off_by_itself(manifest: Manifest) -> None:
    robot = robot_file(safety=msgspec.structs.replace(SAFETY, resume_within_s=0.8))
    with Rig(manifest, robot=robot) as rig:
        stands_after(rig, lambda: setattr(rig.camera, "fault", CameraFault.SILENT))
        rig.until(lambda: any(note.kind == "halt" for note in rig.heard.notes))
        rig.camera.fault = None
        count = len(rig.heard.decisions)
        rig.until(lambda: len(rig.heard.decisions) > count + 5)
        assert rig.plant.velocity.is_zero
        recovers(rig, lambda: rig.loop.instruct("go"))


def test_a_robot_that_wants_to_stand_may_stand_for_ever(manifest: Manifest) -> None:
    robot = robot_file(safety=msgspec.structs.replace(SAFETY, resume_within_s=0.5))
    with Rig(manifest, robot=robot) as rig:
        rig.until_moving()
        rig.policy.row = np.zeros(2, np.float32)
        rig.until_standing()
        time.sleep(1.0)
        rig.policy.row = FORWARD
        rig.until_moving()
        assert not rig.heard.notes


def test_a_recording_that_plays_as_a_camera_ends_the_run(manifest: Manifest) -> None:
    with Rig(manifest) as rig:
        stands_after(rig, lambda: setattr(rig.camera, "fault", CameraFault.END))
        assert rig.result().zero_sent


# --- what nothing may do ------------------------------------------------------------------------------------------------------------


def test_whatever_the_policy_wants_the_limits_hold(manifest: Manifest) -> None:
    rng = np.random.default_rng(0)
    with Rig(manifest) as rig:
        rig.policy.chunk = lambda: rng.choice([-1e9, -1.0, 0.0, 1.0, 1e9], (4, 2)).astype(np.float32)
        rig.until(lambda: rig.policy.steps > 20)
        log = rig.plant.log
        assert fastest(log) <= 0.4
        assert any(not twist.is_zero for _, twist in log)
