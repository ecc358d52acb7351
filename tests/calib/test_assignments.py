"""Which assignment is judged next, and how they are told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from bundle.manifest import Action
from calib.acceptance import Acceptance, Streamed, judge
from calib.assignments import HOPELESS, describe, number, safer
from calib.search import Evaluation

BUDGET = 0.01
ACTION = Action(
    head="velocities", names=("linear_x",), units=("m/s",), normalized=False, minimum=-1, maximum=1, mu=None,
    class_names=(), class_values=(),
)  # fmt: skip
SAME = np.zeros((1, 1, 1), np.float32)


def tried(name: str, error: float, latency: float) -> Evaluation:
    return Evaluation("ort:cpu", (name,), error, latency)


def failed(error: float) -> Acceptance:
    found = judge([Streamed("a", 0, "go", SAME, SAME)], ACTION, budget=BUDGET)
    return structs.replace(found, verdict="FAIL", action_error=error)


ALL = tried("all", 0.0075, 5.0)
# What returns cheap blocks hardly gets more exact; the head costs next to nothing and is what does it.
CHEAP = [tried(name, 0.0074, 5.1) for name in ("projection", "vision.0", "vision.1")]
HEAD, HALF = tried("head", 0.0005, 5.4), tried("half", 0.004, 5.3)


def test_the_next_is_one_that_should_pass() -> None:
    assert safer([ALL, *CHEAP, HEAD, HALF], [(ALL, failed(0.0105))], 3) == HALF
    assert safer([ALL, *CHEAP, HEAD, HALF], [(ALL, failed(0.05))], 3) == HEAD


def test_decisions_alone_want_half_the_error() -> None:
    near = tried("near", 0.00376, 5.05)
    assert safer([ALL, near, HEAD], [(ALL, failed(0.005))], 3) == HEAD
    assert safer([ALL, structs.replace(near, action_error=0.0037), HEAD], [(ALL, failed(0.005))], 3).int8 == ("near",)  # type: ignore[union-attr]


def test_where_nothing_should_pass_the_most_exact_is_judged() -> None:
    assert safer([ALL, *CHEAP], [(ALL, failed(0.0105))], 3) == CHEAP[0]
    assert safer([ALL, HEAD, HALF], [(ALL, failed(math.nan))], 3) == HEAD


def test_the_last_chance_is_the_most_exact_ones() -> None:
    judged = [(ALL, failed(0.0105)), (CHEAP[0], failed(0.0105))]
    assert safer([ALL, *CHEAP, HEAD, HALF], judged, 3) == HALF
    assert safer([ALL, *CHEAP, HEAD, HALF], judged, 2) == HEAD


@given(
    errors=st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True),
    chances=st.integers(0, 4),
    factor=st.floats(0.5, 3),
)
def test_it_ends_and_judges_nothing_twice(errors: list[float], chances: int, factor: float) -> None:
    known = [tried(str(index), error, 1.0 + index % 3) for index, error in enumerate(errors)]
    judged = [(known[0], failed(known[0].action_error * factor))]
    while (chosen := safer(known, judged, chances)) is not None:
        assert chosen.action_error < judged[-1][0].action_error
        judged.append((chosen, failed(chosen.action_error * factor)))
    assert len(judged) <= chances + 1
    if (len(judged) == chances + 1 and chances > 0) or len(judged) <= chances:
        assert judged[-1][0].action_error == min(errors)


@pytest.mark.parametrize(("error", "told"), [(0.5, 0.5), (math.inf, HOPELESS), (math.nan, HOPELESS)])
def test_what_is_not_finite_is_worse_than_anything(error: float, told: float) -> None:
    assert number(error) == told


def test_assignments_in_words() -> None:
    blocks = ("vision.0", "language.0", "action_head")
    assert describe(blocks, Evaluation("ort:cpu", blocks, 0, 0)) == "all INT8"
    assert describe(blocks, Evaluation("ort:cpu", blocks[1:2], 0, 0)) == "vision.0, action_head in floating point"
