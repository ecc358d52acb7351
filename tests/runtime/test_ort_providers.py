"""Providers of ONNX Runtime prove themselves with numbers, and those with a device keep tensors on it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bundle import manifest as manifest_module
from bundle.errors import BackendError, BundleError, DeviceError, EngineError
from bundle.manifest import Graph, Manifest, Tensor
from runtime.backends import mapped_weights, ort_plugins, select
from runtime.backends.ort import PROVIDERS, OrtBackend, OrtStage
from runtime.backends.ort_device import OrtDeviceChain
from runtime.backends.ort_probe import PROBE, expected, int8_model, probe, probe_int8, probe_model
from runtime.policy import Policy
from tests.bundles import GO_LEFT, LONG_IDS, Tiny, add_int8, make_bundle
from tests.openvino import needs_openvino
from tests.runtime.onnx_files import GraphWriter

FRAMES = np.random.default_rng(3).integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def onnxruntime() -> ModuleType:
    module: ModuleType = pytest.importorskip("onnxruntime")
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny())


def open_on_cpu(onnxruntime: ModuleType, model: bytes, graph: Graph) -> OrtStage:
    return OrtStage(onnxruntime, onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]), graph)


# --- the probe ----------------------------------------------------------------------------------------------------------------


def test_the_probe_is_what_it_says(onnxruntime: ModuleType) -> None:
    probe("cpu", lambda model, graph: open_on_cpu(onnxruntime, model, graph))
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(probe_model())
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add", "Relu"]
    assert model.opset_import[0].version == 17
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, first: expected(first),  # the first input for ever
        lambda x, first: expected(x) * np.float32(1.2),
        lambda x, first: np.zeros_like(expected(x)),
        lambda x, first: np.full_like(expected(x), np.nan),
    ],
    ids=["frozen", "scaled", "zero", "nan"],
)
def test_wrong_numbers_are_found(wrong: Any) -> None:
    class Stage:
        first: np.ndarray | None = None

        def run(self, feeds: Any) -> Any:
            self.first = feeds["x"].copy() if self.first is None else self.first
            return {"y": wrong(feeds["x"], self.first)}

    with pytest.raises(BackendError, match="broken computes wrong numbers on this machine"):
        probe("broken", lambda model, graph: Stage())


def test_rounding_of_small_types_is_not_wrong() -> None:
    """bf16 keeps 8 bits of each product."""

    class Stage:
        def run(self, feeds: Any) -> Any:
            bits = expected(feeds["x"]).view(np.uint32) & np.uint32(0xFFFF0000)
            return {"y": bits.view(np.float32)}

    probe("bf16", lambda model, graph: Stage())


def test_the_probe_runs_before_the_bundle_is_read(onnxruntime: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("runtime.backends.ort.probe", lambda name, opener: seen.append(name))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    OrtBackend("ort:cuda")
    assert seen == ["ort:cuda"]


# --- the INT8 probe ------------------------------------------------------------------------------------------------------------

CPUS = ("ort:cpu", "ort:openvino")


def written(name: str) -> bytes:
    """The INT8 probe's file, made anew."""
    writer = GraphWriter()
    scale = writer.constant(np.array(np.float32(1)))
    zero = writer.constant(np.array(np.uint8(128) if name == "ort:cpu" else np.int8(0)))
    weight = (
        writer.constant(np.full((8, 64), 127, np.int8)),
        writer.constant(np.ones(8, np.float32)),
        writer.constant(np.zeros(8, np.int8)),
    )
    if name == "ort:cpu":
        writer.add("QGemm", "x", scale, zero, *weight, out="y", domain="com.microsoft", transB=1)
        dtype = "uint8"
    else:
        integers = writer.add("QuantizeLinear", "x", scale, zero)
        activation = writer.add("DequantizeLinear", integers, scale, zero)
        writer.add("Gemm", activation, writer.add("DequantizeLinear", *weight, axis=0), out="y", transB=1)
        dtype = "float32"
    return writer.model(
        [Tensor(name="x", dtype=dtype, shape=(4, 64))], [Tensor(name="y", dtype="float32", shape=(4, 8))]
    )


class Product:
    """A stage that computes the probe with given sums of pairs of uint8 x int8 products, as CPUs do that have no VNNI."""

    def __init__(self, pair: Callable[[np.ndarray], np.ndarray], after: Callable[[np.ndarray], np.ndarray]) -> None:
        self._pair, self._after = pair, after

    def run(self, feeds: Any) -> Any:
        x = feeds["x"].astype(np.int64)
        x = x if feeds["x"].dtype == np.uint8 else x + 128
        pairs = self._pair((x * 127).reshape(4, 32, 2).sum(axis=2))
        sums = (pairs.sum(axis=1) - 128 * 127 * 64).astype(np.float32)
        return {"y": self._after(np.repeat(sums[:, None], 8, axis=1))}


