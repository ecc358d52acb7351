"""The TensorRT backend on the fake GPU: right numbers in every version, in the right order, and nothing left behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from bundle import engine_cache
from bundle.errors import BackendError, DeviceError, EngineError, PromptError
from bundle.manifest import Manifest
from runtime import golden, tensorrt_flavour
from runtime.backends.fake_gpu import DESKTOP, ORIN, FakeCuda
from runtime.backends.fake_tensorrt import VERSIONS
from runtime.backends.trt import TrtBackend
from runtime.cuda_errors import cuda_error
from runtime.gpu import Device
from runtime.policy import Policy
from tests.bundles import GO_LEFT, GO_RIGHT, LEFT_IDS, LONG_IDS, WINDOW, Tiny, edit_manifest, make_bundle
from tests.engines import add_engines, fake_backend, fake_tensorrt

pytest.importorskip("onnxruntime")  # it computes what the fake engines compute
pytestmark = pytest.mark.fake_gpu
FRAMES = np.random.default_rng(3).integers(0, 256, (9, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny())


def on_device(folder: Path, device: Device = DESKTOP, version: str = "10.3.0", **cuda: Any) -> tuple[Policy, FakeCuda]:
    backend, gpu = fake_backend(folder, device, version, **cuda)
    return Policy(folder, Manifest.load(folder), backend), gpu


def on_host(folder: Path) -> Policy:
    return Policy.load(folder, "ort:cpu", threads=1)


def actions(policy: Policy, frames: np.ndarray, instruction: str = GO_LEFT) -> np.ndarray:
    policy.reset(instruction)
    return np.stack([policy.step(frame).normalized for frame in frames])


@pytest.mark.parametrize("device", [ORIN, DESKTOP], ids=lambda device: device.slug)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_numbers_of_the_cpu(folder: Path, device: Device, version: str) -> None:
    policy, _ = on_device(folder, device, version)
    golden.check(policy, folder)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))


def test_without_cuda_graphs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, gpu = on_device(folder, has_graphs=False)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))
    assert "launch" not in gpu.calls
    assert "cannot be captured" in caplog.text


def test_two_cameras_and_two_latents(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "x.bundle", Tiny(cameras=("hand", "static"), latent=2))
    policy, _ = on_device(folder)
    host = on_host(folder)
    for one in (policy, host):
        one.reset(GO_LEFT)
    for frame in FRAMES:
        got, expected = (one.step(frame, hand=frame[::-1]) for one in (policy, host))
        np.testing.assert_array_equal(got.normalized, expected.normalized)
        np.testing.assert_array_equal(got.feature, expected.feature)


def test_stages_alone(folder: Path) -> None:
    policy, host = on_device(folder)[0], on_host(folder)
    frames = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    for one in (policy, host):
        one.reset(GO_LEFT)
    tokens = policy.run_vision(frames).copy()
    np.testing.assert_array_equal(tokens, host.run_vision(frames))
    feature = policy.run_language(tokens).copy()
    np.testing.assert_array_equal(feature, host.run_language(tokens))
    for scale in (1.0, 0.5, 0.25):
        again = (feature * np.float32(scale)).astype(np.float32)
        np.testing.assert_array_equal(policy.run_action_head(again), host.run_action_head(again))


# --- a step -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [ORIN, DESKTOP], ids=lambda device: device.slug)
def test_a_step_allocates_nothing_and_is_one_launch(folder: Path, device: Device) -> None:
    policy, gpu = on_device(folder, device)
    policy.reset(GO_LEFT)
    policy.step(FRAMES[0])
    before, seen = gpu.allocations, len(gpu.calls)
    for frame in FRAMES:
        policy.step(frame)
    assert gpu.allocations == before
    per_step = [call for call in gpu.calls[seen:] if call != "elapsed_ms"]
    assert per_step == ["launch", "synchronize"] * len(FRAMES)


def test_what_the_graph_holds(folder: Path) -> None:
    """Between begin and end of the capture: copies in, states, three stages between four events, copies out - and no waiting.

    Copies stand outside the events: the sections are what the engines take.
    """
    policy, gpu = on_device(folder)
    policy.reset(GO_LEFT)
    start, end = gpu.calls.index("begin_capture"), gpu.calls.index("end_capture")
    inside = gpu.calls[start + 1 : end]
    assert inside == ["to_device", "on_device", "on_device", *["record"] * 4, *["to_host"] * 5]
    assert gpu.calls[:start].count("synchronize") >= 1  # the warm run was over


def test_shared_memory_is_not_copied(folder: Path) -> None:
    policy, gpu = on_device(folder, ORIN)
    policy.reset(GO_LEFT)
    inside = gpu.calls[gpu.calls.index("begin_capture") : gpu.calls.index("end_capture")]
    assert inside.count("to_device") == 0
    assert inside.count("to_host") == 3  # image tokens and states, which are looked at for NaN


def test_sections_are_timed(folder: Path) -> None:
    policy, _ = on_device(folder)
    policy.reset(GO_LEFT)
    chunk = policy.step(FRAMES[0])
    timing = chunk.timing
    assert chunk.engine_ms == pytest.approx(sum(timing[name] for name in ("vision", "language", "action_head")))
    assert set(timing) == {"preprocess", "vision", "language", "action_head", "total"}
    assert min(timing[name] for name in ("vision", "language", "action_head")) > 0


def test_a_driver_that_cannot_time_inside_a_graph(folder: Path) -> None:
    # Four plain records of the warm run go well, the first captured one does not.
    policy, gpu = on_device(folder, fail={"record": (4, 801)})
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))
    assert gpu.calls.count("begin_capture") == 2
    assert gpu.calls.count("abandon_capture") == 1
    assert "launch" in gpu.calls
    assert set(policy.step(FRAMES[0]).timing) == {"preprocess", "total"}


def test_a_driver_that_cannot_read_the_times(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, gpu = on_device(folder)
    policy.reset(GO_LEFT)
    gpu.fail = {"elapsed_ms": (1, 400)}
    assert set(policy.step(FRAMES[0]).timing) == {"preprocess", "total"}
    assert set(policy.step(FRAMES[1]).timing) == {"preprocess", "total"}
    assert caplog.text.count("cannot be timed") == 1


def test_a_driver_that_cannot_capture_at_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, gpu = on_device(folder)
    gpu.fail = {"end_capture": (0, 900)}
    real = gpu.end_capture

    def refuse(stream: Any) -> Any:
        gpu.fail["end_capture"] = (0, 900)
        return real(stream)

    gpu.end_capture = refuse  # type: ignore[method-assign]
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))
    assert "launch" not in gpu.calls
    assert "could not be captured" in caplog.text


@pytest.mark.parametrize("version", ["10.3.0", "rtx-1.7.1"])
def test_an_engine_that_is_exchanged_goes_at_once_where_nothing_can_be_captured(folder: Path, version: str) -> None:
    """And not when Python collects circles: until then the decoder's weights would be there twice."""
    policy, gpu = on_device(folder, DESKTOP, version)

    def refuse(stream: Any) -> Any:
        raise cuda_error("capturing", 801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported")

    gpu.begin_capture = refuse  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        for ids in (LEFT_IDS, LONG_IDS, LEFT_IDS):
            policy.reset(token_ids=ids)
            assert gpu.calls.count("engine made") - gpu.calls.count("engine destroyed") == 3
        policy.close()
        assert gpu.calls.count("context made") == gpu.calls.count("context destroyed")
    finally:
        gc.enable()


def test_from_another_thread(folder: Path) -> None:
    policy, _ = on_device(folder)
    policy.reset(GO_LEFT)
    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(policy.step(FRAMES[0]).normalized))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], actions(on_host(folder), FRAMES[:1])[0])


