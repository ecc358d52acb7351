"""Classes as they are written, and labels as the lab's loaders give them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bundle.errors import ConfigError
from episodes.actions import CLASS_NAMES, classify_actions
from train.action_classes import AXES, DIRECTIONS, NINE, ORDERS, classes_of_action, parse_classes
from train.action_meaning import action_of
from train.config import HeadSpec, PolicySpec
from train.facts import TrainingFacts

EIGHT = parse_classes(ORDERS[8])
SPEEDS = st.sampled_from([0.0, 0.05, 0.2, 0.29, 0.31, 0.5, 1.0, 1.15])
SIGNED = st.tuples(SPEEDS, st.sampled_from([-1, 1])).map(lambda pair: pair[0] * pair[1])


def labelled_by_v5(x: float, y: float, z: float) -> str:
    """What the lab's loader of V5 does, in words: turns where nothing else moves, no way back."""
    forward, sideways = ("F" if x > 0.3 else ""), ("L" if y > 0.3 else "R" if y < -0.3 else "")
    if abs(x) <= 0.3 and abs(y) <= 0.3:
        return "TurnL" if z > 0.1 else "TurnR" if z < -0.1 else "Stop"
    return "Stop" if x < -0.3 else forward + sideways


@given(x=SIGNED, y=SIGNED, z=SIGNED)
def test_eight_classes_are_labelled_as_the_lab_does(x: float, y: float, z: float) -> None:
    label = int(EIGHT.labels(np.array([x, y, z], np.float32), AXES))
    assert EIGHT.names[label] == labelled_by_v5(x, y, z)


@given(actions=st.lists(st.tuples(SIGNED, SIGNED, SIGNED), min_size=1, max_size=5))
def test_nine_classes_are_the_nine_directions(actions: list[tuple[float, float, float]]) -> None:
    rows = np.array(actions, np.float32)
    assert_array_equal(NINE.labels(rows, AXES), classify_actions(rows))
    assert len(CLASS_NAMES) == len(NINE.names)


def test_an_axis_goes_by_its_name_and_a_missing_one_is_zero() -> None:
    turning = np.array([[[0.5, 0.0], [-0.5, 0.0]]], np.float32)
    assert_array_equal(EIGHT.labels(turning, ("angular_z", "linear_x")), [[6, 7]])
    assert_array_equal(EIGHT.labels(np.array([[1.0, 0.0]], np.float32), ("linear_x", "linear_y")), [1])


def test_motions_may_be_labelled_as_another_class() -> None:
    folded = parse_classes(ORDERS[6], relabel={"FL": "L", "FR": "R", "TurnL": "L", "TurnR": "R"})
    rows = np.array([[1, 1, 0], [1, -1, 0], [0, 0, 0.5], [0, 0, -0.5], [-1, 1, 0], [1, 0, 0.5]], np.float32)
    assert [folded.names[label] for label in folded.labels(rows, AXES)] == ["L", "R", "L", "R", "Stop", "F"]
    assert folded.hears_turns
    assert not folded.turns


def test_classes_that_share_a_motion_are_told_apart_by_their_commands() -> None:
    table = parse_classes(("Stop", "slow=0.2,0", "fast=1,0", "arc=0.5,0,0.3"))
    rows = np.array([[0.05, 0, 0], [0.25, 0, 0], [0.9, 0, 0], [0.5, 0, 0.25], [0, 1, 0]], np.float32)
    assert [table.names[label] for label in table.labels(rows, AXES)] == ["Stop", "slow", "fast", "arc", "Stop"]
    without_stop = parse_classes(("F", "L"))
    assert_array_equal(without_stop.labels(np.array([[0.0, 0.2]], np.float32), AXES[:2]), [1])


