"""Pictures from the network: right ones exactly, wrong ones refused before they cost anything."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle.reading_limits import PICTURE_SCANS
from runtime.preprocess import resize
from runtime.service.pictures import decode, decode_base64, encode
from runtime.service.refusal import Refusal
from tests.bundles import random_frames

PIXELS = random_frames(1, seed=3)[0, 0]


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises much and whose data is nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def refused(data: bytes, max_pixels: int = 10_000) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value


@pytest.mark.parametrize("size", [8, 224])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_a_resized_picture_arrives_as_it_was_and_is_not_resized_again(policy: object, size: int, filter: str) -> None:
    """What makes a remote policy's answers those of a local one."""
    import msgspec

    preprocessing = msgspec.structs.replace(policy.manifest.preprocessing, resize=filter)  # type: ignore[attr-defined]
    camera = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    small = resize(camera, preprocessing, size)

    arrived = decode(encode(small, "png"), max_pixels=size * size)

    np.testing.assert_array_equal(arrived, small)
    np.testing.assert_array_equal(resize(arrived, preprocessing, size), small)


def test_jpeg_is_close_and_not_the_same() -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64))[..., None].repeat(3, -1).astype(np.uint8)

    arrived = decode(encode(smooth, "jpeg", 95), max_pixels=64 * 64)

    assert np.abs(arrived.astype(int) - smooth).max() <= 4


def test_grey_and_transparent_pictures_become_rgb() -> None:
    grey = decode(saved(Image.new("L", (5, 4), 77)), max_pixels=100)
    assert (grey.shape, grey.dtype) == ((4, 5, 3), np.uint8)
    assert (grey == 77).all()
    clear = decode(saved(Image.new("RGBA", (5, 4), (1, 2, 3, 0))), max_pixels=100)
    assert clear[0, 0].tolist() == [1, 2, 3]


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.new("RGB", (20, 10)), "JPEG", exif=exif), max_pixels=1000).shape == (10, 20, 3)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(50), saved(Image.new("RGB", (4, 4)), "BMP")])
def test_other_files_are_refused_as_such(data: bytes) -> None:
    refusal = refused(data)
    assert (refusal.status, refusal.reason) == (415, "image_type")


def test_pixel_formats_that_would_be_misread_are_refused() -> None:
    for image in (Image.new("CMYK", (4, 4)), Image.new("I;16", (4, 4))):
        refusal = refused(saved(image, "JPEG" if image.mode == "CMYK" else "PNG"))
        assert (refusal.status, refusal.reason) == (415, "image_type")
        assert refusal.got in ("pixels of the kind CMYK", "16 bits a channel")


@pytest.mark.parametrize("size", [(101, 100), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (12_000, 12_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    refusal = refused(png_of_size(*size))
    assert (refusal.status, refusal.reason) == (413, "pixels")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_files_are_refused(format: str) -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), format)
    for length in (len(whole) // 2, len(whole) - 40):
        refusal = refused(whole[:length])
        assert (refusal.status, refusal.reason) == (422, "image")


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    progressive = saved(Image.fromarray(PIXELS), "JPEG", progressive=True)
    assert decode(progressive, max_pixels=100).shape == PIXELS.shape
    start = progressive.index(b"\xff\xda")
    slow = progressive[:start] + progressive[start:-2] * (PICTURE_SCANS + 1) + progressive[-2:]
    refusal = refused(slow)
    assert refusal.status == 422
    assert "scans" in str(refusal.got)


FILES = {format: saved(Image.fromarray(PIXELS), format) for format in ("JPEG", "PNG")}


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(sorted(FILES)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 10_000),
)
def test_damaged_files_are_decoded_or_refused(format: str, edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(FILES[format])
    for where, value in edits:
        data[where % len(data)] = value
    del data[max(8, cut) :]
    pixels = np.zeros((1, 1, 3), np.uint8)
    # Anything else that is raised fails the test.
    with contextlib.suppress(Refusal):
        pixels = decode(bytes(data), max_pixels=10_000)
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)


def test_base64_with_and_without_a_data_url() -> None:
    text = base64.b64encode(b"picture").decode()
    assert decode_base64(text) == b"picture"
    assert decode_base64(f"data:image/jpeg;base64,{text}") == b"picture"


@pytest.mark.parametrize(
    "text", ["not base64!", "abc", "data:text/html;base64,AAAA", "data:image/png,AAAA", "ä", "AA==AA", "http://x/,AAAA"]
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="is not base64") as caught:
        decode_base64(text)
    assert caught.value.status == 422
