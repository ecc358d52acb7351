"""Commands over DDS, received by another process with types of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist
from runtime.commands.dds import DdsSink
from runtime.commands.select import competitors, identity, misfits, open_sink
from runtime.robot_file import DdsCommands
from runtime.ros_names import dds_topic
from runtime.watchdog import Watchdog

pytest.importorskip("cyclonedds")

PATIENCE_S = 60.0
TWIST = Twist(0.1, -0.2, 0.3, -0.4, 0.5, -0.6)
SHOWN = "0.1 -0.2 0.3 -0.4 0.5 -0.6"

# A receiver that shares no code with the sender. argv: domain, topic, type; prints each message as six numbers (and frame_id, seconds).
RECEIVER = """
import sys
from dataclasses import dataclass
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.idl import IdlStruct
from cyclonedds.idl.types import float64, int32, uint32
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

@dataclass
class V(IdlStruct, typename="geometry_msgs::msg::dds_::Vector3_"):
    x: float64
    y: float64
    z: float64

@dataclass
class T(IdlStruct, typename="geometry_msgs::msg::dds_::Twist_"):
    linear: V
    angular: V

@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    sec: int32
    nanosec: uint32

@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    stamp: Time
    frame_id: str

@dataclass
class S(IdlStruct, typename="geometry_msgs::msg::dds_::TwistStamped_"):
    header: Header
    twist: T

domain, name, kind = int(sys.argv[1]), sys.argv[2], {"twist": T, "stamped": S}[sys.argv[3]]
participant = DomainParticipant(domain)
qos = Qos(Policy.Reliability.Reliable(max_blocking_time=0), Policy.History.KeepLast(10))  # a ROS 2 subscription's
reader = DataReader(participant, Topic(participant, name, kind), qos=qos)
print("listening", flush=True)
for sample in reader.take_iter(timeout=duration(seconds=120)):
    if sys.argv[4:] == ["once"]:  # a first message, then an orderly end
        del reader, participant
        break
    twist = sample.twist if kind is S else sample
    more = [sample.header.frame_id, sample.header.stamp.sec] if kind is S else []
    v, w = twist.linear, twist.angular
    print(v.x, v.y, v.z, w.x, w.y, w.z, *more, flush=True)
