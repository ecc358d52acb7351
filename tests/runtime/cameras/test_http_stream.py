"""Against a real server in a thread, on this machine only."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import CameraError, FrameError
from runtime.cameras import http_stream
from runtime.cameras.base import Camera, Frame
from runtime.cameras.chunked import Dechunker
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.select import open_camera
from runtime.robot_file import HttpCamera
from tests.runtime.cameras.scripted import LIMIT_S, Notes, wait_until

Answer = Callable[[BaseHTTPRequestHandler], None]
MIXED = "multipart/x-mixed-replace; boundary=frame"


class Server:
    """Answers every GET by calling `answer`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        self.answer: Answer = lambda handler: handler.send_error(404)
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append(dict(self.headers) | {"path": self.path})
                self.close_connection = True
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Not to stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/stream"

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def picture(value: int) -> NDArray[np.uint8]:
    """Left half red, right half blue, and a corner that tells which picture it is."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = pixels[:, 16:, 2] = 250
    pixels[:8, :8] = value
    return pixels


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(value)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def part(body: bytes, *, length: bool = True, **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return (
        ("--frame\r\nContent-Type: image/jpeg\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode()
        + body
        + b"\r\n"
    )


def begin(handler: BaseHTTPRequestHandler, content_type: str = MIXED, **headers: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", content_type)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def config(server: Server, **settings: object) -> HttpCamera:
    return HttpCamera(**{"url": server.url, "colour_order": "rgb"} | settings)  # type: ignore[arg-type]


def next_frame(camera: Camera) -> Frame:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (frame := camera.read(0.25)) is not None:
            return frame
    raise AssertionError("no frame came")


@pytest.fixture
def opened() -> Iterator[Callable[[HttpCamera], Camera]]:
    cameras: list[Camera] = []

    def open_one(settings: HttpCamera) -> Camera:
        cameras.append(open_camera(settings))
        cameras[-1].open()
        return cameras[-1]

    yield open_one
    for camera in cameras:
        camera.close()
        camera.close()


Opened = Callable[[HttpCamera], Camera]


@pytest.mark.parametrize("length", [True, False])
def test_a_stream_gives_its_pictures_in_rgb(server: Server, opened: Opened, length: bool) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        for value in range(1000):
            handler.wfile.write(part(jpeg(value % 250), length=length, X_Timestamp=value))
            if server.over.wait(0.02):
                return

    server.answer = answer
    camera = opened(config(server))

    frames = [next_frame(camera) for _ in range(3)]

    numbers = [frame.source_stamp_s for frame in frames]
    assert numbers == sorted(set(numbers))
    assert abs(int(frames[2].pixels[3, 3].mean()) - int(numbers[2]) % 250) <= 3
    assert frames[0].pixels.shape == (16, 32, 3)
    assert frames[0].pixels[12, 4, 0] > 200 > 50 > frames[0].pixels[12, 4, 2]
    assert time.monotonic() - frames[-1].captured_s < LIMIT_S / 2
    assert server.requests[0]["User-Agent"] == "jetvla"


def test_what_has_piled_up_is_skipped(server: Server, opened: Opened) -> None:
    sent = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        for value in range(0, 200, 2):
            handler.wfile.write(part(jpeg(value)))
        sent.set()
        server.over.wait()

    server.answer = answer
    camera = opened(config(server))
    assert sent.wait(LIMIT_S)
    time.sleep(0.1)  # what is sent has arrived

    frame = camera.read(1.0)

    assert frame is not None
    assert abs(int(frame.pixels[3, 3].mean()) - 198) <= 2
    assert camera.read(0.05) is None


def test_a_single_picture_that_came_with_the_headers_is_not_waited_for(server: Server, opened: Opened) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = part(jpeg(7))
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Type: {MIXED}\r\n\r\n".encode() + body)
        server.over.wait()

    server.answer = answer

    assert opened(config(server)).read(LIMIT_S) is not None


def test_chunked_transfer(server: Server, opened: Opened) -> None:
    """As servers on asyncio send it; the chunks have nothing to do with the parts."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, Transfer_Encoding="chunked")
        for value in range(1000):
            data = part(jpeg(7), X_Timestamp=value)
            for piece in (data[:70], data[70:400], data[400:]):
                handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if server.over.wait(0.02):
                return

    server.answer = answer
    camera = opened(config(server))

    numbers = [next_frame(camera).source_stamp_s for _ in range(5)]

    assert numbers == sorted(set(numbers))


def test_stamps_tell_of_a_queue(server: Server, opened: Opened) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        for number in range(1000):  # each stamp falls further behind the time at which it is sent
            handler.wfile.write(part(jpeg(number % 250), X_Timestamp=1000 + number * 0.001))
            if server.over.wait(0.05):
                return

    server.answer = answer
    camera = opened(config(server))
    first = next_frame(camera)
    begun = time.monotonic()
    while time.monotonic() - begun < 0.4:
        frame = next_frame(camera)

    assert first.source_stamp_s is not None
    assert frame.source_stamp_s is not None
    assert frame.source_stamp_s > first.source_stamp_s
    assert time.monotonic() - frame.captured_s > 0.2


