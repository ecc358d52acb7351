from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.errors import CameraError
from runtime.cameras.orientation import upright, upright_size
from runtime.robot_file import SimulatedCamera

PICTURE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


@pytest.mark.parametrize(
    ("rotate", "top_left"), [(0, PICTURE[0, 0]), (90, PICTURE[1, 0]), (180, PICTURE[1, 2]), (270, PICTURE[0, 2])]
)
def test_rotation_is_clockwise(rotate: int, top_left: NDArray[np.uint8]) -> None:
    config = SimulatedCamera(colour_order="rgb", rotate=rotate, width=3, height=2)  # type: ignore[arg-type]

    turned = upright(PICTURE, config)

    assert turned.shape == ((2, 3, 3) if rotate in (0, 180) else (3, 2, 3))
    assert np.array_equal(turned[0, 0], top_left)
    assert (turned.shape[1], turned.shape[0]) == upright_size(config)
    assert turned.flags.c_contiguous
    assert not turned.flags.writeable


def test_bgr_becomes_rgb_and_the_source_stays_as_it_is() -> None:
    before = PICTURE.copy()

    turned = upright(PICTURE, SimulatedCamera(colour_order="bgr", rotate=180))

    assert np.array_equal(turned, PICTURE[::-1, ::-1, ::-1])
    assert np.array_equal(PICTURE, before)


def test_another_size_says_which() -> None:
    with pytest.raises(CameraError, match=r"(?s)simulated camera.*got: +3 x 2.*expected: 1280 x any.*hint:"):
        upright(PICTURE, SimulatedCamera(colour_order="rgb", width=1280))


@pytest.mark.parametrize("pixels", [PICTURE[..., 0], PICTURE[..., :2], PICTURE[:0], PICTURE.astype(np.float32)])
def test_what_is_no_colour_picture_is_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(CameraError, match="no colour picture"):
        upright(pixels, SimulatedCamera(colour_order="rgb"))
