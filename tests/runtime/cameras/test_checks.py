from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.cameras.base import Frame
from runtime.cameras.checks import REFUSALS, FrameChecks, Refusal, brightness, same_pixels
from runtime.robot_file import SimulatedCamera

RANDOM = np.random.default_rng(0)


def config(**settings: object) -> SimulatedCamera:
    return SimulatedCamera(**{"colour_order": "rgb", "width": 16, "height": 12} | settings)  # type: ignore[arg-type]


def frame(at_s: float, stamp: float | None = None, height: int = 12, width: int = 16) -> Frame:
    return Frame(RANDOM.integers(100, 200, (height, width, 3), dtype=np.uint8), at_s, stamp)


def test_good_frames_count() -> None:
    checks = FrameChecks(config())

    assert [checks.refuse(frame(at, at + 50), at) for at in (1.0, 1.1, 1.2)] == [None, None, None]


def test_the_second_of_two_equal_pictures_does_not_count_and_later_is_called_frozen() -> None:
    checks = FrameChecks(config(frozen_after_s=1.0))
    first = frame(1.0)
    assert checks.refuse(first, 1.0) is None

    reasons = [checks.refuse(Frame(first.pixels.copy(), at), at) for at in (1.1, 1.9, 2.1, 9.0)]

    assert reasons == ["repeated", "repeated", "frozen", "frozen"]
    checks.reconnected()
    assert checks.refuse(Frame(first.pixels, 9.1), 9.1) == "frozen"  # a new connection to the same dead sensor
    assert checks.refuse(frame(9.2), 9.2) is None


def test_one_bit_makes_a_picture_a_new_one() -> None:
    checks = FrameChecks(config())
    first = frame(1.0)
    other = first.pixels.copy()
    other[5, 3, 1] ^= 1  # not in the sample that is looked at first
    assert checks.refuse(first, 1.0) is None

    assert checks.refuse(Frame(other, 1.1), 1.1) is None
    assert not same_pixels(first.pixels, other)


def test_equal_pictures_count_where_the_check_is_off() -> None:
    checks = FrameChecks(config(frozen_after_s=0))
    first = frame(1.0)

    assert [checks.refuse(Frame(first.pixels, at), at) for at in (1.0, 5.0, 9.0)] == [None, None, None]


def test_dark_pictures_do_not_count() -> None:
    checks = FrameChecks(config(dark_below=2.0))
    black = np.ones((12, 16, 3), np.uint8)

    assert checks.refuse(Frame(black, 1.0), 1.0) == "too dark"
    assert checks.refuse(Frame(black + 2, 1.1), 1.1) is None
    assert FrameChecks(config(dark_below=0)).refuse(Frame(black * 0, 1.0), 1.0) is None
    assert brightness(black * 7) == 7


def test_sizes() -> None:
    checks = FrameChecks(config())
    assert checks.refuse(frame(1.0, height=16, width=12), 1.0) == "wrong size"
    assert FrameChecks(config(rotate=90)).refuse(frame(1.0, height=16, width=12), 1.0) is None

    any_size = FrameChecks(config(width=0, height=0))
    assert any_size.refuse(frame(1.0, height=9), 1.0) is None
    assert any_size.refuse(frame(1.1, height=8), 1.1) == "wrong size"
    any_size.reconnected()
    assert any_size.refuse(frame(1.2, height=8), 1.2) is None


@pytest.mark.parametrize(
    "pixels", [np.zeros((12, 16), np.uint8), np.zeros((12, 16, 4), np.uint8), np.zeros((12, 16, 3), np.float32)]
)
def test_what_is_no_picture(pixels: np.ndarray) -> None:
    assert FrameChecks(config()).refuse(Frame(pixels, 1.0), 1.0) == "not a picture"


def test_stamps_must_grow() -> None:
    checks = FrameChecks(config())
    stamps = [50.0, 50.0, 49.0, 49.9, 50.1, math.nan]

    reasons = [checks.refuse(frame(at, stamp), at) for at, stamp in enumerate(stamps, start=1)]

    back: Refusal = "stamp went backwards"
    assert reasons == [None, "duplicate stamp", back, back, None, back]
    checks.reconnected()
    assert checks.refuse(frame(9.0, 3.0), 9.0) is None


@pytest.mark.parametrize(
    ("captured_s", "reason"),
    [
        (math.nan, "no capture time"),
        (math.inf, "no capture time"),
        (10.01, "from the future"),
        (9.0, "older than the newest"),
        (8.0, "older than the newest"),
    ],
)
def test_capture_times(captured_s: float, reason: Refusal) -> None:
    checks = FrameChecks(config())
    assert checks.refuse(frame(9.0), 9.0) is None

    assert checks.refuse(frame(captured_s), 10.0) == reason
    assert reason in REFUSALS
    assert checks.refuse(frame(10.0), 10.0) is None


def test_a_refused_frame_leaves_no_trace_in_time() -> None:
    """A picture from the future must not make all later ones look old."""
    checks = FrameChecks(config())

    assert checks.refuse(frame(1e9), 1.0) == "from the future"
    assert checks.refuse(frame(1.1), 1.1) is None