# --- prompts and lifetimes ----------------------------------------------------------------------------------------------------


def test_a_prompt_of_the_same_length_keeps_the_graph(folder: Path) -> None:
    policy, gpu = on_device(folder)
    host = on_host(folder)
    for text in (GO_LEFT, GO_RIGHT, GO_LEFT):
        np.testing.assert_array_equal(actions(policy, FRAMES[:4], text), actions(host, FRAMES[:4], text))
    assert gpu.calls.count("begin_capture") == 1


def test_another_length_captures_again_and_destroys_in_order(folder: Path) -> None:
    policy, gpu = on_device(folder)
    host = on_host(folder)
    actions(policy, FRAMES[:2])
    for one in (policy, host):
        one.reset(token_ids=LONG_IDS)
    for frame in FRAMES:
        np.testing.assert_array_equal(policy.step(frame).normalized, host.step(frame).normalized)
    assert gpu.calls.count("begin_capture") == 2
    released = gpu.calls.index("release_graph")
    assert gpu.calls.index("context destroyed") > released
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(host, FRAMES))
    assert gpu.live["graphs"] == 1


def test_an_engine_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = engine_cache.verify
    monkeypatch.setattr(
        engine_cache, "verify", lambda bundle, record: hashed.append(record.label) or real(bundle, record)
    )
    policy, _ = on_device(folder)
    for ids in ((0, 7, 2), LONG_IDS, (0, 7, 2), LONG_IDS):
        policy.reset(token_ids=ids)
    assert sorted(hashed) == ["action_head", "language.s12", "language.s24", "vision"]


