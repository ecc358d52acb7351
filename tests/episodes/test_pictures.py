"""The one decoder of picture files: against numpy for what PNG says its numbers mean, and bounded for what strangers send."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import EpisodeError, JetvlaError, PictureError
from bundle.reading_limits import PICTURE_PIXELS, PICTURE_SCANS
from episodes.frames import FrameSource
from episodes.pictures import decode_picture
from runtime.cameras.jpeg import decode_from
from runtime.service.pictures import decode as decode_for_the_service

Pixels = NDArray[np.uint8]
RANDOM = np.random.default_rng(0)
PICTURE: Pixels = RANDOM.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


JPEG = saved(Image.fromarray(PICTURE), "JPEG", quality=95)
PNG = saved(Image.fromarray(PICTURE), "PNG")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colours: int, rows: bytes, *before: bytes, interlaced: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + chunk(b"IEND", b"")


def packed(samples: NDArray[np.uint8], bits: int) -> bytes:
    """Rows of a PNG, unfiltered: `samples` [H, W, channels] of `bits` bits each, the first one highest."""
    flat = samples.reshape(samples.shape[0], -1)
    split = (flat[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1
    return b"".join(b"\0" + row.tobytes() for row in np.packbits(split.reshape(len(flat), -1), axis=1))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def refused(data: bytes, **options: object) -> PictureError:
    with pytest.raises(PictureError) as caught:
        decode_picture(data, **options)  # type: ignore[arg-type]
    return caught.value


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan, which refines nothing, is repeated until there are `count`."""
    start = jpeg.rfind(b"\xff\xc4", 0, jpeg.rfind(b"\xff\xda"))
    return jpeg[:-2] + jpeg[start:-2] * (count - jpeg.count(b"\xff\xda")) + jpeg[-2:]


def as_mpo(jpeg: bytes) -> bytes:
    """The same picture, with the mark of a file of several: what Pillow calls MPO."""
    two = saved(Image.new("RGB", (16, 16)), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    start = two.index(b"\xff\xe2")
    return jpeg[:2] + two[start : start + 2 + int.from_bytes(two[start + 2 : start + 4], "big")] + jpeg[2:]


# --- what the numbers mean ------------------------------------------------------------------------------------------------------------

COLOURS = {"grey": 0, "rgb": 2, "palette": 3, "grey and alpha": 4, "rgba": 6}
DEPTHS = {"grey": (1, 2, 4, 8), "rgb": (8,), "palette": (1, 2, 4, 8), "grey and alpha": (8,), "rgba": (8,)}
CHANNELS = {"grey": 1, "rgb": 3, "palette": 1, "grey and alpha": 2, "rgba": 4}


@st.composite
def pngs(draw: st.DrawFn) -> tuple[bytes, Pixels]:
    """A PNG of any colour type and depth up to 8 bits, and what it shows by the specification."""
    kind = draw(st.sampled_from(sorted(COLOURS)))
    bits = draw(st.sampled_from(DEPTHS[kind]))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = random.integers(0, 2**bits, (height, width, CHANNELS[kind])).astype(np.uint8)
    palette = random.integers(0, 256, (2**bits, 3)).astype(np.uint8)
    before = [chunk(b"PLTE", palette.tobytes())] if kind == "palette" else []
    if draw(st.booleans()) and kind in (
        "grey",
        "rgb",
        "palette",
    ):  # transparency beside the pixels, which changes no colour
        one = samples[0, 0].astype(">u2").tobytes()
        before.append(
            chunk(b"tRNS", bytes(random.integers(0, 256, 2**bits).astype(np.uint8)) if kind == "palette" else one)
        )
    if kind == "palette":
        shown = palette[samples[..., 0]]
    elif kind.startswith("grey"):
        shown = np.repeat((samples[..., :1].astype(int) * 255 // (2**bits - 1)).astype(np.uint8), 3, axis=2)
    else:
        shown = samples[..., :3]
    return png(width, height, bits, COLOURS[kind], packed(samples, bits), *before), shown


@given(pngs())
def test_every_kind_of_png_shows_what_its_numbers_mean(case: tuple[bytes, Pixels]) -> None:
    data, shown = case
    assert np.array_equal(decode_picture(data), shown)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "YCbCr"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (33, 17)])
def test_what_pillow_writes_is_read_as_pillow_reads_it(mode: str, form: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    try:
        data = saved(image, form)
    except OSError:
        pytest.skip(f"{form} has no {mode}")
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_picture(data), want)
    if form == "PNG" and mode in ("RGB", "L"):
        assert np.array_equal(decode_picture(data), np.asarray(image.convert("RGB")))


def test_the_same_as_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    for data in (PNG, saved(Image.fromarray(PICTURE[..., 0]), "PNG")):
        assert np.array_equal(decode_picture(data), cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1])