"""

# Another controller. argv: domain, topic.
RIVAL = """
import sys, time
from runtime.commands.select import open_sink
from runtime.robot_file import DdsCommands
sink = open_sink(DdsCommands(domain=int(sys.argv[1]), topic=sys.argv[2]))
print(sink.identity, flush=True)
time.sleep(600)
"""


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def receiver(domain: int, kind: str = "twist") -> Iterator[subprocess.Popen[str]]:
    with running(RECEIVER, domain, "rt/cmd_vel", kind) as process:
        assert line(process) == "listening"
        yield process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def first_line(sink: DdsSink, robot: subprocess.Popen[str]) -> str:
    """Send until something arrives: the two sides of DDS find each other independently, and what is sent in between is lost."""
    shown: list[str] = []
    reader = threading.Thread(target=lambda: shown.append(line(robot)))
    reader.start()
    deadline = time.monotonic() + PATIENCE_S
    while reader.is_alive():
        assert time.monotonic() < deadline
        sink.send(TWIST)
        reader.join(0.02)
    return shown[0]


def wait_for_listeners(sink: DdsSink, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while sink.listeners() != count:
        assert time.monotonic() < deadline, f"{sink.listeners()} listeners"
        time.sleep(0.01)


@contextmanager
def opened(config: DdsCommands) -> Iterator[DdsSink]:
    sink = open_sink(config)
    assert isinstance(sink, DdsSink)
    try:
        yield sink
    finally:
        sink.close()


def test_names_of_topics() -> None:
    assert dds_topic("/cmd_vel") == dds_topic("cmd_vel") == "rt/cmd_vel"
    assert dds_topic("/base/cmd_vel") == "rt/base/cmd_vel"


def test_a_command_arrives_in_another_process(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink:
        assert sink.listeners() == 0
        sink.send(Twist(9.0))
        with receiver(domain) as robot:
            wait_for_listeners(sink, 1)
            assert first_line(sink, robot) == SHOWN  # and nothing from before it listened
            sink.send(ZERO)
            while (shown := line(robot)) == SHOWN:
                pass
            assert shown == "0.0 0.0 0.0 0.0 0.0 0.0"
        sink.send(TWIST)


def test_the_last_command_before_closing_arrives(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink, receiver(domain) as robot:
        wait_for_listeners(sink, 1)
        assert first_line(sink, robot) == SHOWN
        sink.send(ZERO)
        sink.close()
        while (last := line(robot)) == SHOWN:
            pass
        assert last == "0.0 0.0 0.0 0.0 0.0 0.0"
        assert sink.listeners() == 0
        with pytest.raises(CommandError, match="cannot publish: DDS topic /cmd_vel in domain"):
            sink.send(ZERO)


def test_closing_does_not_wait_for_ever_for_a_frozen_receiver(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink, receiver(domain) as robot:
        wait_for_listeners(sink, 1)
        assert first_line(sink, robot) == SHOWN
        os.kill(robot.pid, signal.SIGSTOP)
        sink.send(ZERO)
        begin = time.monotonic()
        sink.close()
        assert time.monotonic() - begin < 20


def test_a_stamped_command_has_its_header(domain: int) -> None:
    config = DdsCommands(domain=domain, stamped=True, frame_id="body")
    sink = DdsSink(config, domain, clock=lambda: 1e12)  # a broken clock
    with receiver(domain, "stamped") as robot:
        wait_for_listeners(sink, 1)
        assert first_line(sink, robot) == f"{SHOWN} body {2**31 - 1}"
    sink.close()


def test_best_effort_does_not_serve_a_reliable_subscription(domain: int) -> None:
    """Why `reliable` is the default: ROS 2 subscriptions ask for it, and quietly get nothing from who does not offer it."""
    with (
        receiver(domain),
        opened(DdsCommands(domain=domain)) as reliable,
        opened(DdsCommands(domain=domain, reliable=False)) as best_effort,
    ):
        wait_for_listeners(reliable, 1)
        best_effort.send(TWIST)
        assert best_effort.listeners() == 0


def test_a_frozen_receiver_holds_nobody_up_and_goes_on_with_the_newest(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink, receiver(domain) as robot:
        wait_for_listeners(sink, 1)
        assert first_line(sink, robot) == SHOWN
        os.kill(robot.pid, signal.SIGSTOP)
        times = []
        for number in range(1, 3001):
            begin = time.perf_counter()
            sink.send(Twist(float(number)))
            times.append(time.perf_counter() - begin)
        assert sorted(times)[1500] < 0.005
        assert max(times) < 2.0
        os.kill(robot.pid, signal.SIGCONT)
        sink.send(ZERO)
        seen = 0
        while line(robot) != "0.0 0.0 0.0 0.0 0.0 0.0":
            seen += 1
            assert seen <= 3100


def test_a_receiver_that_ends_is_missed_and_commands_go_on(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink:
        with running(RECEIVER, domain, "rt/cmd_vel", "twist", "once") as robot:
            deadline = time.monotonic() + PATIENCE_S
            while robot.poll() is None:
                assert time.monotonic() < deadline
                sink.send(TWIST)
                time.sleep(0.02)
            assert robot.returncode == 0
        wait_for_listeners(sink, 0)
        sink.send(TWIST)


def test_other_controllers_are_found_wherever_they_run(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink:
        assert competitors(sink, wait_s=0.2) == ()
        with running(RIVAL, domain, "/other/cmd_vel") as elsewhere, running(RIVAL, domain, "cmd_vel") as rival:
            line(elsewhere)
            rival_identity = line(rival)
            deadline = time.monotonic() + PATIENCE_S
            while not (found := competitors(sink, wait_s=0.0)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert len(found) == 1, "another topic is another robot"
            assert found[0].startswith(f"jetvla, process {rival.pid} on "), "it says who it is"
            assert rival_identity in found[0]
            assert competitors(sink, exclude=[rival_identity], wait_s=0.0) == ()
        with opened(DdsCommands(domain=domain)) as late:
            assert len(competitors(late, wait_s=PATIENCE_S)) >= 1, "also by who comes later"
            assert identity(late) != identity(sink)


# Another controller that is there for a second. argv: domain, topic.
VISITOR = RIVAL.replace("time.sleep(600)", "time.sleep(1)\nsink.close()")


def test_a_controller_that_came_and_went_is_told_of_once(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink:
        with running(VISITOR, domain, "/other/cmd_vel") as elsewhere, running(VISITOR, domain, "cmd_vel") as visitor:
            visitor_identity = line(visitor)
            assert (elsewhere.wait(PATIENCE_S), visitor.wait(PATIENCE_S)) == (0, 0)
            deadline = time.monotonic() + PATIENCE_S
            while not (found := competitors(sink, wait_s=0.0)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert found == (f"participant {visitor_identity}, which is gone again",)
        assert competitors(sink, wait_s=0.0) == ()
        with opened(DdsCommands(domain=domain)) as ours:
            ours_identity = identity(ours)
        time.sleep(0.2)
        assert competitors(sink, exclude=[ours_identity], wait_s=0.0) == ()


def test_looking_for_other_controllers_keeps_none_of_those_that_went(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink:
        for _ in range(5):
            with opened(DdsCommands(domain=domain)) as other:
                deadline = time.monotonic() + PATIENCE_S
                while not competitors(sink, wait_s=0.0):
                    assert time.monotonic() < deadline
                assert len(competitors(sink, wait_s=0.0)) == 1, "as long as it is there"
                assert competitors(sink, exclude=[identity(other)], wait_s=0.0) == ()
            while competitors(sink, wait_s=0.0):  # until it is said that it left
                assert time.monotonic() < deadline
        assert len(sink._writing) == 1, "its own"


@pytest.mark.parametrize(("base", "stamped"), [("stamped", False), ("twist", True)])
def test_a_base_that_takes_the_other_type_is_named(domain: int, base: str, stamped: bool) -> None:
    with opened(DdsCommands(domain=domain, stamped=stamped)) as sink, receiver(domain, base):
        deadline = time.monotonic() + PATIENCE_S
        while not (found := misfits(sink)) and time.monotonic() < deadline:
            time.sleep(0.02)
        theirs, ours = ("Twist", "TwistStamped") if stamped else ("TwistStamped", "Twist")
        assert found == (
            f"1 subscriber takes geometry_msgs/msg/{theirs}, and geometry_msgs/msg/{ours} is sent: "
            f"write stamped = {'false' if stamped else 'true'} under [commands]",
        )
        assert sink.listeners() == 0
    assert misfits(sink) == ()


def test_a_base_that_asks_for_reliable_delivery_is_named(domain: int) -> None:
    with opened(DdsCommands(domain=domain, reliable=False)) as sink, receiver(domain):
        deadline = time.monotonic() + PATIENCE_S
        while not (found := misfits(sink)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found == ("1 subscriber takes reliable delivery only: write reliable = true under [commands]",)
    with opened(DdsCommands(domain=domain)) as sink, receiver(domain):
        wait_for_listeners(sink, 1)
        assert misfits(sink) == ()


def test_the_watchdog_stops_a_robot_that_speaks_dds(domain: int) -> None:
    with opened(DdsCommands(domain=domain)) as sink, receiver(domain) as robot:
        wait_for_listeners(sink, 1)
        with Watchdog.start(DdsCommands(domain=domain), 0.3) as watchdog:
            assert first_line(sink, robot) == SHOWN
            watchdog.beat()
            watchdog.check()
            while (shown := line(robot)) == SHOWN:
                pass
            assert shown == "0.0 0.0 0.0 0.0 0.0 0.0"
            assert competitors(sink, exclude=[watchdog.identity], wait_s=0.0) == ()
            assert len(competitors(sink, wait_s=0.0)) == 1


def test_ros_localhost_only_is_obeyed(domain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_LOCALHOST_ONLY", "1")
    before = os.environ["CYCLONEDDS_URI"]
    with opened(DdsCommands(domain=domain)):
        assert os.environ["CYCLONEDDS_URI"] == before, "what the user configured goes first"
    monkeypatch.delenv("CYCLONEDDS_URI")
    with opened(DdsCommands(domain=domain)) as sink:
        assert "127.0.0.1" in os.environ["CYCLONEDDS_URI"]
        sink.send(ZERO)
    monkeypatch.setenv("CYCLONEDDS_URI", before)


def test_a_network_that_cannot_be_used_is_told(domain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "<CycloneDDS><Domain><General><Interfaces><NetworkInterface name='none9'/></Interfaces></General></Domain></CycloneDDS>"
    monkeypatch.setenv("CYCLONEDDS_URI", uri)
    with pytest.raises(CommandError, match=f"cannot publish: DDS topic /cmd_vel in domain {domain}") as caught:
        open_sink(DdsCommands(domain=domain))
    assert "CYCLONEDDS_URI" in caught.value.hint


def test_without_cyclonedds_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedds.pub", None)
    with pytest.raises(CommandError, match="cyclonedds is not installed") as caught:
        open_sink(DdsCommands(domain=0))
    assert "pip install 'jetvla[dds]'" in caught.value.hint


def test_a_frame_id_that_cannot_be_sent_is_told_at_once(domain: int) -> None:
    with pytest.raises(CommandError, match="frame_id holds a NUL"):
        open_sink(DdsCommands(domain=domain, stamped=True, frame_id="a\0b"))
