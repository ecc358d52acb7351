"""A velocity command, and the protocol of everything that takes one to a robot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal, Protocol, get_args

TwistField = Literal["linear_x", "linear_y", "linear_z", "angular_x", "angular_y", "angular_z"]
TWIST_FIELDS: tuple[TwistField, ...] = get_args(TwistField)


@dataclass(frozen=True)
class Twist:
    """geometry_msgs/Twist: linear in m/s, angular in rad/s, in the robot's frame (x forward, y left, z up: ROS REP 103)."""

    linear_x: float = 0.0
    linear_y: float = 0.0
    linear_z: float = 0.0
    angular_x: float = 0.0
    angular_y: float = 0.0
    angular_z: float = 0.0

    @property
    def values(self) -> tuple[float, ...]:
        """The six numbers, in the order of TWIST_FIELDS."""
        return astuple(self)

    @property
    def is_zero(self) -> bool:
        """Tells the robot to stand still."""
        return not any(self.values)

    @property
    def is_finite(self) -> bool:
        """No NaN, no infinity."""
        return all(map(math.isfinite, self.values))


ZERO = Twist()


class CommandSink(Protocol):
    """Takes commands to a robot. `send` returns in far less than a control period; used by one thread."""

    def send(self, twist: Twist) -> None:
        """Publish one command.

        Raises:
            CommandError: it cannot be published, now or any more.
        """
        ...

    def listeners(self) -> int | None:
        """How many receivers are known to listen; None where it cannot be told."""
        ...

    def close(self) -> None:
        """Release the connection; safe to call twice. Sends nothing: whoever drives sends the last zero."""
        ...


def why_not(wants: Mapping[tuple[str, bool], int], sent: str, *, reliable: bool) -> list[str]:
    """Why subscribers of a topic get nothing of what is sent to it, and what to write into the robot file.

    Args:
        wants: how many there are by what they ask for: type as ROS names it, and whether delivery must be reliable.
        sent: the type that is sent.
        reliable: how it is sent.
    """
    stamped = {"geometry_msgs/msg/TwistStamped": "true", "geometry_msgs/msg/Twist": "false"}
    found = []
    for (kind, strict), count in sorted(wants.items()):
        if kind != sent:
            hint = f"write stamped = {stamped[kind]}" if kind in stamped else "give another topic"
            found.append(f"{count} {_subscribers(count)} {kind}, and {sent} is sent: {hint} under [commands]")
        elif strict and not reliable:
            found.append(
                f"{count} {_subscribers(count)} reliable delivery only: write reliable = true under [commands]"
            )
    return found


def _subscribers(count: int) -> str:
    return "subscriber takes" if count == 1 else "subscribers take"
