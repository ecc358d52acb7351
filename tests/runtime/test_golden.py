"""A backend that computes wrong numbers is found out before the robot moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from bundle.errors import BackendError, BundleError
from bundle.manifest import Manifest
from runtime import golden
from runtime.backends.fake import FakeBackend
from runtime.backends.select import open_backend
from runtime.chain import HostChain
from runtime.golden import Golden, cosine
from runtime.policy import Policy
from tests.bundles import LEFT_IDS, LONG_IDS, Tiny, edit_manifest, make_bundle, random_frames, rehash

pytest.importorskip("onnxruntime")
Edit = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny(head="actions_gripper"))


def tamper(folder: Path, *, feature: Edit = lambda x: x, action: Edit = lambda x: x) -> None:
    """Other expected numbers, in a bundle whose hashes are right."""
    old = Golden.load(folder)
    Golden(old.frames, old.token_ids, feature(old.feature), action(old.action)).save(folder)
    rehash(folder)


def shifted(error: float) -> Edit:
    """One number off by `error`, as much of the array's largest where that exceeds 1."""

    def edit(array: NDArray[np.float32]) -> NDArray[np.float32]:
        changed = array.copy()
        changed.flat[-1] += error * max(1.0, float(np.abs(array).max()))
        return changed

    return edit


