"""Where a service may listen."""

from __future__ import annotations

import socket

import pytest

from bundle.errors import ConfigError, ServiceError
from runtime.service.server import listen, url_of
from tests.runtime.service.serving import KEY


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
