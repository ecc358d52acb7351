"""The live view: tells what happens, holds nobody up, and shows the camera to this machine only."""

from __future__ import annotations

import http.client
import io
import json
import math
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from bundle.errors import ServiceError
from runtime.cameras.base import Frame
from runtime.commands.base import Twist
from runtime.events import Decision, Note, Published, RunInfo
from runtime.service.live_view import NOTES, LiveView

PATIENCE_S = 60.0
SETTINGS = {
    "robot": {
        "axes": {
            "linear_x": {"field": "linear_x", "max_speed": 0.5},
            "turn": {"field": "angular_z", "max_speed": 1.0},
        }
    },
    "limits_file": {"axes": {"linear_x": {"max_speed": 0.2, "max_acceleration": None}}},
}


def info(settings: str) -> RunInfo:
    return RunInfo(
        robot="<b>robot</b>",
        bundle="x.bundle",
        manifest_sha256="0" * 64,
        backend="ort:cpu",
        precision="fp32",
        action_names=("linear_x", "turn"),
        action_units=("m/s", "rad/s"),
        decide_hz=6.0,
        publish_hz=20.0,
        strategy="receding_horizon",
        settings=settings,
    )


def decision(number: int, *, missed: bool = False, size: tuple[int, int] = (72, 128)) -> Decision:
    now = time.monotonic()
    pixels = np.full((*size, 3), (200, 40, 10), np.uint8)
    values = np.array([[0.1, 0.2], [0.3, np.nan]], np.float32)
    return Decision(number, "go", Frame(pixels, now), now - 0.05, now, values, {"total": 50.0}, missed)


def published(**changes: object) -> Published:
    facts: dict[str, object] = {
        "at_s": time.monotonic(),
        "twist": Twist(linear_x=0.1),
        "wanted": {"linear_x": 0.4},
        "level": "drive",
        "reasons": ("clamped",),
        "frame_age_s": 0.1,
        "action_age_s": math.inf,
        **changes,
    }
    return Published(**facts)  # type: ignore[arg-type]


@pytest.fixture
def view() -> Iterator[LiveView]:
    running = LiveView(0)
    yield running
    running.close()


def get(view: LiveView, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(view.url.rsplit(":", 1)[1].strip("/")), timeout=PATIENCE_S)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def state(view: LiveView) -> dict[str, dict[str, object]]:
    answer, body = get(view, "/state")
    assert answer.status == 200

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    loaded: dict[str, dict[str, object]] = json.loads(body, parse_constant=refuse)
    return loaded


def test_the_page_needs_nothing_from_elsewhere(view: LiveView) -> None:
    answer, body = get(view, "/")
    page = body.decode()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<script>" in page
    # A name space is no address that anybody asks.
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in page


def test_before_anything_happens(view: LiveView) -> None:
    shown = state(view)
    assert (shown["run"], shown["decision"], shown["command"], shown["notes"]) == (None, None, None, [])
    assert get(view, "/frame.jpg")[0].status == 404


def test_what_happens_is_shown(view: LiveView) -> None:
    view.start(info(json.dumps(SETTINGS)))
    for number in range(8):
        view.take(decision(number, missed=number == 3))
    view.take(published())
    for number in range(NOTES + 5):
        view.take(Note(time.monotonic(), "note", str(number)))

    shown = state(view)

    assert shown["run"]["robot"] == "<b>robot</b>"
    assert shown["rates"]["decide"] == 4.0
    assert (shown["rates"]["missed"], shown["rates"]["of"]) == (1, 8)
    assert shown["decision"]["number"] == 7
    assert shown["decision"]["axes"] == [{"name": "linear_x", "unit": "m/s"}, {"name": "turn", "unit": "rad/s"}]
    assert shown["decision"]["chunk"] == [[0.1, 0.2], [0.3, None]]
    command = shown["command"]
    assert (command["level"], command["reasons"], command["action_age_s"]) == ("drive", ["clamped"], None)
    assert command["axes"] == [
        {"field": "linear_x", "unit": "m/s", "sent": 0.1, "wanted": 0.4, "limit": 0.2},
        {"field": "angular_z", "unit": "rad/s", "sent": 0.0, "wanted": None, "limit": 1.0},
    ]
    notes = shown["notes"]
    assert [note["text"] for note in notes] == [str(number) for number in range(5, NOTES + 5)]  # type: ignore[index]


