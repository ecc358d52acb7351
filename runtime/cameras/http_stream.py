"""Network cameras: a stream of JPEG pictures over HTTP, or one picture per request.

The connection holds whatever is not read yet, so everything that has arrived is read and only the newest complete picture is decoded. A
picture counts as taken when its headers arrived, or, where the sender stamps it (X-Timestamp), as long before as source_clock.py can tell.
A picture asked for counts as taken when it was asked for. Senders should announce the length of each picture: without it, its end is known
only when the next one begins.

Redirects and proxies are not followed: a robot's camera is where the robot file says. Error messages leave out passwords and queries.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import math
import select
import socket
import ssl
import time
from urllib.parse import unquote, urlsplit

from bundle.errors import CameraError
from runtime.cameras.base import Frame
from runtime.cameras.chunked import Dechunker
from runtime.cameras.jpeg import decode_from
from runtime.cameras.multipart import MOST_BODY, Part, PartParser, boundary_of
from runtime.cameras.orientation import upright
from runtime.cameras.source_clock import SourceClock
from runtime.robot_file import HttpCamera

_CONNECT_S = 3.0
_SNAPSHOT_S = 3.0
_MOST_SNAPSHOTS_HZ = 30.0
_READ = 1 << 16
_RECEIVE_BUFFER = 1 << 18  # of the kernel: what waits there is old


class Address:
    """A camera's URL, taken apart."""

    def __init__(self, url: str) -> None:
        """Raises:
        CameraError: it is no http or https URL.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise CameraError(
                "the camera's address cannot be used",
                got=url.partition("?")[0].rpartition("@")[2],
                expected="http://HOST:PORT/PATH",
                hint="write the address that shows the stream in a browser; RTSP is not read here.",
            )
        self._secure = parts.scheme == "https"
        self._host, self._port = host, port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.shown = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
        self._headers = {"Accept": "multipart/x-mixed-replace, image/jpeg, */*", "User-Agent": "jetvla"}
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode("ascii")

    def get(self, timeout_s: float) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, socket.socket]:
        """Ask, and read the headers of the answer.

        Raises:
            CameraError: nobody answers in time, or not with 200.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_s)
        try:
            connection.connect()
            link: socket.socket = connection.sock
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            connection.request("GET", self._target, headers=self._headers)
            # Not connection.getresponse(), which closes the socket behind the answer's back where the sender will.
            response = http.client.HTTPResponse(link, method="GET")
            response.begin()
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise self.lost(f"{type(error).__name__}: {error}") from None
        if response.status != http.client.OK:
            response.close()
            connection.close()
            raise CameraError(
                f"the camera at {self.shown} refuses",
                got=f"{response.status} {response.reason}",
                expected="200 OK",
                hint="401 and 403 want http://USER:PASSWORD@HOST/...; redirects are not followed, write the final address.",
            )
        return connection, response, link

    def lost(self, got: str) -> CameraError:
        """The error for a connection that is gone or never was."""
        return CameraError(
            f"the camera at {self.shown} does not answer",
            got=got,
            expected="pictures",
            hint="look at its power, the network and the address; a browser should show the stream.",
        )


