"""The one resize of training and robot. Its arithmetic is held to Pillow's source by the tests of runtime/preprocess.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from episodes.resize import ResizeFilter, squash

ROOT = Path(__file__).resolve().parents[2]
FILTERS: dict[ResizeFilter, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (8, 8), (1, 3)])
def test_width_comes_before_height(name: ResizeFilter, shape: tuple[int, int]) -> None:
    frame = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before = frame.copy()
    squashed = squash(frame, 8, name)
    narrow = Image.fromarray(frame).resize((8, shape[0]), FILTERS[name])
    assert_array_equal(squashed, np.asarray(narrow.resize((8, 8), FILTERS[name])))
    assert squashed.dtype == np.uint8
    assert_array_equal(frame, before)


def test_a_view_of_another_memory_order() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    flipped = frame[::-1, :, ::-1]
    assert_array_equal(squash(flipped, 4, "bilinear"), squash(flipped.copy(), 4, "bilinear"))


def test_it_needs_no_hdf5() -> None:
    program = "import sys; sys.modules['h5py'] = None; import episodes.resize"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 48))
def test_a_letterbox_keeps_the_aspect_ratio_in_a_black_square(height: int, width: int, size: int) -> None:
    """As the lab's loader does it with Pillow alone: resized (width first, see `squash`), pasted in the middle."""
    frame = np.random.default_rng(height * 100 + width).integers(1, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(frame)
    scale = min(size / width, size / height)
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    expected = Image.new("RGB", (size, size), (0, 0, 0))
    resized = image.resize((sides[0], height), Image.BILINEAR).resize(sides, Image.BILINEAR)
    expected.paste(resized, ((size - sides[0]) // 2, (size - sides[1]) // 2))

    assert_array_equal(squash(frame, size, "letterbox"), np.asarray(expected))


def test_a_letterbox_of_a_square_is_a_squash() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    assert_array_equal(squash(frame, 24, "letterbox"), squash(frame, 24, "bilinear"))
