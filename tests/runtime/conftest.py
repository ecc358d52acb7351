"""Bundles that many tests read and none may change: tiny ones by hand, and real ones built from the recorded checkpoints; a DDS domain."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bundles import Tiny, make_bundle
from tests.oracle import oracle_case

TinyBundle = Callable[[Tiny], Path]
BuiltBundle = Callable[[str, str, bool], Path]
_DOMAINS = itertools.count(os.getpid())
_LOOPBACK = (
    "<CycloneDDS><Domain><General><Interfaces><NetworkInterface address='127.0.0.1'/></Interfaces>"
    "<AllowMulticast>false</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex>"
    "<Peers><Peer address='127.0.0.1'/></Peers></Discovery></Domain></CycloneDDS>"
)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """tiny_bundle(Tiny(...)) -> its folder; equal options give the same one."""
    made: dict[Tiny, Path] = {}

    def make(tiny: Tiny) -> Path:
        if tiny not in made:
            made[tiny] = make_bundle(tmp_path_factory.mktemp("tiny") / "tiny.bundle", tiny)
        return made[tiny]

    return make


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> BuiltBundle:
    """built_bundle(case, precision, promote) -> a bundle built from a recorded checkpoint."""
    made: dict[tuple[str, str, bool], Path] = {}

    def build_once(case: str, precision: str, promote: bool) -> Path:
        pytest.importorskip("torch")
        pytest.importorskip("onnx")
        recorded = oracle_case(case)
        from export.pipeline import BuildConfig, build

        key = (case, precision, promote)
        if key not in made:
            made[key] = build(
                BuildConfig(
                    checkpoint=recorded.checkpoint,
                    out=tmp_path_factory.mktemp(case) / f"{precision}.bundle",
                    precision=precision,  # type: ignore[arg-type]
                    promote=promote,
                    packing=recorded.packing,
                    # These tests verify more than a build does; but what is promoted is decided by the build's own frames.
                    verify_frames=0 if precision == "fp16" and promote else 2,
                )
            )
        return made[key]

    return build_once


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """DDS on the loopback device alone, in a domain of its own below 100: ports of higher ones also go to other sockets."""
    monkeypatch.setenv("CYCLONEDDS_URI", _LOOPBACK)
    return 1 + next(_DOMAINS) % 99
