"""Robots among crowds that hold connections for nothing; crowds.py has the same with times."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading

import pytest

from runtime.policy import Policy
from runtime.service import connection
from runtime.service.app import Limits
from tests.runtime.service import crowds
from tests.runtime.service.crowds import CROWDS, Crowd, Robot
from tests.runtime.service.serving import KEY, PATIENCE_S, Gated, Serving

LIMITS = Limits(max_connections=16, max_waiting=2, request_timeout_s=2 * PATIENCE_S)
CROWD = 24
TRIES = 20


@pytest.fixture(autouse=True)
def slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a robot is kept from its next request here, it drives."""
    monkeypatch.setattr(crowds, "ASKS_EVERY_S", 0.3)
    monkeypatch.setattr(connection, "_DRIVING_S", 100 * PATIENCE_S, raising=False)


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
@pytest.mark.parametrize("kind", CROWDS)
def test_robots_are_answered_among_a_crowd(serving: Serving, kind: str, key: str | None) -> None:
    with serving(key=key, limits=LIMITS) as served, contextlib.closing(Robot(served.url, key, keeps=True)) as kept:
        assert kept.ask() == 200
        with Crowd(served.url, CROWDS[kind]).of(CROWD) as crowd:
            newcomer = Robot(served.url, key, keeps=False)
            for _ in range(3):
                assert 200 in tries(newcomer)
            for _ in range(5):
                before = crowd.thrown_out
                crowd.wait_for(lambda before=before: crowd.thrown_out > before)  # type: ignore[misc]
                # Always over the same connection, which nobody opens again.
                assert kept.ask() == 200


def tries(robot: Robot) -> list[int]:
    """What came of requests, to the first that was answered: one may be thrown out while it is on its way, if that takes very long."""
    answers: list[int] = []
    while len(answers) < TRIES and 200 not in answers:
        try:
            answers.append(robot.ask())
        except (OSError, http.client.HTTPException):
            answers.append(0)
    return answers


def test_robots_that_drive_are_not_closed_for_anybody(serving: Serving) -> None:
    with serving(limits=Limits(max_connections=3)) as served, contextlib.ExitStack() as stack:
        robots = [stack.enter_context(contextlib.closing(Robot(served.url, None, keeps=True))) for _ in range(3)]
        assert [robot.ask() for robot in robots] == [200] * 3
        with pytest.raises((OSError, http.client.HTTPException)):
            Robot(served.url, None, keeps=False).ask()
        assert [robot.ask() for robot in robots] == [200] * 3


def test_a_request_in_the_queue_is_not_closed_for_anybody(serving: Serving, policy: Policy) -> None:
    """Nobody knows yet that it is a robot's."""
    gated, answers = Gated(policy), []
    gated.gate.clear()
    with serving(limits=Limits(max_connections=3), policy=gated) as served, contextlib.ExitStack() as stack:
        robot = threading.Thread(target=lambda: answers.append(Robot(served.url, None, keeps=False).ask()))
        robot.start()
        assert gated.entered.acquire(timeout=PATIENCE_S)
        for _ in range(10):
            stack.enter_context(served.http.stream("GET", "/health"))
            stack.enter_context(socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))))
        gated.gate.set()
        robot.join(PATIENCE_S)
    assert answers == [200]


def test_who_does_not_read_the_answers_makes_room(serving: Serving) -> None:
    """Requests of which each answer waits to be read would be at work for ever."""
    with serving(limits=Limits(max_connections=3)) as served, contextlib.ExitStack() as stack:
        many = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
            sock.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                sock.sendall(many)
        assert 200 in tries(Robot(served.url, None, keeps=False))