def test_closing_gives_everything_back_in_order(folder: Path) -> None:
    policy, gpu = on_device(folder)
    actions(policy, FRAMES[:2])
    policy.close()
    assert set(gpu.live.values()) == {0}
    ends = [
        call
        for call in gpu.calls
        if call in ("release_graph", "context destroyed", "engine destroyed", "release", "release_stream")
    ]
    assert ends[0] == "release_graph"
    assert ends.index("context destroyed") < ends.index("engine destroyed") < ends.index("release")
    assert ends[-1] == "release_stream"
    policy.close()  # twice is fine


def test_a_forgotten_policy_gives_everything_back(folder: Path) -> None:
    policy, gpu = on_device(folder)
    actions(policy, FRAMES[:2])
    del policy
    gc.collect()
    assert set(gpu.live.values()) == {0}


def test_a_failed_start_gives_everything_back(folder: Path) -> None:
    gpu = FakeCuda(DESKTOP, fail={"allocate": (3, 2)})
    tensorrt = fake_tensorrt("10.3.0", gpu)
    add_engines(folder, tensorrt, DESKTOP)
    with pytest.raises(DeviceError, match="out of GPU memory"):
        Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    gc.collect()
    assert set(gpu.live.values()) == {0}


def test_only_lengths_with_an_engine_are_used(folder: Path) -> None:
    gpu = FakeCuda(DESKTOP)
    tensorrt = fake_tensorrt("10.3.0", gpu)
    add_engines(folder, tensorrt, DESKTOP, buckets=(24,))
    policy = Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    assert policy.buckets == (24,)
    np.testing.assert_allclose(actions(policy, FRAMES), actions(on_host(folder), FRAMES), atol=1e-6)

    other = make_bundle(folder.parent / "short.bundle", Tiny())
    add_engines(other, tensorrt, DESKTOP, buckets=(12,))
    short = Policy(other, Manifest.load(other), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    with pytest.raises(PromptError, match="too long"):
        short.reset(token_ids=LONG_IDS)
    with pytest.raises(PromptError, match="step before reset"):
        short.step(FRAMES[0])


# --- errors -------------------------------------------------------------------------------------------------------------------


def test_a_sticky_error_ends_it(folder: Path) -> None:
    policy, gpu = on_device(folder)
    policy.reset(GO_LEFT)
    policy.step(FRAMES[0])
    gpu.fail = {"synchronize": (0, 700)}
    with pytest.raises(DeviceError, match="the GPU failed") as caught:
        policy.step(FRAMES[1])
    assert caught.value.sticky
    assert "start the program again" in caught.value.hint
    with pytest.raises(DeviceError):
        policy.step(FRAMES[2])
    policy.close()  # does not raise: a program must be able to end


def test_a_launch_that_fails_once_changes_no_state(folder: Path) -> None:
    policy, gpu = on_device(folder)
    host = on_host(folder)
    for one in (policy, host):
        one.reset(GO_LEFT)
    for number, frame in enumerate(FRAMES):
        if number in (2, 5):
            gpu.fail = {"launch": (0, 1)}
            with pytest.raises(DeviceError, match="CUDA failed: launch"):
                policy.step(frame)
        np.testing.assert_array_equal(policy.step(frame).normalized, host.step(frame).normalized)


def test_a_step_that_is_not_finite_is_taken_back(folder: Path) -> None:
    policy, gpu = on_device(folder)
    host = on_host(folder)
    for one in (policy, host):
        one.reset(GO_LEFT)
        for frame in FRAMES[: WINDOW + 1]:
            one.step(frame)
    chain = policy._chain
    prompt = chain._pointers["prompt"]  # type: ignore[attr-defined]
    size = chain._views["prompt"].nbytes  # type: ignore[attr-defined]
    kept = gpu.memory(prompt, size).copy()
    gpu.memory(prompt, size).view(np.float32)[:] = np.nan
    with pytest.raises(BackendError, match="not finite"):
        policy.step(FRAMES[0])
    gpu.memory(prompt, size)[:] = kept
    for frame in FRAMES:
        np.testing.assert_array_equal(policy.step(frame).normalized, host.step(frame).normalized)


@pytest.mark.parametrize("device", [ORIN, DESKTOP], ids=lambda device: device.slug)
@pytest.mark.parametrize("spoiled", ["image_tokens", "feature"])
def test_what_an_engine_would_hide_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: Device, spoiled: str
) -> None:
    """As INT8 engines do, which give finite numbers for a NaN: here it appears when the stage that reads it has run."""
    policy, gpu = on_device(folder, device, has_graphs=False)
    host = on_host(folder)
    chain: Any = policy._chain
    for one in (policy, host):
        one.reset(GO_LEFT)
        one.step(FRAMES[0])
    run = chain._run

    def run_and_spoil(stage: str) -> None:
        run(stage)
        if stage == "action_head":
            memory = gpu.memory(chain._pointers[spoiled], chain._tensor_bytes[spoiled]).view(np.float32)
            gpu.enqueue(chain._stream_pointer, lambda: memory.__setitem__(-1, np.nan))

    with monkeypatch.context() as patch:
        patch.setattr(chain, "_run", run_and_spoil)
        with pytest.raises(BackendError, match="not finite"):
            policy.step(FRAMES[1])
    for frame in FRAMES[2:]:
        np.testing.assert_array_equal(policy.step(frame).normalized, host.step(frame).normalized)