# --- the file -------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    saved = Golden(random_frames(1)[0], np.array([0, 5, 2]), np.float32([1, 2]), np.float32([[3], [4]]))
    saved.save(tmp_path)
    loaded = Golden.load(tmp_path)
    for name in ("frames", "token_ids", "feature", "action"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype


def test_nothing_in_it_can_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    evil = np.array([Payload()], dtype=object)
    np.savez(tmp_path / "golden.npz", frames=evil, token_ids=evil, feature=evil, action=evil)
    with pytest.raises(BundleError, match="Object arrays cannot be loaded"):
        Golden.load(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- the cosine -----------------------------------------------------------------------------------------------------------

vectors = arrays(np.float32, 6, elements=st.floats(-100, 100, width=32)).filter(lambda x: np.abs(x).max() > 1e-3)


@given(vectors, vectors, st.floats(0.1, 10))
def test_cosine(a: NDArray[np.float32], b: NDArray[np.float32], scale: float) -> None:
    expected = float(np.dot(a.astype(float), b)) / float(
        np.sqrt(np.sum(a.astype(float) ** 2) * np.sum(b.astype(float) ** 2))
    )
    assert cosine(a, b) == pytest.approx(expected, abs=1e-12)
    assert cosine(a, a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(a.reshape(2, 3), (scale * b.astype(float)).reshape(3, 2)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_no_angle_counts_as_none(bad: float) -> None:
    with np.errstate(invalid="ignore"):
        assert cosine(np.full(3, bad), np.ones(3)) == 0
        assert cosine(np.ones(3), np.full(3, bad)) == 0


# --- the check ------------------------------------------------------------------------------------------------------------


def test_right_numbers_pass(folder: Path) -> None:
    policy = Policy.load(folder, "ort:cpu", threads=1)
    assert policy.backend == "ort:cpu"


@pytest.mark.parametrize("kind", ["feature", "action"])
def test_small_differences_pass(folder: Path, kind: str) -> None:
    tamper(folder, **{kind: shifted(5e-4)})
    Policy.load(folder, "ort:cpu", threads=1)


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("action", shifted(2e-3)),
        ("action", shifted(np.nan)),
        ("action", lambda x: x[:, ::-1].copy()),
        ("action", np.zeros_like),
        ("feature", lambda x: x * np.linspace(1, 1.05, len(x), dtype=np.float32)),
        ("feature", lambda x: -x),
        ("feature", np.zeros_like),
        ("feature", shifted(np.inf)),
    ],
)
def test_wrong_numbers_are_refused(folder: Path, kind: str, edit: Edit) -> None:
    tamper(folder, **{kind: edit})
    with np.errstate(invalid="ignore"), pytest.raises(BackendError) as caught:
        Policy.load(folder, "ort:cpu", threads=1)
    text = str(caught.value)
    assert text.startswith("ort:cpu computes wrong numbers on this machine\n  got:      feature cosine ")
    assert "expected: at least 0.99999, at most 1e-03\n\nhint: try --backend ort:cpu; " in text


def test_auto_says_why_nothing_was_good_enough(folder: Path) -> None:
    tamper(folder, feature=lambda x: -x)
    with pytest.raises(BackendError, match=r"no backend can run .*tiny\.bundle\n") as caught:
        Policy.load(folder, "auto", threads=1)
    assert "ort:cuda: ONNX Runtime has no CUDAExecutionProvider (" in str(caught.value.got)
    assert "ort:cpu: ort:cpu computes wrong numbers on this machine (feature cosine -1.0" in str(caught.value.got)


@pytest.mark.parametrize("error", [5e-3, 2e-2])
def test_fp16_is_given_more_room(folder: Path, error: float) -> None:
    tamper(folder, action=shifted(error))
    edit_manifest(folder, lambda manifest: msgspec.structs.replace(manifest, precision="fp16"))
    if error < 1e-2:
        Policy.load(folder, "ort:cpu", threads=1)
    else:
        with pytest.raises(BackendError, match=r"at least 0\.999, at most 1e-02"):
            Policy.load(folder, "ort:cpu", threads=1)


class Broken:
    """A stage whose outputs were changed on the way."""

    def __init__(self, stage: object, edit: Callable[[np.ndarray], np.ndarray]) -> None:
        self._stage, self._edit = stage, edit

    def run(self, feeds: object) -> dict[str, np.ndarray]:
        outputs = self._stage.run(feeds)  # type: ignore[attr-defined]
        return {name: self._edit(array) for name, array in outputs.items()}


class BrokenBackend:
    """ONNX Runtime with one stage that computes something else."""

    name = "broken"
    remark = ""

    def __init__(self, stage: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
        self._backend, self._broken, self._edit = open_backend("ort:cpu", threads=1), stage, edit

    def open(self, folder: Path, manifest: Manifest) -> HostChain:
        return HostChain(self, folder, manifest)  # type: ignore[arg-type]

    def load(self, folder: Path, graph: object) -> object:
        stage = self._backend.load(folder, graph)  # type: ignore[arg-type]
        return Broken(stage, self._edit) if graph.file.startswith(self._broken) else stage  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["vision", "language", "action_head"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_every_stage_is_looked_at(folder: Path, stage: str, value: float) -> None:
    backend = BrokenBackend(stage, lambda array: np.full_like(array, value))
    policy = Policy(folder, Manifest.load(folder), backend)  # type: ignore[arg-type]
    with np.errstate(invalid="ignore"), pytest.raises(BackendError, match="broken computes wrong numbers"):
        golden.check(policy, folder)


def test_an_unbroken_backend_passes_the_same_way(folder: Path) -> None:
    backend = BrokenBackend("vision", lambda array: array)
    golden.check(Policy(folder, Manifest.load(folder), backend), folder)  # type: ignore[arg-type]


def test_the_fake_cannot_pass(folder: Path) -> None:
    """Which is why Policy.load does not ask it to."""
    with pytest.raises(BackendError, match="fake computes wrong numbers"):
        golden.check(Policy(folder, Manifest.load(folder), FakeBackend()), folder)
    assert Policy.load(folder, "fake").backend == "fake"


def test_the_check_leaves_no_trace(tmp_path: Path) -> None:
    """Neither its history nor its instruction, even if that was of another bucket."""
    frames = random_frames(4, seed=3)
    policies = []
    for name, ids in (("a", LEFT_IDS), ("b", LONG_IDS)):
        policy = Policy.load(make_bundle(tmp_path / name, golden_ids=ids), "ort:cpu", threads=1)
        with pytest.raises(Exception, match="step before reset"):
            policy.step_resized(frames[0])
        policy.reset(token_ids=LEFT_IDS)
        policies.append(policy)
    for frame in frames:
        chunks = [policy.step_resized(frame) for policy in policies]
        np.testing.assert_array_equal(chunks[0].normalized, chunks[1].normalized)
