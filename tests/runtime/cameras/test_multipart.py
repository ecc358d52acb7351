from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import CameraError
from runtime.cameras.multipart import MOST_BODY, MOST_HEAD, Part, PartParser, boundary_of

BODIES = [b"\xff\xd8first\xff\xd9", b"", b"\r\n--not quite\r\n\r\n", bytes(range(256)) * 3, b"last\r\n"]


def stream(bodies: list[bytes], *, length: bool, end: bytes = b"\r\n", boundary: bytes = b"frame") -> bytes:
    out = b"preamble" + end
    for number, body in enumerate(bodies):
        headers = [b"Content-Type: image/jpeg", b"X-Timestamp: %d.5" % number]
        headers += [b"Content-Length: %d" % len(body)] if length else []
        out += b"--" + boundary + end + end.join(headers) + end + end + body + end
    return out + b"--" + boundary + b"--" + end


def parse(data: bytes, cuts: list[int] | None = None, boundary: bytes = b"frame") -> tuple[list[Part], PartParser]:
    parser = PartParser(boundary)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    parts = [part for at, to in itertools.pairwise(places) for part in parser.feed(data[at:to], 1.0)]
    return parts, parser


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("length", [True, False])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_the_parts_are_the_same_however_the_stream_was_cut(length: bool, end: bytes, cuts: list[int]) -> None:
    parts, parser = parse(stream(BODIES, length=length, end=end), cuts)

    assert [part.body for part in parts] == BODIES
    assert [part.headers["x-timestamp"] for part in parts] == [f"{number}.5" for number in range(len(BODIES))]
    assert parser.over


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(0, 10_000), max_size=10))
def test_any_body_with_a_length_comes_out_whole(bodies: list[bytes], cuts: list[int]) -> None:
    parts, _ = parse(stream(bodies, length=True), cuts)
    assert [part.body for part in parts] == bodies


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=10))
def test_noise_gives_parts_or_a_camera_error_and_never_keeps_much(noise: bytes, cuts: list[int]) -> None:
    try:
        parse(noise.replace(b"\x00", b"--frame\r\n"), cuts)
    except CameraError:
        return


def test_a_wrong_length_costs_a_picture_and_not_the_stream() -> None:
    good = b"--frame\r\nContent-Length: 4\r\n\r\ngood\r\n"
    short = b"--frame\r\nContent-Length: 2\r\n\r\nabcdef\r\n"

    parts, _ = parse(good + short + good)

    assert [part.body for part in parts] == [b"good", b"ab", b"good"]


def test_parts_without_headers_and_a_boundary_that_another_word_begins_with() -> None:
    parts, _ = parse(b"--frames are nice\r\n--frame\r\n\r\none\r\n--frame\n\ntwo\n--frame--\n")
    assert [part.body for part in parts] == [b"one", b"two"]


def test_a_part_counts_from_when_its_headers_came() -> None:
    parser = PartParser(b"frame")
    assert parser.feed(b"--frame\r\nContent-Length: 4\r\n\r\nab", 1.0) == []
    (part,) = parser.feed(b"cd", 2.0)
    assert part.begun_s == 1.0


@pytest.mark.parametrize(
    "data",
    [
        b"--frame\r\n" + b"X: y\r\n" * MOST_HEAD,
        b"--frame\r\nContent-Length: %d\r\n\r\n" % (MOST_BODY + 1),
        b"--frame\r\nContent-Length: 9999999999999999999999999\r\n\r\n",
        b"--frame\r\nContent-Length: -5\r\n\r\n",
        b"--frame\r\nContent-Length: many\r\n\r\n",
        b"--frame\r\n\r\n" + bytes(MOST_BODY + 10),
    ],
    ids=["headers", "length", "huge length", "negative", "no number", "body"],
)
def test_what_no_camera_sends_is_refused(data: bytes) -> None:
    with pytest.raises(CameraError, match=r"(?s)not to be understood.*got:.*expected:.*hint:"):
        parse(data)


def test_endless_noise_is_not_kept() -> None:
    parser = PartParser(b"frame")
    for _ in range(100):
        parser.feed(bytes(1 << 16), 0.0)
    assert len(parser._buffer) < 100


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/x-mixed-replace; boundary=frame", b"frame"),
        ("multipart/x-mixed-replace;boundary=--myboundary", b"myboundary"),
        ('multipart/x-mixed-replace; boundary="a b"', b"a b"),
        ("Multipart/X-Mixed-Replace; Boundary=frame", b"frame"),
    ],
)
def test_boundaries(header: str, boundary: bytes) -> None:
    assert boundary_of(header) == boundary


@pytest.mark.parametrize(
    "header", ["", "image/jpeg", "multipart/x-mixed-replace", "text/html; boundary=x", "multipart/x; boundary=--"]
)
def test_what_is_no_stream_says_so(header: str) -> None:
    with pytest.raises(CameraError, match=r"(?s)not a stream of pictures.*snapshot = true"):
        boundary_of(header)