@given(
    names=st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_what_is_spelled_is_read_back(names: list[str], data: st.DataObject) -> None:
    number = st.floats(-2, 2, width=16)
    texts = [f"{name}={data.draw(number)},{data.draw(number)},{data.draw(number)}" for name in names]
    table = parse_classes(texts)
    assert parse_classes(table.spelled()) == table


def test_names_and_numbers_may_be_mixed() -> None:
    table = parse_classes(("Stop", "FL", "TurnL=0,0,0.5", "B=-0.2,0"), speed=1.0)
    assert table.values == ((0, 0, 0), (1, 1, 0), (0, 0, 0.5), (-0.2, 0, 0))
    assert table.spelled() == ("Stop=0,0", "FL=1,1", "TurnL=0,0,0.5", "B=-0.2,0")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("Stop", "Forwards"), "what the class 'Forwards' does is not known"),
        (("Stop", "Stop=0,0"), "two classes have one name"),
        (("=0,0",), "a class has no name"),
        (("A=1",), "the command of a class is not usable"),
        (("A=1,2,3,4",), "the command of a class is not usable"),
        (("A=1,nan",), "the command of a class is not usable"),
        (("A=x,y",), "the command of a class is not usable"),
    ],
)
def test_classes_that_mean_nothing_are_refused(texts: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_classes(texts)
    assert "--classes" in str(caught.value)


def test_a_motion_is_relabelled_as_one_of_the_classes() -> None:
    with pytest.raises(ConfigError, match="a motion cannot be labelled so") as caught:
        parse_classes(("Stop", "F"), relabel={"FL": "L"})
    assert "FL as L" in str(caught.value)


def spec(count: int, *, classes: tuple[str, ...] = (), source: str = "") -> PolicySpec:
    head = HeadSpec("classes", count, 16, 1, 1, pooling=False)
    return PolicySpec(
        head=head, lora=None, window=4, chunk=2, image_size=56, hand_camera=False, normalized=False, minimum=-1.0,
        maximum=1.0, mu=None, fork=True, base_path=None, classes=classes, classes_source=source,
    )  # fmt: skip


def test_a_policy_that_turns_has_a_third_column() -> None:
    action = action_of(spec(8, classes=ORDERS[8], source="assumed"), class_speed=1.0)
    assert (action.names, action.units) == (("linear_x", "linear_y", "angular_z"), ("m/s", "m/s", "rad/s"))
    assert action.class_values[-2:] == ((0, 0, 0.5), (0, 0, -0.5))
    assert action.classes_source == "assumed"
    assert classes_of_action(action) == parse_classes(ORDERS[8], speed=1.0)
    six = action_of(spec(6, classes=ORDERS[6], source="assumed"))
    assert six.names == ("linear_x", "linear_y")
    assert {len(value) for value in six.class_values} == {2}


def test_a_stated_speed_leaves_recorded_turns_and_commands_of_ones_own() -> None:
    recorded = ("Stop=0,0", "F=1.15,0", "FL=1.15,1.15", "R=0.1,-0.4", "slow=0.2,0", "TurnL=0,0,0.8")
    facts = TrainingFacts(
        packing="upstream", x_attn_causal=False, resize="bilinear", pixel_norm="clip", action_names=AXES, action_minimum=-1.15,
        action_maximum=1.15, fps=6.0, base_sha256="0" * 64, classes=recorded,
    )  # fmt: skip
    action = action_of(spec(6), facts=facts, class_speed=0.5)
    assert action.class_names == ("Stop", "F", "FL", "R", "slow", "TurnL")
    assert action.class_values == ((0, 0, 0), (0.5, 0, 0), (0.5, 0.5, 0), (0.1, -0.4, 0), (0.2, 0, 0), (0, 0, 0.8))


def test_any_number_of_classes_can_be_stated_and_nothing_is_guessed() -> None:
    action = action_of(spec(3, source="nobody knows"), classes=("go=0.3,0", "Stop", "TurnR=0,0,-0.2"))
    assert action.class_names == ("go", "Stop", "TurnR")
    assert action.class_values == ((0.3, 0, 0), (0, 0, 0), (0, 0, -0.2))
    assert action.classes_source == "stated by the user"
    with pytest.raises(ConfigError, match="what the 3 classes mean must be stated") as caught:
        action_of(spec(3, source="nobody knows"))
    assert "nobody knows" in str(caught.value)
    with pytest.raises(ConfigError, match="--classes names 2 of 8 classes"):
        action_of(spec(8, classes=ORDERS[8]), classes=("Stop", "F"))


def test_every_direction_is_one_of_the_lab() -> None:
    assert {name for order in ORDERS.values() for name in order} == set(DIRECTIONS)
