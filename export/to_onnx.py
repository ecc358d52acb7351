"""One clean ONNX graph a stage: tensor names, shapes and files of the bundle.

Binds the stages (what is computed) to the emitter (how a graph is written). The names here are the contract with the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bundle.manifest import File, FloatPrecision, Graph, Stage
from export import stages
from export.onnx_ops import OnnxOps
from export.stages import StageDims
from export.weight_file import WeightFile
from export.weights import MergedWeights
from train.base import Base
from train.policy import KosmosPolicy
from train.vision_resampler import DEPTH

COMPUTE: dict[FloatPrecision, str] = {"fp32": "float32", "fp16": "float16"}
# Sequence lengths are rounded up to this: GEMM tiles of every backend divide by it, and near-equal instructions share a graph.
BUCKET_STEP = 8


def stage_dims(
    policy: KosmosPolicy, base: Base, *, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> StageDims:
    """What the stages need to know, from config, base and checkpoint."""
    vision, text = base.kosmos.vision_config, base.kosmos.text_config
    return StageDims(
        image_size=vision.image_size,
        patch=vision.patch_size,
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_eps=vision.layer_norm_eps,
        width=text.embed_dim,
        layers=text.layers,
        heads=text.attention_heads,
        eps=text.layer_norm_eps,
        latents=base.kosmos.latent_query_num,
        cameras=2 if policy.spec.hand_camera else 1,
        embed_scale=text.embed_dim**0.5 if text.scale_embedding else 1.0,
        x_attn_causal=policy.conventions.x_attn_causal,
        mean=mean,
        std=std,
        window=policy.spec.window,
        chunk=policy.spec.chunk,
        head=policy.spec.head,
        perceiver=DEPTH if policy.resamples else 0,
    )


def round_up(length: int) -> int:
    """The bucket of a sequence of `length` slots."""
    return -(-length // BUCKET_STEP) * BUCKET_STEP


def export_stage(
    stage: str,
    folder: Path,
    weights: MergedWeights,
    dims: StageDims,
    *,
    precision: FloatPrecision,
    buckets: Sequence[int],
    key: str,
    wide: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> tuple[Stage, dict[str, File]]:
    """Write a stage's graphs and weights into `folder`; the operations `wide` in fp32, see OnnxOps.

    Returns:
        The stage's manifest entry, and the integrity record of its weight file (graphs are small; the caller hashes them).

    Raises:
        ExportError: the graph is not valid.
    """
    path = folder / f"{stage}.{precision}.onnx.data"
    graphs = []
    with WeightFile(path, progress) as file:
        for sequence in buckets if stage == "language" else (None,):
            ops = OnnxOps(file, COMPUTE[precision], wide)
            name = f"{stage}.{precision}.onnx" if sequence is None else f"{stage}.{precision}.s{sequence}.onnx"
            inputs, outputs, nodes = _emit(stage, ops, weights, dims, sequence, folder / name)
            graphs.append(
                Graph(file=name, form="portable", sequence=sequence, nodes=nodes, inputs=inputs, outputs=outputs)
            )
    entry = Stage(key=key, precision=precision, weights=path.name, weight_bytes=file.bytes, graphs=tuple(graphs))
    return entry, {path.name: File(sha256=file.sha256, bytes=file.bytes)}


def _emit(
    stage: str, ops: OnnxOps, weights: MergedWeights, dims: StageDims, sequence: int | None, path: Path
) -> tuple[tuple, tuple, int]:  # type: ignore[type-arg]
    tokens = [1, dims.image_tokens, dims.width]
    if stage == "vision":
        frames = ops.input("frames", "uint8", [dims.cameras, dims.image_size, dims.image_size, 3])
        return ops.save(path, stage, [("image_tokens", stages.vision(ops, weights, dims, frames), tokens)])
    if stage == "language":
        assert sequence is not None
        feature = stages.language(
            ops,
            weights,
            dims,
            sequence,
            ops.input("image_tokens", "float32", tokens),
            ops.input("prompt", "float32", [1, sequence, dims.width]),
            ops.input("image_index", "int64", [sequence]),
            ops.input("action_index", "int64", [dims.head.latent + dims.head.told]),
        )
        return ops.save(path, stage, [("feature", feature, [1, dims.feature])])
    state = [dims.window, dims.head.layers, dims.hidden]
    action, h, c = stages.action_head(
        ops,
        weights,
        dims,
        ops.input("feature", "float32", [1, dims.feature]),
        ops.input("h", "float32", state),
        ops.input("c", "float32", state),
    )
    chunk = [1, dims.chunk, dims.head.outputs]
    return ops.save(path, stage, [("action", action, chunk), ("next_h", h, state), ("next_c", c, state)])