def saturating(pairs: np.ndarray) -> np.ndarray:
    return np.clip(pairs, -32768, 32767)


def exact(values: np.ndarray) -> np.ndarray:
    return values


@pytest.mark.parametrize("name", CPUS)
def test_the_int8_probe_is_what_it_says(name: str) -> None:
    assert int8_model(name) == written(name)
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(int8_model(name)), full_check=name != "ort:cpu")


@pytest.mark.parametrize("name", CPUS)
def test_products_that_saturate_are_found(name: str) -> None:
    probe_int8(name, lambda model, graph: Product(exact, exact))
    probe_int8(
        name, lambda model, graph: Product(exact, lambda y: (y.view(np.uint32) & np.uint32(0xFFFF0000)).view("f4"))
    )
    with pytest.raises(BackendError, match="this CPU's 8-bit products saturate") as caught:
        probe_int8(name, lambda model, graph: Product(saturating, exact))
    assert caught.value.got == f"a sum of 64 products that is off by 99.2%, on {name}"
    assert "exact" in str(caught.value.expected)
    assert "--precision float" in caught.value.hint
    assert ("--backend ort:cpu" in caught.value.hint) == (name != "ort:cpu")
    assert not caught.value.absent  # worth a warning
    with pytest.raises(BackendError, match="saturate"):
        probe_int8(name, lambda model, graph: Product(exact, lambda y: y * np.float32(np.nan)))


@pytest.mark.usefixtures("onnxruntime")
def test_int8_on_a_cpu_is_probed_before_a_graph_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = add_int8(folder)
    order: list[str] = []
    load = OrtBackend.load
    monkeypatch.setattr("runtime.backends.ort.probe_int8", lambda name, opener: order.append(f"probe {name}"))
    monkeypatch.setattr(OrtBackend, "load", lambda *args: order.append("load") or load(*args))
    OrtBackend("ort:cpu", threads=1).open(folder, manifest.int8("ort-cpu"))
    assert order == ["probe ort:cpu", "load", "load"]
    order.clear()
    OrtBackend("ort:cpu", threads=1).open(folder, manifest)
    assert order == ["load", "load"]
    for name in set(PROVIDERS) - set(CPUS):
        probe_int8(name, lambda model, graph: pytest.fail("nobody's CPU"))


_OPEN = """
import sys
from pathlib import Path
from bundle.manifest import Manifest
from runtime.backends.ort import OrtBackend
OrtBackend(sys.argv[1], threads=1).open(Path(sys.argv[2]), Manifest.load(sys.argv[2]).int8())
"""