def test_a_note_that_comes_again_and_again_is_one_line(view: LiveView) -> None:
    view.take(Note(1.0, "camera", "lost"))
    for _ in range(3 * NOTES):
        view.take(Note(time.monotonic(), "policy", "the service does not answer"))
    view.take(Note(time.monotonic(), "camera", "lost"))

    notes = state(view)["notes"]

    assert [(note["kind"], note["times"]) for note in notes] == [("camera", 1), ("policy", 3 * NOTES), ("camera", 1)]  # type: ignore[index]
    assert notes[1]["ago_s"] < PATIENCE_S  # type: ignore[index]


@pytest.mark.parametrize("settings", ["", "null", "[]", "{}", '{"robot":{"axes":[1]}}', '{"robot":{"axes":{"x":{}}}}'])
def test_settings_that_say_nothing_of_limits(view: LiveView, settings: str) -> None:
    view.start(info(settings))
    view.take(published(twist=Twist(angular_z=0.2), wanted={}))
    assert state(view)["command"]["axes"] == [
        {"field": "angular_z", "unit": "rad/s", "sent": 0.2, "wanted": None, "limit": None}
    ]


def test_the_picture_is_that_of_the_newest_decision(view: LiveView) -> None:
    view.take(decision(0, size=(720, 1280)))
    answer, body = get(view, "/frame.jpg?n=0")
    picture = Image.open(io.BytesIO(body))
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert answer.headers["Cache-Control"] == "no-store"
    assert picture.size == (960, 540)
    assert np.abs(np.array(picture).mean(axis=(0, 1)) - (200, 40, 10)).max() < 4
    assert view.picture() is view.picture()
    view.take(decision(1))
    assert Image.open(io.BytesIO(get(view, "/frame.jpg?n=1")[1])).size == (128, 72)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "192.168.0.2:8080"])
def test_another_name_is_refused(view: LiveView, host: str) -> None:
    """A page that has pointed its own name at 127.0.0.1 would read the camera."""
    view.take(decision(0))
    for path in ("/", "/state", "/frame.jpg"):
        assert get(view, path, Host=host)[0].status == 403
        assert get(view, path, Host="localhost:1")[0].status == 200


def test_nothing_can_be_posted(view: LiveView) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(view, "/state", method)[0].status == 501
    for path in ("/../live_view.py", "/etc/passwd", "/state/"):
        assert get(view, path)[0].status == 404


def test_a_taken_port_is_an_error_that_says_so(view: LiveView) -> None:
    port = int(view.url.rsplit(":", 1)[1].strip("/"))
    for wrong in (port, 70_000):
        with pytest.raises(ServiceError, match=f"cannot listen on port {wrong}"):
            LiveView(wrong)


def test_it_listens_on_loopback_only(view: LiveView) -> None:
    assert view.url.startswith("http://127.0.0.1:")
    others = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    port = int(view.url.rsplit(":", 1)[1].strip("/"))
    for address in others - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((str(address), port), 2)


def test_readers_that_hang_hold_nobody_up(view: LiveView) -> None:
    view.start(info(json.dumps(SETTINGS)))
    port = int(view.url.rsplit(":", 1)[1].strip("/"))
    hanging = [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for _ in range(5)]
    for sock in hanging:
        sock.sendall(b"GET /state HTTP/1.1\r\nHost: localhost\r\n")
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            view.state()
            view.picture()

    reader = threading.Thread(target=read)
    reader.start()
    event = decision(0, size=(720, 1280))
    command = published()
    costs = []
    for _ in range(2000):
        start = time.thread_time()
        view.take(command)
        view.take(event)
        costs.append(time.thread_time() - start)
    over.set()
    reader.join(PATIENCE_S)
    assert np.median(costs) < 1e-4
    assert state(view)["decision"]["number"] == 0
    for sock in hanging:
        sock.close()


def test_it_ends_once_and_for_all() -> None:
    view = LiveView(0)
    view.take(decision(0))
    view.close()
    view.close()
    view.take(decision(1))
    with pytest.raises(OSError, match="refused"):
        get(view, "/")
