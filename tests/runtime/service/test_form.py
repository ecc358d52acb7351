"""multipart/form-data: what clients write is read, and what is not theirs costs nothing."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.service.form import MAX_HEADERS, MAX_PARTS, Part, read_form

KIND = "multipart/form-data; boundary=b"
FILE = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n'
CONTENTS = (
    b"",
    b"\r\n",
    b"\r",
    b"x--b",
    b"\r--b",
    b"\n--b",
    b"\r\n-",
    b"\r\n--",
    b"\xff\xd8\x00",
    b"\r\n\r\n",
    bytes(range(256)),
)


def part(content: bytes, headers: bytes = FILE) -> bytes:
    return b"--b\r\n" + headers + b"\r\n" + content + b"\r\n"


@pytest.mark.parametrize("content", CONTENTS)
def test_contents_come_back_whole(content: bytes) -> None:
    body = part(content) + part(b"lab", b"content-disposition:form-data;name=session\r\n") + b"--b--\r\n"
    assert read_form(KIND, body) == [Part("image", content, True), Part("session", b"lab", False)]


@pytest.mark.parametrize(
    ("rest", "name", "is_file"),
    [
        (b'; name="a"', "a", False),
        (b'; name="a"; filename=""', "a", True),
        (b'; filename="x;name=\\"b\\".jpg"; name="a"', "a", True),
        (b"; name=a; filename*=UTF-8''%e2%82%ac.jpg", "a", True),
        (b';name="a" ; filename="\xc3\xa4.jpg"', "a", True),
    ],
)
def test_names(rest: bytes, name: str, is_file: bool) -> None:
    body = part(b"1", b"X-More: 1\r\nContent-Disposition: form-data" + rest + b"\r\n") + b"--b--"
    assert read_form(KIND, body) == [Part(name, b"1", is_file)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no end"),
        (b"garbage", "before the first"),
        (part(b"1"), "no end"),
        (part(b"1") + b"--b--\r\nmore", "stands behind"),
        (b"preamble\r\n" + part(b"1") + b"--b--", "before the first"),
        (part(b"1") * (MAX_PARTS + 1) + b"--b--", "more than"),
        (part(b"1", b""), "no end"),
        (part(b"1", b"") + b"--b--", "Content-Disposition"),
        (b"--b\r\n\r\n--b--", "without headers"),
        (b"--bx\r\n" + FILE + b"\r\n1\r\n--b--", "without headers"),
        (part(b"1", b"X: " + b"a" * MAX_HEADERS + b"\r\n" + FILE) + b"--b--", "without headers"),
        (part(b"1", b"X: 1\r\n") + b"--b--", "Content-Disposition"),
        (part(b"1", FILE * 2) + b"--b--", "Content-Disposition"),
        (part(b"1", b'Content-Disposition: attachment; name="a"\r\n') + b"--b--", "Content-Disposition"),
        (part(b"1", b'Content-Disposition: form-data; name="a"; name="b"\r\n') + b"--b--", "cannot be read"),
        (part(b"1", b'Content-Disposition: form-data; name="a\r\n') + b"--b--", "cannot be read"),
        (part(b"1", b"Content-Disposition: form-data\r\n") + b"--b--", "without a name"),
        (part(b"1", b'Content-Disposition: form-data; name="\xc3\xa4"\r\n') + b"--b--", "in ASCII"),
    ],
)
def test_what_is_no_form(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_form(KIND, body)


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'a' * 71}"]
    + ["multipart/form-data; boundary=a; boundary=b", "multipart/form-data; boundary=\xe4", 'x; boundary="b'],
)
def test_what_is_no_boundary(kind: str) -> None:
    with pytest.raises(ValueError, match="boundar"):
        read_form(kind, part(b"1") + b"--b--")


@given(st.lists(st.sampled_from([b"--b", b"--", b"\r\n", b"\r", b'"', b";", b"\\", b"name=", FILE, b"\xff", b"="])))
def test_anything_is_read_or_refused(pieces: list[bytes]) -> None:
    try:
        parts = read_form(KIND, b"".join(pieces))
    except ValueError:
        return
    assert all(part.name for part in parts)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.binary(max_size=80), max_size=MAX_PARTS))
def test_what_httpx_writes(fields: dict[str, bytes]) -> None:
    request = httpx.Request("POST", "http://x", files={name: (None, content) for name, content in fields.items()})
    if fields:
        parts = read_form(request.headers["content-type"], request.read())
        assert {part.name: part.content for part in parts} == fields


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_what_curl_writes(tmp_path: Path) -> None:
    picture = tmp_path / 'a "quoted"; name=x.jpg'
    picture.write_bytes(bytes(range(256)) * 300)
    came: list[list[Part]] = []

    class Reads(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            came.append(read_form(self.headers["content-type"], body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Reads) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        quoted = str(picture).replace('"', '\\"')
        command = ["curl", "-sS", "--noproxy", "*", "-F", f'image=@"{quoted}"', "-F", "session=lab"]
        subprocess.run([*command, f"http://127.0.0.1:{server.server_port}/"], check=True, timeout=60)
        thread.join(60)
    assert came == [[Part("image", picture.read_bytes(), True), Part("session", b"lab", False)]]
