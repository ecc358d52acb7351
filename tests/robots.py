"""Robot files and limits for tests: a base with two axes that a tiny bundle can drive, cameras and sinks that need no hardware."""

from __future__ import annotations

from pathlib import Path

import msgspec

from runtime.robot_file import (
    Axis,
    CameraConfig,
    CommandConfig,
    ConsoleCommands,
    Loop,
    RobotFile,
    Safety,
    SimulatedCamera,
)
from runtime.robot_toml import to_toml

AXES = {
    "linear_x": Axis(field="linear_x", policy_unit="m/s", gain=0.5, invert=False, max_speed=0.4, max_acceleration=2.0),
    "linear_y": Axis(field="linear_y", policy_unit="m/s", gain=0.5, invert=True, max_speed=0.4, max_acceleration=2.0),
}
# A tiny policy says what it says, mostly little: with such gains it drives.
EAGER = {name: msgspec.structs.replace(axis, gain=100.0) for name, axis in AXES.items()}
SAFETY = Safety(stale_frame_s=0.4, stale_action_s=0.4, stop_within_s=0.2, watchdog_s=1.0)


def robot_file(
    camera: CameraConfig | None = None,
    commands: CommandConfig | None = None,
    *,
    axes: dict[str, Axis] | None = None,
    safety: Safety = SAFETY,
    loop: Loop | None = None,
) -> RobotFile:
    """The test base."""
    return RobotFile(
        schema=1,
        name="test-base",
        camera=camera or SimulatedCamera(colour_order="rgb"),
        commands=commands or ConsoleCommands(),
        axes=AXES if axes is None else axes,
        safety=safety,
        loop=loop or Loop(publish_hz=20.0, decide_hz=10.0),
    )


def save_robot(path: Path, robot: RobotFile) -> Path:
    """As TOML."""
    path.write_text(to_toml(robot))
    return path
