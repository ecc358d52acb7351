"""What the policy sees and what the robot is told, as a page on this machine: a listener that never holds up the loop.

The loop's threads only leave the newest records here; everything else happens on the page's own threads, when the page asks. If nobody
looks, it costs nothing, and if somebody looks slowly, what comes in between is dropped. Loopback only, under loopback names only, because
the page shows a camera; from another computer, `ssh -L 8080:127.0.0.1:8080 robot`. Moves nothing: nothing here can be posted.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from PIL import Image

from bundle.errors import ServiceError
from runtime.commands.base import TWIST_FIELDS
from runtime.events import Decision, Event, Note, Published, RunInfo
from runtime.service.security import is_loopback, without_port

_T = TypeVar("_T")

NOTES = 12
# Rates are over this long.
_RATE_S = 2.0
_MAX_SIDE = 960
_POLICY = "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


@dataclass(frozen=True)
class _Picture:
    number: int
    jpeg: bytes


class LiveView:
    """A Listener that serves http://127.0.0.1:PORT/.

    Args:
        port: on loopback; 0 takes a free one.

    Raises:
        ServiceError: the port is taken.
    """

    def __init__(self, port: int = 8080) -> None:
        self._info: RunInfo | None = None
        self._limits: dict[str, float] = {}
        self._decision: Decision | None = None
        self._published: Published | None = None
        # Appending to a bounded deque needs no lock; readers copy.
        self._decided_at: deque[float] = deque(maxlen=256)
        self._published_at: deque[float] = deque(maxlen=256)
        self._missed: deque[bool] = deque(maxlen=256)
        self._notes: deque[tuple[Note, int]] = deque(maxlen=NOTES)
        """Each with how often it came in a row: a service that is away says so at every decision."""
        self._noting = threading.Lock()
        self._over = False
        self._encoding = threading.Lock()
        self._picture: _Picture | None = None
        try:
            self._server = _Server(("127.0.0.1", port), _handler(self))
        except (OSError, OverflowError) as error:
            raise ServiceError(
                f"the live view cannot listen on port {port}",
                got=getattr(error, "strerror", None) or error,
                expected="a free port of this machine",
                hint="take another port; another run may be showing its own there.",
            ) from None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="live-view", daemon=True)
        self._thread.start()

    def start(self, info: RunInfo) -> None:
        """The run begins."""
        self._limits = _limits(info.settings)
        self._info = info

    def take(self, event: Event) -> None:
        """Keep the newest; a microsecond."""
        if isinstance(event, Published):
            self._published = event
            self._published_at.append(event.at_s)
        elif isinstance(event, Decision):
            self._decision = event
            self._decided_at.append(event.finished_s)
            self._missed.append(event.missed)
        else:
            with self._noting:
                same = bool(self._notes) and (self._notes[-1][0].kind, self._notes[-1][0].text) == (
                    event.kind,
                    event.text,
                )
                if same:
                    self._notes[-1] = (event, self._notes[-1][1] + 1)
                else:
                    self._notes.append((event, 1))

    def close(self) -> None:
        """Stop serving; safe to call twice."""
        if not self._over:
            self._over = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(2.0)

    def state(self) -> dict[str, Any]:
        """What the page shows, ready for JSON: no number in it is infinite or NaN."""
        now = time.monotonic()
        info, decision, published = self._info, self._decision, self._published
        return {
            "run": None
            if info is None
            else {"robot": info.robot, "backend": info.backend, "precision": info.precision},
            "rates": {
                "decide": _rate(self._decided_at, now),
                "decide_wanted": None if info is None else info.decide_hz,
                "publish": _rate(self._published_at, now),
                "publish_wanted": None if info is None else info.publish_hz,
                "missed": sum(_copy(self._missed)),
                "of": len(self._missed),
            },
            "decision": None if decision is None else _decision(decision, now, info),
            "command": None if published is None else _command(published, now, self._limits),
            "notes": [
                {"ago_s": _number(now - note.at_s), "kind": note.kind, "text": note.text, "times": times}
                for note, times in _copy(self._notes)
            ],
        }

    def picture(self) -> bytes | None:
        """JPEG of the frame that the newest decision was made on, or None; encoded once, however many look."""
        decision = self._decision
        if decision is None:
            return None
        with self._encoding:
            if self._picture is None or self._picture.number != decision.number:
                image = Image.fromarray(decision.frame.pixels)
                image.thumbnail((_MAX_SIDE, _MAX_SIDE))
                self._picture = _Picture(decision.number, _jpeg(image))
            return self._picture.jpeg


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def _handler(view: LiveView) -> type[BaseHTTPRequestHandler]:
    page = Path(__file__).with_name("live_view.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10.0  # of a connection that says nothing

        def do_GET(self) -> None:
            if not is_loopback(without_port(self.headers.get("Host", ""))):
                # A page elsewhere that has pointed its name at 127.0.0.1 would read the camera.
                self._answer(403, "text/plain", b"this page answers to localhost and 127.0.0.1 only")
                return
            path = self.path.partition("?")[0]
            if path == "/":
                self._answer(200, "text/html; charset=utf-8", page)
            elif path == "/state":
                self._answer(200, "application/json", msgspec.json.encode(view.state()))
            elif path == "/frame.jpg" and (jpeg := view.picture()) is not None:
                self._answer(200, "image/jpeg", jpeg)
            else:
                self._answer(404, "text/plain", b"nothing here")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the browser went away

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: the terminal belongs to the run."""

    return Handler


