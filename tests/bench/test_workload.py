"""The operations that a plan counts are those of the graphs: products, weights, and sizes that no manifest states."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import pytest

from bench.workload import FULL, STAGES, Workload, file_bytes, io_bytes, sized, stage_ops, workload_of
from bundle.errors import ConfigError
from tests.bench.plans import manifest_of

pytest.importorskip("onnx")
pytest.importorskip("torch")

import onnx
import torch

from bundle.manifest import Dimensions, Precision, Stage
from export.to_onnx import export_stage
from tests.policies import TinyOptions, TinyPolicy, tiny_policy

BUCKETS = (24, 32)
VARIANTS = (
    TinyOptions(dtype=torch.float32),
    TinyOptions(dtype=torch.float32, head="velocities", window=1),
    TinyOptions(dtype=torch.float32, head="classes", hand_camera=True, latent=2, window=2),
    TinyOptions(dtype=torch.float32, head="classes", told=True, latent=2),
    TinyOptions(dtype=torch.float32, vision_resampler=True, hand_camera=True),
    TinyOptions(dtype=torch.float32, vision_resampler=True, packing="fork_overwrite"),
    TinyOptions(dtype=torch.float32, x_attn_causal=True, text_layers=1, vision_layers=1, lstm_layers=1),
)
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options.name)


def workload(tiny: TinyPolicy) -> Workload:
    """The sizes of a tiny policy; its feed-forward widths are in tests/policies.py."""
    dims = tiny.dims
    return Workload(
        name="tiny",
        dims=Dimensions(
            image_size=dims.image_size, vision_width=dims.vision_width, vision_layers=dims.vision_layers,
            vision_heads=dims.vision_heads, embed_dim=dims.width, text_layers=dims.layers, text_heads=dims.heads,
            vocab_size=60, image_tokens=dims.latents, latent=dims.head.latent, window=dims.window, chunk=dims.chunk,
            lstm_layers=dims.head.layers, lstm_hidden=dims.head.hidden,
        ),
        cameras=dims.cameras, head=dims.head.kind, outputs=dims.head.outputs, x_attn_causal=dims.x_attn_causal,
        vision_ffn=40, text_ffn=48, nodes={}, buckets=BUCKETS, perceiver=dims.perceiver, told=dims.head.told,
    )  # fmt: skip


def exported(tiny: TinyPolicy, folder: Path, precision: Precision) -> dict[str, Stage]:
    """All stages written as a build writes them."""
    return {
        stage: export_stage(
            stage, folder, tiny.weights, tiny.dims,
            precision="fp32" if stage == "action_head" else precision, buckets=BUCKETS, key="k",
        )[0]
        for stage in STAGES
    }  # fmt: skip


def products_of(path: Path) -> int:
    """2 m n k over all products of a graph, from inferred shapes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in model.graph.node:
        assert node.op_type not in ("Conv", "Einsum", "LSTM"), "a product that this test does not count"
        if node.op_type in ("Gemm", "MatMul"):
            total += 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return total


@variants
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_counts_the_products_and_weights_of_real_graphs(
    options: TinyOptions, precision: Precision, tmp_path: Path
) -> None:
    tiny = tiny_policy(options)
    work = workload(tiny)
    with torch.inference_mode():
        entries = exported(tiny, tmp_path, precision)
    for stage, entry in entries.items():
        for graph in entry.graphs:
            counted = sum(op.flops for op in stage_ops(work, stage, graph.sequence or 0))
            assert counted == products_of(tmp_path / graph.file), f"{stage} {graph.sequence}"
        size = 2 if entry.precision == "fp16" else 4
        # Every weight starts on a page; the last one's page is not filled up.
        assert 0 <= file_bytes(work, stage, size) - entry.weight_bytes < 4096, stage
        moved = sum(prod(tensor.shape) * {"uint8": 1, "int64": 0}.get(tensor.dtype, 4)
                    for tensor in (*entry.graphs[0].inputs, *entry.graphs[0].outputs))  # fmt: skip
        assert io_bytes(work, stage, BUCKETS[0]) == moved, stage


def test_the_full_size_is_what_is_known_of_it() -> None:
    gflop = {stage: sum(op.flops for op in stage_ops(FULL, stage, 88)) / 1e9 for stage in STAGES}
    # The plain model at 96 tokens: 404 GFLOP, of which 234 decoder, 162 ViT and 7.5 resampler. 88 slots are 11/12 of the decoder, less all
    # but keys and values of its last layer.
    assert gflop["vision"] == pytest.approx(162 + 7.5, rel=0.04)
    assert gflop["language"] == pytest.approx(234 * 88 / 96, rel=0.04)
    assert gflop["action_head"] < 0.2
    assert sum(gflop.values()) == pytest.approx(375, rel=0.02)
    numbers = sum(op.count * sum(op.weights) for stage in STAGES for op in stage_ops(FULL, stage, 88))
    # 1.66 billion parameters less 65037 x 2048 embedded words (the LM head shares them).
    assert numbers == pytest.approx(1.66e9 - 65037 * 2048, rel=0.02)


def test_the_weight_files_tell_the_widths_that_the_manifest_leaves_out() -> None:
    for ratio in (4, 2):
        work = dataclasses.replace(FULL, vision_ffn=ratio * 1024, text_ffn=ratio * 2048)
        found = workload_of(manifest_of(work), "x")
        assert (found.vision_ffn, found.text_ffn, found.notes) == (ratio * 1024, ratio * 2048, ())
        assert found.name == "x"
        assert found.nodes == work.nodes


def test_the_weight_files_tell_of_a_second_resampler() -> None:
    for perceiver in (0, 6):
        for precision in ("fp32", "fp16"):
            work = dataclasses.replace(FULL, perceiver=perceiver)
            found = workload_of(manifest_of(work, precision), "x")  # type: ignore[arg-type]
            assert (found.perceiver, found.vision_ffn, found.notes) == (perceiver, 4096, ())


def test_a_weight_file_of_another_length_becomes_a_note() -> None:
    odd = workload_of(manifest_of(dataclasses.replace(FULL, text_ffn=5000)))
    assert odd.text_ffn == 4 * 2048
    assert len(odd.notes) == 1
    assert "language: the weight file has" in odd.notes[0]


def test_sizes_are_named() -> None:
    assert sized("full") is FULL
    work = sized("embed_dim=1024, text_layers=12,text_heads=16,cameras=2")
    assert (work.dims.embed_dim, work.dims.text_layers, work.cameras, work.text_ffn) == (1024, 12, 2, 4096)
    assert work.dims.vision_width == FULL.dims.vision_width
    assert sized("text_ffn=1000").text_ffn == 1000


@pytest.mark.parametrize("text", ["", "small", "embed=3", "embed_dim=x", "embed_dim=-1", "embed_dim=0", "embed_dim=2,"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--size is not understood"):
        sized(text)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="heads of unequal width"):
        sized("text_heads=7")
