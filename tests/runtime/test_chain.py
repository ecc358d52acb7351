"""What is not finite between two stages ends the tick, whatever the next stage makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import BackendError
from bundle.manifest import Graph, Manifest
from runtime.backends.base import Feeds, Outputs
from runtime.backends.fake import FakeBackend
from runtime.chain import HostChain, all_finite
from runtime.policy import Policy
from tests.bundles import GO_LEFT, add_int8, make_bundle, random_frames

FRAMES = random_frames(6)
BAD = [np.nan, np.inf, -np.inf]


class Hiding:
    """The fake backend, whose stages answer anything with finite numbers as INT8 ones do; one number of `spoiled` is `value`."""

    name = "hiding"
    remark = ""

    def __init__(self) -> None:
        self.spoiled, self.value = "", 0.0
        self._backend = FakeBackend()

    def open(self, folder: Path, manifest: Manifest) -> HostChain:
        return HostChain(self, folder, manifest)  # type: ignore[arg-type]

    def load(self, folder: Path, graph: Graph) -> Any:
        backend, stage = self, self._backend.load(folder, graph)

        class Stage:
            def run(self, feeds: Feeds) -> Outputs:
                outputs: Outputs = {name: array.copy() for name, array in stage.run(feeds).items()}
                if backend.spoiled in outputs:
                    outputs[backend.spoiled].reshape(-1)[3] = backend.value
                return outputs

        return Stage()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("spoiled", ["image_tokens", "feature"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_not_finite_is_not_hidden(tmp_path: Path, precision: str, spoiled: str, value: float) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    manifest = add_int8(folder)
    backend, other = Hiding(), Hiding()
    view = manifest.int8() if precision == "int8" else manifest
    policy, right = Policy(folder, view, backend), Policy(folder, view, other)
    for one in (policy, right):
        one.reset(GO_LEFT)
        one.step_resized(FRAMES[0])
    backend.spoiled, backend.value = spoiled, value
    assert np.isnan(policy.step_resized(FRAMES[1]).normalized).all()
    with pytest.raises(BackendError, match="hiding gave an action that is not finite"):
        policy.step(FRAMES[1][0])
    backend.spoiled = ""
    for frame in FRAMES[2:]:  # as if nothing had been: the states were not advanced
        np.testing.assert_array_equal(policy.step_resized(frame).normalized, right.step_resized(frame).normalized)


def test_a_stage_alone_hides_nothing_either(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    policy = Policy(folder, Manifest.load(folder), FakeBackend())
    policy.reset(GO_LEFT)
    tokens = policy.run_vision(FRAMES[0]).copy()
    feature = policy.run_language(tokens).copy()
    assert np.isfinite(policy.run_action_head(feature)).all()
    for array in (tokens, feature):
        array.reshape(-1)[-1] = np.nan
    assert np.isnan(policy.run_language(tokens)).all()
    assert np.isnan(policy.run_action_head(feature)).all()


@pytest.mark.parametrize("value", BAD)
def test_one_number_is_enough(value: float) -> None:
    largest = np.finfo(np.float32).max
    array = np.array([[largest, -largest] * 500], np.float32)
    assert all_finite()
    assert all_finite(array, array)
    for place in (0, 500, 999):
        spoiled = array.copy()
        spoiled[0, place] = value
        assert not all_finite(array, spoiled)
