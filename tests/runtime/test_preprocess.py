"""The resize is Pillow's to the bit, and whatever is no camera frame is refused before it can become one."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import FrameError
from bundle.manifest import Preprocessing
from runtime.preprocess import check_frame, resize
from tests.oracle import oracle_case

filters = st.sampled_from(["bicubic", "bilinear"])
sides = st.integers(1, 48)
PILLOW = int(PIL.__version__.partition(".")[0])


def preprocessing(name: str) -> Preprocessing:
    return Preprocessing(
        color="RGB",
        resize=name,  # type: ignore[arg-type]
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        cameras=("static",),
    )


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise and flat areas: filters differ in the one, round in the other."""
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame[: height // 2, : width // 2] = rng.choice([0, 255], 3)
    return frame


# --- the numbers ----------------------------------------------------------------------------------------------------------


def weights(size: int, target: int, name: str) -> NDArray[np.int64]:
    """Pillow's antialiased filter as a matrix [target, size] of 22-bit fixed-point numbers, after its Resample.c."""
    scale = max(size / target, 1.0)
    support = scale * (2.0 if name == "bicubic" else 1.0)
    matrix = np.zeros((target, size), np.int64)
    for row in range(target):
        centre = (row + 0.5) * size / target
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size)
        x = np.abs((np.arange(first, last) - centre + 0.5) / scale)
        if name == "bilinear":
            values = np.clip(1 - x, 0, None)
        else:
            a = -0.5
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = (((x - 5) * x + 8) * x - 4) * a
            values = np.where(x < 1, near, np.where(x < 2, far, 0))
        values = values / values.sum()
        matrix[row, first:last] = np.trunc(values * 2**22 + np.where(values < 0, -0.5, 0.5)).astype(np.int64)
    return matrix


def fixed_point(frame: NDArray[np.uint8], size: int, name: str, *, tall: int | None = None) -> NDArray[np.uint8]:
    """To [tall, size, 3]: horizontal pass, then vertical; each rounds and clips to 8 bits. The integers are exact in float64."""

    def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(np.floor((values + 2**21) / 2**22), 0, 255)

    height, width, _ = frame.shape
    tall = size if tall is None else tall
    pixels = frame.astype(np.float64)
    if width != size:
        pixels = rounded(weights(width, size, name).astype(np.float64) @ pixels)
    if height != tall:
        down = weights(height, tall, name).astype(np.float64) @ pixels.reshape(height, size * 3)
        pixels = rounded(down).reshape(tall, size, 3)
    return pixels.astype(np.uint8)


def pillow(frame: NDArray[np.uint8], size: int, name: str) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling[name.upper()]))


@settings(max_examples=100)
@given(sides, sides, st.integers(1, 40), filters, st.integers(0, 9))
def test_the_filter_to_the_bit(height: int, width: int, size: int, name: str, seed: int) -> None:
    frame = picture(height, width, seed)

    resized = resize(frame, preprocessing(name), size)

    assert (resized.dtype, resized.shape) == (np.uint8, (size, size, 3))
    np.testing.assert_array_equal(resized, fixed_point(frame, size, name))
    # Pillow 13 resizes some upright frames vertically first; up to 12, and so in all training so far, none.
    if height <= width or PILLOW < 13:
        np.testing.assert_array_equal(resized, pillow(frame, size, name))


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(720, 1280), (480, 640), (224, 224), (100, 3000), (1280, 720), (300, 200)])
def test_real_sizes(shape: tuple[int, int], name: str) -> None:
    frame = picture(*shape)
    resized = resize(frame, preprocessing(name), 224)

    np.testing.assert_array_equal(resized, fixed_point(frame, 224, name))
    if shape[0] <= shape[1] or PILLOW < 13:
        np.testing.assert_array_equal(resized, pillow(frame, 224, name))


@pytest.mark.parametrize(
    ("shape", "tall", "wide"),
    [
        ((720, 1280), 126, 224),
        ((480, 640), 168, 224),
        ((1280, 720), 224, 126),
        ((224, 224), 224, 224),
        ((3, 2000), 1, 224),
    ],
)
def test_a_letterbox_to_the_bit(shape: tuple[int, int], tall: int, wide: int) -> None:
    frame = picture(*shape)
    above, left = (224 - tall) // 2, (224 - wide) // 2
    sides = ((above, 224 - tall - above), (left, 224 - wide - left), (0, 0))

    resized = resize(frame, preprocessing("letterbox"), 224)

    np.testing.assert_array_equal(resized, np.pad(fixed_point(frame, wide, "bilinear", tall=tall), sides))


