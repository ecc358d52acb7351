"""One episode's state and nothing else: what is forgotten at a reset, what survives a failure, what belongs to the caller."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundle.errors import BackendError, BundleError, FrameError, JetvlaError, PromptError
from bundle.manifest import Graph, Manifest
from runtime.actions import denormalize
from runtime.backends.base import Feeds
from runtime.backends.fake import FakeBackend, FakeStage
from runtime.policy import ActionChunk, Policy
from runtime.preprocess import resize
from tests.bundles import (
    CHUNK,
    GO_LEFT,
    GO_RIGHT,
    LEFT_IDS,
    LONG_IDS,
    RIGHT_IDS,
    WIDTH,
    WINDOW,
    Tiny,
    TinyModel,
    edit_manifest,
    make_bundle,
    random_frames,
)
from tests.runtime.conftest import TinyBundle

HAND = Tiny(cameras=("hand", "static"))
FRAMES = np.random.default_rng(1).integers(0, 256, (10, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tiny_bundle: TinyBundle) -> Path:
    return tiny_bundle(Tiny())


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy.load(folder, "fake")


def open_policy(folder: Path, backend: FakeBackend) -> Policy:
    return Policy(folder, Manifest.load(folder), backend)


def stream(policy: Policy, frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[ActionChunk]:
    return [policy.step(frame) for frame in frames]


def assert_same(actual: Sequence[ActionChunk], expected: Sequence[ActionChunk]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for name in ("values", "normalized", "feature"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- what a step gives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["velocities", "actions_gripper", "classes"])
def test_a_chunk(tiny_bundle: TinyBundle, head: str) -> None:
    tiny = Tiny(head=head, latent=2)  # type: ignore[arg-type]
    policy = Policy.load(tiny_bundle(tiny), "fake")
    policy.reset(GO_LEFT)

    chunk = policy.step(FRAMES[0])

    assert (chunk.normalized.dtype, chunk.normalized.shape) == (np.float32, (CHUNK, tiny.columns))
    assert (chunk.values.dtype, chunk.values.shape) == (np.float32, (CHUNK, len(policy.manifest.action.names)))
    assert (chunk.feature.dtype, chunk.feature.shape) == (np.float32, (2 * WIDTH,))
    np.testing.assert_array_equal(chunk.values, denormalize(chunk.normalized, policy.manifest.action))
    assert list(chunk.timing) == ["preprocess", "vision", "language", "action_head", "total"]
    assert all(milliseconds >= 0 for milliseconds in chunk.timing.values())
    *sections, total = chunk.timing.values()
    assert sum(sections) <= total < 10_000


def test_what_a_policy_tells_about_itself(policy: Policy, tiny_bundle: TinyBundle) -> None:
    assert (policy.window, policy.image_tokens, policy.backend) == (WINDOW, 4, "fake")
    assert policy.manifest == Manifest.load(tiny_bundle(Tiny()))
    assert Policy.load(tiny_bundle(HAND), "fake").image_tokens == 8


def test_a_chunk_belongs_to_the_caller(folder: Path) -> None:
    """Logged chunks must not change under the logger; whatever he does to them must not change the policy."""
    pytest.importorskip("onnxruntime")
    policy, other = (Policy.load(folder, "ort:cpu", threads=1) for _ in range(2))
    policy.reset(GO_LEFT)
    other.reset(GO_LEFT)
    expected = [(c.values.copy(), c.normalized.copy(), c.feature.copy()) for c in stream(other, FRAMES[:5])]

    first = policy.step(FRAMES[0])
    rest = stream(policy, FRAMES[1:3])
    for got, want in zip([first, *rest], expected, strict=False):
        np.testing.assert_array_equal(got.values, want[0])
        np.testing.assert_array_equal(got.normalized, want[1])
        np.testing.assert_array_equal(got.feature, want[2])
    for chunk in (first, *rest):
        for array in (chunk.values, chunk.normalized, chunk.feature):
            array[:] = np.nan
    for got, want in zip(stream(policy, FRAMES[3:5]), expected[3:], strict=True):
        np.testing.assert_array_equal(got.normalized, want[1])


def test_a_frame_stays_as_it_is_and_is_not_kept(policy: Policy) -> None:
    """Camera drivers reuse their buffers."""
    policy.reset(GO_LEFT)
    buffer = FRAMES[0].copy()
    policy.step(buffer)
    np.testing.assert_array_equal(buffer, FRAMES[0])
    buffer[:] = FRAMES[1]
    second = policy.step(buffer)

    policy.reset(GO_LEFT)
    assert_same([second], stream(policy, FRAMES[:2])[1:])


def test_any_frame_size_is_resized(policy: Policy) -> None:
    manifest = policy.manifest
    for frame in (FRAMES[0], FRAMES[0][::-1, ::2], random_frames(1)[0, 0]):
        policy.reset(GO_LEFT)
        stepped = policy.step(frame)
        policy.reset(GO_LEFT)
        resized = resize(frame, manifest.preprocessing, manifest.dimensions.image_size)
        assert_same([stepped], [policy.step_resized(resized[None])])


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_the_filter_is_the_manifests(tiny_bundle: TinyBundle, name: str) -> None:
    policy = Policy.load(tiny_bundle(Tiny(resize=name)), "fake")
    spec = msgspec.structs.replace(policy.manifest.preprocessing, resize=name)
    policy.reset(GO_LEFT)
    chunk = policy.step(FRAMES[0])
    policy.reset(GO_LEFT)
    assert_same([chunk], [policy.step_resized(resize(FRAMES[0], spec, 8)[None])])


@settings(max_examples=25)
@given(
    latent=st.integers(1, 2),
    packing=st.sampled_from(["upstream", "fork_overwrite"]),
    head=st.sampled_from(["velocities", "actions_gripper", "classes"]),
    cameras=st.sampled_from([("static",), ("hand", "static")]),
    ids=st.sampled_from([LEFT_IDS, LONG_IDS, (0, 2), (*RIGHT_IDS, 1, 1, 1)]),
    count=st.integers(1, 2 * WINDOW + 1),
)
def test_streaming_is_the_window_recomputed(
    tiny_bundle: TinyBundle,
    latent: int,
    packing: str,
    head: str,
    cameras: tuple[str, ...],
    ids: tuple[int, ...],
    count: int,
) -> None:
    """Frame by frame the same as the reference, which runs the last W features from a zero state at every step."""
    pytest.importorskip("onnxruntime")
    tiny = Tiny(latent=latent, packing=packing, head=head, cameras=cameras)  # type: ignore[arg-type]
    policy, model = Policy.load(tiny_bundle(tiny), "ort:cpu", threads=1), TinyModel(tiny)
    for seed in range(2):  # and again after a reset
        policy.reset(token_ids=ids)
        model.reset(ids)
        for frame in random_frames(count, cameras=len(cameras), seed=seed):
            chunk = policy.step_resized(frame)
            feature, action = model.step(frame)
            np.testing.assert_allclose(chunk.feature, feature, atol=2e-6)
            np.testing.assert_allclose(chunk.normalized, action, atol=2e-6)


# --- reset ------------------------------------------------------------------------------------------------------------------


def test_step_before_reset(policy: Policy) -> None:
    with pytest.raises(
        PromptError, match=r"step before reset\n\nhint: call policy\.reset\('\.\.\.'\) once per episode"
    ):
        policy.step(FRAMES[0])


def test_clear_forgets_the_instruction(policy: Policy) -> None:
    policy.reset(GO_LEFT)
    expected = stream(policy, FRAMES[:2])
    policy.clear()
    with pytest.raises(PromptError, match="step before reset"):
        policy.step(FRAMES[0])
    policy.reset(GO_LEFT)
    assert_same(stream(policy, FRAMES[:2]), expected)


@pytest.mark.parametrize("arguments", [{}, {"instruction": GO_LEFT, "token_ids": LEFT_IDS}])
def test_reset_takes_one_of_two(policy: Policy, arguments: dict[str, object]) -> None:
    with pytest.raises(PromptError, match="hint: pass exactly one of them"):
        policy.reset(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, WINDOW, 2 * WINDOW])
def test_reset_forgets_everything(policy: Policy, count: int) -> None:
    policy.reset(GO_LEFT)
    first = stream(policy, FRAMES[:count])
    continued = policy.step(FRAMES[0])
    policy.reset(GO_LEFT)
    again = stream(policy, FRAMES[:count])

    assert_same(again, first)
    assert (continued.normalized != first[0].normalized).any()  # there was something to forget


def test_history_changes_the_action_and_not_the_feature(policy: Policy) -> None:
    policy.reset(GO_LEFT)
    early, late = stream(policy, [FRAMES[0], FRAMES[0]])
    np.testing.assert_array_equal(early.feature, late.feature)
    assert (early.normalized != late.normalized).any()


def test_the_instruction_matters_and_is_tokenised_as_the_manifest_says(policy: Policy) -> None:
    chunks = []
    for arguments in ({"instruction": GO_LEFT}, {"token_ids": LEFT_IDS}, {"token_ids": np.array([LEFT_IDS])}):
        policy.reset(**arguments)  # type: ignore[arg-type]
        chunks.append(policy.step(FRAMES[0]))
    assert_same(chunks[1:], chunks[:1] * 2)
    policy.reset(GO_RIGHT)
    assert (policy.step(FRAMES[0]).feature != chunks[0].feature).all()


def test_the_default_mask_hides_padding(policy: Policy) -> None:
    padded = (*LEFT_IDS, 1, 1)
    chunks = []
    for mask in (None, [1] * 6 + [0, 0], [1] * 8):
        policy.reset(token_ids=padded, attention_mask=mask)
        chunks.append(policy.step(FRAMES[0]))
    assert_same(chunks[:1], chunks[1:2])
    assert (chunks[2].feature != chunks[0].feature).all()


def test_text_is_padded_where_the_deployment_padded(tiny_bundle: TinyBundle) -> None:
    policy = Policy.load(tiny_bundle(Tiny(pad_to=8)), "fake")
    chunks = []
    for arguments in ({"instruction": GO_LEFT}, {"token_ids": (*LEFT_IDS, 1, 1)}, {"token_ids": LEFT_IDS}):
        policy.reset(**arguments)  # type: ignore[arg-type]
        chunks.append(policy.step(FRAMES[0]))
    assert_same(chunks[:1], chunks[1:2])
    assert_same(chunks[:1], chunks[2:])  # ids without padding get it as well


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction": " "}, "the instruction is empty"),
        ({"instruction": "dance"}, "cannot tokenise 'dance'"),
        ({"token_ids": [0]}, "too few tokens"),
        ({"token_ids": [0, 99, 2]}, "outside the vocabulary"),
        ({"token_ids": [0, *[5] * 20, 2]}, r"too long for this bundle\n  got:      26 slots\n  expected: at most 24"),
        ({"token_ids": LEFT_IDS, "attention_mask": [1]}, "mask does not fit"),
    ],
)
def test_a_refused_reset_changes_nothing(folder: Path, arguments: dict[str, object], message: str) -> None:
    """The old instruction goes on, with its history."""
    policy, undisturbed = (Policy.load(folder, "fake") for _ in range(2))
    for one in (policy, undisturbed):
        one.reset(GO_LEFT)
        one.step(FRAMES[0])
    with pytest.raises(PromptError, match=message):
        policy.reset(**arguments)  # type: ignore[arg-type]
    assert_same(stream(policy, FRAMES[1:4]), stream(undisturbed, FRAMES[1:4]))


def test_longer_than_the_padding(tiny_bundle: TinyBundle) -> None:
    policy = Policy.load(tiny_bundle(Tiny(pad_to=5)), "fake")
    with pytest.raises(PromptError, match="longer than the padding of this bundle"):
        policy.reset(GO_LEFT)


# --- buckets ----------------------------------------------------------------------------------------------------------------


def test_the_graph_of_the_bucket_runs(folder: Path) -> None:
    backend = FakeBackend()
    policy = open_policy(folder, backend)
    small, large = "language.fp32.s12.onnx", "language.fp32.s24.onnx"
    assert not {small, large} & backend.runs.keys()  # which one is needed is not known yet

    for ids, file in ((LEFT_IDS, small), (LONG_IDS, large), (LEFT_IDS, small)):
        policy.reset(token_ids=ids)
        stream(policy, FRAMES[:2])
        assert backend.runs[file] == 2
        backend.runs.pop(file)  # it is put back by loading only


def test_a_graph_is_loaded_once_for_all_instructions_of_its_bucket(folder: Path) -> None:
    backend = FakeBackend()
    policy = open_policy(folder, backend)
    for instruction in (GO_LEFT, GO_RIGHT, GO_LEFT):
        policy.reset(instruction)
        policy.step(FRAMES[0])
    assert backend.runs == {"vision.fp32.onnx": 3, "action_head.fp32.onnx": 3, "language.fp32.s12.onnx": 3}


def test_a_bucket_does_not_change_the_numbers(tiny_bundle: TinyBundle) -> None:
    """Padding behind the action token is nothing; the same prompt in a larger graph gives the same action."""
    pytest.importorskip("onnxruntime")
    chunks = []
    for buckets in ((12, 24), (24,), (11, 12)):
        policy = Policy.load(tiny_bundle(Tiny(buckets=buckets)), "ort:cpu", threads=1)
        policy.reset(GO_LEFT)
        chunks.append(stream(policy, FRAMES[:4]))
    for other in chunks[1:]:
        for one, two in zip(chunks[0], other, strict=True):
            np.testing.assert_allclose(one.feature, two.feature, atol=1e-6)
            np.testing.assert_allclose(one.normalized, two.normalized, atol=1e-6)


def test_back_to_the_first_bucket(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    policy = Policy.load(folder, "ort:cpu", threads=1)
    results = {}
    for ids in (LEFT_IDS, LONG_IDS, LEFT_IDS, LONG_IDS):
        policy.reset(token_ids=ids)
        chunks = stream(policy, FRAMES[:2])
        assert_same(chunks, results.setdefault(ids, chunks))
    assert (results[LEFT_IDS][0].feature != results[LONG_IDS][0].feature).any()


class NoRoom(FakeBackend):
    """Cannot load the graph of one bucket, as on a device without memory for it - as long as `full`."""

    full = True

    def load(self, folder: Path, graph: Graph) -> FakeStage:
        if self.full and graph.sequence == 24:
            raise BackendError("no memory for the graph", hint="close something.")
        return super().load(folder, graph)


@pytest.mark.parametrize("ids", [LEFT_IDS, LONG_IDS])
def test_a_bucket_that_cannot_be_loaded(folder: Path, ids: tuple[int, ...]) -> None:
    backend = NoRoom()
    policy = open_policy(folder, backend)
    policy.reset(token_ids=LEFT_IDS)
    policy.step(FRAMES[0])
    with pytest.raises(BackendError, match="no memory"):
        policy.reset(token_ids=LONG_IDS)
    backend.full = False
    # To the other one first: that, too, must not find the graph that is gone.
    for next_ids in (LEFT_IDS, ids):
        policy.reset(token_ids=next_ids)
        chunk = policy.step(FRAMES[0])
    expected = open_policy(folder, FakeBackend())
    expected.reset(token_ids=ids)
    assert_same([chunk], [expected.step(FRAMES[0])])


# --- cameras ----------------------------------------------------------------------------------------------------------------


def test_a_hand_camera_comes_first(tiny_bundle: TinyBundle) -> None:
    policy = Policy.load(tiny_bundle(HAND), "fake")
    static, hand = (resize(frame, policy.manifest.preprocessing, 8) for frame in FRAMES[:2])
    policy.reset(GO_LEFT)
    chunk = policy.step(FRAMES[0], hand=FRAMES[1])
    for order, same in (((hand, static), True), ((static, hand), False)):
        policy.reset(GO_LEFT)
        resized = policy.step_resized(np.stack(order))
        assert (resized.feature == chunk.feature).all() == same


def test_cameras_may_have_other_sizes(tiny_bundle: TinyBundle) -> None:
    policy = Policy.load(tiny_bundle(HAND), "fake")
    policy.reset(GO_LEFT)
    policy.step(FRAMES[0], hand=np.zeros((5, 6, 3), np.uint8))


def test_a_camera_too_few(tiny_bundle: TinyBundle) -> None:
    policy = Policy.load(tiny_bundle(HAND), "fake")
    policy.reset(GO_LEFT)
    with pytest.raises(FrameError, match=r"the policy has a hand camera\n  got:      no hand frame"):
        policy.step(FRAMES[0])


def test_a_camera_too_many(policy: Policy) -> None:
    policy.reset(GO_LEFT)
    with pytest.raises(FrameError, match=r"the policy has no hand camera\n  got:      a hand frame"):
        policy.step(FRAMES[0], hand=FRAMES[0])


# --- failures -----------------------------------------------------------------------------------------------------------------

BAD = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize("cameras", [("static",), ("hand", "static")])
def test_a_bad_frame_changes_nothing(tiny_bundle: TinyBundle, cameras: tuple[str, ...]) -> None:
    folder = tiny_bundle(Tiny(cameras=cameras))
    hands = {} if len(cameras) == 1 else {"hand": FRAMES[9]}
    policy, undisturbed = (Policy.load(folder, "fake") for _ in range(2))
    chunks = []
    for one in (policy, undisturbed):
        one.reset(GO_LEFT)
        one.step(FRAMES[0], **hands)
        if one is policy:
            for bad in ({"frame": BAD, **hands}, *([{"frame": FRAMES[1], "hand": BAD}] if hands else [])):
                with pytest.raises(FrameError, match="wrong shape"):
                    one.step(**bad)
        chunks.append([one.step(frame, **hands) for frame in FRAMES[2:5]])
    assert_same(*chunks)


@pytest.mark.parametrize("fail_at", range(1, 6))
def test_a_failed_step_may_be_tried_again(folder: Path, fail_at: int) -> None:
    """Each of the three stages fails once, in the middle of the episode; the actions are those of an episode without."""
    policy, undisturbed = open_policy(folder, FakeBackend(fail_at=fail_at)), open_policy(folder, FakeBackend())
    policy.reset(GO_LEFT)
    undisturbed.reset(GO_LEFT)
    chunks, failures = [], []
    for frame in FRAMES[:6]:
        for _ in range(4):
            try:
                chunks.append(policy.step(frame))
            except BackendError as error:
                failures.append(error.what)
            else:
                break
    assert failures == [
        f"{file} failed while running"
        for file in ("vision.fp32.onnx", "language.fp32.s12.onnx", "action_head.fp32.onnx")
    ]
    assert_same(chunks, stream(undisturbed, FRAMES[:6]))


def test_after_a_failure_in_ort(folder: Path) -> None:
    """The same with a session that really fails: its buffers hold half of a step then."""
    pytest.importorskip("onnxruntime")
    policy, undisturbed = (Policy.load(folder, "ort:cpu", threads=1) for _ in range(2))
    for one in (policy, undisturbed):
        one.reset(GO_LEFT)
        one.step(FRAMES[0])
    prompt = policy._chain._prompt
    assert prompt is not None
    policy._chain._prompt = type(prompt)(prompt.prompt, prompt.image_index, prompt.action_index + 1000)
    with pytest.raises(BackendError, match=r"language\.fp32\.s12\.onnx failed while running"):
        policy.step(FRAMES[5])
    policy._chain._prompt = prompt
    assert_same(stream(policy, FRAMES[1:4]), stream(undisturbed, FRAMES[1:4]))


class OneBuffer:
    """A stage as the protocol allows it: it returns the same buffers every time, and a failed run leaves rubbish in them."""

    def __init__(self, stage: FakeStage, graph: Graph) -> None:
        self._stage = stage
        self._buffers: dict[str, NDArray[np.generic]] = {t.name: np.zeros(t.shape, t.dtype) for t in graph.outputs}

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        fed = {name: array.copy() for name, array in feeds.items()}
        for buffer in self._buffers.values():
            buffer.fill(np.nan)
        for name, array in self._stage.run(fed).items():
            self._buffers[name][...] = array
        return self._buffers


class OneBufferBackend(FakeBackend):
    def load(self, folder: Path, graph: Graph) -> OneBuffer:  # type: ignore[override]
        return OneBuffer(super().load(folder, graph), graph)


@pytest.mark.parametrize("fail_at", [2, 3])
def test_nothing_of_a_failed_run_is_used(folder: Path, fail_at: int) -> None:
    policy, undisturbed = open_policy(folder, OneBufferBackend(fail_at=fail_at)), open_policy(folder, FakeBackend())
    policy.reset(GO_LEFT)
    undisturbed.reset(GO_LEFT)
    chunks = []
    for frame in FRAMES[:5]:
        for _ in range(4):  # at most three stages fail
            try:
                chunks.append(policy.step(frame))
            except BackendError:
                continue
            break
    assert_same(chunks, stream(undisturbed, FRAMES[:5]))


def test_two_policies_do_not_share_state(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    one, other = (Policy.load(folder, "ort:cpu", threads=1) for _ in range(2))
    one.reset(GO_LEFT)
    alone = stream(one, FRAMES[:4])
    one.reset(GO_LEFT)
    other.reset(GO_RIGHT)
    interleaved = []
    for frame in FRAMES[:4]:
        interleaved.append(one.step(frame))
        other.step(frame)
    assert_same(interleaved, alone)


# --- loading ------------------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_corrupt_bundle_is_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    damage(folder / "vision.fp32.onnx")
    with pytest.raises(BundleError, match=r"vision\.fp32\.onnx is corrupt"):
        Policy.load(folder, "fake")
    assert Policy.load(folder, "fake", verify=False).backend == "fake"


@pytest.mark.parametrize("name", ["token_embedding.npy", "vision.fp32.onnx", "golden.npz"])
@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_sizes_are_checked_even_without_hashes(tmp_path: Path, name: str, change: str) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    if change == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{name} is (missing|truncated)"):
        Policy.load(folder, "fake", verify=False)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Policy.load(tmp_path)


def test_the_manifests_path_stands_for_its_bundle(folder: Path) -> None:
    """As it does in Manifest.load and verify."""
    Policy.load(folder / "manifest.json", "fake").reset(GO_LEFT)


def test_an_unknown_backend(folder: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'tpu'"):
        Policy.load(folder, "tpu")


@pytest.mark.parametrize("name", ["auto", "ort", "ort:cpu"])
def test_the_first_backend_that_proves_itself(folder: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("here it may be CUDA")
    assert Policy.load(str(folder), name, threads=1).backend == "ort:cpu"


def test_a_window_of_one(tmp_path: Path) -> None:
    """The smallest window: every action depends on its own frame only."""
    folder = make_bundle(tmp_path / "tiny.bundle")

    def one_frame(manifest: Manifest) -> Manifest:
        stages = dict(manifest.stages)
        head = stages["action_head"].graphs[0]
        inputs, outputs = (
            tuple(msgspec.structs.replace(t, shape=(1, *t.shape[1:])) if t.name[-1] in "hc" else t for t in tensors)
            for tensors in (head.inputs, head.outputs)
        )
        graph = msgspec.structs.replace(head, inputs=inputs, outputs=outputs)
        stages["action_head"] = msgspec.structs.replace(stages["action_head"], graphs=(graph,))
        dimensions = msgspec.structs.replace(manifest.dimensions, window=1)
        return msgspec.structs.replace(manifest, stages=stages, dimensions=dimensions)

    edit_manifest(folder, one_frame)
    policy = Policy.load(folder, "fake")
    policy.reset(GO_LEFT)
    assert policy.window == 1
    assert policy.step(FRAMES[0]).values.shape == (CHUNK, 2)


# --- files in use -------------------------------------------------------------------------------------------------------


def _patch(path: Path) -> None:
    """Other bytes in place: the same length, another time."""
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)


@pytest.fixture
def own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose writers do not wait, as on a network's disk."""
    monkeypatch.setattr("bundle.held_files._LEASES", False)
    return shutil.copytree(folder, tmp_path / "own.bundle")


