"""Which sink, which robot, which domain."""

from __future__ import annotations

import pytest

from bundle.errors import CommandError
from runtime.commands.console import ConsoleSink
from runtime.commands.select import competitors, identity, open_sink, robot_key
from runtime.commands.udp import UdpSink
from runtime.robot_file import CommandConfig, ConsoleCommands, DdsCommands, Ros2Commands, UdpCommands
from runtime.ros_names import resolve_domain


def test_each_kind_gets_its_sink() -> None:
    for config, kind in ((UdpCommands(host="127.0.0.1", port=9), UdpSink), (ConsoleCommands(), ConsoleSink)):
        sink = open_sink(config)
        assert type(sink) is kind
        assert competitors(sink, wait_s=60.0) == ()
        assert identity(sink) == ""
        sink.close()


def test_what_identifies_a_robot_is_not_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    same: list[CommandConfig] = [
        DdsCommands(),
        Ros2Commands(),
        DdsCommands(topic="cmd_vel", stamped=True),
        Ros2Commands(domain=42),
    ]
    assert {robot_key(config) for config in same} == {"topic /cmd_vel domain 42"}
    different: list[CommandConfig] = [
        DdsCommands(domain=1),
        DdsCommands(topic="/b/cmd_vel"),
        UdpCommands(host="a", port=1),
        UdpCommands(host="a", port=2),
        UdpCommands(host="b", port=1),
    ]
    assert len({robot_key(config) for config in [*same, *different]}) == 6
    assert robot_key(UdpCommands(host="Robot", port=1)) == robot_key(UdpCommands(host="robot", port=1))
    assert robot_key(ConsoleCommands()) == ""


@pytest.mark.parametrize(
    ("configured", "variable", "expected"),
    [(None, None, 0), (None, "", 0), (None, "42", 42), (7, "42", 7), (0, "x", 0)],
)
def test_the_domain(
    configured: int | None, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    else:
        monkeypatch.setenv("ROS_DOMAIN_ID", variable)
    assert resolve_domain(configured, CommandError) == expected


@pytest.mark.parametrize("variable", ["robot", "-1", "233", "4.2", "٤"])
def test_a_variable_that_is_no_domain_is_told(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", variable)
    with pytest.raises(CommandError, match="ROS_DOMAIN_ID is no domain") as caught:
        robot_key(DdsCommands())
    assert "from 0 to 232" in str(caught.value)
