"""A robot for benches: a drawn 1280x720 camera, and a base that takes datagrams; its limits are low, so that any policy can drive it."""

from __future__ import annotations

from bundle.manifest import Action
from runtime.commands.base import TwistField
from runtime.robot_file import Axis, Loop, Recorder, RobotFile, Safety, SimulatedCamera, UdpCommands

_FIELDS: tuple[TwistField, ...] = ("linear_x", "linear_y", "angular_z", "linear_z", "angular_x", "angular_y")


def drawn_robot(
    name: str, action: Action, port: int, *, gain: float, hz: float, safety: Safety, recorder: Recorder | None = None
) -> RobotFile:
    """Whatever the policy's axes are, each drives a field of its own.

    Args:
        port: of the base, on this machine.
        hz: decisions and commands a second.
    """
    axes = {
        axis: Axis(field=field, policy_unit=unit, gain=gain, invert=False, max_speed=0.3, max_acceleration=1.0)
        for axis, unit, field in zip(action.names, action.units, _FIELDS, strict=False)
    }
    return RobotFile(
        schema=1,
        name=name,
        camera=SimulatedCamera(colour_order="rgb", width=1280, height=720),
        commands=UdpCommands(host="127.0.0.1", port=port),
        axes=axes,
        safety=safety,
        loop=Loop(publish_hz=hz, decide_hz=hz),
        recorder=recorder,
    )