def test_a_file_that_is_written_to_in_use_ends_the_episode(own: Path) -> None:
    policy = Policy.load(own, "fake")
    policy.reset(GO_LEFT)
    policy.step(FRAMES[0])
    _patch(own / "vision.fp32.onnx")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"vision.fp32.onnx was changed while it was in use"):
            policy.step(FRAMES[1])
    with pytest.raises(BundleError, match="was changed while it was in use"):
        policy.reset(GO_LEFT)


def test_what_is_written_while_it_is_computed_is_not_driven(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.load(own, "fake")
    policy.reset(GO_LEFT)
    tick = policy._chain.tick

    def slow(frames: NDArray[np.uint8]) -> object:
        done = tick(frames)
        _patch(own / "action_head.fp32.onnx")
        return done

    monkeypatch.setattr(policy._chain, "tick", slow)
    with pytest.raises(BundleError, match=r"action_head.fp32.onnx was changed"):
        policy.step(FRAMES[0])


def test_what_is_written_between_hashing_and_loading_is_not_loaded(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = Manifest.verify

    def then_write(manifest: Manifest, *arguments: Any, **options: Any) -> None:
        verify(manifest, *arguments, **options)
        if "vision.fp32.onnx" in (options.get("only") or ()) and not options.get("without"):
            _patch(own / "vision.fp32.onnx")

    monkeypatch.setattr(Manifest, "verify", then_write)
    with pytest.raises(JetvlaError, match="was changed while it was in use"):
        Policy.load(own, "fake")


def test_a_file_that_was_replaced_is_refused_where_it_would_be_read_again(own: Path) -> None:
    policy = Policy.load(own, "fake")
    policy.reset(GO_LEFT)
    shutil.copy(own / "vision.fp32.onnx", own / "copy")
    (own / "copy").replace(own / "vision.fp32.onnx")
    policy.step(FRAMES[0])
    with pytest.raises(BundleError, match=r"vision.fp32.onnx was replaced while it was in use"):
        policy.reset(GO_LEFT)


def test_a_closed_policy_lets_its_files_go(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own.bundle")
    policy = Policy.load(own, "fake")
    policy.close()
    _patch(own / "vision.fp32.onnx")  # with a lease in the way this would take 45 s
