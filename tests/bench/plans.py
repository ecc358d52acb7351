"""Manifests of policies that were never built, and calibrations that nobody measured, for tests of the planner."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench.calibration import SCHEMA, Calibration, Machine, Product
from bench.workload import STAGES, Workload, file_bytes
from bundle.manifest import Graph, Manifest, Precision, Stage, Tensor
from tests.bundles import signed_manifest

MACHINE = Machine(processor="Test CPU", threads=2, backend="ort:cpu", version="1.0")


def manifest_of(work: Workload, precision: Precision = "fp32") -> Manifest:
    """What a build of these sizes would say of itself."""
    size = 2 if precision == "fp16" else 4

    def graph(stage: str, sequence: int | None) -> Graph:
        outputs = (Tensor(name="y", dtype="float32", shape=(1, work.dims.chunk, work.outputs)),)
        name = f"{stage}.s{sequence}.onnx"
        nodes = work.nodes.get(stage, 1)
        return Graph(file=name, form="portable", sequence=sequence, nodes=nodes, inputs=(), outputs=outputs)

    stages = {}
    for stage in STAGES:
        head = stage == "action_head"
        stages[stage] = Stage(
            key="k",
            precision="fp32" if head else precision,
            weights=f"{stage}.data",
            weight_bytes=file_bytes(work, stage, 4 if head else size),
            graphs=tuple(graph(stage, bucket) for bucket in (work.buckets if stage == "language" else (None,))),
        )
    blank = Manifest.decode(signed_manifest())
    preprocessing = msgspec.structs.replace(blank.preprocessing, cameras=("static", "hand")[: work.cameras])
    return msgspec.structs.replace(
        blank,
        precision=precision,
        dimensions=work.dims,
        x_attn_causal=work.x_attn_causal,
        prompt=msgspec.structs.replace(blank.prompt, buckets=work.buckets),
        preprocessing=preprocessing,
        action=msgspec.structs.replace(blank.action, head=work.head),
        stages=stages,
    )


def save_manifest(manifest: Manifest, folder: Path) -> Path:
    """A folder that holds nothing but the manifest: enough to plan for."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(folder)
    return folder


def product(
    m: int, n: int, k: int, flops: float, *, batch: int = 1, cold: bool = True, precision: str = "fp32"
) -> Product:
    """A measured rate."""
    return Product(m=m, n=n, k=k, batch=batch, cold=cold, precision=precision, flops=flops)  # type: ignore[arg-type]


def calibration(*products: Product, machine: Machine = MACHINE, drift: float = 1.0, share: float = 1.0) -> Calibration:
    """Round numbers: 1e9 bytes a second for everything that is no product, a microsecond a node."""
    return Calibration(
        schema=SCHEMA,
        created="2026-01-01T00:00:00+00:00",
        machine=machine,
        products=products or (product(88, 2048, 2048, 1e11),),
        shorts=(),
        pointwise=dict.fromkeys(("norm", "softmax", "gelu", "quick_gelu", "move"), 1e9),
        bandwidth=1e10,
        start_us=1.0,
        drift=drift,
        share=share,
    )