@pytest.mark.parametrize("colours", sorted(COLOURS.values()))
def test_sixteen_bits_are_refused_by_name(colours: int) -> None:
    """12 bits in 16 would be black by PNG's meaning, and white if cut to 8 bits, as Pillow cuts grey."""
    error = refused(png(4, 4, 16, colours, bytes(4 * (1 + 4 * 8))))
    assert (error.fault, error.got) == ("meaning", "16 bits a channel")
    assert "mono8" in error.hint


def test_an_infrared_picture_as_opencv_writes_it_is_refused_and_not_white() -> None:
    cv2 = pytest.importorskip("cv2")
    twelve = (np.arange(64 * 48, dtype=np.uint16) % 4096).reshape(48, 64)
    assert refused(cv2.imencode(".png", twelve)[1].tobytes()).fault == "meaning"


def test_other_meanings_are_refused_by_name() -> None:
    assert "CMYK" in str(refused(saved(Image.new("CMYK", (4, 4)), "JPEG")).got)
    several = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(3)]
    animated = saved(several[0], "PNG", save_all=True, append_images=several[1:])
    assert (refused(animated).fault, refused(animated).got) == ("meaning", "an animated PNG: several pictures")


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"hello", saved(Image.new("RGB", (4, 4)), "BMP"), saved(Image.new("L", (4, 4)), "TIFF")]
)
def test_other_files_are_no_pictures(data: bytes) -> None:
    assert refused(data).fault == "format"


def test_png_may_be_left_out() -> None:
    assert refused(PNG, png=False).fault == "format"
    assert decode_picture(JPEG, png=False).shape == PICTURE.shape


