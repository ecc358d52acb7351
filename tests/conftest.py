"""Settings that every test shares. They are set here, before any test module can import numpy or torch."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.pop("FORCE_COLOR", None)
os.environ["NO_COLOR"] = "1"  # messages are compared as plain text
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is a broken test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; more threads only fight each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Example timings on a shared machine say nothing about the code.
settings.register_profile("jetvla", deadline=None)
settings.load_profile("jetvla")


@pytest.fixture(autouse=True, scope="session")
def no_engines_by_default() -> Iterator[None]:
    """Builds make engines where TensorRT is installed, which it is where this runs; tests that want them name a flavour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.engine_options.installed", lambda: iter(()))
        yield


def pytest_collection_finish() -> None:
    """Keep what importing all test modules left out of garbage collection.

    The latency harness collects before every measurement; with torch in the process that walked a million objects each time, and its tests
    took six times as long.
    """
    gc.collect()
    gc.freeze()
