from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bundle.errors import CameraError, FrameError
from runtime.cameras.jpeg import decode_from

PICTURE = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(form: str = "JPEG", mode: str = "RGB", **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, form, **settings)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_picture_becomes_rgb() -> None:
    assert np.array_equal(decode_from(encoded("PNG"), "it"), PICTURE)
    for mode in ("RGB", "L"):
        assert decode_from(encoded(mode=mode), "it").shape == (24, 32, 3)


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("I;16", "PNG")])
def test_a_picture_that_means_nothing_certain_is_a_matter_of_the_camera_and_no_glitch(mode: str, form: str) -> None:
    data = io.BytesIO()
    Image.new(mode, (4, 4)).save(data, form)
    with pytest.raises(
        CameraError, match=r"(?s)http://cam sends pictures that are not taken.*got:.*8 bits a channel.*mono8"
    ):
        decode_from(data.getvalue(), "http://cam")


def test_the_orientation_in_the_file_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter

    assert np.array_equal(decode_from(encoded(exif=exif.tobytes()), "it"), decode_from(encoded(), "it"))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>404</html>", encoded("GIF", "P"), encoded("BMP")])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(
        FrameError, match=r"(?s)http://cam sent a picture that cannot be used.*(no picture|no header).*hint:"
    ):
        decode_from(data, "http://cam")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_half_a_picture_is_refused(keep: float) -> None:
    data = encoded(quality=95)
    with pytest.raises(FrameError, match=r"(?i)truncated"):
        decode_from(data[: int(len(data) * keep)], "it")


@pytest.mark.parametrize(("width", "height"), [(7000, 7000), (12000, 12000), (60000, 60000)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(FrameError, match=r"pixels|bomb"):
        decode_from(png_of(width, height), "it")


@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_any_damage_gives_a_picture_or_a_frame_error(noise: bytes, where: int) -> None:
    data = bytearray(encoded())
    where %= len(data)
    data[where : where + len(noise)] = noise
    try:
        pixels = decode_from(data, "it")
    except FrameError:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8
