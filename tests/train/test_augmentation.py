"""A mirror is an involution in words, actions and pixels; colours are a function of strengths and draw."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from episodes.scene import draw_frame, plan_drive
from train.augmentation import Augmenter, mirror_actions, mirror_frame, mirror_text
from train.run_config import AugmentConfig

KINDS = ("brightness", "contrast", "saturation", "hue", "blur", "crop")


@pytest.fixture
def frame() -> NDArray[np.uint8]:
    return draw_frame(plan_drive("basket", "left", 1, 8, 0), 3, 48, 48)


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("Navigate to the gray basket on the left", "Navigate to the gray basket on the right"),
        ("Left, then RIGHT; the left-hand one", "Right, then LEFT; the right-hand one"),
        ("the leftover is bright, upright and lefty", "the leftover is bright, upright and lefty"),
        ("왼쪽으로 가서 오른쪽에 멈춰", "오른쪽으로 가서 왼쪽에 멈춰"),
        ("좌측 바구니, 우측 병", "우측 바구니, 좌측 병"),
        ("left로", "right로"),
        ("weak_left_curve", "weak_right_curve"),
        ("go straight", "go straight"),
    ],
)
def test_words_are_exchanged(text: str, mirrored: str) -> None:
    assert mirror_text(text) == mirrored


pieces = st.sampled_from(
    [
        "left",
        "right",
        "Left",
        "RIGHT",
        "왼쪽",
        "오른쪽",
        "좌측",
        "우측",
        "오른",
        "쪽",
        "측",
        "l",
        "eft",
        " ",
        "-",
        "_",
        "으로",
    ]
)


@given(st.one_of(st.text(), st.lists(pieces).map("".join)))
@example("오른왼쪽")
@example("lEft rIght")
def test_mirroring_a_text_twice_gives_it_back(text: str) -> None:
    assert mirror_text(mirror_text(text)) == text


@pytest.mark.parametrize(
    ("names", "signs"),
    [
        (("linear_x", "linear_y"), (1, -1)),
        (("linear_x", "linear_y", "angular_z"), (1, -1, -1)),
        (("angular_z", "linear_x"), (-1, 1)),
        (("linear_x",), (1,)),
    ],
)
def test_lateral_axes_are_negated(names: tuple[str, ...], signs: tuple[int, ...]) -> None:
    actions = np.random.default_rng(0).normal(size=(4, len(names))).astype(np.float32)
    actions[0] = 0
    before = actions.copy()
    mirrored = mirror_actions(actions, names)
    assert_array_equal(mirrored, actions * np.array(signs, np.float32))
    assert not np.signbit(mirrored[0]).any()
    assert_array_equal(mirror_actions(mirrored, names), before)
    assert_array_equal(actions, before)


def test_a_mirrored_drive_looks_like_the_drive_to_the_other_side(frame: NDArray[np.uint8]) -> None:
    # The scene's actions are a function of its picture, so this holds image and actions to one convention.
    drive = plan_drive("basket", "left", 1, 8, 0)
    opposite = dataclasses.replace(drive, offset_m=-drive.offset_m)
    target = draw_frame(opposite, 3, 48, 48).astype(int)
    assert 10 * np.abs(mirror_frame(frame) - target).mean() < np.abs(frame - target).mean()
    assert_array_equal(mirror_frame(mirror_frame(frame)), frame)
    assert mirror_frame(frame).flags.c_contiguous


def test_strengths_of_zero_change_no_bit(frame: NDArray[np.uint8]) -> None:
    assert_array_equal(Augmenter(AugmentConfig(mirror=0.5)).apply(frame, 7), frame)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_by_draw_and_by_nothing_else(kind: str, frame: NDArray[np.uint8]) -> None:
    strength = 2.0 if kind == "blur" else 0.4
    augmenter = Augmenter(AugmentConfig(**{kind: strength}))
    original = frame.copy()
    first = augmenter.apply(frame, 1)
    assert first.shape == frame.shape
    assert first.dtype == np.uint8
    assert_array_equal(Augmenter(AugmentConfig(**{kind: strength})).apply(frame, 1), first)
    assert_array_equal(frame, original)
    different = [augmenter.apply(frame, draw) for draw in range(2, 6)]
    assert all((other != first).any() for other in different)
    assert any((other != frame).any() for other in different)  # a small draw of blur may change nothing


def test_a_second_kind_does_not_change_the_draw_of_the_first() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)  # neither contrast nor hue nor blur nor crop shows on it
    alone = Augmenter(AugmentConfig(brightness=0.3))
    together = Augmenter(AugmentConfig(brightness=0.3, saturation=0.3, hue=0.2, blur=1.0, crop=0.2))
    for draw in range(5):
        assert_array_equal(alone.apply(grey, draw), together.apply(grey, draw))


def test_brightness_stays_within_its_strength() -> None:
    grey = np.full((2, 2, 3), 100, np.uint8)
    augmenter = Augmenter(AugmentConfig(brightness=0.2))
    values = [int(augmenter.apply(grey, draw)[0, 0, 0]) for draw in range(200)]
    assert 80 <= min(values) < 85
    assert 115 < max(values) <= 120


def test_hue_turns_the_colour_circle() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    augmenter = Augmenter(AugmentConfig(hue=0.5))
    seen = np.array([augmenter.apply(red, draw)[0, 0] for draw in range(60)])
    assert (seen.max(axis=1) == 255).all()  # value and saturation stay
    assert (seen.min(axis=1) == 0).all()
    assert (seen[:, 1] > 200).any()
    assert (seen[:, 2] > 200).any()


@pytest.mark.parametrize("crop", [0.5, 0.01])
def test_a_crop_keeps_shapes(crop: float, frame: NDArray[np.uint8]) -> None:
    ramp = np.broadcast_to(np.arange(0, 96, 2, dtype=np.uint8)[:, None, None], (48, 48, 3))
    square = np.ascontiguousarray(ramp)
    for draw in range(20):
        down = Augmenter(AugmentConfig(crop=crop)).apply(square, draw)[..., 0].astype(int)
        right = Augmenter(AugmentConfig(crop=crop)).apply(square.transpose(1, 0, 2).copy(), draw)[..., 0].astype(int)
        # The same zoom both ways: what is left of the ramp has the same slope.
        assert abs(np.ptp(down[:, 0]) - np.ptp(right[0])) <= 2
        assert np.ptp(down[:, 0]) >= (1 - crop) * 94 - 3