class HttpStream:
    """A stream of pictures; see Camera."""

    def __init__(self, config: HttpCamera) -> None:
        """Raises:
        CameraError: the URL cannot be used.
        """
        self._config = config
        self._address = Address(config.url)
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._link: socket.socket | None = None
        self._waiting = b""
        self._over = False
        self._chunks: Dechunker | None = None
        self._parser = PartParser(b"")
        self._clock = SourceClock()

    def open(self) -> None:
        """Connect.

        Raises:
            CameraError: nobody answers, or not with a stream.
        """
        self.close()
        self._connection, self._response, self._link = self._address.get(_CONNECT_S)
        try:
            self._parser = PartParser(boundary_of(self._response.getheader("Content-Type", "")))
        except CameraError:
            self.close()
            raise
        self._chunks = Dechunker() if self._response.chunked else None
        self._clock = SourceClock()
        self._over = False
        # What came together with the headers is in a buffer of http.client's; from here on nothing goes through that any more.
        self._link.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._waiting = self._response.fp.read1(_READ) if self._response.fp.peek(1) else b""

    def read(self, timeout_s: float) -> Frame | None:
        """The newest complete picture.

        Raises:
            FrameError: the picture is damaged.
            CameraError: the stream is over or malformed, or the picture has another size.
        """
        deadline = time.monotonic() + timeout_s
        newest: Part | None = None
        try:
            while (
                not self._over
                and (data := self._receive(0.0 if newest else max(0.0, deadline - time.monotonic()))) is not None
            ):
                content = data if self._chunks is None else self._chunks.feed(data)
                parts = self._parser.feed(content, time.monotonic())
                newest = parts[-1] if parts else newest
                self._over = not data or self._parser.over or (self._chunks is not None and self._chunks.over)
                if self._over or time.monotonic() > deadline:
                    break
        except (OSError, http.client.HTTPException) as error:
            raise self._address.lost(f"{type(error).__name__}: {error}") from None
        if newest is None:
            if self._over:
                raise self._address.lost("the stream is over")
            return None
        pixels = upright(decode_from(newest.body, self._address.shown), self._config)
        stamp = _number(newest.headers.get("x-timestamp"))
        return Frame(pixels, self._clock.captured_s(stamp, newest.begun_s), stamp)

    def close(self) -> None:
        """Disconnect."""
        for thing in (self._response, self._connection):
            if thing is not None:
                with contextlib.suppress(OSError):
                    thing.close()
        self._connection = self._response = self._link = None
        self._waiting = b""

    def _receive(self, wait_s: float) -> bytes | None:
        """What has arrived, waiting for it at most `wait_s`; None if nothing has, empty if nothing ever will.

        Raises:
            CameraError: it is not open.
            OSError: the connection is lost.
        """
        if self._link is None:
            raise self._address.lost("it is not open")
        if self._waiting:
            data, self._waiting = self._waiting, b""
            return data
        for wait in (0.0, wait_s):  # first without: TLS keeps data where no select sees it
            if wait > 0 and not select.select([self._link], [], [], wait)[0]:
                return None
            try:
                return self._link.recv(_READ)
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
        return None


class HttpSnapshots:
    """One picture per request; see Camera."""

    def __init__(self, config: HttpCamera) -> None:
        """Raises:
        CameraError: the URL cannot be used.
        """
        self._config = config
        self._address = Address(config.url)
        self._next_s = 0.0

    def open(self) -> None:
        """Nothing: each picture has its own connection."""

    def read(self, timeout_s: float) -> Frame | None:
        """Ask for a picture; may take some seconds.

        Raises:
            FrameError: the picture is damaged.
            CameraError: nobody answers in time, or the picture has another size.
        """
        wait = self._next_s - time.monotonic()
        time.sleep(max(0.0, min(wait, timeout_s)))
        if wait > timeout_s:
            return None
        asked = time.monotonic()
        self._next_s = asked + 1 / _MOST_SNAPSHOTS_HZ
        connection, response, link = self._address.get(_SNAPSHOT_S)
        try:
            data = self._body(response, link, asked + _SNAPSHOT_S)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._address.lost(f"{type(error).__name__}: {error}") from None
        finally:
            response.close()
            connection.close()
        return Frame(upright(decode_from(data, self._address.shown), self._config), asked)

    def close(self) -> None:
        """Nothing is open."""

    def _body(self, response: http.client.HTTPResponse, link: socket.socket, deadline: float) -> bytes:
        """All of the answer, in time and of a sane size.

        Raises:
            CameraError: it is not.
        """
        body = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._address.lost(f"{len(body)} bytes in {_SNAPSHOT_S:g} s, and no end")
            link.settimeout(left)
            data = response.read1(_READ)
            if not data:
                break
            body += data
            if len(body) > MOST_BODY:
                raise self._address.lost(f"more than {MOST_BODY} bytes for one picture")
        if response.length:
            raise self._address.lost(f"{len(body)} bytes, {response.length} more were announced")
        return bytes(body)


def _number(text: str | None) -> float | None:
    """A time stamp in seconds; None where there is none, or something else."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
