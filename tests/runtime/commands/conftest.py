"""DDS on the loopback device alone, in a domain that no other test uses."""

from __future__ import annotations

import itertools
import os

import pytest

_DOMAINS = itertools.count(os.getpid())
_LOOPBACK = (
    "<CycloneDDS><Domain><General><Interfaces><NetworkInterface address='127.0.0.1'/></Interfaces>"
    "<AllowMulticast>false</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex>"
    "<Peers><Peer address='127.0.0.1'/></Peers></Discovery></Domain></CycloneDDS>"
)


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """A domain below 100: the ports of higher ones are also given to other sockets."""
    monkeypatch.setenv("CYCLONEDDS_URI", _LOOPBACK)
    return 1 + next(_DOMAINS) % 99
