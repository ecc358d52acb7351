"""Which of a bundle's two precisions runs, what is read for it, and what happens when it cannot.

The INT8 variant of the tiny bundle computes the same as its floating-point stages, so only names, files and tolerances tell them apart.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bundle import manifest as manifest_module
from bundle.errors import BackendError, BundleError, DeviceError, EngineError, NoEnginesError, PromptError
from bundle.manifest import File, Manifest, Measured
from runtime import golden
from runtime.backends import select
from runtime.backends.fake_gpu import ORIN, FakeCuda
from runtime.backends.ort import OrtBackend
from runtime.backends.trt import TrtBackend
from runtime.chain import HostChain
from runtime.golden import Golden
from runtime.policy import Policy
from runtime.precision import int8_notes, why_not_int8
from tests.bundles import GO_LEFT, LONG_IDS, add_int8, edit_manifest, make_bundle, random_frames, rehash
from tests.engines import add_engines, fake_tensorrt

pytest.importorskip("onnxruntime")

FLOAT_ONLY = frozenset(["vision.fp32.onnx", "language.fp32.s12.onnx", "language.fp32.s24.onnx"])
SHARED = frozenset(["action_head.fp32.onnx", "golden.npz", "token_embedding.npy"])
FLOAT_FIRST = (
    Measured(backend="ort:cpu", precision="fp32", step_ms=1.0),
    Measured(backend="ort:cpu", precision="int8", step_ms=2.0),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_bundle(tmp_path / "tiny.bundle")
    add_int8(made)
    return made


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the CPU backend is installed."""
    opening(monkeypatch, {})


def opening(monkeypatch: pytest.MonkeyPatch, backends: dict[str, Any]) -> list[str]:
    """Backends by name, or their errors; others are absent but for ort:cpu. Returns the names that were opened."""
    opened: list[str] = []

    def open_one(name: str, *, threads: int = 0, verify: bool = True) -> Any:
        opened.append(name)
        if name == "ort:cpu":
            return OrtBackend(name, threads=1)
        found = backends.get(name, BackendError("not here", hint="-", absent=True))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("runtime.policy.open_backend", open_one)
    return opened


def corrupt(folder: Path, *names: str) -> None:
    for name in names:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# --- what runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("backend", "precision", "runs"),
    [
        ("auto", "auto", "int8"),
        ("auto", "int8", "int8"),
        ("auto", "float", "fp32"),
        ("ort", "auto", "int8"),
        ("ort:cpu", "auto", "int8"),
        ("ort:cpu", "float", "fp32"),
    ],
)
def test_what_runs(folder: Path, caplog: pytest.LogCaptureFixture, backend: str, precision: Any, runs: str) -> None:
    policy = Policy.load(folder, backend, precision=precision, threads=1)
    assert (policy.backend, policy.manifest.precision) == ("ort:cpu", runs)
    assert policy.failed_backends == ()
    assert warnings(caplog) == []
    policy.reset(GO_LEFT)
    policy.step_resized(random_frames(1)[0])
    policy.reset(token_ids=LONG_IDS)  # another bucket: the bundle is still this one
    policy.step_resized(random_frames(1)[0])


def test_each_backend_gets_its_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = OrtBackend.load
    monkeypatch.setattr(OrtBackend, "load", lambda *args: loaded.append(args[2].file) or load(*args))
    Policy.load(folder, "ort:cpu", precision="int8")
    assert loaded == ["vision.int8.ort-cpu.onnx", "action_head.fp32.onnx", "language.int8.ort-cpu.s12.onnx"]
    view = select.view_of(Manifest.load(folder), "ort:openvino", "int8")
    assert view.graph("vision").file == "vision.int8.portable.onnx"
    assert select.view_of(Manifest.load(folder), "trt", "int8") == view
    assert select.view_of(Manifest.load(folder), "trt", "float") == Manifest.load(folder)


