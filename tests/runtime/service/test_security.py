"""Who may ask, and how much: over raw sockets, because what an attacker sends no HTTP library would."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from bundle.errors import ConfigError
from runtime.service.app import Limits
from runtime.service.security import KEY_VARIABLE, STRANGERS_A_SECOND, check_exposure, is_loopback, read_key
from runtime.service.wire import ErrorAnswer
from tests.bundles import make_bundle
from tests.runtime.service.serving import KEY, PATIENCE_S, Served, serve_bundle

LIMITS = Limits(request_timeout_s=1.0, max_upload_mb=0.5, max_connections=12)

WAITING = ("Content-Length: 400000", "Content-Type: application/json", "Expect: 100-continue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[Served]:
    with serve_bundle(folder, key=KEY, limits=LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def keyless(folder: Path) -> Iterator[Served]:
    with serve_bundle(folder, limits=LIMITS) as served:
        yield served


@contextmanager
def connection(served: Served) -> Iterator[socket.socket]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        yield sock


def received(sock: socket.socket) -> bytes:
    """Everything until the other side closes, or a whole answer is there."""
    data = bytearray()
    while True:
        try:
            part = sock.recv(65536)
        except ConnectionResetError:
            return bytes(data)
        data += part
        length = re.search(rb"content-length: (\d+)\r\n", data)
        head = data.find(b"\r\n\r\n")
        if not part or (length and head >= 0 and len(data) >= head + 4 + int(length[1])):
            return bytes(data)


def request(path: str = "/predict", *headers: str, method: str = "POST", host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")


def status(answer: bytes) -> int:
    assert answer, "closed without an answer"
    return int(answer.split(b" ", 2)[1])


def ask(served: Served, data: bytes) -> bytes:
    with connection(served) as sock:
        sock.sendall(data)
        return received(sock)


@pytest.mark.parametrize(
    "key",
    [[], ["X-API-Key: wrong"], ["X-API-Key: "], [f"X-API-Key: {KEY}x"], [f"X-API-Key: {KEY}", "X-API-Key: other"]],
)
@pytest.mark.parametrize("path", ["/predict", "/reset", "/policy", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_key_nothing_is_told(keyed: Served, key: list[str], path: str) -> None:
    answer = ask(keyed, request(path, *key, "Content-Length: 0"))
    assert status(answer) == 401
    assert b"www-authenticate" in answer
    assert KEY.encode() not in answer


def test_the_key_is_checked_before_the_body_comes(keyed: Served) -> None:
    """Not one byte of the 400 kB is sent, and a client that waits to be asked for them is not asked."""
    answer = ask(keyed, request("/predict", *WAITING))
    assert status(answer) == 401
    with connection(keyed) as sock:
        sock.sendall(request("/predict", f"X-API-Key: {KEY}", *WAITING))
        assert sock.recv(100).startswith(b"HTTP/1.1 100")


def test_health_needs_no_key(keyed: Served) -> None:
    assert status(ask(keyed, request("/health", method="GET"))) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "[::2]", "[x"]
    + [
        "[::1].evil",
        "[::1]evil.example:80",
        "evil@127.0.0.1",
        "evil:80@[::1]",
        "localhost/x",
        "localhost#",
        "localhost:80:80",
        "[localhost]",
    ],
)
def test_a_service_without_a_key_answers_to_loopback_names_only(keyless: Served, keyed: Served, host: str) -> None:
    """A page whose name has been pointed at 127.0.0.1 still sends that name."""
    assert status(ask(keyless, request("/health", method="GET", host=host))) == 403
    # With a key a page cannot know it, and the names that a robot calls a service by are many.
    assert status(ask(keyed, request("/health", method="GET", host=host))) == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost."]
)
def test_loopback_names_are_answered(keyless: Served, host: str) -> None:
    assert status(ask(keyless, request("/health", method="GET", host=host))) == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:1234", "https://evil.example:8000", "file://"]
    + [
        "http://[",
        "http://[::1",
        "http://]",
        "",
        "localhost",
        "http://evil@localhost",
        "http://localhost/",
        "ftp://localhost",
    ],
)
def test_web_pages_of_others_are_refused(keyless: Served, keyed: Served, origin: str) -> None:
    for served in (keyless, keyed):
        answer = ask(served, request("/reset", f"Origin: {origin}", f"X-API-Key: {KEY}", "Content-Length: 0"))
        assert status(answer) == 403
        assert b"access-control" not in answer.lower()
    preflight = request("/predict", f"Origin: {origin}", "Access-Control-Request-Method: POST", method="OPTIONS")
    assert status(ask(keyless, preflight)) == 403


@pytest.mark.parametrize("length", ["500001", "100000000", "9" * 18])
def test_a_large_content_length_is_refused_before_the_body(keyless: Served, length: str) -> None:
    answer = ask(keyless, request("/predict", f"Content-Length: {length}", "Content-Type: application/json"))
    assert status(answer) == 413
    # Only a picture may be large.
    assert status(ask(keyless, request("/reset", "Content-Length: 70000"))) == 413


def test_a_body_without_a_length_is_counted(keyless: Served) -> None:
    with connection(keyless) as sock:
        sock.sendall(request("/predict", "Transfer-Encoding: chunked", "Content-Type: application/json"))
        sender = threading.Thread(target=_send_chunks, args=(sock, 100_000_000))
        sender.start()
        answer = received(sock)
        sock.shutdown(socket.SHUT_RDWR)
        sender.join(PATIENCE_S)
    assert status(answer) == 413


def _send_chunks(sock: socket.socket, total: int) -> None:
    chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
    try:
        for _ in range(total // 0x4000):
            sock.sendall(chunk)
    except OSError:
        pass  # the service has had enough


@pytest.mark.parametrize("body", [b"", b'{"session"'])
def test_a_body_that_does_not_come_is_not_waited_for(keyless: Served, body: bytes) -> None:
    start = time.monotonic()
    answer = ask(keyless, request("/predict", "Content-Length: 100", "Content-Type: application/json") + body)
    assert status(answer) == 408
    assert time.monotonic() - start >= LIMITS.request_timeout_s


def test_a_body_that_trickles_is_not_waited_for(keyless: Served) -> None:
    with connection(keyless) as sock:
        sock.sendall(request("/predict", "Content-Length: 100000", "Content-Type: application/json"))
        sock.settimeout(0.2)
        deadline = time.monotonic() + PATIENCE_S
        answer = b""
        while not answer and time.monotonic() < deadline:
            sock.sendall(b" ")
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                continue
    assert status(answer) == 408


def test_connections_that_never_ask_are_closed(keyless: Served) -> None:
    with connection(keyless) as silent, connection(keyless) as cut, connection(keyless) as foreign:
        cut.sendall(b"POST /predict HTTP/1.1\r\nHost: localh")
        foreign.sendall(b"\x16\x03\x01 is no HTTP\r\n\r\n")
        answer = received(foreign)
        assert status(answer) == 400
        assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=ErrorAnswer).reason == "http"
        assert b"application/json" in answer
        assert received(silent) == received(cut) == b""


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (request("/health", "Content-Length: -1"), 400),
        (request("/predict", "Transfer-Encoding: chunked", "Content-Type: application/json") + b"xyz\r\n", 400),
        (request("/predict", "Transfer-Encoding: gzip"), 400),
        (b"\r\n" * 5 + b"\x00", 400),
    ],
)
def test_what_is_no_http_gets_json(keyless: Served, data: bytes, code: int) -> None:
    answer = ask(keyless, data)
    assert status(answer) == code
    assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=ErrorAnswer).reason == "http"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (request("/health", method="GET"), 200),
        (request("/health", "X-API-Key: wrong", method="GET"), 200),
        (request("/predict", "Content-Length: 0"), 401),
        (request("/predict", *WAITING[:2]) + b"a" * 1000, 401),
    ],
)
def test_strangers_get_one_answer_a_connection(keyed: Served, data: bytes, code: int) -> None:
    with connection(keyed) as sock:
        sock.sendall(data)
        answer = received(sock)
        assert status(answer) == code
        assert b"\r\nconnection: close\r\n" in answer
        sock.shutdown(socket.SHUT_WR)  # the rest of the body is not waited for
        assert sock.recv(1) == b""
    keeps = ask(keyed, request("/health", f"X-API-Key: {KEY}", method="GET"))
    assert b"connection: close" not in keeps


def test_strangers_are_answered_at_a_pace(keyed: Served) -> None:
    start = time.monotonic()
    for _ in range(20):
        assert status(ask(keyed, request("/policy", "X-API-Key: a-guess", method="GET"))) == 401
    assert time.monotonic() - start >= 19 / STRANGERS_A_SECOND


def test_what_comes_after_a_refusal_is_bounded(keyed: Served) -> None:
    """The answer is there at once, though the client goes on sending; it is not read for ever."""
    with connection(keyed) as sock:
        sock.sendall(request("/predict", "Transfer-Encoding: chunked"))
        assert status(received(sock)) == 401
        sender = threading.Thread(target=_send_chunks, args=(sock, 10**10))
        sender.start()
        sender.join(PATIENCE_S)
        assert not sender.is_alive()


def test_large_headers_are_refused(keyless: Served) -> None:
    with connection(keyless) as sock:
        with contextlib.suppress(OSError):  # it has had enough
            sock.sendall(request("/health", "X-Long: " + "a" * 4_000_000, method="GET"))
        answer = received(sock)
    assert answer == b"" or status(answer) in (400, 431)


def test_a_key_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert read_key(None) == KEY
    path = tmp_path / "key.txt"
    path.write_text("another-key-of-some-length\n")
    path.chmod(0o600)
    assert read_key(path) == "another-key-of-some-length"


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o600, "cannot read the key file"),
        (b"", 0o600, "is no good"),
        (b"short\n", 0o600, "is no good"),
        (b"two words that are long\n", 0o600, "is no good"),
        (b"two-lines-that-are-long\nsecond-line\n", 0o600, "is no good"),
        ("schlüssel-der-lang-ist".encode(), 0o600, "is not a key file"),
        (KEY.encode(), 0o644, "others can read"),
    ],
)
def test_bad_key_files_are_refused(tmp_path: Path, content: bytes | None, mode: int, message: str) -> None:
    path = tmp_path / "key.txt"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=message) as caught:
        read_key(path)
    assert "key" in caught.value.hint or "chmod" in caught.value.hint
    if content:
        assert content.decode("utf-8").strip() not in str(caught.value)


def test_an_empty_key_in_the_environment_is_no_key_at_all_but_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        read_key(None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "Localhost."])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "robot.local", "", "localhost.evil.example", "127.0.0.1.nip.io"]
)
def test_everything_else_does(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="without a key"):
        check_exposure(host, None)
    check_exposure(host, KEY)


def test_an_upload_of_100_mb_is_refused_early(keyless: Served, keyed: Served) -> None:
    chunk = b"a" * 1_000_000
    for served, headers, expected in (
        (keyed, {"X-API-Key": "wrong"}, 401),
        (keyless, {}, 413),
        (keyless, {"Content-Length": "100000000"}, 413),
    ):
        sent = 0

        def body() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(100):
                sent += len(chunk)
                yield chunk

        answer = httpx.post(
            f"{served.url}/predict",
            content=body(),
            headers={"content-type": "application/json", **headers},
            timeout=PATIENCE_S,
            trust_env=False,
        )

        assert answer.status_code == expected
        assert sent < 60_000_000
