"""Through a file in memory come the same bytes as through memory, and other threads go on meanwhile."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from runtime.recorder.jpeg import JpegEncoder
from tests.recordings import pictures


@pytest.mark.parametrize(("quality", "subsampling"), [(50, "4:2:0"), (90, "4:2:0"), (95, "4:4:4"), (100, "4:4:4")])
def test_the_same_bytes(quality: int, subsampling: str) -> None:
    encoder = JpegEncoder(quality)
    for height, width in ((96, 128), (16, 16), (50, 33)):  # a small one after a large one
        pixels = pictures(1, height=height, width=width)[0]
        expected = io.BytesIO()
        Image.fromarray(pixels).save(expected, "JPEG", quality=quality, subsampling=subsampling)
        assert encoder.encode(pixels) == expected.getvalue()
    encoder.close()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 70000, 3), np.uint8),
    ],
)
def test_what_is_no_picture(pixels: np.ndarray) -> None:
    encoder = JpegEncoder(90)
    with pytest.raises(ValueError, match="a picture of"):
        encoder.encode(pixels)
    assert encoder.encode(pictures(1)[0])  # it goes on
    encoder.close()


def test_others_go_on_meanwhile() -> None:
    """A large picture takes long; a thread that wants to run every millisecond must not wait for all of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    encoder = JpegEncoder(95)
    gaps: list[float] = []
    done = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    encoder.encode(pixels)
    took = time.perf_counter() - begin
    done.set()
    thread.join()
    encoder.close()
    # Converting to Pillow's own layout still locks; compressing, which is most of it, does not.
    assert max(gaps) < 0.7 * took
    assert len(gaps) > 10