def test_a_bundle_without_a_variant(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    for backend in ("auto", "ort:cpu", "trt", "fake"):
        with pytest.raises(BundleError, match=r"no INT8 variant(?s:.*)calib/quantize\.py"):
            Policy.load(folder, backend, precision="int8")
        if backend != "trt":
            assert Policy.load(folder, backend, threads=1).manifest.precision == "fp32"


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("change", [{"random": True}, {"verdict": "FAIL"}])
def test_a_variant_that_nobody_should_trust_is_run_only_when_named(folder: Path, change: dict[str, Any]) -> None:
    add_int8(folder, **change)
    policy = Policy.load(folder, threads=1)
    assert policy.manifest.precision == "fp32"
    assert why_not_int8(policy).startswith("it was calibrated on made-up" if "random" in change else "it failed")
    assert why_not_int8(policy).endswith("; --precision int8 runs it")
    assert Policy.load(folder, precision="int8", threads=1).manifest.precision == "int8"


@pytest.mark.usefixtures("without_gpu")
def test_the_fastest_that_was_measured_runs(folder: Path) -> None:
    add_int8(folder, measured=FLOAT_FIRST)
    policy = Policy.load(folder)
    assert policy.manifest.precision == "fp32"
    assert why_not_int8(policy) == "floating point was faster on a CPU"
    named = Policy.load(folder, "ort:cpu")
    assert named.manifest.precision == "fp32"
    assert why_not_int8(named) == "floating point was faster on a CPU"


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("measured", [(), FLOAT_FIRST[:1]])
@pytest.mark.parametrize("backend", ["auto", "ort", "ort:cpu"])
def test_what_was_not_measured_is_run_only_when_named(folder: Path, measured: Any, backend: str) -> None:
    """Nobody has judged INT8 on that backend."""
    add_int8(folder, measured=measured)
    policy = Policy.load(folder, backend, threads=1)
    assert policy.manifest.precision == "fp32"
    assert why_not_int8(policy) == "it was not measured on ort:cpu; --precision int8 runs it there"
    assert Policy.load(folder, backend, precision="int8", threads=1).manifest.precision == "int8"


# --- what is read -------------------------------------------------------------------------------------------------------------


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = manifest_module.sha256_file
    monkeypatch.setattr(manifest_module, "sha256_file", lambda path: names.append(path.name) or real(path))
    return names


@pytest.mark.usefixtures("without_gpu")
def test_only_what_runs_is_hashed_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = hashed(monkeypatch)
    Policy.load(folder)
    assert len(names) == len(set(names))
    assert set(names) == SHARED | Manifest.load(folder).int8("ort-cpu").stage_files()
    assert not FLOAT_ONLY & set(names)
    names.clear()
    Policy.load(folder, precision="float")
    assert set(names) == SHARED | FLOAT_ONLY
    names.clear()
    Policy.load(folder, verify=False)
    assert names == []


@pytest.mark.usefixtures("without_gpu")
def test_damage_to_what_does_not_run_does_not_matter(folder: Path) -> None:
    corrupt(folder, *FLOAT_ONLY)
    assert Policy.load(folder).manifest.precision == "int8"
    with pytest.raises(BundleError, match="is corrupt"):
        Policy.load(folder, precision="float")


@pytest.mark.usefixtures("without_gpu")
def test_sizes_are_checked_of_everything(folder: Path) -> None:
    with (folder / "vision.fp32.onnx").open("ab") as file:
        file.write(b"\0")
    for verify in (True, False):
        with pytest.raises(BundleError, match="truncated or replaced"):
            Policy.load(folder, precision="int8", verify=verify)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("backend", ["auto", "ort:cpu"])
def test_a_damaged_variant_gives_way_to_floating_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    corrupt(folder, "language.int8.onnx.data")
    names = hashed(monkeypatch)
    policy = Policy.load(folder, backend)
    assert (policy.backend, policy.manifest.precision) == ("ort:cpu", "fp32")
    assert set(names) >= FLOAT_ONLY
    first, last = warnings(caplog)
    assert f"backend ort:cpu in int8 skipped: {folder / 'language.int8.onnx.data'} is corrupt" in first
    assert "running on ort:cpu in float, because a backend before it failed" in last
    assert policy.failed_backends[0].startswith("ort:cpu in int8: ")
    assert "is corrupt" in why_not_int8(policy)
    for name in ("auto", "ort:cpu"):
        with pytest.raises(BundleError, match="is corrupt"):
            Policy.load(folder, name, precision="int8")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", sorted(SHARED))
def test_damage_to_what_both_read_is_an_error(folder: Path, name: str) -> None:
    corrupt(folder, name)
    with pytest.raises(BundleError, match="is corrupt"):
        Policy.load(folder)


# --- falling back -------------------------------------------------------------------------------------------------------------


def engines_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """A fake GPU that has engines of these precisions."""
    gpu = FakeCuda(ORIN)
    tensorrt = fake_tensorrt("10.3.0", gpu)
    for precision in precisions:
        manifest = Manifest.load(folder)
        add_engines(folder, tensorrt, ORIN, manifest=manifest.int8() if precision == "int8" else manifest)
    opening(monkeypatch, {"trt": TrtBackend(cuda=gpu, tensorrt=tensorrt)})


@pytest.mark.fake_gpu
@pytest.mark.parametrize(
    ("built", "precision", "runs"),
    [
        (("int8", "float"), "auto", ("trt", "int8")),
        (("int8",), "auto", ("trt", "int8")),
        (("float",), "auto", ("trt", "fp32")),
        (("int8", "float"), "float", ("trt", "fp32")),
        (("int8", "float"), "int8", ("trt", "int8")),
    ],
)
def test_engines(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    built: tuple[str, ...],
    precision: Any,
    runs: tuple[str, str],
) -> None:
    """Engines of floating point alone are no reason to warn: nobody has built the others yet."""
    engines_of(folder, monkeypatch, *built)
    for backend in ("auto", "trt"):
        policy = Policy.load(folder, backend, precision=precision)
        assert (policy.backend, policy.manifest.precision) == runs
        assert policy.failed_backends == ()
        assert ("has no INT8 engines for this machine" in why_not_int8(policy)) == (built == ("float",))
        policy.close()
    assert warnings(caplog) == []


@pytest.mark.fake_gpu
def test_int8_engines_that_are_asked_for_and_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines_of(folder, monkeypatch, "float")
    with pytest.raises(NoEnginesError, match="has no INT8 engines for this machine"):
        Policy.load(folder, "trt", precision="int8")
    policy = Policy.load(folder, precision="int8")
    assert (policy.backend, policy.manifest.precision) == ("ort:cpu", "int8")
    assert "backend trt skipped: " in warnings(caplog)[0]  # from a GPU to a CPU is not a detail


@pytest.mark.fake_gpu
def test_a_damaged_int8_engine_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines_of(folder, monkeypatch, "int8", "float")
    view = Manifest.load(folder).int8()
    for path in (folder / "engines").glob("*/vision.*.engine"):
        record = msgspec.json.decode(path.with_suffix(".json").read_bytes())
        if record["content"] == content_of(view, "vision"):
            corrupt(folder, str(path.relative_to(folder)))
    policy = Policy.load(folder)
    assert (policy.backend, policy.manifest.precision) == ("trt", "fp32")
    assert "backend trt in int8 skipped: " in warnings(caplog)[0]
    assert "is corrupt" in policy.failed_backends[0]


def content_of(manifest: Manifest, stage: str) -> str:
    from bundle.engine_cache import content_key

    return content_key(manifest, stage, manifest.graph(stage))


def test_a_lost_gpu_is_not_papered_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opening(monkeypatch, {"trt": DeviceError("the GPU failed", hint="-", sticky=True)})
    with pytest.raises(DeviceError, match="the GPU failed"):
        Policy.load(folder)
    assert opened == ["trt"]


def test_a_named_backend_says_itself_why_it_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opening(monkeypatch, {"trt": EngineError("TensorRT is broken", hint="-")})
    with pytest.raises(EngineError, match="TensorRT is broken"):
        Policy.load(folder, "trt")
    assert opened == ["trt", "trt"]


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("backend", ["auto", "ort:cpu"])
def test_a_cpu_whose_products_saturate_in_every_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    class Saturated:
        def run(self, feeds: Any) -> Any:
            return {"y": np.full((4, 8), 8160, np.float32)}

    monkeypatch.setattr(OrtBackend, "_stage", lambda self, model, graph: Saturated())
    policy = Policy.load(folder, backend)
    assert policy.manifest.precision == "fp32"
    assert "backend ort:cpu in int8 skipped: this CPU's 8-bit products saturate" in warnings(caplog)[0]
    assert "saturate" in why_not_int8(policy)
    with pytest.raises(BackendError, match=r"8-bit products saturate(?s:.*)--precision float"):
        Policy.load(folder, "ort:cpu", precision="int8")


# --- tolerances ---------------------------------------------------------------------------------------------------------------


def test_the_golden_step_is_held_to_what_int8_explains(folder: Path) -> None:
    """Recorded: cosine 0.999, action error 0.003. Allowed: 1 - 3e-3 - 1e-4, and 0.019."""
    view = Manifest.load(folder).int8()
    assert golden.tolerances(view) == pytest.approx((0.9969, 0.019))
    assert golden.tolerances(Manifest.load(folder)) == (0.99999, 1e-3)
    recorded = Golden.load(folder)
    for error, passes in ((0.015, True), (0.025, False)):
        Golden(recorded.frames, recorded.token_ids, recorded.feature, recorded.action + np.float32(error)).save(folder)
        rehash(folder)
        if passes:
            Policy.load(folder, "ort:cpu", precision="int8")
        else:
            with pytest.raises(BackendError, match=r"computes wrong numbers(?s:.*)at least 0\.9969, at most 2e-02"):
                Policy.load(folder, "ort:cpu", precision="int8")
        with pytest.raises(BackendError, match=r"at least 0\.99999, at most 1e-03"):
            Policy.load(folder, "ort:cpu", precision="float")


@pytest.mark.parametrize(("cosine", "error"), [(0.6, 0.7), (-1.0, 1e9), (0.96, 0.0969)])
def test_no_recording_excuses_a_wrong_kernel(folder: Path, cosine: float, error: float) -> None:
    view = add_int8(folder, golden_cosine=cosine, golden_error=error).int8()
    assert golden.tolerances(view) == (0.9, 0.3)


@pytest.mark.usefixtures("without_gpu")
def test_int8_that_computes_wrongly_gives_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that is wrong in INT8 only."""
    run_vision = Policy.step_resized

    def wrong(self: Policy, frames: Any, **how: Any) -> Any:
        chunk = run_vision(self, frames, **how)
        if self.manifest.precision == "int8":
            chunk.feature[:] = -chunk.feature
        return chunk

    monkeypatch.setattr(Policy, "step_resized", wrong)
    assert Policy.load(folder).manifest.precision == "fp32"
    assert "backend ort:cpu in int8 skipped: ort:cpu computes wrong numbers on this machine" in warnings(caplog)[0]


def test_a_manifest_of_a_rebuilt_bundle_is_another(folder: Path) -> None:
    policy = Policy.load(folder, "ort:cpu")
    edit_manifest(folder, lambda manifest: msgspec.structs.replace(manifest, jetvla="0.0.0"))
    with pytest.raises(BundleError, match="was replaced while it was in use"):
        policy.reset(GO_LEFT)


def test_a_bundle_published_while_a_length_is_loaded_is_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder would be the new bundle's, behind the old one's image tokens: refused, and nothing can be decided with it."""
    policy = Policy.load(folder, "ort:cpu")
    set_prompt = HostChain.set_prompt

    def publish_meanwhile(self: HostChain, *prompt: Any) -> None:
        edit_manifest(folder, lambda manifest: msgspec.structs.replace(manifest, jetvla="0.0.0"))
        set_prompt(self, *prompt)

    monkeypatch.setattr(HostChain, "set_prompt", publish_meanwhile)
    with pytest.raises(BundleError, match="was replaced while it was in use"):
        policy.reset(GO_LEFT)
    size = policy.manifest.dimensions.image_size
    with pytest.raises(PromptError):
        policy.step(np.zeros((size, size, 3), np.uint8))


def test_where_int8_was_judged_is_said_on_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.load(folder, "ort:cpu", precision="int8")
    policy.remark = ""  # of a CPU without VNNI
    (note,) = int8_notes(policy, "int8")
    assert note.startswith("INT8 was judged and timed on a CPU; quantize on this machine")
    monkeypatch.setattr("runtime.precision.processor_name", lambda: "a CPU")
    assert int8_notes(policy, "int8") == []
    monkeypatch.setattr("runtime.precision.processor_name", lambda: None)
    assert int8_notes(policy, "int8") == []


def test_of_floating_point_only_auto_is_surprised(folder: Path) -> None:
    policy = Policy.load(folder, "ort:cpu", precision="float")
    assert int8_notes(policy, "float") == []
    (note,) = int8_notes(policy, "auto")
    assert note.startswith("the INT8 variant does not run: ")


@pytest.mark.parametrize("verify", [True, False])
def test_a_report_that_was_thrown_away_stops_no_robot(folder: Path, verify: bool) -> None:
    report = File(sha256="0" * 64, bytes=1)
    edit_manifest(folder, lambda old: msgspec.structs.replace(old, files={**old.files, "reports/build.json": report}))
    for precision in ("float", "int8"):
        Policy.load(folder, "ort:cpu", precision=precision, verify=verify)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="is missing"):
        Manifest.load(folder).verify(folder)


def test_logging_stays_quiet(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jetvla"):
        Policy.load(folder, "ort:cpu")
    assert caplog.records == []
