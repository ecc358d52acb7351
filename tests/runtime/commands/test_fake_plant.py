"""The robot that coasts: its book-keeping is what other tests rely on."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from runtime.commands.base import ZERO, Twist
from runtime.commands.cdr import encode_twist
from runtime.commands.fake_plant import FakePlant

FORWARD = Twist(linear_x=1.0)


def send(plant: FakePlant, *twists: Twist) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for twist in twists:
            sender.sendto(encode_twist(twist), ("127.0.0.1", plant.port))


def test_it_keeps_the_last_command_for_ever() -> None:
    with FakePlant() as plant:
        assert plant.velocity == ZERO
        assert plant.stopped_at() == 0.0
        assert not plant.moving_after(0.0)
        send(plant, FORWARD)
        assert plant.wait_for(lambda twist: twist == FORWARD, 30)
        moving = time.monotonic()
        assert plant.moving_after(moving)
        assert plant.moving_after(moving + 1000), "it never stops by itself"
        assert plant.stopped_at() is None
        time.sleep(0.05)
        send(plant, ZERO)
        assert plant.wait_for(lambda twist: twist.is_zero, 30)
        stopped = plant.stopped_at()
        assert stopped is not None
        assert moving < stopped <= time.monotonic()
        assert plant.moving_after(moving)
        assert not plant.moving_after(stopped)
        start = plant.log[0][0]
        assert plant.distance_m() == pytest.approx(stopped - start)
        assert plant.distance_m(after=moving) == pytest.approx(stopped - moving)


def test_what_passes_at_once_is_seen_too() -> None:
    with FakePlant() as plant:
        sender = threading.Timer(0.1, send, (plant, ZERO, FORWARD, ZERO))
        sender.start()
        assert plant.wait_for(lambda twist: twist == FORWARD, 30)
        sender.join()
        assert not plant.wait_for(lambda twist: twist == Twist(9.0), 0.05)
        sender = threading.Timer(0.05, send, (plant, ZERO, ZERO))
        sender.start()
        assert plant.wait_for_commands(2, 30)
        sender.join()
        assert not plant.wait_for_commands(1, 0.05)


def test_rubbish_changes_nothing() -> None:
    with FakePlant() as plant:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"rubbish", ("127.0.0.1", plant.port))
        send(plant, FORWARD)
        assert plant.wait_for(lambda twist: twist == FORWARD, 30)
        assert plant.malformed == 1
        assert len(plant.log) == 1
    plant.close()
