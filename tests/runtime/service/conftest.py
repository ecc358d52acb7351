"""A tiny bundle, its policy in this process, and services of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from runtime.policy import Policy
from tests.bundles import Tiny
from tests.runtime.service.serving import Served, Serving, serve_bundle


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Callable[[Tiny], Path]) -> Path:
    return tiny_bundle(Tiny())


@pytest.fixture
def policy(bundle: Path) -> Iterator[Policy]:
    """A policy in this process, to compare with."""
    loaded = Policy.load(bundle, "ort:cpu", threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def serving(bundle: Path) -> Serving:
    """serving(key=..., limits=..., policy=...) -> context manager of a service in a thread."""

    def serve(**options: Any) -> AbstractContextManager[Served]:
        return serve_bundle(bundle, **options)

    return serve
