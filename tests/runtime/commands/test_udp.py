"""Datagrams over real sockets, also to where nobody listens."""

from __future__ import annotations

import socket
import time

import pytest

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist
from runtime.commands.cdr import encode_twist
from runtime.commands.fake_plant import FakePlant
from runtime.commands.udp import UdpSink
from runtime.robot_file import UdpCommands

TWIST = Twist(0.1, -0.2, 0.3, -0.4, 0.5, -0.6)


def test_one_command_is_one_datagram_of_52_bytes() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(30)
        sink = UdpSink(UdpCommands(host="localhost", port=receiver.getsockname()[1]))
        assert sink.listeners() is None
        sink.send(TWIST)
        sink.send(ZERO)
        assert [receiver.recv(1000), receiver.recv(1000)] == [encode_twist(TWIST), encode_twist(ZERO)]
        sink.close()
        sink.close()


def test_nobody_there_is_no_error_is_told_and_does_not_lose_the_first_command_of_who_comes() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sink = UdpSink(UdpCommands(host="127.0.0.1", port=port))
    deadline = time.monotonic() + 30
    while sink.listeners() != 0:
        assert time.monotonic() < deadline
        sink.send(TWIST)
        time.sleep(0.005)
    with FakePlant(port) as plant:
        sink.send(TWIST)
        assert plant.wait_for(lambda twist: twist == TWIST, 30)
        sink.send(ZERO)
        assert sink.listeners() is None
    sink.close()


def test_a_closed_sink_sends_no_more() -> None:
    sink = UdpSink(UdpCommands(host="127.0.0.1", port=9))
    sink.close()
    with pytest.raises(
        CommandError, match=r"cannot send a command: 127\.0\.0\.1:9\n  got:      the connection was closed"
    ):
        sink.send(ZERO)


def test_a_host_without_address_is_told() -> None:
    with pytest.raises(CommandError) as caught:
        UdpSink(UdpCommands(host="nowhere.invalid", port=9))
    assert "the host of the commands has no address: nowhere.invalid:9" in str(caught.value)
    assert "check `host` and `port`" in caught.value.hint


def test_an_address_that_cannot_be_sent_to_is_told() -> None:
    with pytest.raises(CommandError, match=r"cannot reach the host of the commands: 255\.255\.255\.255:9"):
        UdpSink(UdpCommands(host="255.255.255.255", port=9))