def test_colours_that_the_sender_swapped_are_swapped_back_and_that_is_said(
    server: Server, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(part(jpeg(7)))
        server.over.wait()

    server.answer = answer

    frame = next_frame(opened(config(server, colour_order="bgr", rotate=180)))

    assert frame.pixels[3, -4, 2] > 200  # red became blue, and the bottom left the top right
    assert "red and blue are exchanged after decoding" in caplog.text


def test_a_stream_that_ends_is_a_lost_camera_and_comes_back(server: Server) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        start = 10 * len(server.requests)
        for value in range(start, start + 5):
            handler.wfile.write(part(jpeg(value)))
            time.sleep(0.02)

    server.answer = answer
    notes = Notes()
    settings = config(server)
    grabber = FrameGrabber(open_camera(settings), settings, on_note=notes.append)
    grabber.start()
    try:
        wait_until(lambda: grabber.statistics.reconnects >= 2, "reconnects")
        wait_until(lambda: notes.kinds[:3] == ["camera lost", "camera back", "camera lost"], "notes")
    finally:
        grabber.close()
    assert grabber.statistics.taken >= 2
    assert "does not answer (got the stream is over)" in notes[0].text


def answer_page(handler: BaseHTTPRequestHandler) -> None:
    begin(handler, "text/html")
    handler.wfile.write(b"<html>")


def answer_moved(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/elsewhere")
    handler.end_headers()


def answer_401(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(401)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answer_page, r"(?s)not a stream of pictures.*text/html"),
        (answer_moved, r"(?s)refuses.*got: +302.*redirects are not followed"),
        (answer_401, r"(?s)refuses.*got: +401"),
    ],
)
def test_what_is_no_stream_says_so(server: Server, answer: Answer, message: str) -> None:
    server.answer = answer
    with pytest.raises(CameraError, match=message):
        open_camera(config(server)).open()
    assert len(server.requests) == 1


@pytest.mark.parametrize("snapshot", [False, True])
def test_nobody_there(server: Server, snapshot: bool) -> None:
    server.close()
    camera = open_camera(config(server, snapshot=snapshot))
    with pytest.raises(CameraError, match=r"(?s)does not answer.*ConnectionRefused"):
        [camera.open(), camera.read(0.1)]


def test_a_password_is_sent_and_not_shown(server: Server) -> None:
    url = server.url.replace("http://", "http://me:s%40crt@") + "?token=hidden"
    with pytest.raises(CameraError) as caught:
        open_camera(config(server, url=url)).open()

    assert server.requests[0]["Authorization"] == "Basic bWU6c0BjcnQ="
    assert server.requests[0]["path"] == "/stream?token=hidden"
    assert not any(secret in str(caught.value) for secret in ("s%40crt", "s@crt", "hidden", "me:"))


@pytest.mark.parametrize("url", ["rtsp://me:secret@cam/1", "cam/stream", "http://", "http://cam:port/", "file:///x"])
def test_addresses_that_cannot_be_used(url: str) -> None:
    with pytest.raises(CameraError, match="address cannot be used") as caught:
        open_camera(HttpCamera(url=url, colour_order="rgb"))
    assert "secret" not in str(caught.value)


def test_damaged_pictures_in_a_stream_are_an_error_and_not_a_picture(server: Server, opened: Opened) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(part(jpeg(1)[:-200]))
        server.over.wait()

    server.answer = answer
    camera = opened(config(server))
    with pytest.raises(FrameError, match="cannot be used"):
        next_frame(camera)


@pytest.mark.parametrize("sent", [b"zz\r\n", b"-5\r\n", bytes(1000)])
def test_chunks_that_are_none(server: Server, opened: Opened, sent: bytes) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, Transfer_Encoding="chunked")
        handler.wfile.write(sent)
        server.over.wait()

    server.answer = answer
    camera = opened(config(server))
    with pytest.raises(CameraError, match=r"does not answer"):
        next_frame(camera)


def test_a_sender_that_stalls_is_silent(server: Server, opened: Opened) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, Transfer_Encoding="chunked")
        handler.wfile.write(b"ff")  # and no line end
        server.over.wait()

    server.answer = answer
    assert opened(config(server)).read(0.1) is None


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.lists(st.integers(0, 400), max_size=20))
def test_chunks_are_joined_however_they_were_cut(chunks: list[bytes], cuts: list[int]) -> None:
    coded = b"".join(b"%x;name=value\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    places = sorted({0, len(coded), *(cut % (len(coded) + 1) for cut in cuts)})
    dechunker = Dechunker()

    joined = b"".join(dechunker.feed(coded[at:to]) for at, to in itertools.pairwise(places))

    assert joined == b"".join(chunks)
    assert dechunker.over


def test_snapshots(server: Server, opened: Opened) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = jpeg(10 * len(server.requests))
        begin(handler, "image/jpeg", Content_Length=str(len(data)))
        handler.wfile.write(data)

    server.answer = answer
    camera = opened(config(server, snapshot=True))
    begun = time.monotonic()

    frames = [next_frame(camera) for _ in range(3)]

    assert [round(int(frame.pixels[3, 3].mean()) / 10) for frame in frames] == [1, 2, 3]
    assert time.monotonic() - begun > 2 / 31  # at most thirty a second
    assert begun <= frames[0].captured_s < frames[1].captured_s


@pytest.mark.parametrize("fault", ["short", "trickle", "endless"])
def test_snapshots_that_do_not_come_whole_and_in_time(
    server: Server, opened: Opened, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(http_stream, "_SNAPSHOT_S", 0.3)
    monkeypatch.setattr(http_stream, "MOST_BODY", 100_000)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = jpeg(1)
        if fault == "short":
            begin(handler, "image/jpeg", Content_Length=str(len(data)))
            handler.wfile.write(data[:100])
            return
        begin(handler, "image/jpeg")
        while not server.over.wait(0.02 if fault == "trickle" else 0):
            handler.wfile.write(b"\xff" if fault == "trickle" else bytes(10_000))

    server.answer = answer
    camera = opened(config(server, snapshot=True))
    begun = time.monotonic()

    with pytest.raises(CameraError, match="does not answer"):
        camera.read(0.25)

    assert time.monotonic() - begun < LIMIT_S / 2