def _decision(decision: Decision, now: float, info: RunInfo | None) -> dict[str, Any]:
    names = () if info is None else tuple(zip(info.action_names, info.action_units, strict=False))
    height, width = decision.frame.pixels.shape[:2]
    return {
        "number": decision.number,
        "instruction": decision.instruction,
        "age_s": _number(now - decision.finished_s),
        "width": width,
        "height": height,
        "took_ms": _number((decision.finished_s - decision.started_s) * 1e3),
        "timing": {name: _number(value) for name, value in decision.timing.items()},
        "missed": decision.missed,
        "axes": [{"name": name, "unit": unit} for name, unit in names],
        "chunk": [[_number(float(value)) for value in row] for row in decision.values],
    }


def _command(published: Published, now: float, limits: dict[str, float]) -> dict[str, Any]:
    sent = dict(zip(TWIST_FIELDS, published.twist.values, strict=True))
    shown = [field for field in TWIST_FIELDS if field in limits or field in published.wanted or sent[field]]
    return {
        "age_s": _number(now - published.at_s),
        "level": published.level,
        "reasons": list(published.reasons),
        "frame_age_s": _number(published.frame_age_s),
        "action_age_s": _number(published.action_age_s),
        "axes": [
            {
                "field": field,
                "unit": "m/s" if field.startswith("linear") else "rad/s",
                "sent": _number(sent[field]),
                "wanted": _number(published.wanted.get(field)),
                "limit": limits.get(field),
            }
            for field in shown
        ],
    }


def _limits(settings: str) -> dict[str, float]:
    """Largest speed by Twist field, from a RunInfo's settings; what cannot be found is left out, for the page can do without."""
    try:
        found = msgspec.json.decode(settings)
        local = (found.get("limits_file") or {}).get("axes", {})
        return {
            axis["field"]: min(float(axis["max_speed"]), float(local.get(name, {}).get("max_speed") or math.inf))
            for name, axis in found["robot"]["axes"].items()
        }
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _jpeg(image: Image.Image) -> bytes:
    """Into a real file, one that lives in memory: Pillow compresses into that without holding up Python's other threads."""
    with os.fdopen(os.memfd_create("live-view"), "w+b") as file:
        image.save(file, "JPEG", quality=80)
        file.seek(0)
        return file.read()


def _rate(times: deque[float], now: float) -> float:
    return round(sum(now - _RATE_S < at <= now for at in _copy(times)) / _RATE_S, 1)


def _copy(growing: deque[_T]) -> list[_T]:
    """What is in it now; the loop's threads, which append, are never made to wait."""
    while True:
        try:
            return list(growing)
        except RuntimeError:  # something was appended meanwhile
            continue


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
