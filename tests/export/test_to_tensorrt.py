"""One graph to one engine: what the real parser and builder say when they refuse, and what versions are told beyond the basics.

What every version is told by default is tested in test_tensorrt_versions.py.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from bundle.errors import DeviceError, EngineBuildError
from export.to_tensorrt import EngineBuilt, build_engine
from runtime.backends.fake_gpu import ORIN, FakeCuda
from runtime.backends.fake_tensorrt import VERSIONS
from runtime.tensorrt_flavour import TensorRT, open_flavour
from tests.checkpoints import file_size_limit
from tests.engines import fake_tensorrt, go_on, request


def write_model(path: Path, op: str = "Tanh", *, width: int = 2, weights: str | None = None) -> Path:
    """y = op(x), x float32 [width, width]; or y = x + w, with w in a file of its own."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (width, width)) for name in ("x", "y")]
    inputs, initializers = ["x"], []
    if weights is not None:
        tensor = helper.make_tensor("w", TensorProto.FLOAT, (width, width), b"\0" * 4 * width**2, raw=True)
        onnx.external_data_helper.set_external_data(tensor, weights)
        tensor.ClearField("raw_data")
        initializers.append(tensor)
        inputs.append("w")
    node = helper.make_node(op, inputs, ["y"], name="layers.0/odd")
    graph = helper.make_graph([node], "graph", value[:1], value[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tanh.onnx")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise DeviceError("no GPU", hint="-")

    monkeypatch.setattr("export.to_tensorrt.open_cuda", none)


# --- TensorRT-RTX itself ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx(no_gpu: None) -> Iterator[TensorRT]:
    """TensorRT-RTX in this process, without garbage collection.

    It calls the logger while it holds a lock that destroying a builder takes. A collection that begins in the logger and finds the
    builder of an earlier test, kept alive by an exception, would wait for ever. A worker process has one builder only.
    """
    pytest.importorskip("tensorrt_rtx")
    gc.collect()
    gc.disable()
    yield open_flavour("rtx")
    gc.enable()


def build_rtx(rtx: TensorRT, graph: Path, **options: Any) -> EngineBuilt:
    report = options.pop("report", go_on)
    fields = {"flavour": "rtx", "label": "vision", "target": "sm86", **options}
    return build_engine(rtx, request(graph, graph.with_suffix(".engine"), **fields), report)


@pytest.mark.parametrize("target", ["sm75", "sm86", "sm120", "portable"])
def test_an_engine_for_a_gpu_that_is_not_here(rtx: TensorRT, graph: Path, tmp_path: Path, target: str) -> None:
    cache = tmp_path / "timing.cache"
    built = build_rtx(rtx, graph, target=target, timing_cache=str(cache))
    assert graph.with_suffix(".engine").stat().st_size > 0
    assert [tensor.name for tensor in (*built.inputs, *built.outputs)] == ["x", "y"]
    assert (built.layers, built.refitted) == (1, False)
    # It measures nothing: there is no cache to keep.
    assert not built.timing_cache
    assert not cache.exists()


def test_the_real_builder_keeps_the_flags(rtx: TensorRT) -> None:
    config, flags = rtx.builder().create_builder_config(), rtx.module.BuilderFlag
    assert config.get_flag(flags.TF32)
    rtx.set_flags(config)
    assert not config.get_flag(flags.TF32)
    assert config.get_flag(
        flags.REQUIRE_USER_ALLOCATION
    )  # an engine that may allocate while it runs cannot be captured


@pytest.mark.parametrize("op", ["NoSuchOperator", "Unique"])
def test_a_node_that_is_not_taken_is_named(rtx: TensorRT, tmp_path: Path, op: str) -> None:
    """One operator that does not exist, and one of ONNX that TensorRT lacks."""
    graph = write_model(tmp_path / "odd.onnx", op)
    with pytest.raises(EngineBuildError, match="does not take the graph of vision") as caught:
        build_rtx(rtx, graph)
    assert re.search(rf"node 0 'layers\.0/odd' \({op}\): [A-Z_]{{5,}}: ", str(caught.value))
    assert "hint: " in str(caught.value)
    assert not graph.with_suffix(".engine").exists()


def test_weights_that_are_missing_are_named(rtx: TensorRT, tmp_path: Path) -> None:
    graph = write_model(tmp_path / "sum.onnx", "Add", weights="sum.data")
    with pytest.raises(EngineBuildError, match=r"graph of vision(?s:.*)Failed to import initializer: w"):
        build_rtx(rtx, graph)


@pytest.mark.parametrize("content", [b"not ONNX", b"", None])
def test_what_is_not_a_graph(rtx: TensorRT, tmp_path: Path, content: bytes | None) -> None:
    graph = tmp_path / "bad.onnx"
    if content is not None:
        graph.write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"(for|of) vision\n"):
        build_rtx(rtx, graph)


def test_progress_comes_from_the_builder_and_stops_it(rtx: TensorRT, graph: Path) -> None:
    seen: list[tuple[str, str | None, int, int]] = []

    def note(*report: Any) -> bool:
        seen.append(report)
        return True

    build_rtx(rtx, graph, report=note)
    roots = [report for report in seen if report[1] is None]
    assert {report[0] for report in roots} == {roots[0][0]}
    assert [report[2] for report in roots] == sorted(report[2] for report in roots)
    assert roots[-1][2] == roots[-1][3]
    phases = {report[0] for report in seen}
    assert all(report[1] in phases for report in seen if report[1] is not None)

    with pytest.raises(EngineBuildError, match=r"build of vision was stopped(?s:.*)finished engines are kept"):
        build_rtx(rtx, graph, report=lambda *_: False)


def test_a_full_disk_is_not_a_truncated_engine(rtx: TensorRT, graph: Path) -> None:
    """TensorRT takes a failed write for a success, so the writer has to remember it."""
    with file_size_limit(500), pytest.raises(OSError, match="File too large"):
        build_rtx(rtx, graph)


# --- what versions are told ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("version", VERSIONS)
def test_options_reach_the_builder(graph: Path, tmp_path: Path, version: str) -> None:
    tensorrt = fake_tensorrt(version)
    options = {"optimization_level": 5, "workspace_bytes": 123 << 20, "refit": True}
    build_engine(tensorrt, request(graph, tmp_path / "x.engine", **options), go_on)
    config, flags = tensorrt.module._last_config, tensorrt.module.BuilderFlag
    assert (config.builder_optimization_level, config._workspace) == (5, 123 << 20)
    assert config.profiling_verbosity == tensorrt.module.ProfilingVerbosity.DETAILED
    assert flags.REFIT in config._flags
    assert flags.TF32 not in config._flags


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("refused_by", ["create_timing_cache", "set_timing_cache"])
def test_times_of_another_gpu_are_forgotten(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    """TensorRT takes no foreign content; the build starts a new cache instead of failing, and the next one has it."""
    file = tmp_path / "timing.cache"
    file.write_bytes(b"of another GPU")
    tensorrt = fake_tensorrt("10.3.0")
    kind = tensorrt.module.IBuilderConfig
    real = getattr(kind, refused_by)

    def refuse(self: Any, given: Any, *rest: Any) -> Any:
        content = given if isinstance(given, bytes) else given._content
        refusal = None if refused_by == "create_timing_cache" else False
        return refusal if content == b"of another GPU" else real(self, given, *rest)

    monkeypatch.setattr(kind, refused_by, refuse)
    for count in (1, 2):
        built = build_engine(tensorrt, request(graph, tmp_path / "x.engine", timing_cache=str(file)), go_on)
        assert built.timing_cache
        assert file.read_bytes() == b"timed;" * count


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "words",
    [
        "Requested size was 1073741824 bytes: out of memory",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (cudaErrorMemoryAllocation)",
        "std::bad_alloc",
        "Tactic Device request: 2048MB Available: 512MB. Device memory is insufficient GPU memory: insufficient memory",
    ],
)
def test_words_for_too_little_memory(graph: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(EngineBuildError, match="ran out of memory while it built tanh") as caught:
        build_engine(fake_tensorrt(refuse=words), request(graph, tmp_path / "x.engine"), go_on)
    assert all(word in caught.value.hint for word in ("swap", "--workspace-mb", "--optimization-level"))


@pytest.mark.usefixtures("no_gpu")
def test_memory_that_python_cannot_get(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> bytes:
        raise MemoryError

    tensorrt = fake_tensorrt()
    monkeypatch.setattr(tensorrt.module.Builder, "build_serialized_network", none)
    with pytest.raises(EngineBuildError, match="ran out of memory"):
        build_engine(tensorrt, request(graph, tmp_path / "x.engine"), go_on)


# --- refit --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    gpu = FakeCuda(ORIN)
    monkeypatch.setattr("export.to_tensorrt.open_cuda", lambda: gpu)
    return gpu


def test_weights_that_are_missing_after_a_refit(
    graph: Path, tmp_path: Path, orin: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refit that leaves old weights in would be a mixture of two checkpoints."""
    tensorrt = fake_tensorrt("10.3.0", orin)
    first, second = tmp_path / "first.engine", tmp_path / "second.engine"
    build_engine(tensorrt, request(graph, first, refit=True), go_on)
    monkeypatch.setattr(tensorrt.module.Refitter, "get_missing_weights", lambda self: ["layers.0.weight"])
    built = build_engine(tensorrt, request(graph, second, refit=True, refit_from=str(first)), go_on)
    assert not built.refitted
    assert second.stat().st_size > 0


@pytest.mark.parametrize("content", [b"FAKEPLAN{", b'FAKEPLAN{"fake": "10.16.1"}'])
def test_an_engine_that_does_not_load_is_not_refitted(
    graph: Path, tmp_path: Path, orin: FakeCuda, content: bytes
) -> None:
    source = tmp_path / "source.engine"
    source.write_bytes(content)
    wanted = request(graph, tmp_path / "x.engine", refit=True, refit_from=str(source))
    assert not build_engine(fake_tensorrt("10.3.0", orin), wanted, go_on).refitted


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_nothing_is_refitted(graph: Path, tmp_path: Path) -> None:
    tensorrt = fake_tensorrt("10.3.0")
    first, second = tmp_path / "first.engine", tmp_path / "second.engine"
    build_engine(tensorrt, request(graph, first, refit=True), go_on)
    assert not build_engine(tensorrt, request(graph, second, refit=True, refit_from=str(first)), go_on).refitted
    assert second.exists()
