"""From the robot file's [commands] to an open sink, and to the name that identifies the robot.

Each kind is imported when it is asked for: a robot that takes datagrams needs no DDS.
"""

from __future__ import annotations

import socket
from collections.abc import Collection

from bundle.errors import CommandError
from runtime.commands.base import CommandSink
from runtime.robot_file import CommandConfig, ConsoleCommands, DdsCommands, Ros2Commands, UdpCommands
from runtime.ros_names import resolve_domain


def open_sink(config: CommandConfig) -> CommandSink:
    """Connect to the robot; sends nothing.

    Raises:
        CommandError: the library is missing, or the connection cannot be made.
    """
    if isinstance(config, UdpCommands):
        from runtime.commands.udp import UdpSink

        return UdpSink(config)
    if isinstance(config, DdsCommands):
        from runtime.commands.dds import DdsSink

        return DdsSink(config, resolve_domain(config.domain, CommandError))
    if isinstance(config, Ros2Commands):
        from runtime.commands.ros2 import Ros2Sink

        return Ros2Sink(config, resolve_domain(config.domain, CommandError))
    from runtime.commands.console import ConsoleSink

    return ConsoleSink()


def competitors(sink: CommandSink, *, exclude: Collection[str] = (), wait_s: float = 1.0) -> tuple[str, ...]:
    """Who else publishes commands to the same robot, on this machine or another; always empty where it cannot be told (udp, console).

    Args:
        sink: an open one; its own publisher is not counted.
        exclude: identities of publishers of ours (`identity`, the watchdog's).
        wait_s: how long to listen for others; finding each other over a network takes some tenths of a second.
    """
    find = getattr(sink, "competitors", None)
    return () if find is None else tuple(find(exclude=exclude, wait_s=wait_s))


def misfits(sink: CommandSink) -> tuple[str, ...]:
    """Who listens on the same topic and gets nothing, such as a base that takes the other message type, and what would mend it; always
    empty where it cannot be told (udp, console).
    """
    find = getattr(sink, "misfits", None)
    return () if find is None else tuple(find())


def identity(sink: CommandSink) -> str:
    """By what other machines tell this publisher from others; empty where nobody can (udp, console)."""
    return str(getattr(sink, "identity", ""))


def robot_key(config: CommandConfig) -> str:
    """What identifies the robot on this machine, whichever way commands take to it; empty for the console, which moves nothing.

    Raises:
        CommandError: ROS_DOMAIN_ID is no domain.
    """
    if isinstance(config, ConsoleCommands):
        return ""
    if isinstance(config, UdpCommands):
        return f"udp {_address_of(config.host)}:{config.port}"
    return f"topic {absolute_topic(config.topic)} domain {resolve_domain(config.domain, CommandError)}"


def _address_of(host: str) -> str:
    """`localhost` and 127.0.0.1 are one robot; a name that has no address is refused when the sink is opened."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return host.lower()
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def absolute_topic(topic: str) -> str:
    """`cmd_vel` and `/cmd_vel` are one topic."""
    return "/" + topic.strip("/")
