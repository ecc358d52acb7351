"""Sites, blocks and LayerNorms of built policies, and of graphs made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import BundleError
from bundle.manifest import HeadKind, Manifest
from calib.stage_graph import STAGES, Site, StageGraph, block_of, read_stage
from tests.bundles import make_bundle
from tests.calib.conftest import Built
from tests.calib.made import stored

VISION_LAYERS, TEXT_LAYERS = 3, 2


def read(bundle: Path, stage: str, *, layers_per_block: int = 1, bucket: int = 0) -> StageGraph:
    manifest = Manifest.load(bundle)
    sequence = manifest.stages[stage].graphs[bucket].sequence
    return read_stage(bundle, manifest, stage, sequence=sequence, layers_per_block=layers_per_block)


def by_name(graph: StageGraph) -> dict[str, Site]:
    return {site.name: site for site in graph.sites}


@pytest.mark.parametrize("head", get_args(HeadKind))
def test_every_product_with_a_weight_is_a_site(built: Built, head: HeadKind) -> None:
    keys = []
    for stage in STAGES:
        graph = read(built(head), stage)
        products = [node for node in graph.model.graph.node if node.op_type == "Gemm"]
        assert [node.name for node in products if node.name != "patches/projection"] == list(by_name(graph))
        for node, site in zip((node for node in products if node.name in by_name(graph)), graph.sites, strict=True):
            assert (site.stage, site.weight, site.bias) == (stage, node.input[1], (*node.input[2:], None)[0])
            assert site.shape == graph.array(site.weight).shape
            assert site.bias is None or graph.array(site.bias).shape == site.shape[:1]
        keys += [site.key for site in graph.sites]
    assert len(set(keys)) == len(keys)
    assert len(keys) == {"velocities": 32, "actions_gripper": 36, "classes": 29}[head]


def test_the_projection_of_pixels_is_left_out(built: Built) -> None:
    graph = read(built(), "vision")
    assert "patches/projection" in {node.name for node in graph.model.graph.node}
    assert "patches/projection" not in by_name(graph)


@pytest.mark.parametrize("head", get_args(HeadKind))
def test_blocks(built: Built, head: HeadKind) -> None:
    def blocks(stage: str, layers: int) -> list[str]:
        return list(dict.fromkeys(site.block for site in read(built(head), stage, layers_per_block=layers).sites))

    assert blocks("vision", 1) == ["vision.0", "vision.1", "vision.2", "projection"]
    assert blocks("vision", 2) == ["vision.0-1", "vision.2", "projection"]
    assert blocks("vision", 6) == ["vision.0-2", "projection"]
    assert blocks("language", 1) == ["language.0", "language.1"]
    assert blocks("language", 6) == ["language.0-1"]
    assert blocks("action_head", 1) == ["action_head"]


@pytest.mark.parametrize(
    ("node", "layers_per_block", "block"),
    [
        ("layers.0/qkv", 6, "vision.0-5"),
        ("layers.5/fc2", 6, "vision.0-5"),
        ("layers.6/fc2", 6, "vision.6-11"),
        ("layers.23/out", 6, "vision.18-23"),
        ("layers.23/out", 7, "vision.21-23"),
        ("layers.10/out", 1, "vision.10"),
        ("layers.10/out", 99, "vision.0-23"),
        ("resampler/kv", 6, "projection"),
    ],
)
def test_layers_are_grouped(node: str, layers_per_block: int, block: str) -> None:
    assert block_of("vision", node, 24, layers_per_block) == block


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norms(built: Built, precision: str) -> None:
    """In the decoder everything is fed by one; in vision what comes from attention and an activation is not."""
    bundle = built("velocities", precision)
    vision, language = by_name(read(bundle, "vision")), by_name(read(bundle, "language"))
    for layer in range(VISION_LAYERS):
        norms = [vision[f"layers.{layer}/{name}"].norm for name in ("qkv", "out", "fc1", "fc2")]
        assert norms == [f"layers.{layer}/norm1", None, f"layers.{layer}/norm2", None]
    assert vision["resampler/kv"].norm is None
    for name, norm in (("qkv", "norm1"), ("out", "inner_norm"), ("fc1", "norm2"), ("fc2", "ffn_norm")):
        assert language[f"layers.0/{name}"].norm == f"layers.0/{norm}"
    assert all(site.norm is None for site in read(bundle, "action_head").sites)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_last_layers_query_has_the_norm_of_its_keys(built: Built, precision: str) -> None:
    """It sees the action token's row only."""
    graph = read(built("velocities", precision), "language")
    sites, producers = by_name(graph), graph.producers()
    last = f"layers.{TEXT_LAYERS - 1}"
    query, keys = sites[f"{last}/q"], sites[f"{last}/kv"]
    assert producers[query.source].op_type == "Gather"
    assert query.source != keys.source
    assert query.norm == keys.norm == f"{last}/norm1"


def test_an_fp16_graph_has_the_same_sites(built: Built) -> None:
    for stage in STAGES:
        single, half = (read(built("velocities", precision), stage) for precision in ("fp32", "fp16"))
        assert [(site.key, site.block, site.norm, site.shape) for site in single.sites] == [
            (site.key, site.block, site.norm, site.shape) for site in half.sites
        ]
        kinds = {half.array(site.weight).dtype for site in half.sites}
        assert kinds == {np.dtype(np.float32 if stage == "action_head" else np.float16)}
        producers = half.producers()
        assert all(site.source not in producers or producers[site.source].op_type != "Cast" for site in half.sites)