def test_no_engines(folder: Path) -> None:
    gpu = FakeCuda(ORIN)
    with pytest.raises(EngineError, match="no engines for this machine") as caught:
        TrtBackend(cuda=gpu, tensorrt=fake_tensorrt("10.3.0", gpu)).open(folder, Manifest.load(folder))
    assert not caught.value.absent  # a GPU with TensorRT and without engines is worth a warning
    assert "orin-sm87x8-trt10.3.0-cuda12" in str(caught.value)
    assert "--engines-only" in caught.value.hint


@pytest.mark.parametrize(
    ("device", "version"),
    [
        (Device("Orin", 87, 8, 1 << 34, True, 13020), "10.3.0"),
        (Device("Thor", 110, 20, 1 << 34, True, 12060), "10.3.0"),
        (Device("Orin", 87, 16, 1 << 34, True, 12060), "10.3.0"),
        (ORIN, "10.16.1"),
    ],
    ids=["another driver", "another GPU", "a larger Orin", "another TensorRT"],
)
def test_engines_of_another_machine_are_not_taken(folder: Path, device: Device, version: str) -> None:
    add_engines(folder, fake_tensorrt("10.3.0", FakeCuda(ORIN)), ORIN)
    gpu = FakeCuda(device)
    with pytest.raises(EngineError, match="no engines for this machine") as caught:
        TrtBackend(cuda=gpu, tensorrt=fake_tensorrt(version, gpu)).open(folder, Manifest.load(folder))
    assert "orin-sm87x8-trt10.3.0-cuda12" in str(caught.value.got)


