"""The limits that hold on a run: the bundle's, the robot file's and the room's, of each the tightest.

The bundle bounds what a policy can ask for, the robot file what the robot may do, a local limits file what it may do here. Each can only
take away. Whatever contradicts itself or could never let the robot move is refused before anything moves. Knows nothing about time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError, LimitsError
from bundle.manifest import Action
from runtime.commands.base import TWIST_FIELDS
from runtime.robot_file import LimitsFile, RobotFile, Safety

_HINT = "a limits file can only tighten; looser values belong into the robot file, after thinking."


@dataclass(frozen=True)
class Limits:
    """What safety holds the robot to. Fields that a policy does not drive have a speed of 0.

    Attributes:
        max_speed: m/s and rad/s, in the order of TWIST_FIELDS.
        max_acceleration: m/s2 and rad/s2, in the same order.
        safety: the times and counts.
    """

    max_speed: tuple[float, ...]
    max_acceleration: tuple[float, ...]
    safety: Safety


@dataclass(frozen=True, eq=False)
class AxisMap:
    """From a row of a chunk to a Twist: `twist = matrix @ row`, m/s and rad/s.

    Attributes:
        matrix: float64 [6, A], in the order of TWIST_FIELDS; one entry per policy axis.
    """

    matrix: NDArray[np.float64]

    def __call__(self, row: NDArray[np.floating]) -> tuple[float, ...]:
        """The six numbers of a Twist that float [A] asks for."""
        with np.errstate(invalid="ignore"):  # infinity times 0; safety refuses what comes of it
            return tuple(float(value) for value in self.matrix @ row.astype(np.float64))


def axis_map(robot: RobotFile, action: Action) -> AxisMap:
    """How this policy's numbers move this robot.

    Raises:
        ConfigError: the robot file has not all axes of the policy, another unit, or two of them on one field.
    """
    matrix = np.zeros((len(TWIST_FIELDS), len(action.names)))
    taken: dict[str, str] = {}
    for column, (name, unit) in enumerate(zip(action.names, action.units, strict=True)):
        axis = robot.axes.get(name)
        if axis is None:
            raise ConfigError(
                f"robot {robot.name} has no axis for the policy's action {name!r}",
                got=", ".join(robot.axes) or "no axes",
                expected=", ".join(action.names),
                hint=f"add [axes.{name}] to the robot file, with its field, gain, sign and limits.",
            )
        if axis.policy_unit != unit:
            raise ConfigError(
                f"axis {name!r} of robot {robot.name} expects another unit than the policy has",
                got=f"{unit!r} in the bundle",
                expected=f"{axis.policy_unit!r}, as the robot file says",
                hint="check the gain, then set policy_unit to what the bundle says.",
            )
        if axis.field in taken:
            raise ConfigError(
                f"two axes of robot {robot.name} drive {axis.field}",
                got=f"{taken[axis.field]} and {name}",
                hint="give every axis of the policy a field of its own.",
            )
        taken[axis.field] = name
        matrix[TWIST_FIELDS.index(axis.field), column] = -axis.gain if axis.invert else axis.gain
    return AxisMap(matrix)


def limits_of(robot: RobotFile, action: Action, local: LimitsFile | None = None) -> Limits:
    """The tightest of all.

    Raises:
        ConfigError: see axis_map; or times that contradict each other.
        LimitsError: a local limit is looser than what it should tighten, or names an axis that the robot does not have.
    """
    mapping, reaches = axis_map(robot, action), _reach(action)
    loose: list[str] = []
    speed, acceleration = [0.0] * len(TWIST_FIELDS), [0.0] * len(TWIST_FIELDS)
    local = local or LimitsFile(schema=robot.schema)
    if unknown := local.axes.keys() - robot.axes.keys():
        raise LimitsError(
            f"the limits file limits an axis that robot {robot.name} does not have",
            got=", ".join(sorted(unknown)),
            expected=", ".join(robot.axes),
            hint="use the names under [axes] of the robot file.",
        )
    for name, axis in robot.axes.items():
        tighter = local.axes.get(name)
        bounds = {"max_speed": axis.max_speed, "max_acceleration": axis.max_acceleration}
        for key, bound in bounds.items():
            wanted = getattr(tighter, key, None)
            if wanted is not None and wanted > bound:
                loose.append(f"axes.{name}.{key} = {wanted:g}, the robot file has {bound:g}")
            bounds[key] = min(bound, wanted) if wanted is not None else bound
        if name in action.names:
            index = TWIST_FIELDS.index(axis.field)
            reach = reaches[action.names.index(name)] * float(np.abs(mapping.matrix[index]).sum())
            speed[index], acceleration[index] = min(bounds["max_speed"], reach), bounds["max_acceleration"]
    times = {key: getattr(robot.safety, key) for key in robot.safety.__struct_fields__}
    for key in local.safety.__struct_fields__:
        wanted = getattr(local.safety, key)
        if wanted is not None and wanted > times[key]:
            loose.append(f"safety.{key} = {wanted:g}, the robot file has {times[key]:g}")
        elif wanted is not None:
            times[key] = wanted
    if loose:
        raise LimitsError(
            "the limits file loosens limits", got="; ".join(loose), expected="values at most as high", hint=_HINT
        )
    safety = Safety(**times)
    _check_times(robot, safety)
    return Limits(tuple(speed), tuple(acceleration), safety)


def check_cadence(limits: Limits, *, publish_hz: float, decide_hz: float) -> None:
    """Refuse times in which a healthy loop would be stopped all the time.

    Raises:
        ConfigError: a bound is shorter than the period of what it watches.
    """
    needs = {
        "stale_action_s": (
            limits.safety.stale_action_s,
            1 / decide_hz + 1 / publish_hz,
            "a decision period and a publishing period",
        ),
        "stale_frame_s": (limits.safety.stale_frame_s, 1 / publish_hz, "a publishing period"),
        "watchdog_s": (limits.safety.watchdog_s, 2 / publish_hz, "two publishing periods"),
    }
    for key, (value, least, what) in needs.items():
        if value < least:
            raise ConfigError(
                f"safety.{key} would stop a robot on which nothing is wrong",
                got=f"{value:g} s",
                expected=f"at least {what}: {least:.3g} s at {publish_hz:g} commands and {decide_hz:g} decisions a second",
                hint="raise it, or raise the rates under [loop].",
            )


def _reach(action: Action) -> tuple[float, ...]:
    """The largest magnitude of each axis that the policy can say, in its own units."""
    if action.head == "classes":
        return tuple(float(value) for value in np.abs(np.asarray(action.class_values, np.float64)).max(axis=0))
    reach = [max(abs(action.minimum), abs(action.maximum)) if action.normalized else 1.0] * len(action.names)
    if action.head == "actions_gripper":
        reach[-1] = 1.0
    return tuple(reach)


def _check_times(robot: RobotFile, safety: Safety) -> None:
    order = (safety.misses_to_hold, safety.misses_to_slow, safety.misses_to_stop)
    if list(order) != sorted(order):
        raise ConfigError(
            f"robot {robot.name} degrades in the wrong order",
            got="misses_to_hold {}, misses_to_slow {}, misses_to_stop {}".format(*order),
            expected="hold first, then slow, then stop",
            hint="correct [safety] in the robot file.",
        )
