"""Windows that are told something else: how many, what, what they then do, and what cannot be told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from episodes.instruction import sides_in_text
from tests.train.test_run_config import config, refusal
from train.action_classes import AXES, NINE, ORDERS, parse_classes
from train.run_config import AugmentConfig, LoopConfig
from train.sampling import epoch_plan
from train.told import Told, draw_told, told_classes, told_texts

STEER = AugmentConfig(stop=0.2, steer=0.5)
EIGHT = {"head": "classes", "classes": list(ORDERS[8])}


def drawn(augment: AugmentConfig, count: int = 4000) -> list[Told | None]:
    return [draw_told(augment, 0, 0, window // 50, window % 50) for window in range(count)]


def test_stops_come_first_and_every_motion_is_told_alike() -> None:
    motions = Counter(told and told.motion for told in drawn(STEER))

    assert motions["Stop"] / 4000 == pytest.approx(0.2, abs=0.02)
    for motion in ("L", "R", "TurnL", "TurnR"):
        assert motions[motion] / 4000 == pytest.approx(0.8 * 0.5 / 4, abs=0.02)
    assert motions[None] / 4000 == pytest.approx(0.4, abs=0.03)


def test_words_name_the_side_that_the_action_takes() -> None:
    for told in filter(None, drawn(STEER)):
        turns, (_, sideways, turning) = told.motion.startswith("Turn"), told.action(AXES)
        if told.motion == "Stop":
            assert not told.action(AXES).any()
            continue
        assert sides_in_text(told.words) == {"left" if sideways + turning > 0 else "right"}
        assert bool(turning) == turns
        assert bool(sideways) != turns


def test_every_text_that_is_told_is_known_before() -> None:
    assert {told.words for told in drawn(STEER) if told} == set(told_texts(STEER))
    assert told_texts(AugmentConfig()) == ()


def test_an_action_has_the_columns_that_are_learned() -> None:
    told = Told("Spin right", "TurnR")
    assert_array_equal(told.action(("angular_z", "linear_x")), np.float32([-0.2, 0.0]))
    assert_array_equal(told.action(("linear_x",)), np.float32([0.0]))


def test_what_is_told_is_a_function_of_seed_and_epoch() -> None:
    plans = [epoch_plan([60] * 4, LoopConfig(seed=3), STEER, window=4, epoch=epoch) for epoch in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_motion_without_words_is_left_out() -> None:
    augment = AugmentConfig(steer=1.0, turn_words=())
    assert {told.motion for told in drawn(augment) if told} == {"L", "R"}
    assert told_classes(augment, NINE) == {"L", "R"}


def test_a_relabelled_motion_is_seen_as_its_class() -> None:
    six = parse_classes(ORDERS[6], relabel={"TurnL": "L", "TurnR": "R"})
    assert told_classes(AugmentConfig(stop=0.1, steer=0.1), six) == {"Stop", "L", "R"}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"augment": {"steer": 0.1}}, "augment.turn_words"),
        ({"augment": {"steer": 0.1, "slide_words": [], "turn_words": []}}, "augment.steer"),
        ({"augment": {"steer": 0.1, "slide_words": ["Move right"], "turn_words": []}}, "augment.slide_words"),
        ({"augment": {"steer": 0.1, "slide_words": ["Move"], "turn_words": []}}, "augment.slide_words"),
        ({"augment": {"steer": 0.1, "turn_words": []}, "data": {"actions": ["linear_x"]}}, "augment.slide_words"),
        (
            {"augment": {"steer": 0.1, "turn_words": []}, "model": {"head": "classes", "classes": ["Stop", "F", "B"]}},
            "augment.steer",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(sections: Any, key: str) -> None:
    assert f"`{key}` is not usable" in refusal(**sections) or f"{key} = " in refusal(**sections)


def test_what_can_be_told_is_accepted() -> None:
    config(augment={"steer": 0.1}, model=EIGHT, data={"actions": list(AXES)})
    config(augment={"steer": 0.1, "turn_words": []})


def test_an_epoch_tells_each_episode_one_of_its_sentences() -> None:
    words = [("Go left", "Head left", "Left, please"), (), ("Go",)]
    seen: list[dict[int, set[str | None]]] = []
    for epoch in range(40):
        steps = epoch_plan([12] * 3, LoopConfig(), AugmentConfig(), window=4, epoch=epoch, words=words)
        told: dict[int, set[str | None]] = {}
        for view in (window.view for step in steps for batch in step for window in batch):
            told.setdefault(view.episode, set()).add(view.told and view.told.words)
            assert view.told is None or view.told.motion is None
        seen.append(told)
    assert all(len(sentences) == 1 for told in seen for sentences in told.values())
    assert set().union(*(told[0] for told in seen)) == set(words[0])
    assert {sentence for told in seen for sentence in told[1] | told[2]} == {None, "Go"}


def test_a_window_that_is_told_to_do_something_else_does_not_hear_its_sentence() -> None:
    augment = AugmentConfig(stop=1.0)
    steps = epoch_plan([12], LoopConfig(), augment, window=4, epoch=0, words=[("Go left",)])
    assert {window.view.told.motion for step in steps for batch in step for window in batch if window.view.told} == {
        "Stop"
    }