def test_an_engine_that_lies_about_its_machine_is_refused_by_tensorrt(folder: Path) -> None:
    """A folder renamed by hand: records do not fit their folder, so they count for nothing."""
    add_engines(folder, fake_tensorrt("10.16.1", FakeCuda(ORIN)), ORIN)
    engines = folder / engine_cache.ENGINES
    (engines / "orin-sm87x8-trt10.16.1-cuda12").rename(engines / "orin-sm87x8-trt10.3.0-cuda12")
    gpu = FakeCuda(ORIN)
    with pytest.raises(EngineError, match="no engines"):
        TrtBackend(cuda=gpu, tensorrt=fake_tensorrt("10.3.0", gpu)).open(folder, Manifest.load(folder))


def test_a_flipped_byte_is_refused(folder: Path) -> None:
    backend, _ = fake_backend(folder, ORIN)
    path = next((folder / engine_cache.ENGINES).glob("*/vision*.engine"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match="is corrupt"):
        backend.open(folder, Manifest.load(folder))


def test_tensorrts_own_refusal_is_told(folder: Path) -> None:
    backend, _ = fake_backend(folder, ORIN)
    manifest = Manifest.load(folder)
    for record in engine_cache.newest(folder, manifest, "orin-sm87x8-trt10.3.0-cuda12").values():
        path = folder / record.file
        path.write_bytes(path.read_bytes().replace(b"10.3.0", b"10.3.1"))
    unchecked = TrtBackend(cuda=backend._cuda, tensorrt=backend._flavours[0], verify=False)
    with pytest.raises(EngineError, match=r"cannot load .*vision") as caught:
        unchecked.open(folder, manifest)
    assert "not compatible with this version" in str(caught.value)


def test_engines_of_other_weights_are_not_taken(folder: Path) -> None:
    backend, _ = fake_backend(folder, ORIN)

    def other_vision(manifest: Manifest) -> Manifest:
        record = msgspec.structs.replace(manifest.files["vision.fp32.onnx"], sha256="0" * 64)
        return msgspec.structs.replace(manifest, files={**manifest.files, "vision.fp32.onnx": record})

    edit_manifest(folder, other_vision)
    with pytest.raises(EngineError, match="no engines for this machine"):
        backend.open(folder, Manifest.load(folder))


def test_the_newest_engine_is_taken(folder: Path) -> None:
    tensorrt = fake_tensorrt("10.3.0", FakeCuda(ORIN))
    add_engines(folder, tensorrt, ORIN, built_at="2026-01-02T00:00:00+00:00")
    manifest = Manifest.load(folder)
    fingerprint = tensorrt.fingerprint(ORIN)
    first = engine_cache.newest(folder, manifest, fingerprint)
    assert {record.built_at for record in first.values()} == {"2026-01-02T00:00:00+00:00"}
    assert len(first) == 4


def test_a_portable_engine_runs_on_a_desktop(folder: Path) -> None:
    gpu = FakeCuda(DESKTOP)
    tensorrt = fake_tensorrt("rtx-1.7.1", gpu)
    assert tensorrt.usable_fingerprints(DESKTOP) == ("sm86-rtx1.7.1", "portable-rtx1.7.1")
    assert tensorrt.usable_fingerprints(Device("GTX", 75, 16, 1, False, 13000)) == ("sm75-rtx1.7.1",)
    assert tensorrt.fingerprint(None) == "portable-rtx1.7.1"
    assert tensorrt.targets() == ("sm75", "sm80", "sm86", "sm89", "sm120")


def test_auto_passes_over_a_tensorrt_that_is_too_old(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A robot with JetPack 6.0 drives on ONNX Runtime, and is told why."""
    monkeypatch.setattr("runtime.backends.trt.installed", lambda: iter(("trt",)))
    monkeypatch.setattr("runtime.backends.trt.open_cuda", lambda: FakeCuda(ORIN))
    real = tensorrt_flavour.importlib.import_module
    old = SimpleNamespace(__version__="8.6.2", ILogger=object)
    monkeypatch.setattr(
        tensorrt_flavour.importlib, "import_module", lambda name: old if name == "tensorrt" else real(name)
    )
    policy = Policy.load(folder, "auto", threads=1)
    assert policy.backend == "ort:cpu"
    assert policy.failed_backends[0].startswith("trt: this TensorRT is too old for exact engines (TensorRT 8.6.2)")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "JetPack 6.1 or newer" in warnings[0]
    with pytest.raises(EngineError, match="too old for exact engines"):
        Policy.load(folder, "trt")


# --- scratch memory, which TensorRT-RTX wants to be given ---------------------------------------------------------------------


def test_scratch_memory_belongs_to_its_engine(folder: Path) -> None:
    policy, gpu = on_device(folder, DESKTOP, "rtx-1.7.1")
    actions(policy, FRAMES[:2])
    before = gpu.live["device"]
    for ids in (LONG_IDS, (0, 7, 2), LONG_IDS):
        policy.reset(token_ids=ids)
        policy.step(FRAMES[0])
    assert gpu.live["device"] == before  # an exchanged engine gives its own back
    policy.close()
    assert set(gpu.live.values()) == {0}
    ends = [call for call in gpu.calls if call in ("release_graph", "context destroyed", "engine destroyed", "release")]
    assert ends.index("context destroyed") < ends.index("release")


def test_too_little_memory_for_scratch(folder: Path) -> None:
    gpu = FakeCuda(DESKTOP, fail={"allocate": (1, 2)})
    tensorrt = fake_tensorrt("rtx-1.7.1", gpu)
    add_engines(folder, tensorrt, DESKTOP)
    with pytest.raises(DeviceError, match="out of GPU memory"):
        Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    gc.collect()
    assert set(gpu.live.values()) == {0}
    assert gpu.calls.count("context made") == gpu.calls.count("context destroyed")


def test_scratch_that_is_refused_is_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCuda(DESKTOP)
    tensorrt = fake_tensorrt("rtx-1.7.1", gpu)
    add_engines(folder, tensorrt, DESKTOP)
    real = tensorrt.context

    def stubborn(engine: Any, cache: bytes) -> Any:
        def refuse(*_: object) -> None:
            raise RuntimeError("no")

        context, compiled = real(engine, cache)
        context.set_device_memory = refuse
        return context, compiled

    monkeypatch.setattr(tensorrt, "context", stubborn)
    with pytest.raises(RuntimeError, match="no"):
        Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    assert gpu.live["device"] == 0


def test_engines_without_own_allocation_still_run(folder: Path) -> None:
    """The runtime asks the engine what it needs, whatever it was built with."""
    backend, _ = fake_backend(folder, DESKTOP, "rtx-1.7.1")
    for path in (folder / engine_cache.ENGINES).glob("*/*.engine"):
        path.write_bytes(path.read_bytes().replace(b'"user_allocation": true', b'"user_allocation": null'))
    unchecked = TrtBackend(cuda=backend._cuda, tensorrt=backend._flavours[0], verify=False)
    policy = Policy(folder, Manifest.load(folder), unchecked)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))


def test_what_was_compiled_at_loading_is_kept(folder: Path) -> None:
    policy, gpu = on_device(folder, DESKTOP, "rtx-1.7.1")
    policy.reset(GO_LEFT)
    kept = sorted(path.name.split(".")[0] for path in (folder / engine_cache.ENGINES).glob("*/*.jit"))
    assert kept == ["action_head", "language", "vision"]
    tensorrt = fake_tensorrt("rtx-1.7.1", gpu)
    loaded = Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    assert loaded._chain._own.stages["vision"]._jit == b"compiled"  # type: ignore[attr-defined]


def test_the_verdict_before_loading_is_told(folder: Path) -> None:
    backend, gpu = fake_backend(folder, DESKTOP, "rtx-1.7.1")
    for path in (folder / engine_cache.ENGINES).glob("*/*.engine"):
        path.write_bytes(b"X" * path.stat().st_size)
    unchecked = TrtBackend(cuda=gpu, tensorrt=backend._flavours[0], verify=False)
    with pytest.raises(EngineError, match=r"cannot load(?s:.*)MALFORMED_ENGINE"):
        unchecked.open(folder, Manifest.load(folder))


def test_engines_too_short_for_the_golden_step_are_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "long.bundle", Tiny(), golden_ids=LONG_IDS)
    gpu = FakeCuda(DESKTOP)
    tensorrt = fake_tensorrt("10.3.0", gpu)
    add_engines(folder, tensorrt, DESKTOP, buckets=(12,))
    policy = Policy(folder, Manifest.load(folder), TrtBackend(cuda=gpu, tensorrt=tensorrt))
    with pytest.raises(BackendError, match=r"cannot replay the golden step(?s:.*)--bucket"):
        golden.check(policy, folder)


def test_a_tensorrt_that_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = fake_backend(folder, ORIN)

    def nothing(logger: Any) -> Any:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(backend._flavours[0].module, "Runtime", nothing)
    with pytest.raises(EngineError, match=r"does not start(?s:.*)error: 35(?s:.*)driver is too old"):
        backend.open(folder, Manifest.load(folder))


# --- what a real GPU would punish ---------------------------------------------------------------------------------------------


def test_tensorrt_that_cannot_be_captured_still_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, gpu = on_device(folder)
    chain = policy._chain
    real = chain._run  # type: ignore[attr-defined]

    def refuse(stage: str) -> None:
        if next(iter(gpu._streams.values())).captured is not None:
            raise BackendError("TensorRT could not run", hint="-")
        real(stage)

    monkeypatch.setattr(chain, "_run", refuse)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))
    assert "launch" not in gpu.calls
    assert gpu.calls.count("begin_capture") == gpu.calls.count("abandon_capture") == 2
    policy.reset(GO_RIGHT)
    assert gpu.calls.count("begin_capture") == 2  # known by now
    assert caplog.text.count("could not be captured") == 1


def test_an_interrupted_capture_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, gpu = on_device(folder)

    def interrupt(stream: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "end_capture", interrupt)
        with pytest.raises(KeyboardInterrupt):
            policy.reset(GO_LEFT)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(on_host(folder), FRAMES))


def test_what_a_stage_gave_outlives_the_policy(folder: Path) -> None:
    policy, gpu = on_device(folder)
    tokens = policy.run_vision(np.zeros((1, 8, 8, 3), np.uint8))
    assert not any(np.shares_memory(tokens, buffer.array) for buffer in gpu._hosts.values())


def test_a_closed_policy_touches_no_memory(folder: Path) -> None:
    policy, _ = on_device(folder)
    policy.reset(GO_LEFT)
    policy.close()
    for use in (
        lambda: policy.reset(GO_LEFT),
        lambda: policy.reset(token_ids=LONG_IDS),
        lambda: policy.clear(),
        lambda: policy.run_vision(np.zeros((1, 8, 8, 3), np.uint8)),
    ):
        with pytest.raises(AssertionError, match="used after close"):
            use()
    with pytest.raises(PromptError, match="step before reset"):
        policy.step(FRAMES[0])


def test_a_tick_that_failed_halfway_is_over_before_its_engine_goes(folder: Path) -> None:
    policy, gpu = on_device(folder, has_graphs=False)
    host = on_host(folder)
    policy.reset(GO_LEFT)
    gpu.fail = {"to_host": (0, 1)}  # all three stages are enqueued by then
    with pytest.raises(DeviceError, match="CUDA failed"):
        policy.step(FRAMES[0])
    for one in (policy, host):
        one.reset(token_ids=LONG_IDS)
    np.testing.assert_array_equal(policy.step(FRAMES[0]).normalized, host.step(FRAMES[0]).normalized)


def test_an_engine_that_vanished_is_told(folder: Path) -> None:
    policy, _ = on_device(folder)
    host = on_host(folder)
    policy.reset(GO_LEFT)
    policy.reset(token_ids=LONG_IDS)
    path = next((folder / engine_cache.ENGINES).glob("*/language.s12*.engine"))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        policy.reset(GO_LEFT)
    with pytest.raises(PromptError, match="step before reset"):
        policy.step(FRAMES[0])
    path.write_bytes(content)
    np.testing.assert_array_equal(actions(policy, FRAMES), actions(host, FRAMES))


def test_an_engine_larger_than_its_record_is_not_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = fake_backend(folder, DESKTOP)
    real = backend._flavours[0].tensors

    def larger(engine: Any) -> Any:
        return tuple(msgspec.structs.replace(item.tensor, shape=(*item.tensor.shape, 2)) for item in real(engine))

    def lie(engine: Any) -> Any:
        return tuple(
            type(item)(tensor, item.is_input) for item, tensor in zip(real(engine), larger(engine), strict=True)
        )

    monkeypatch.setattr(backend._flavours[0], "tensors", lie)
    with pytest.raises(EngineError, match="does not fit the other engines"):
        backend.open(folder, Manifest.load(folder))


def test_large_finite_states_are_kept(folder: Path) -> None:
    """A sum in 32 bits would overflow, and the tick be taken back for nothing."""
    policy, gpu = on_device(folder)
    policy.reset(GO_LEFT)
    chain: Any = policy._chain
    before = len(gpu.calls)
    for name in ("action", "next_h", "next_c"):
        chain._views[name][:] = np.finfo(np.float32).max
    chain._keep_finite()
    assert gpu.calls[before:] == []
    chain._views["next_c"].reshape(-1)[0] = np.inf
    chain._keep_finite()
    assert gpu.calls[before:].count("on_device") == 2


def test_nothing_compiled_is_not_written(folder: Path) -> None:
    policy, _ = on_device(folder, DESKTOP, "rtx-1.7.1")
    chain: Any = policy._chain
    vision = chain._own.stages["vision"]
    vision._compiled.serialize = lambda: None
    vision.keep_compiled()
    assert not list((folder / engine_cache.ENGINES).glob("*/vision*.jit"))
    policy.close()
    assert vision._compiled is None  # it could keep the engine alive


def test_a_broken_tensorrt_does_not_hide_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_flavour(name: str) -> Any:
        if name in broken:
            raise EngineError(f"{name} cannot be imported", hint="-")
        return name

    monkeypatch.setattr("runtime.backends.trt.installed", lambda: iter(("trt", "rtx")))
    monkeypatch.setattr("runtime.backends.trt.open_flavour", open_flavour)
    broken = {"trt"}
    assert TrtBackend(cuda=FakeCuda(DESKTOP))._flavours == ["rtx"]  # type: ignore[comparison-overlap]
    assert "trt cannot be imported" in caplog.text
    broken = {"trt", "rtx"}
    with pytest.raises(EngineError, match="trt cannot be imported"):
        TrtBackend(cuda=FakeCuda(DESKTOP))
