"""One builder for every TensorRT: what each version is told, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bundle.errors import DeviceError, EngineBuildError
from export.to_tensorrt import build_engine
from runtime.backends.fake_gpu import ORIN, FakeCuda
from runtime.backends.fake_tensorrt import VERSIONS
from tests.bundles import Tiny, make_bundle
from tests.engines import fake_tensorrt, go_on, request

pytest.importorskip("onnxruntime")  # it computes what the fake engines compute
pytestmark = pytest.mark.fake_gpu


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny()) / "language.fp32.s12.onnx"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise DeviceError("no GPU", hint="-")

    monkeypatch.setattr("export.to_tensorrt.open_cuda", none)


@pytest.mark.parametrize("version", VERSIONS)
def test_types_come_from_the_graph(graph: Path, tmp_path: Path, version: str) -> None:
    tensorrt = fake_tensorrt(version)
    built = build_engine(tensorrt, request(graph, tmp_path / "x.engine", workspace_bytes=1 << 28), go_on)
    module, network, config = tensorrt.module, tensorrt.module._last_network, tensorrt.module._last_config
    assert config._workspace == 1 << 28
    assert config.builder_optimization_level == 3
    assert network._creation == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert config._flags == ({module.BuilderFlag.REQUIRE_USER_ALLOCATION} if version.startswith("rtx") else set())
    assert {tensor.dtype for tensor in built.inputs} == {"float32", "int64"}
    assert built.layers == 4
    assert (tmp_path / "x.engine").stat().st_size > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_the_timing_cache_grows(graph: Path, tmp_path: Path, version: str) -> None:
    cache = tmp_path / "timing.cache"
    for count in (1, 2):
        tensorrt = fake_tensorrt(version)
        build_engine(tensorrt, request(graph, tmp_path / "x.engine", timing_cache=str(cache)), go_on)
        assert cache.read_bytes() == b"timed;" * count


def test_progress_is_told_and_can_stop_the_build(graph: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, str | None, int, int]] = []

    def stop_after_one(*report: Any) -> bool:
        seen.append(report)
        return len(seen) < 2

    with pytest.raises(EngineBuildError, match="was stopped"):
        build_engine(fake_tensorrt(), request(graph, tmp_path / "x.engine"), stop_after_one)
    assert seen == [("Building engine", None, 0, 2), ("Building engine", None, 1, 2)]
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parsers_complaint(tmp_path: Path, version: str) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(EngineBuildError, match="does not take the graph of bad") as caught:
        build_engine(fake_tensorrt(version), request(tmp_path / "bad.onnx", tmp_path / "x"), go_on)
    assert "node 3 'layers.0/qkv' (Gemm): UNSUPPORTED_NODE: " in str(caught.value)


def test_the_builders_refusal(graph: Path, tmp_path: Path) -> None:
    tensorrt = fake_tensorrt(refuse="Could not find any implementation for node {Gemm_7}")
    with pytest.raises(EngineBuildError, match="could not build an engine") as caught:
        build_engine(tensorrt, request(graph, tmp_path / "x"), go_on)
    assert "Gemm_7" in str(caught.value)


def test_out_of_memory(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"ran out of memory(?s:.*)--workspace-mb"):
        build_engine(fake_tensorrt(out_of_memory=True), request(graph, tmp_path / "x"), go_on)


@pytest.mark.parametrize("version", VERSIONS)
def test_refit(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    gpu = FakeCuda(ORIN)
    monkeypatch.setattr("export.to_tensorrt.open_cuda", lambda: gpu)
    tensorrt = fake_tensorrt(version, gpu)
    first, second, rigid = tmp_path / "first.engine", tmp_path / "second.engine", tmp_path / "rigid.engine"
    build_engine(tensorrt, request(graph, first, refit=True), go_on)
    build_engine(tensorrt, request(graph, rigid), go_on)
    built = build_engine(tensorrt, request(graph, second, refit=True, refit_from=str(first)), go_on)
    assert built.refitted
    assert second.exists()
    assert not build_engine(tensorrt, request(graph, second, refit=True, refit_from=str(rigid)), go_on).refitted
    assert first.with_suffix(".layers").read_text() == '{"Layers": ["fused"]}'