def opened_by(command: list[str], name: str, folder: Path, **environment: str) -> str:
    add_int8(folder)
    done = subprocess.run(
        [*command, sys.executable, "-c", _OPEN, name, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stderr


@pytest.mark.parametrize(("isa", "saturates"), [("AVX2", True), ("AVX512_CORE", True), ("AVX512_CORE_VNNI", False)])
def test_openvino_on_a_cpu_without_vnni(folder: Path, isa: str, saturates: bool) -> None:
    """oneDNN, which computes OpenVINO's products, can be told to take a CPU for less than it is."""
    needs_openvino()
    if not {"avx512_vnni", "avx512bw"} <= cpu_flags():
        pytest.skip("this CPU is itself one without VNNI")
    errors = opened_by([], "ort:openvino", folder, ONEDNN_MAX_CPU_ISA=isa)
    assert ("8-bit products saturate" in errors) == saturates
    assert saturates or errors == ""


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


# --- tensors that stay on the device ------------------------------------------------------------------------------------------


def device_policy(onnxruntime: ModuleType, folder: Path) -> Policy:
    """The chain of a GPU, with its values in host memory: the same code without the GPU."""

    class Backend:
        name = "ort:device"
        remark = ""

        def open(self, folder: Path, manifest: Manifest) -> OrtDeviceChain:
            def session(graph: Graph) -> Any:
                return onnxruntime.InferenceSession(str(folder / graph.file), providers=["CPUExecutionProvider"])

            return OrtDeviceChain(onnxruntime, session, manifest, "cpu")

    return Policy(folder, Manifest.load(folder), Backend())


def test_the_device_chain_is_the_host_chain(onnxruntime: ModuleType, folder: Path) -> None:
    device, host = device_policy(onnxruntime, folder), Policy.load(folder, "ort:cpu", threads=1)
    for ids in ((0, 7, 8, 9, 10, 2), LONG_IDS, (0, 7, 8, 9, 11, 2)):
        for one in (device, host):
            one.reset(token_ids=ids)
        for frame in FRAMES:
            got, right = device.step(frame), host.step(frame)
            np.testing.assert_array_equal(got.normalized, right.normalized)
            np.testing.assert_array_equal(got.feature, right.feature)
            assert set(got.timing) == set(right.timing)
    tokens = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(device.run_language(tokens), host.run_language(tokens))


def test_it_allocates_once(onnxruntime: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_numpy", lambda *arguments: made.append(1) or real(*arguments)
    )
    policy = device_policy(onnxruntime, folder)
    policy.reset(GO_LEFT)
    before = len(made)
    assert before == 11  # frames, tokens, three of the prompt, feature, action, two sets of h and c
    for frame in FRAMES:
        policy.step(frame)
    policy.reset(GO_LEFT)
    assert len(made) == before


def test_a_step_that_is_not_finite_is_taken_back(onnxruntime: ModuleType, folder: Path) -> None:
    device, host = device_policy(onnxruntime, folder), Policy.load(folder, "ort:cpu", threads=1)
    for one in (device, host):
        one.reset(GO_LEFT)
        one.step(FRAMES[0])
    bad = np.full((1, 8), np.nan, np.float32)
    assert not np.isfinite(device.run_action_head(bad)).all()
    for frame in FRAMES:
        np.testing.assert_array_equal(device.step(frame).normalized, host.step(frame).normalized)


@pytest.mark.parametrize("spoiled", ["image_tokens", "feature"])
def test_what_a_stage_would_hide_is_seen(
    onnxruntime: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    """As INT8 does: the stage that reads the NaN gives finite numbers."""
    device, host = device_policy(onnxruntime, folder), Policy.load(folder, "ort:cpu", threads=1)
    for one in (device, host):
        one.reset(GO_LEFT)
        one.step(FRAMES[0])
    chain: Any = device._chain
    run, kept = chain._run, {}
    writer, reader = ("vision", "language") if spoiled == "image_tokens" else ("language", "action_head")

    def run_and_spoil(stage: str) -> None:
        value = chain._values[spoiled]
        if stage == reader:
            value.update_inplace(kept[spoiled])
        run(stage)
        if stage == writer:
            kept[spoiled] = value.numpy().copy()
            value.update_inplace(np.full_like(kept[spoiled], np.inf))

    with monkeypatch.context() as patch:
        patch.setattr(chain, "_run", run_and_spoil)
        with pytest.raises(BackendError, match="not finite"):
            device.step(FRAMES[1])
    for frame in FRAMES[2:]:
        np.testing.assert_array_equal(device.step(frame).normalized, host.step(frame).normalized)


def test_a_closed_chain_holds_nothing(onnxruntime: ModuleType, folder: Path) -> None:
    policy = device_policy(onnxruntime, folder)
    policy.reset(GO_LEFT)
    policy.close()
    chain: Any = policy._chain
    assert not chain._values
    assert not chain._sessions
    policy.close()


# --- plugins ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ort_plugins.PLUGINS)
def test_a_plugin_that_is_not_installed(onnxruntime: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plugin = ort_plugins.PLUGINS[name]
    monkeypatch.setitem(sys.modules, plugin.package, None)
    # A plugin that another test has registered in this process is listed.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=f"{name} is not installed") as caught:
        OrtBackend(name)
    assert caught.value.absent
    assert f"jetvla[{plugin.extra}]" in caught.value.hint


def test_an_onnxruntime_without_plugins(onnxruntime: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules,
        "onnxruntime_ep_openvino",
        SimpleNamespace(get_ep_name=lambda: "OpenVINOExecutionProvider", __spec__=object()),
    )
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library", raising=False)
    ort_plugins.plugin_device.cache_clear()
    with pytest.raises(BackendError, match="needs a newer ONNX Runtime"):
        OrtBackend("ort:openvino")


def test_openvino(onnxruntime: ModuleType, folder: Path) -> None:
    """The real plugin: changed inputs are seen, the numbers are right, and it really runs there."""
    ort_plugins.plugin_device.cache_clear()
    needs_openvino()
    backend = OrtBackend("ort:openvino", threads=1)
    policy = Policy(folder, Manifest.load(folder), backend)
    host = Policy.load(folder, "ort:cpu", threads=1)
    for one in (policy, host):
        one.reset(GO_LEFT)
    for frame in FRAMES:
        np.testing.assert_allclose(policy.step(frame).normalized, host.step(frame).normalized, atol=1e-5)
    session = backend._session(probe_model(), PROBE)
    assert session.get_providers()[0] == "OpenVINOExecutionProvider"


def test_openvino_rounds_int8_and_gives_pages_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort_plugins.plugin_device.cache_clear()
    needs_openvino()
    add_int8(folder)
    released: list[str] = []
    monkeypatch.setattr(mapped_weights, "release", lambda path: released.append(path.name) or 0)
    backend = OrtBackend("ort:openvino", threads=1)
    policy = Policy(folder, Manifest.load(folder).int8(), backend)
    assert not backend._exact
    policy.reset(GO_LEFT)
    weights = ["vision.int8.onnx.data", "action_head.fp32.onnx", "language.int8.onnx.data"]
    assert released == weights
    for _ in range(3):
        policy.step(FRAMES[0])
    assert sorted(released[3:]) == sorted(weights)  # once more after the first run, and never again
    policy.close()


def test_openvino_does_not_hand_nodes_to_the_cpu(onnxruntime: ModuleType, tmp_path: Path) -> None:
    ort_plugins.plugin_device.cache_clear()
    needs_openvino()
    writer = GraphWriter()
    writer.add("NoSuchOperator", "x", out="y")
    (tmp_path / "g.onnx").write_bytes(writer.model(PROBE.inputs, PROBE.outputs))
    with pytest.raises(BackendError, match="ort:openvino cannot load bad"):
        OrtBackend("ort:openvino")._session(
            (tmp_path / "g.onnx").read_bytes(),
            Graph(file="bad", form="portable", sequence=None, nodes=1, inputs=(), outputs=()),
        )


# --- falling back -------------------------------------------------------------------------------------------------------------


def backends_that(monkeypatch: pytest.MonkeyPatch, **errors: BackendError) -> None:
    def open_one(name: str, *, threads: int = 0, verify: bool = True) -> Any:
        error = errors.get(name.replace(":", "_").replace("-", "_"))
        if error is not None:
            raise error
        return select.OrtBackend("ort:cpu", threads=1)

    monkeypatch.setattr("runtime.policy.open_backend", open_one)


@pytest.mark.usefixtures("onnxruntime")
def test_absent_backends_are_passed_over_quietly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = BackendError("not here", hint="-", absent=True)
    backends_that(monkeypatch, trt=absent, ort_tensorrt=absent, ort_tensorrt_rtx=absent, ort_cuda=absent)
    with caplog.at_level(logging.INFO, "jetvla"):
        assert Policy.load(folder).backend == "ort:cpu"
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert "backend trt passed over: not here" in caplog.text


@pytest.mark.usefixtures("onnxruntime")
def test_broken_backends_are_skipped_loudly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = EngineError("vision.engine is corrupt", got="sha256 1", hint="build it again.")
    absent = BackendError("not here", hint="-", absent=True)
    backends_that(monkeypatch, trt=broken, ort_tensorrt=absent, ort_tensorrt_rtx=absent, ort_cuda=absent)
    assert Policy.load(folder).backend == "ort:cpu"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "backend trt skipped: vision.engine is corrupt" in warnings[0]
    assert "running on ort:cpu" in warnings[1]


def test_a_named_backend_never_falls_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends_that(monkeypatch, trt=EngineError("vision.engine is corrupt", hint="-"))
    with pytest.raises(EngineError, match="corrupt"):
        Policy.load(folder, "trt")


def test_a_lost_gpu_is_not_papered_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends_that(monkeypatch, trt=DeviceError("the GPU failed", hint="-", sticky=True))
    with pytest.raises(DeviceError, match="the GPU failed"):
        Policy.load(folder)


def test_engines_spare_the_hashing_of_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the named backend reads is hashed, and no gigabytes beside it."""
    pytest.importorskip("onnxruntime")
    hashed: list[str] = []
    real = manifest_module.sha256_file
    monkeypatch.setattr(manifest_module, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    absent = BackendError("not here", hint="-", absent=True)
    backends_that(monkeypatch, trt=absent, ort_tensorrt=absent, ort_tensorrt_rtx=absent, ort_cuda=absent)
    with pytest.raises(BackendError):
        Policy.load(folder, "trt")
    stages = Manifest.load(folder).stage_files()
    assert hashed
    assert not stages & set(hashed)
    assert Policy.load(folder).backend == "ort:cpu"
    assert stages <= set(hashed)


def test_weights_are_hashed_before_onnx_runtime_reads_them(folder: Path) -> None:
    path = folder / "vision.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is corrupt"):
        Policy.load(folder)
