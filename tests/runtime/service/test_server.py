"""Where a service may listen, and how it ends."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest

from bundle.errors import ConfigError, ServiceError
from runtime.service.server import listen, url_of
from tests.runtime.service.serving import KEY, PATIENCE_S, service_process


def test_a_free_port_is_found_and_named() -> None:
    with listen("127.0.0.1", 0, None) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_is_named_as_urls_have_it() -> None:
    try:
        sock = listen("::1", 0, None)
    except ServiceError:
        pytest.skip("no IPv6 here")
    with sock:
        assert url_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_every_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="without a key"):
        listen(host, 0, None)


def test_it_is_the_address_that_counts_and_not_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hosts file may send localhost anywhere."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("0.0.0.0", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match="without a key"):
        listen("localhost", 0, None)
    listen("localhost", 0, KEY).close()


@pytest.mark.parametrize("port", [-1, 65536, 70_000])
def test_what_is_no_port(port: int) -> None:
    """The resolver takes these modulo 65536."""
    with pytest.raises(ConfigError, match="this is no port"):
        listen("127.0.0.1", port, None)


def test_addresses_that_are_not_ours() -> None:
    for host in ("no-such-host.invalid", "192.0.2.1"):
        with pytest.raises(ServiceError, match=f"cannot listen on {host}"):
            listen(host, 0, KEY)


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServiceError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1], None)


def test_a_signal_ends_it_whatever_is_being_decoded(bundle: Path) -> None:
    """A thread inside of a decoder cannot be stopped, and the end of the process would wait for it."""
    hangs = "import time, runtime.service.app as app; app.decode = lambda *_, **__: print('decodes', flush=True) or time.sleep(3600)"
    answers: list[httpx.Response] = []
    with service_process(bundle, "--port", "0", first=hangs) as service:

        def ask() -> None:
            fields, files = {"session": "a"}, {"image": ("a.png", b"")}
            answers.append(
                httpx.post(f"{service.url}/predict", data=fields, files=files, trust_env=False, timeout=PATIENCE_S)
            )

        asks = threading.Thread(target=ask)
        asks.start()
        assert service.process.stdout is not None
        assert service.process.stdout.readline() == "decodes\n"
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE_S) == 0
        asks.join(PATIENCE_S)
    (answer,) = answers
    assert (answer.status_code, answer.json()["reason"]) == (503, "ending")
