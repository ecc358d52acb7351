"""Limits: the tightest of bundle, robot file and limits file; what contradicts itself is refused before anything moves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import ConfigError, LimitsError
from bundle.manifest import Action, Manifest
from runtime.commands.base import TWIST_FIELDS
from runtime.limits import axis_map, check_cadence, limits_of
from runtime.robot_file import AxisLimits, LimitsFile, SafetyLimits
from runtime.robot_toml import load_limits_file, load_robot_file
from tests.bundles import Tiny
from tests.robots import AXES, SAFETY, robot_file, save_robot

ACTION = Action(
    head="velocities",
    names=("linear_x", "linear_y"),
    units=("m/s", "m/s"),
    normalized=False,
    minimum=-1.0,
    maximum=1.0,
    mu=None,
    class_names=(),
    class_values=(),
)


def test_gain_sign_and_field_stand_in_the_robot_file() -> None:
    twist = axis_map(robot_file(), ACTION)(np.array([1.0, 1.0], np.float32))
    assert twist == (0.5, -0.5, 0.0, 0.0, 0.0, 0.0)


def test_a_policy_may_name_its_axes_in_any_order() -> None:
    turned = msgspec.structs.replace(ACTION, names=("linear_y", "linear_x"))
    assert axis_map(robot_file(), turned)(np.array([1.0, 0.0], np.float32))[:2] == (0.0, -0.5)


def test_the_robot_bounds_the_policy() -> None:
    limits = limits_of(robot_file(), ACTION)
    assert limits.max_speed == (0.4, 0.4, 0.0, 0.0, 0.0, 0.0)
    assert limits.max_acceleration == (2.0, 2.0, 0.0, 0.0, 0.0, 0.0)
    assert limits.safety == SAFETY


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({"normalized": True, "minimum": -0.6, "maximum": 0.2}, 0.6),
        (
            {
                "head": "classes",
                "class_names": ("stop", "left"),
                "class_values": ((0.0, 0.0), (0.3, -0.5)),
            },
            0.3,
        ),
    ],
)
def test_the_bundle_bounds_the_robot(changes: dict[str, object], reach: float) -> None:
    assert limits_of(robot_file(), msgspec.structs.replace(ACTION, **changes)).max_speed[0] == pytest.approx(
        reach * 0.5
    )


def test_a_class_that_turns_needs_an_axis_to_turn_about() -> None:
    turning = msgspec.structs.replace(
        ACTION,
        head="classes",
        names=(*ACTION.names, "angular_z"),
        units=(*ACTION.units, "rad/s"),
        class_names=("F", "TurnL"),
        class_values=((0.3, 0.0, 0.0), (0.0, 0.0, 0.5)),
    )
    with pytest.raises(ConfigError, match="has no axis for the policy's action 'angular_z'"):
        limits_of(robot_file(), turning)
    robot = robot_file()
    spinning = msgspec.structs.replace(
        robot.axes["linear_x"], field="angular_z", policy_unit="rad/s", gain=1.0, max_speed=2.0
    )
    robot = msgspec.structs.replace(robot, axes=robot.axes | {"angular_z": spinning})
    assert limits_of(robot, turning).max_speed[TWIST_FIELDS.index("angular_z")] == 0.5


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.floats(0.001, 10))
def test_local_limits_only_ever_tighten(speed: float, acceleration: float, stale: float) -> None:
    local = LimitsFile(
        schema=1,
        axes={"linear_x": AxisLimits(max_speed=speed, max_acceleration=acceleration)},
        safety=SafetyLimits(stale_frame_s=stale),
    )
    before = limits_of(robot_file(), ACTION)
    if speed > 0.4 or acceleration > 2.0 or stale > 0.4:
        with pytest.raises(LimitsError, match="only tighten"):
            limits_of(robot_file(), ACTION, local)
        return
    after = limits_of(robot_file(), ACTION, local)
    assert after.max_speed[0] == speed
    assert after.max_acceleration[0] == acceleration
    assert after.safety.stale_frame_s == stale
    assert after.max_speed[1] == before.max_speed[1]
    assert after.safety.watchdog_s == before.safety.watchdog_s


def test_everything_that_loosens_is_named_at_once() -> None:
    local = LimitsFile(
        schema=1, axes={"linear_y": AxisLimits(max_speed=9)}, safety=SafetyLimits(watchdog_s=4, slow_factor=0.9)
    )
    with pytest.raises(LimitsError, match=r"linear_y.max_speed = 9.*watchdog_s = 4.*slow_factor = 0.9"):
        limits_of(robot_file(), ACTION, local)


def test_a_limit_for_an_axis_that_does_not_exist_is_no_limit_and_refused() -> None:
    with pytest.raises(LimitsError, match="linear_z"):
        limits_of(robot_file(), ACTION, LimitsFile(schema=1, axes={"linear_z": AxisLimits(max_speed=0.1)}))


def test_an_axis_of_the_policy_that_the_robot_lacks_is_refused() -> None:
    three = msgspec.structs.replace(ACTION, names=(*ACTION.names, "angular_z"), units=("m/s", "m/s", "rad/s"))
    with pytest.raises(ConfigError, match=r"angular_z(?s:.*)add \[axes.angular_z\]"):
        axis_map(robot_file(), three)


def test_an_axis_that_the_policy_lacks_stays_still() -> None:
    one = msgspec.structs.replace(ACTION, names=("linear_x",), units=("m/s",))
    assert limits_of(robot_file(), one).max_speed == (0.4, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_another_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match="another unit"):
        axis_map(robot_file(), msgspec.structs.replace(ACTION, units=("m/s", "cm/s")))


def test_two_axes_on_one_field_are_refused() -> None:
    both = AXES | {"linear_y": msgspec.structs.replace(AXES["linear_y"], field="linear_x")}
    with pytest.raises(ConfigError, match="two axes"):
        axis_map(robot_file(axes=both), ACTION)


def test_stages_out_of_order_are_refused() -> None:
    wrong = msgspec.structs.replace(SAFETY, misses_to_slow=9)
    with pytest.raises(ConfigError, match="wrong order"):
        limits_of(robot_file(safety=wrong), ACTION)


@pytest.mark.parametrize(("key", "value"), [("stale_action_s", 0.1), ("stale_frame_s", 0.01), ("watchdog_s", 0.06)])
def test_bounds_that_would_stop_a_healthy_robot_are_refused(key: str, value: float) -> None:
    limits = limits_of(robot_file(safety=msgspec.structs.replace(SAFETY, **{key: value})), ACTION)
    with pytest.raises(ConfigError, match=key):
        check_cadence(limits, publish_hz=20, decide_hz=10)
    check_cadence(limits_of(robot_file(), ACTION), publish_hz=20, decide_hz=10)


def test_files_say_what_memory_says(tmp_path: Path, tiny_bundle) -> None:
    robot = robot_file()
    assert load_robot_file(save_robot(tmp_path / "robot.toml", robot)) == robot
    limits_of(robot, Manifest.load(tiny_bundle(Tiny())).action)
    (tmp_path / "limits.toml").write_text("schema = 1\n[axes.linear_x]\nmax_speed = 0.1\n[safety]\nwatchdog_s = 0.2\n")
    local = load_limits_file(tmp_path / "limits.toml")
    assert local == LimitsFile(
        schema=1, axes={"linear_x": AxisLimits(max_speed=0.1)}, safety=SafetyLimits(watchdog_s=0.2)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schema"),
        ("schema = 1", "name"),
        ("schema = [", "not TOML"),
        ("\x00", "not TOML"),
        ("{good}\n[typo]\nx = 1", "typo"),
        ("{good}".replace("schema = 1", "schema = 2"), "schema"),
    ],
)
def test_what_is_no_robot_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    good = save_robot(tmp_path / "good.toml", robot_file()).read_text()
    path = tmp_path / "robot.toml"
    path.write_text(text.replace("{good}", good))
    if message == "schema" and text == "{good}":
        path.write_text(good.replace("schema = 1", "schema = 2"))
    with pytest.raises(ConfigError, match=message):
        load_robot_file(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_robot_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gain", "0.0"),
        ("gain", "-1.0"),
        ("gain", "nan"),
        ("gain", "inf"),
        ("max_speed", "inf"),
        ("max_speed", "true"),
        ("invert", "1"),
        ("field", '"sideways"'),
    ],
)
def test_senseless_numbers_are_refused(tmp_path: Path, key: str, value: str) -> None:
    text = save_robot(tmp_path / "robot.toml", robot_file()).read_text()
    shown = {"gain": "0.5", "max_speed": "0.4", "invert": "false", "field": '"linear_x"'}[key]
    assert f"{key} = {shown}" in text
    (tmp_path / "robot.toml").write_text(text.replace(f"{key} = {shown}", f"{key} = {value}", 1))
    with pytest.raises(ConfigError):
        load_robot_file(tmp_path / "robot.toml")


def test_a_limits_file_with_senseless_numbers_is_refused(tmp_path: Path) -> None:
    for value in ("nan", "-0.1", "0", '"0.1"'):
        (tmp_path / "limits.toml").write_text(f"schema = 1\n[axes.linear_x]\nmax_speed = {value}\n")
        with pytest.raises(ConfigError):
            load_limits_file(tmp_path / "limits.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "max_speed = 0.4",
            "max_sped = 0.4",
            r"unknown field `max_sped` - at `\$.axes.linear_x`(?s:.*)did you mean max_speed",
        ),
        ('kind = "console"', 'kind = "consol"', r"commands.kind(?s:.*)dds, ros2, udp, console"),
        ('field = "linear_y"', 'field = "linear-y"', r"axes.linear_y.field(?s:.*)linear_x, linear_y, linear_z"),
        ("rotate = 0", "rotate = 45", r"camera.rotate(?s:.*)0, 90, 180, 270"),
        ("invert = false", "invert = False", "lower case"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = save_robot(tmp_path / "robot.toml", robot_file()).read_text()
    assert old in text
    (tmp_path / "robot.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_robot_file(tmp_path / "robot.toml")
