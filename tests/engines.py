"""Engines for tests: made by the fake TensorRT from a bundle's own graphs, published as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bundle import engine_cache
from bundle.engine_cache import EngineRecord, EngineSettings
from bundle.hashing import sha256_file
from bundle.manifest import Manifest
from export.to_tensorrt import EngineBuilt, EngineRequest, build_engine
from runtime.backends.fake_gpu import FakeCuda
from runtime.backends.fake_tensorrt import fake_module
from runtime.backends.trt import TrtBackend
from runtime.gpu import Device
from runtime.tensorrt_flavour import TensorRT

SETTINGS = EngineSettings(optimization_level=3, refit=False, code="test", graph="g")


def go_on(*_: object) -> bool:
    """A report that never stops a build."""
    return True


def fake_tensorrt(version: str = "10.3.0", cuda: FakeCuda | None = None, **options: Any) -> TensorRT:
    return TensorRT(fake_module(version, cuda, **options), "rtx" if version.startswith("rtx") else "trt")


def request(graph: Path, output: Path, **options: Any) -> EngineRequest:
    fields: dict[str, Any] = {
        "flavour": "trt",
        "label": graph.stem,
        "graph": str(graph),
        "output": str(output),
        "layers_output": str(output.with_suffix(".layers")),
        "target": None,
        "optimization_level": 3,
        "workspace_bytes": 1 << 30,
        "refit": False,
        "timing_cache": None,
    }
    return EngineRequest(**{**fields, **options})


def add_engines(
    bundle: Path,
    tensorrt: TensorRT,
    device: Device,
    *,
    manifest: Manifest | None = None,
    buckets: tuple[int, ...] | None = None,
    built_at: str = "2026-01-01T00:00:00+00:00",
) -> list[EngineRecord]:
    """Build all engines of a bundle, or of its view `manifest`, for a device (fake TensorRT only) and publish them."""
    manifest = manifest or Manifest.load(bundle)
    fingerprint = tensorrt.fingerprint(device)
    records = []
    for stage, graph in engine_cache.graphs(manifest):
        if buckets is not None and graph.sequence is not None and graph.sequence not in buckets:
            continue
        folder = engine_cache.fingerprint_folder(bundle, fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{graph.file}.building"
        built = build_engine(tensorrt, request(bundle / graph.file, temporary), go_on)
        record = record_of(manifest, stage, graph.sequence, fingerprint, temporary, built, built_at)
        engine_cache.publish(bundle, temporary, record)
        records.append(record)
    return records


def record_of(
    manifest: Manifest,
    stage: str,
    sequence: int | None,
    fingerprint: str,
    engine: Path,
    built: EngineBuilt,
    built_at: str,
    settings: EngineSettings = SETTINGS,
) -> EngineRecord:
    content = engine_cache.content_key(manifest, stage, manifest.graph(stage, sequence))
    return engine_cache.new_record(
        stage=stage,
        sequence=sequence,
        content=content,
        key=engine_cache.engine_key(content, fingerprint, settings),
        fingerprint=fingerprint,
        settings=settings,
        origin="built",
        sha256=sha256_file(engine),
        bytes=engine.stat().st_size,
        layers=built.layers,
        inputs=built.inputs,
        outputs=built.outputs,
        seconds=built.seconds,
        built_at=built_at,
    )


def fake_backend(bundle: Path, device: Device, version: str = "10.3.0", **cuda: Any) -> tuple[TrtBackend, FakeCuda]:
    """A TensorRT backend on a fake GPU, with engines in the bundle; and the GPU."""
    gpu = FakeCuda(device, **cuda)
    tensorrt = fake_tensorrt(version, gpu)
    add_engines(bundle, tensorrt, device)
    return TrtBackend(cuda=gpu, tensorrt=tensorrt), gpu