def test_of_several_pictures_in_a_jpeg_the_first_is_read() -> None:
    small = [Image.fromarray(PICTURE), Image.new("RGB", (8, 8))]
    mpo = saved(small[0], "MPO", save_all=True, append_images=small[1:])
    assert Image.open(io.BytesIO(mpo)).format == "MPO"
    assert np.array_equal(decode_picture(mpo), np.asarray(Image.open(io.BytesIO(mpo)).convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_all_ways_in_give_the_same_array(form: str, tmp_path: Path) -> None:
    data = JPEG if form == "JPEG" else PNG
    want = decode_picture(data)
    assert np.array_equal(decode_from(data, "it"), want)
    assert np.array_equal(decode_for_the_service(data, max_pixels=10_000), want)
    if form == "JPEG":
        assert np.array_equal(in_hdf5(tmp_path, data), want)


def in_hdf5(folder: Path, data: bytes) -> Pixels:
    with h5py.File(folder / "one.h5", "w") as file:
        dataset = file.create_dataset("images", (1,), h5py.vlen_dtype(np.uint8))
        dataset[0] = np.frombuffer(data, np.uint8)
        return FrameSource(folder / "one.h5", dataset, "jpeg").read(0)


def test_all_ways_in_refuse_the_same(tmp_path: Path) -> None:
    slow = with_scans(saved(Image.fromarray(PICTURE), "JPEG", progressive=True), PICTURE_SCANS + 1)
    for data in (slow, as_mpo(slow), saved(Image.new("CMYK", (4, 4)), "JPEG"), JPEG[:-40]):
        for read in (lambda d: decode_from(d, "it"), lambda d: decode_for_the_service(d, max_pixels=10_000)):
            with pytest.raises(JetvlaError):
                read(data)
        with pytest.raises(EpisodeError, match="frame 0 of 1 is corrupt"):
            in_hdf5(tmp_path, data)


# --- whole -----------------------------------------------------------------------------------------------------------------------------


def test_a_png_whose_pixels_end_early_is_refused_at_the_end_of_a_row_too() -> None:
    row = b"\0" + bytes([9] * 12)
    assert decode_picture(png(4, 6, 8, 2, row * 6)).shape == (6, 4, 3)
    for rows in range(6):
        assert (refused(png(4, 6, 8, 2, row * rows)).fault) == "damaged"


def test_the_passes_of_an_interlaced_png_are_all_there() -> None:
    size = 4 + 4 + 2 * 4 + 7 + 3 * 7 + 3 * 13  # of the passes of 4 x 6 pixels; the second one is empty
    assert decode_picture(png(4, 6, 8, 2, bytes(size), interlaced=1)).shape == (6, 4, 3)
    for less in (1, 13, 39, size - 4, size):
        assert refused(png(4, 6, 8, 2, bytes(size - less), interlaced=1)).fault == "damaged"


def test_pixels_behind_another_chunk_do_not_count() -> None:
    """Pillow reads the first run of them alone."""
    whole = zlib.compress(b"".join(b"\0" + bytes([9] * 12) for _ in range(6)))
    parts = chunk(b"IDAT", whole[:-6]) + chunk(b"tIME", bytes(7)) + chunk(b"IDAT", whole[-6:])
    plain = png(4, 6, 8, 2, b"")
    start = plain.index(b"IDAT") - 4
    assert refused(plain[:start] + parts + chunk(b"IEND", b"")).fault == "damaged"


def test_a_flipped_bit_in_a_png_is_refused() -> None:
    plain = png(8, 8, 8, 0, b"".join(b"\0" + bytes(8) for _ in range(8)))
    at = plain.index(b"IDAT") + 4
    for where in range(at, at + int.from_bytes(plain[at - 8 : at - 4], "big")):
        flipped = bytearray(plain)
        flipped[where] ^= 1
        assert refused(bytes(flipped)).fault == "damaged", where


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("data", [JPEG, PNG])
def test_what_is_cut_short_is_refused(data: bytes, keep: float) -> None:
    assert refused(data[: int(len(data) * keep)]).fault == "damaged"


KINDS = {
    "plain": {},
    "fine": {"quality": 95, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "restarts by row": {"restart_marker_rows": 1, "subsampling": 2},
}
SMOOTH = np.asarray(Image.fromarray(PICTURE[:5, :5]).resize((120, 90)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("noise", [0, 40])
def test_an_end_behind_half_of_a_jpeg_is_refused(kind: str, mode: str, noise: int) -> None:
    """libjpeg fills up what is missing and says nothing; a torn picture that somebody closed looks like one with a grey floor."""
    pixels = SMOOTH // 2 + RANDOM.integers(0, noise + 1, SMOOTH.shape, dtype=np.uint8)
    whole = saved(Image.fromarray(pixels).convert(mode), "JPEG", **KINDS[kind])
    shown = decode_picture(whole)
    assert np.array_equal(shown, np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
    start = whole.rindex(b"\xff\xda") + 10
    for cut in (start + (len(whole) - start) * part // 20 for part in range(1, 16)):
        if whole[cut - 1] != 0xFF:  # half of a marker
            error = refused(whole[:cut] + b"\xff\xd9")
            assert (error.fault, error.got) == ("damaged", "an end before the last pixels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 8, 9, 16, 17, 50])
def test_flat_pictures_are_whole(kind: str, side: int) -> None:
    """As whole ones are told from filled ones by their last block, which is flat in both here."""
    flat = saved(Image.new("RGB", (side, side + 3), (9, 99, 199)), "JPEG", **KINDS[kind])
    assert decode_picture(flat).shape == (side + 3, side, 3)
    assert decode_picture(flat + b"something behind it").shape == (side + 3, side, 3)


@given(
    st.sampled_from([JPEG, PNG]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_damage_gives_a_picture_or_a_picture_error(data: bytes, edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for where, value in edits:
        damaged[where % len(damaged)] = value
    try:
        pixels = decode_picture(damaged)
    except PictureError:
        return
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)


# --- costs -----------------------------------------------------------------------------------------------------------------------------


def test_many_scans_are_refused_whatever_the_format_is_called() -> None:
    """Before a pixel is decoded: a file of 20 kB can hold minutes."""
    progressive = saved(Image.fromarray(PICTURE), "JPEG", progressive=True)
    assert decode_picture(with_scans(progressive, PICTURE_SCANS)).shape == PICTURE.shape
    slow = with_scans(progressive, PICTURE_SCANS + 1)
    assert Image.open(io.BytesIO(as_mpo(slow))).format == "MPO"
    for data in (slow, as_mpo(slow), with_scans(progressive, 20_000)):
        assert (refused(data).fault, "scans" in str(refused(data).got)) == ("damaged", True)


def large_jpeg(side: int) -> bytes:
    """Header and first bytes of a progressive JPEG of side x side pixels; small, because nothing of it may be decoded."""
    data = saved(Image.fromarray(PICTURE), "JPEG", progressive=True)
    at = data.index(b"\xff\xc2") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def test_scans_of_many_pixels_are_counted_together() -> None:
    assert "scans of 6000 x 6000 pixels" in str(refused(with_scans(large_jpeg(6000), 30)).got)


@pytest.mark.parametrize("side", [6400, 13_000, 65_500])
def test_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    assert side * side > PICTURE_PIXELS
    for data in (large_jpeg(side), as_mpo(large_jpeg(side)), png(side, side, 8, 2, bytes(100))):
        error = refused(data)
        assert (error.fault, error.got) == ("pixels", f"{side} x {side} pixels")
    assert refused(PNG, most_pixels=64 * 48 - 1).fault == "pixels"


BOMB = zlib.compress(bytes(5_000_000))
TEXT = chunk(b"zTXt", b"a\0\0" + BOMB)
ROWS = b"".join(b"\0" + bytes(12) for _ in range(4))
EXIF = b"Exif\0\0" + bytes(8)
HOSTILE = {
    "a large text": png(4, 4, 8, 2, ROWS, TEXT),
    "many texts": png(4, 4, 8, 2, ROWS, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 200),
    "a large profile": png(4, 4, 8, 2, ROWS, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "many chunks": png(4, 4, 8, 2, ROWS, *[chunk(b"tIME", bytes(7))] * 2000),
    "many chunks of pixels": png(4, 4, 8, 2, ROWS)[:-12] + chunk(b"IDAT", b"") * 2000 + chunk(b"IEND", b""),
    "many pieces of EXIF": JPEG[:2] + segment(0xE1, EXIF) * 2000 + JPEG[2:],
    "much EXIF": JPEG[:2] + segment(0xE1, EXIF + bytes(65_000)) * 200 + JPEG[2:],
    "much filling": JPEG[:2] + b"\xff" * 5000 + JPEG[2:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_costs_much_beside_the_pixels_is_refused(name: str) -> None:
    assert refused(HOSTILE[name]).fault == "damaged"


def test_more_pixels_than_a_png_says_are_left_alone() -> None:
    assert decode_picture(png(4, 4, 8, 2, ROWS + bytes(50_000_000))).shape == (4, 4, 3)


def test_a_colour_profile_and_texts_of_the_usual_size_are_no_trouble() -> None:
    text = [chunk(b"tEXt", b"a\0b")] * 20
    assert not decode_picture(png(4, 4, 8, 2, ROWS, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3000))), *text)).any()
    assert np.array_equal(decode_picture(JPEG[:2] + segment(0xE2, bytes(65_000)) * 60 + JPEG[2:]), decode_picture(JPEG))
