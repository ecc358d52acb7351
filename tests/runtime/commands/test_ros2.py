"""The rclpy sink against the fake: what it calls, not what a real ROS 2 makes of it."""

from __future__ import annotations

import sys

import pytest

from bundle.errors import CommandError
from runtime.commands import fake_rclpy
from runtime.commands.base import ZERO, Twist
from runtime.commands.fake_rclpy import FakeRos
from runtime.commands.ros2 import Ros2Sink
from runtime.commands.select import competitors, identity, misfits, open_sink
from runtime.robot_file import Ros2Commands

TWIST = Twist(1, 2.0, 3.0, 4.0, 5.0, 6.0)


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> FakeRos:
    ros = FakeRos()
    for name, module in ros.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return ros


def test_a_twist_arrives_as_floats_with_a_profile_that_keeps_the_newest(ros: FakeRos) -> None:
    sink = open_sink(Ros2Commands(domain=42))
    assert isinstance(sink, Ros2Sink)
    assert ros.published == [], "opening sends nothing"
    sink.send(TWIST)
    [(topic, message)] = ros.published
    assert topic == "/cmd_vel"
    assert [vars(message.linear), vars(message.angular)] == [
        {"x": 1.0, "y": 2.0, "z": 3.0},
        {"x": 4.0, "y": 5.0, "z": 6.0},
    ]
    assert ros.profiles["/cmd_vel"] == fake_rclpy.QoSProfile(
        history=fake_rclpy.HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=fake_rclpy.ReliabilityPolicy.RELIABLE,
        durability=fake_rclpy.DurabilityPolicy.VOLATILE,
    )
    assert ros.calls == [("init", {"args": [], "domain_id": 42})], "ROS must not read this program's arguments"
    assert sink.listeners() == 1
    ros.subscriptions = 0
    assert sink.listeners() == 0
    sink.close()
    sink.close()
    assert ros.calls[1:] == [("shutdown", {})]
    assert ros.nodes == {}
    assert sink.listeners() == 0
    with pytest.raises(CommandError, match="the connection was closed"):
        sink.send(ZERO)


def test_stamped_and_best_effort(ros: FakeRos) -> None:
    sink = Ros2Sink(Ros2Commands(topic="/base/cmd_vel", stamped=True, frame_id="body", reliable=False), 0)
    sink.send(TWIST)
    [(topic, message)] = ros.published
    assert topic == "/base/cmd_vel"
    assert (message.header.frame_id, message.header.stamp.sec, message.header.stamp.nanosec) == ("body", 1, 2)
    assert message.twist.angular.z == 6.0
    assert ros.profiles[topic].reliability is fake_rclpy.ReliabilityPolicy.BEST_EFFORT
    sink.close()


def test_others_on_the_topic_are_found_by_their_nodes(ros: FakeRos) -> None:
    loop, watchdog = Ros2Sink(Ros2Commands(), 0), Ros2Sink(Ros2Commands(), 0)
    assert identity(loop) != identity(watchdog)
    assert competitors(loop, exclude=[identity(watchdog)], wait_s=0.0) == ()
    assert competitors(loop, wait_s=60.0) == (f"node /{identity(watchdog)}",)
    ros.others.append(("teleop", "/operator"))
    assert competitors(loop, exclude=[identity(watchdog)], wait_s=60.0) == ("node /operator/teleop",)


def test_subscribers_that_get_nothing_are_named(ros: FakeRos) -> None:
    strict, loose = fake_rclpy.ReliabilityPolicy.RELIABLE, fake_rclpy.ReliabilityPolicy.BEST_EFFORT
    ros.wants = [("geometry_msgs/msg/Twist", strict), ("geometry_msgs/msg/Twist", loose)]
    sink = Ros2Sink(Ros2Commands(), 0)
    assert misfits(sink) == ()
    ros.wants += [("geometry_msgs/msg/TwistStamped", strict), ("geometry_msgs/msg/TwistStamped", strict)]
    [stamped] = misfits(sink)
    assert stamped.startswith("2 subscribers take geometry_msgs/msg/TwistStamped, and geometry_msgs/msg/Twist is sent")
    assert "stamped = true" in stamped
    ros.wants = [("geometry_msgs/msg/Twist", strict), ("std_msgs/msg/String", loose)]
    assert [text.rpartition(":")[2] for text in misfits(Ros2Sink(Ros2Commands(reliable=False), 0))] == [
        " write reliable = true under [commands]",
        " give another topic under [commands]",
    ]
    ros.broken = "rcl says no"
    assert misfits(sink) == ()


def test_every_failure_of_ros_is_a_command_error(ros: FakeRos) -> None:
    sink = Ros2Sink(Ros2Commands(), 0)
    ros.broken = "rcl says no"
    for attempt in (
        lambda: sink.send(ZERO),
        lambda: competitors(sink, wait_s=0.0),
        lambda: Ros2Sink(Ros2Commands(), 0),
    ):
        with pytest.raises(CommandError, match="ROS 2 topic /cmd_vel in domain 0\n  got:      rcl says no"):
            attempt()
    assert sink.listeners() is None
    sink.close()


def test_without_ros_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(CommandError, match="rclpy is not installed") as caught:
        open_sink(Ros2Commands(domain=0))
    assert "source /opt/ros/humble/setup.bash" in caught.value.hint