def test_it_is_said_in_words() -> None:
    names = ("bicubic", "bilinear", "letterbox")
    assert [preprocessing(name).how for name in names] == ["bicubic squash", "bilinear squash", "letterbox"]


def test_the_filters_differ() -> None:
    frame = picture(40, 60)
    assert (resize(frame, preprocessing("bicubic"), 16) != resize(frame, preprocessing("bilinear"), 16)).any()


@pytest.mark.parametrize("case", ["lora_7d", "fork2dof_stock"])
def test_as_the_reference_saw_it(case: str) -> None:
    """The recorded pixels are what upstream's own preprocessing made of these frames, normalised."""
    recorded = oracle_case(case)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = recorded.expected["pixel_values"]
    for clip in range(2):
        for index in range(0, expected.shape[1], 3):
            resized = resize(recorded.inputs["frames_u8"][clip, index], preprocessing("bicubic"), 224)
            pixels = ((resized / 255 - mean) / std).transpose(2, 0, 1)
            np.testing.assert_allclose(pixels, expected[clip, index], atol=1e-5, rtol=0)


# --- what arrives as a frame ----------------------------------------------------------------------------------------------

VIEWS = {
    "bgr": lambda frame: frame[..., ::-1],
    "rotated by 180 degrees": lambda frame: frame[::-1, ::-1],
    "every second row": lambda frame: frame[::2],
    "a region": lambda frame: frame[3:11, 5:20],
    "transposed": lambda frame: frame.transpose(1, 0, 2),
    "Fortran order": np.asfortranarray,
    "of four channels": lambda frame: np.dstack([frame, frame[..., :1]])[..., :3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_a_view_is_as_good_as_a_copy(view: object, name: str) -> None:
    frame = view(picture(24, 30))  # type: ignore[operator]
    assert not frame.flags.c_contiguous or frame.base is None
    before = frame.copy()

    resized = resize(frame, preprocessing(name), 16)

    np.testing.assert_array_equal(resized, resize(np.ascontiguousarray(frame), preprocessing(name), 16))
    np.testing.assert_array_equal(resized, fixed_point(np.ascontiguousarray(frame), 16, name))
    np.testing.assert_array_equal(frame, before)


def test_a_read_only_frame() -> None:
    frame = picture(24, 30)
    frame.flags.writeable = False
    assert resize(frame, preprocessing("bicubic"), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("frame", "what", "got"),
    [
        (np.zeros((4, 4, 3), np.float32), "wrong dtype", "float32"),
        (np.zeros((4, 4, 3), np.float64), "wrong dtype", "float64"),
        (np.zeros((4, 4, 3), np.int64), "wrong dtype", "int64"),
        (np.zeros((4, 4, 3), np.int8), "wrong dtype", "int8"),
        (np.zeros((4, 4, 3), bool), "wrong dtype", "bool"),
        (np.zeros((4, 4), np.uint8), "wrong shape", r"\[4, 4\]"),
        (np.zeros((4, 4, 1), np.uint8), "wrong shape", r"\[4, 4, 1\]"),
        (np.zeros((4, 4, 4), np.uint8), "wrong shape", r"\[4, 4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), "wrong shape", r"\[3, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "wrong shape", r"\[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "wrong shape", r"\[0, 4, 3\]"),
        (np.zeros((4, 0, 3), np.uint8), "wrong shape", r"\[4, 0, 3\]"),
        (np.zeros((), np.uint8), "wrong shape", r"\[\]"),
        ([[[0, 0, 0]]], "is not an array", "list"),
        (None, "is not an array", "NoneType"),
        (Image.new("RGB", (4, 4)), "is not an array", "Image"),
        (b"\xff\xd8\xff", "is not an array", "bytes"),
    ],
)
def test_what_is_no_frame(frame: object, what: str, got: str) -> None:
    with pytest.raises(
        FrameError, match=rf"a frame .*{what}\n  got:      {got}\n  expected: (?s:.*)\n\nhint: pass RGB"
    ):
        check_frame(frame)
    with pytest.raises(FrameError):
        resize(frame, preprocessing("bicubic"), 8)  # type: ignore[arg-type]


def test_a_frame_is_passed_on_as_it_is() -> None:
    frame = picture(1, 1)
    assert check_frame(frame) is frame
