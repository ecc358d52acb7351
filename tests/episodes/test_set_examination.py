"""What shows only when the episodes of a set are compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from episodes.findings import Examination, Problem
from episodes.set_examination import examine_set

BROWN = ((150.0, 80.0),) * 8
BLUE = ((80.0, 150.0),) * 8
LEFT, RIGHT = "go to the left", "go to the right"


def episode(number: int, **changes: object) -> Examination:
    """A V6 episode without a fault, to the left and to the right in turn."""
    is_left = number % 2 == 0
    plain = Examination(
        path=f"e{number}.h5",
        bytes=1000,
        schema="v6",
        frames=12,
        height=720,
        width=1280,
        fps=6.0,
        instruction=LEFT if is_left else RIGHT,
        instruction_source="stored",
        classes={"forward": 10, "stop": 2},
        left=3 if is_left else 0,
        right=0 if is_left else 4,
        bands=BROWN,
    )
    return replace(plain, **changes)


def advice_on(*episodes: Examination) -> str:
    return "\n".join(examine_set(episodes)[1].advice)


def test_a_good_set():
    episodes = tuple(episode(number) for number in range(6))
    judged, summary = examine_set(episodes)
    assert judged == episodes
    assert summary.advice == ()
    assert (summary.episodes, summary.unusable, summary.frames, summary.seconds, summary.bytes) == (
        6,
        0,
        72,
        12.0,
        6000,
    )
    assert summary.schemas == {"v6": 6}
    assert summary.sizes == {"720x1280": 6}
    assert summary.rates == {"6.0": 6}
    assert summary.sides == {"left": 3, "right": 3, "none": 0}
    assert summary.instructions == {LEFT: 3, RIGHT: 3}
    assert (summary.left_frames, summary.right_frames) == (9, 12)
    assert (summary.classes["forward"], summary.classes["stop"], summary.classes["left"]) == (60, 12, 0)


def test_no_episodes():
    judged, summary = examine_set([])
    assert judged == ()
    assert (summary.episodes, summary.frames, summary.advice) == (0, 0, ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "v1"}, "3 x v6, 1 x v1: schemas differ"),
        ({"height": 480, "width": 640}, "3 x 720x1280, 1 x 480x640"),
        ({"fps": 10.0}, "3 x 6.0, 1 x 10.0 fps"),
        ({"instruction_source": "file name"}, "1 of 4 episodes store no instruction"),
        ({"problems": (Problem("actions", "error", "t", "h"),)}, "1 of 4 episodes have errors"),
    ],
)
def test_one_that_differs(changes, said):
    assert said in advice_on(*(episode(number) for number in range(3)), episode(3, **changes))


def test_rates_that_are_nearly_the_same_are_the_same():
    assert advice_on(episode(0), episode(1, fps=6.3)) == ""
    assert advice_on(episode(0), episode(1, fps=None)) == ""


def test_one_side_only():
    assert "4 episodes go left, 1 go right" in advice_on(*(episode(number) for number in (0, 2, 4, 6, 1)))
    assert advice_on(*(episode(number) for number in (0, 2, 1))) == ""
    # Without a side in the text, the actions tell.
    silent = [episode(number, instruction="go") for number in (0, 2, 4, 1)]
    assert "3 episodes go left, 1 go right" in advice_on(*silent)


def test_episodes_with_errors_do_not_count():
    broken = episode(1, schema="v1", problems=(Problem("actions", "error", "t", "h"),))
    _, summary = examine_set([episode(0), broken])
    assert (summary.episodes, summary.unusable, summary.frames) == (2, 1, 12)
    assert summary.schemas == {"v6": 1}


def test_a_swapped_file_gets_a_warning():
    judged, summary = examine_set([*(episode(number) for number in range(5)), episode(5, bands=BLUE)])
    assert [len(one.problems) for one in judged] == [0, 0, 0, 0, 0, 1]
    (problem,) = judged[5].problems
    assert (problem.code, problem.severity) == ("colour_order", "warning")
    assert "confidence high" in problem.text
    assert "70 grey levels as read, 0 after swapping" in problem.text
    assert summary.advice == ()


def test_a_split_set_blames_no_file():
    judged, summary = examine_set([episode(number, bands=BLUE if number < 3 else BROWN) for number in range(6)])
    assert not any(one.problems for one in judged)
    assert "nobody can tell" in summary.advice[0]