def test_buckets_have_the_same_sites(built: Built) -> None:
    short, long = (read(built(), "language", bucket=bucket) for bucket in (0, 1))
    assert short.sites == long.sites


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_arrays_are_those_that_onnx_reads(built: Built, stage: str, precision: str) -> None:
    graph = read(built("velocities", precision), stage)
    expected = stored(graph.folder, graph.model)
    assert expected
    for name, array in expected.items():
        found = graph.array(name)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


# --- graphs made by hand ------------------------------------------------------------------------------------------------------

ROWS, WIDTH = 3, 4


def by_hand(folder: Path, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("y",)) -> StageGraph:
    """The vision stage of a tiny bundle, made of `norm` (x to n), these nodes, and weights w [4, 4] and b [4]."""
    norm = helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], name="norm")
    values: dict[str, NDArray[Any]] = {
        "gamma": np.ones(WIDTH, np.float32),
        "beta": np.zeros(WIDTH, np.float32),
        "w": np.eye(WIDTH, dtype=np.float32),
        "b": np.zeros(WIDTH, np.float32),
        "rows": np.array([0, 2], np.int64),
    }
    graph = helper.make_graph(
        [norm, *nodes],
        "made by hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    bundle = make_bundle(folder / "tiny.bundle")
    onnx.save(helper.make_model(graph), bundle / Manifest.load(bundle).graph("vision").file)
    return read(bundle, "vision")


def gemm(name: str, source: str, output: str = "y") -> onnx.NodeProto:
    return helper.make_node("Gemm", [source, "w", "b"], [output], name=f"layers.0/{name}", transB=1)


def gather(source: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Gather", [source, "rows"], [output], axis=0)


def cast(source: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [output], to=TensorProto.FLOAT)


FOLDABLE: dict[str, list[onnx.NodeProto]] = {
    "one product": [gemm("a", "n")],
    "two products": [gemm("a", "n"), gemm("b", "n", "z")],
    "behind a cast": [cast("n", "c"), gemm("a", "c")],
    "rows of it": [gather("n", "r"), gemm("a", "r")],
    "rows of it and all": [gather("n", "r"), gemm("a", "r"), gemm("b", "n", "z")],
    "rows of a cast, cast": [cast("n", "c"), gather("c", "r"), cast("r", "s"), gemm("a", "s")],
}
READ_BY_OTHERS: dict[str, list[onnx.NodeProto]] = {
    "a sum": [gemm("a", "n"), helper.make_node("Add", ["n", "x"], ["z"])],
    "a sum, after a cast": [gemm("a", "n"), cast("n", "c"), helper.make_node("Add", ["c", "x"], ["z"])],
    "a sum of some rows": [gather("n", "r"), gemm("a", "r"), helper.make_node("Add", ["r", "b"], ["z"])],
    "a sum, and a product of some rows": [gather("n", "r"), gemm("a", "r"), helper.make_node("Add", ["n", "b"], ["z"])],
    "the right side of a product": [
        gemm("a", "n"),
        helper.make_node("Gemm", ["x", "n"], ["z"], name="patches/projection", transB=1),
    ],
    "something between": [helper.make_node("Relu", ["n"], ["r"]), gemm("a", "r")],
}


@pytest.mark.parametrize("nodes", FOLDABLE.values(), ids=FOLDABLE)
def test_a_norm_that_feeds_only_products(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    sites = by_hand(tmp_path, nodes).sites
    assert sites
    assert {site.norm for site in sites} == {"norm"}


@pytest.mark.parametrize("nodes", READ_BY_OTHERS.values(), ids=READ_BY_OTHERS)
def test_a_norm_that_something_else_reads(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    assert by_name(by_hand(tmp_path, nodes))["layers.0/a"].norm is None


def test_a_norm_that_two_blocks_read(tmp_path: Path) -> None:
    """Each block moves alone, and with it its norm."""
    other = helper.make_node("Gemm", ["n", "w", "b"], ["z"], name="resampler/kv", transB=1)
    two = by_name(by_hand(tmp_path, [gemm("a", "n"), other]))
    assert {site.block for site in two.values()} == {"vision.0", "projection"}
    assert {site.norm for site in two.values()} == {None}


def test_a_norm_that_the_stage_gives_out(tmp_path: Path) -> None:
    """Scaled, it would be another output."""
    graph = by_hand(tmp_path, [gemm("a", "n")], outputs=("y", "n"))
    assert by_name(graph)["layers.0/a"].norm is None


def test_a_product_without_a_bias(tmp_path: Path) -> None:
    (site,) = by_hand(tmp_path, [helper.make_node("Gemm", ["n", "w"], ["y"], name="layers.0/a", transB=1)]).sites
    assert site.bias is None
    assert site.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: b"\xff" * len(raw)])
def test_a_damaged_graph(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    bundle = make_bundle(tmp_path / "tiny.bundle")
    path = bundle / Manifest.load(bundle).graph("vision").file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"vision.*is damaged"):
        read(bundle, "vision")


def test_dimensions_decide_how_layers_are_grouped(built: Built) -> None:
    """The last block ends with the last layer of its own stage."""
    manifest = Manifest.load(built())
    assert manifest.dimensions.vision_layers == VISION_LAYERS
    assert manifest.dimensions.text_layers == TEXT_LAYERS
    longer = msgspec.structs.replace(
        manifest, dimensions=msgspec.structs.replace(manifest.dimensions, vision_layers=30, text_layers=20)
    )
    vision = read_stage(built(), longer, "vision", sequence=None, layers_per_block=8)
    language = read_stage(built(), longer, "language", sequence=manifest.prompt.buckets[0], layers_per_block=8)
    assert {site.block for site in vision.sites} == {"vision.0-7", "projection"}
    assert {site.block for site in language.sites} == {"language.0-7"}
