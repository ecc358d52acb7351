"""What a person sees."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from runtime.commands.base import ZERO, Twist
from runtime.commands.console import ConsoleSink, describe


def test_changes_are_shown_a_few_a_second_and_stops_at_once() -> None:
    shown = io.StringIO()
    commands = [
        (0.0, ZERO),
        (0.1, Twist(1.0)),
        (0.3, Twist(1.0)),
        (0.4, Twist(1.0)),
        (0.5, Twist(2.0)),
        (0.51, Twist(3.0)),
        (0.52, ZERO),
        (0.6, ZERO),
        (0.7, Twist(4.0)),
        (0.9, Twist(5.0)),
    ]
    times = iter([moment for moment, _ in commands])
    sink = ConsoleSink(Console(file=shown, width=200), clock=lambda: next(times))
    for _, twist in commands:
        sink.send(twist)
    assert shown.getvalue().splitlines() == [
        "command: stop",
        "command: linear_x +1.000 m/s",
        "command: stop",
        "command: linear_x +5.000 m/s",
    ]
    assert sink.listeners() is None
    sink.close()
    sink.close()


def test_it_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink().send(ZERO)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "command: stop\n")


def test_fields_have_units() -> None:
    line = describe(Twist(linear_y=-0.25, angular_z=1.5))
    assert line == "command: linear_y -0.250 m/s, angular_z +1.500 rad/s"
