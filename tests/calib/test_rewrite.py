"""Rewritten stages: what they compute, in numpy's integers and by ONNX Runtime's own quantizer, and how they look."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from msgspec import structs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import ExportError
from bundle.manifest import Form, Manifest
from calib.calibrate import How
from calib.int8_weights import DataFile, add_site
from calib.rewrite import Integers, check, pack, rewrite
from calib.stage_graph import STAGES, Site, StageGraph
from runtime.backends.ort import OrtBackend
from tests.calib.conftest import Built
from tests.calib.made import Prepared, prepare, run, run_model, seen_frames, stored
from tests.openvino import needs_openvino

FORMS: tuple[Form, ...] = get_args(Form)
SUBSETS: dict[str, dict[str, tuple[str, ...]]] = {
    "vision": {
        "all": ("vision.0", "vision.1", "vision.2", "projection"),
        "one": ("vision.1",),
        "first and last": ("vision.0", "projection"),
    },
    "language": {"all": ("language.0", "language.1"), "one": ("language.1",)},
    "action_head": {"all": ("action_head",)},
}
CASES = [(stage, blocks) for stage, subsets in SUBSETS.items() for blocks in subsets.values()]
IDS = [f"{stage}-{name}" for stage, subsets in SUBSETS.items() for name in subsets]
cases = pytest.mark.parametrize(("stage", "blocks"), CASES, ids=IDS)
forms = pytest.mark.parametrize("form", FORMS)


def made(prepared: Prepared, stage: str, blocks: tuple[str, ...], form: Form, key: Any = None) -> onnx.ModelProto:
    return rewrite(prepared.graphs[key or prepared.first(stage)], blocks, prepared.integers[stage], form)


def result(prepared: Prepared, stage: str, model: onnx.ModelProto, *, optimized: bool = False) -> NDArray[np.float32]:
    """The stage's own outputs in one row."""
    found = run_model(model, prepared.folder, prepared.feeds[prepared.first(stage)], optimized=optimized)
    return np.concatenate([value.astype(np.float32).ravel() for value in found.values()])


def original(prepared: Prepared, stage: str) -> NDArray[np.float32]:
    return result(prepared, stage, prepared.graphs[prepared.first(stage)].model)


def chosen_sites(graph: StageGraph, blocks: tuple[str, ...]) -> list[Site]:
    return [site for site in graph.sites if site.block in blocks]


def largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max())


def nodes_by_output(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def integers_into(model: onnx.ModelProto, site: Site) -> str:
    """The quantized activation of a product."""
    product = next(node for node in model.graph.node if node.name == site.name)
    if product.op_type == "QGemm":
        return str(product.input[0])
    return str(nodes_by_output(model)[product.input[0]].input[0])


# --- numbers ------------------------------------------------------------------------------------------------------------------


@cases
@forms
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_products_are_those_of_the_integers(
    request: pytest.FixtureRequest, precision: str, form: Form, stage: str, blocks: tuple[str, ...]
) -> None:
    """Every product, from what feeds it in the rewritten graph itself: simulated in int64."""
    prepared: Prepared = request.getfixturevalue(precision)
    graph, model = prepared.graphs[prepared.first(stage)], made(prepared, stage, blocks, form)
    arrays = stored(prepared.folder, model)
    sites = chosen_sites(graph, blocks)
    products = {node.name: node for node in model.graph.node}
    into = {site.name: integers_into(model, site) for site in sites}
    tensors = [name for site in sites for name in (site.source, into[site.name], products[site.name].output[0])]
    values = run_model(model, prepared.folder, prepared.feeds[prepared.first(stage)], tensors)
    assert sites
    for site in sites:
        scale = np.float32(prepared.found[stage].scales[site.key])
        x = values[site.source].reshape(-1, site.shape[1]).astype(np.float32) / scale
        rows = values[into[site.name]].reshape(-1, site.shape[1])
        assert (rows[len(x) :] == 0).all()  # what is added for OpenVINO
        integers = rows[: len(x)].astype(np.int64) - (128 if form == "ort-cpu" else 0)
        # The runtime leaves an fp16 rounding out where it can: then what was quantized is finer than what it shows.
        slack = 0 if values[site.source].dtype == np.float32 else 2e-3 * np.abs(x)
        assert (np.abs(integers - np.clip(x, -128, 127)) <= 0.5 + slack).all()
        if values[site.source].dtype == np.float32:
            assert np.array_equal(integers, np.clip(np.rint(x), -128, 127))
        sums = integers @ arrays[f"{site.weight}.int8"].astype(np.int64).T
        steps = np.float64(scale) * arrays[f"{site.weight}.scale"].astype(np.float64)
        if site.bias is None:
            expected = sums * steps
        elif form == "ort-cpu":
            expected = (sums + arrays[f"{site.weight}.bias32"]) * steps
        else:
            expected = sums * steps + arrays[f"{site.weight}.bias"]
        got = values[products[site.name].output[0]][: len(expected)]
        assert got.dtype == np.float32
        size = np.abs(integers) @ np.abs(arrays[f"{site.weight}.int8"].astype(np.int64)).T * steps
        assert (np.abs(got.reshape(expected.shape) - expected) <= 1e-5 * (size + np.abs(expected)) + 1e-7).all()


@cases
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_forms_are_one(
    request: pytest.FixtureRequest, precision: str, form: Form, stage: str, blocks: tuple[str, ...]
) -> None:
    """Through whole stages. Where several layers follow each other, a last bit decides between two steps, and so on from there."""
    prepared: Prepared = request.getfixturevalue(precision)
    portable, other = (result(prepared, stage, made(prepared, stage, blocks, each)) for each in ("portable", form))
    before = original(prepared, stage)
    assert np.abs(portable - other).mean() < 0.9 * np.abs(portable - before).mean()
    if (stage, blocks) == ("language", ("language.1",)):
        assert largest(portable, other) <= (1e-4 if precision == "fp32" else 2e-3)
        assert largest(portable, before) > 5e-3


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_forms_of_the_head_differ_by_single_steps(
    request: pytest.FixtureRequest, precision: str, form: Form
) -> None:
    """QGemm's bias is rounded to int32; where that decides between two integers, it is the next one, and rarely."""
    prepared: Prepared = request.getfixturevalue(precision)
    key = prepared.first("action_head")
    sites = prepared.graphs[key].sites
    found = []
    for each in ("portable", form):
        model = made(prepared, "action_head", ("action_head",), each)
        names = [integers_into(model, site) for site in sites]
        values = run_model(model, prepared.folder, prepared.feeds[key], names)
        found.append([values[name].astype(int) - (128 if each == "ort-cpu" else 0) for name in names])
    assert np.array_equal(found[0][0], found[1][0])
    for ours, theirs in zip(*found, strict=True):
        assert np.abs(ours - theirs).max() <= 1
        assert (ours != theirs).mean() <= 0.1


@cases
@forms
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_is_near_floating_point(
    request: pytest.FixtureRequest, precision: str, form: Form, stage: str, blocks: tuple[str, ...]
) -> None:
    prepared: Prepared = request.getfixturevalue(precision)
    before, after = original(prepared, stage), result(prepared, stage, made(prepared, stage, blocks, form))
    assert 0 < np.abs(after - before).mean() < 0.1 * np.abs(before).std()


@cases
@forms
def test_optimizations_of_the_runtime_change_nothing(
    fp32: Prepared, form: Form, stage: str, blocks: tuple[str, ...]
) -> None:
    model = made(fp32, stage, blocks, form)
    plain, optimized = (result(fp32, stage, model, optimized=how) for how in (False, True))
    assert np.median(np.abs(plain - optimized)) <= 1e-4
    assert largest(plain, optimized) <= 0.2 * largest(plain, original(fp32, stage))


@forms
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_blocks_is_the_graph_that_was_there(
    request: pytest.FixtureRequest, precision: str, stage: str, form: Form
) -> None:
    prepared: Prepared = request.getfixturevalue(precision)
    model = made(prepared, stage, (), form)
    old = prepared.graphs[prepared.first(stage)].model
    assert [node.name for node in model.graph.node] == [node.name for node in old.graph.node]
    assert np.array_equal(result(prepared, stage, model), original(prepared, stage))


# --- what is left out ---------------------------------------------------------------------------------------------------------


@cases
@forms
def test_what_is_not_chosen_stays_as_it_was(fp32: Prepared, form: Form, stage: str, blocks: tuple[str, ...]) -> None:
    """Its products, weights and LayerNorms, to the byte; smoothing is for those that are chosen."""
    graph, model = fp32.graphs[fp32.first(stage)], made(fp32, stage, blocks, form)
    sites = chosen_sites(graph, blocks)
    products, norms = {site.name for site in sites}, {site.norm for site in sites}
    new = {node.name: node for node in model.graph.node if node.name}
    for node in graph.model.graph.node:
        if node.name in products:
            assert new[node.name].SerializeToString() != node.SerializeToString()
        elif node.name in norms:
            assert [*new[node.name].input] == [node.input[0], *(f"{name}.smooth" for name in node.input[1:])]
            assert new[node.name].output == node.output
        elif node.op_type in ("Gemm", "LayerNormalization", "MatMul", "Softmax", "Add"):
            assert new[node.name].SerializeToString() == node.SerializeToString()
    before, after = stored(fp32.folder, graph.model), stored(fp32.folder, model)
    for name in after.keys() & before.keys():
        assert np.array_equal(after[name], before[name])
    gone = {site.weight for site in sites}
    assert not gone & after.keys()
    used = {name for node in model.graph.node for name in node.input}
    assert after.keys() <= used


def test_strength_0_leaves_every_norm(built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built(), tmp_path / "bundle"))
    plain = prepare(folder, seen_frames(Manifest.load(folder), 2), How("minmax", 0.0, 1, 1))
    for stage in ("vision", "language"):
        model = made(plain, stage, SUBSETS[stage]["all"], "portable")
        old = {node.name: node for node in plain.graphs[plain.first(stage)].model.graph.node}
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                assert node.SerializeToString() == old[node.name].SerializeToString()
        assert largest(result(plain, stage, model), original(plain, stage)) > 0


# --- the pattern --------------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_portable_form_is_what_tensorrt_fuses(
    request: pytest.FixtureRequest, precision: str, stage: str, blocks: tuple[str, ...]
) -> None:
    """Activation: Q, DQ, per tensor. Weight: int8, DQ, per row. Zero points 0. Nothing else between quantization and product."""
    prepared: Prepared = request.getfixturevalue(precision)
    model = made(prepared, stage, blocks, "portable")
    arrays, by_output = stored(prepared.folder, model), nodes_by_output(model)
    products = {node.name: node for node in model.graph.node}
    for site in chosen_sites(prepared.graphs[prepared.first(stage)], blocks):
        product = products[site.name]
        assert product.op_type == "Gemm"
        assert {attribute.name: attribute.i for attribute in product.attribute} == {"transB": 1}
        activation, weight = (by_output[name] for name in product.input[:2])
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        quantize = by_output[activation.input[0]]
        assert quantize.op_type == "QuantizeLinear"
        assert list(quantize.input[1:]) == list(activation.input[1:])
        assert arrays[activation.input[1]] == pytest.approx(prepared.found[stage].scales[site.key])
        assert arrays[activation.input[1]].shape == ()
        assert (arrays[activation.input[2]].dtype, int(arrays[activation.input[2]])) == (np.dtype(np.int8), 0)
        assert {attribute.name: attribute.i for attribute in weight.attribute} == {"axis": 0}
        integers, scales, zeros = (arrays[name] for name in weight.input)
        assert (integers.dtype, integers.shape) == (np.dtype(np.int8), site.shape)
        assert (scales.dtype, scales.shape) == (np.dtype(np.float32), site.shape[:1])
        assert (zeros.dtype, zeros.shape, bool(zeros.any())) == (np.dtype(np.int8), site.shape[:1], False)
        assert all(arrays[name].dtype == np.float32 for name in product.input[2:])


@cases
@forms
def test_attention_stays_in_floating_point(fp32: Prepared, form: Form, stage: str, blocks: tuple[str, ...]) -> None:
    model = made(fp32, stage, blocks, form)
    by_output, products = nodes_by_output(model), {"Gemm", "QGemm"}
    for node in model.graph.node:
        sources = {by_output[name].op_type for name in node.input if name in by_output}
        if node.op_type not in (*products, "DequantizeLinear", "Pad"):
            assert not sources & {"QuantizeLinear", "DequantizeLinear"}


def test_openvino_finds_a_max_between_norm_and_quantization(fp32: Prepared) -> None:
    """And nowhere else; it cuts off what is below the smallest integer."""
    for stage in STAGES:
        model = made(fp32, stage, SUBSETS[stage]["all"], "openvino")
        arrays, by_output = stored(fp32.folder, model), nodes_by_output(model)
        for node in model.graph.node:
            if node.op_type != "QuantizeLinear":
                continue
            before = by_output.get(node.input[0])
            kind = before.op_type if before is not None else ""
            assert kind != "LayerNormalization"
            if before is not None and kind == "Max":
                assert by_output[before.input[0]].op_type == "LayerNormalization"
                assert arrays[before.input[1]] == pytest.approx(-128 * arrays[node.input[1]])
    kinds = [node.op_type for node in made(fp32, "language", SUBSETS["language"]["all"], "openvino").graph.node]
    assert kinds.count("Max") == 8


def with_and_without_rows(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Vision for OpenVINO, its products with rows added, and with as many as there are tokens."""
    padded = made(prepared, "vision", SUBSETS["vision"]["all"], "openvino")
    monkeypatch.setattr("calib.rewrite._BLOCK_ROWS", 1000)
    return padded, made(prepared, "vision", SUBSETS["vision"]["all"], "openvino")


def test_openvino_gets_rows_that_divide_well_where_weights_are_read_more_than_once(
    fp32: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = fp32.graphs[fp32.first("vision")]
    model, plain = with_and_without_rows(fp32, monkeypatch)
    sites = [site for site in graph.sites if site.shape[1] > site.shape[0]]
    assert {site.name.rpartition("/")[2] for site in sites} == {"fc2"}
    assert {graph.rows(site) for site in sites} == {257}
    by_output, products = nodes_by_output(model), {node.name: node for node in model.graph.node}
    for site in sites:
        pad = by_output[integers_into(model, site)]
        assert pad.op_type == "Pad"
        assert list(stored(fp32.folder, model)[pad.input[1]]) == [0, 0, 7, 0]
        (cut,) = (node for node in model.graph.node if products[site.name].output[0] in node.input)
        assert cut.op_type == "Slice"
    kinds = [node.op_type for node in plain.graph.node]
    assert "Pad" not in kinds
    added = [node.op_type for node in model.graph.node]
    assert sorted(added) == sorted([*kinds, *["Pad", "Slice"] * len(sites)])
    for form in ("portable", "ort-cpu"):
        assert "Pad" not in [node.op_type for node in made(fp32, "vision", SUBSETS["vision"]["all"], form).graph.node]


def test_rows_that_were_added_change_nothing(fp32: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = with_and_without_rows(fp32, monkeypatch)
    assert largest(result(fp32, "vision", model), result(fp32, "vision", plain)) <= 1e-6


def test_rows_that_were_added_change_no_bit_in_openvino(fp32: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_openvino()
    graph = fp32.manifest.graph("vision")
    backend = OrtBackend("ort:openvino", threads=1)
    found = []
    for model in with_and_without_rows(fp32, monkeypatch):
        path = fp32.folder / ".rows.onnx"
        path.write_bytes(model.SerializeToString())
        stage = backend.load(fp32.folder, structs.replace(graph, file=path.name))
        found.append(stage.run(fp32.feeds[fp32.first("vision")])["image_tokens"].copy())
        path.unlink()
    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])


def test_a_tensor_is_quantized_once_for_all_that_read_it_alike(fp32: Prepared) -> None:
    """The LSTM's products have one scale each; what is quantized twice has two."""
    for stage in STAGES:
        for form in FORMS:
            model = made(fp32, stage, SUBSETS[stage]["all"], form)
            scales = {
                proto.name: numpy_helper.to_array(proto) for proto in model.graph.initializer if not proto.external_data
            }
            seen = [
                (node.input[0], float(scales[node.input[1]]))
                for node in model.graph.node
                if node.op_type == "QuantizeLinear"
            ]
            assert len(seen) == len(set(seen))


@cases
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graphs_are_valid(
    request: pytest.FixtureRequest, precision: str, stage: str, blocks: tuple[str, ...]
) -> None:
    prepared: Prepared = request.getfixturevalue(precision)
    for key in (key for key in prepared.graphs if key[0] == stage):
        model = made(prepared, stage, blocks, "portable", key)
        path = prepared.folder / ".valid.onnx"
        path.write_bytes(model.SerializeToString())
        check(path)
        path.unlink()
        assert [entry.domain for entry in model.opset_import] == [""]
        assert model.opset_import[0].version == prepared.graphs[key].model.opset_import[0].version
        names = [output for node in model.graph.node for output in node.output]
        assert len(names) == len(set(names))


def test_an_invalid_graph_is_refused(fp32: Prepared) -> None:
    model = made(fp32, "action_head", ("action_head",), "portable")
    model.graph.node[0].input[0] = "nothing"
    path = fp32.folder / ".invalid.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"invalid\.onnx is not valid ONNX"):
        check(path)
    path.unlink()


@cases
@forms
def test_an_fp16_stage_has_the_types_that_it_had(
    fp16: Prepared, form: Form, stage: str, blocks: tuple[str, ...]
) -> None:
    """Inputs and outputs as before; products in fp32, cast where fp16 follows."""
    graph, model = fp16.graphs[fp16.first(stage)], made(fp16, stage, blocks, form)
    assert list(model.graph.input) == list(graph.model.graph.input)
    assert list(model.graph.output) == list(graph.model.graph.output)
    products = {node.name: node for node in model.graph.node}
    old = {node.name: node for node in graph.model.graph.node}
    sites = chosen_sites(graph, blocks)
    feeds = fp16.feeds[fp16.first(stage)]
    outputs = [old[site.name].output[0] for site in sites]
    before, after = (run_model(each, fp16.folder, feeds, outputs) for each in (graph.model, model))
    for site in sites:
        name = old[site.name].output[0]
        assert after[name].dtype == before[name].dtype
        assert after[name].shape == before[name].shape
        half = graph.array(site.weight).dtype == np.float16
        assert before[name].dtype == (np.float16 if half else np.float32)
        output = products[site.name].output[0].removesuffix(".padded")
        assert output == (f"{name}.fp32" if half else name)
    kinds = {proto.name: proto.data_type for proto in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert kinds[node.input[1]] == TensorProto.FLOAT


# --- against ONNX Runtime's own quantizer -------------------------------------------------------------------------------------


class _Frames:
    """A calibration data reader."""

    def __init__(self, batches: list[NDArray[np.float32]]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


@forms
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_is_what_onnxruntimes_quantizer_makes(tmp_path: Path, form: Form, bias: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    rng = np.random.default_rng(0)
    rows, n, k = 16, 12, 40
    weight = (rng.normal(0, 0.1, (n, k)) * np.exp(rng.normal(0, 1, (n, 1)))).astype(np.float32)
    values = {"w": weight, "b": rng.normal(0, 1, n).astype(np.float32)}
    if not bias:
        del values["b"]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", *values], ["y"], name="layers.0/one", transB=1)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "one.onnx")
    batches = [rng.normal(0, 1, (rows, k)).astype(np.float32) for _ in range(4)]
    quantize_static(
        tmp_path / "one.onnx",
        tmp_path / "theirs.onnx",
        _Frames(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["Gemm"],
        },
    )

    site = Site("vision", "vision.0", "layers.0/one", "x", "w", "b" if bias else None, None, (n, k))
    scale = max(float(np.abs(batch).max()) for batch in batches) / 127
    with DataFile(tmp_path / "ours.data") as file:
        add_site(file, site, weight, values.get("b"), scale)
    ours = StageGraph("vision", tmp_path, model, {proto.name: proto for proto in graph.initializer}, (site,))
    rewritten = rewrite(ours, ("vision.0",), Integers("ours.data", file.tensors, {site.key: scale}), form)

    x = 1.2 * batches[0]  # some of it is clipped
    theirs = run(tmp_path / "theirs.onnx", {"x": x})["y"]
    got = run_model(rewritten, tmp_path, {"x": x})["y"]
    assert largest(theirs, run(tmp_path / "one.onnx", {"x": x})["y"]) > 0.05
    half_a_step = 0.5 * scale * np.abs(weight).max() / 127  # their bias is int32 in both
    assert largest(got, theirs) <= half_a_step + 1e-6 * np.abs(theirs).max()
    assert half_a_step < 1e-3


@forms
def test_a_tensor_with_two_scales_is_quantized_twice(tmp_path: Path, form: Form) -> None:
    """And for a third product with one of them it is not."""
    rng = np.random.default_rng(0)
    rows, width = 5, 8
    weights = {f"w{index}": rng.normal(0, 1, (width, width)).astype(np.float32) for index in range(3)}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", name], [f"y{name}"], name=f"layers.0/{name}", transB=1) for name in weights],
        "three",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, [rows, width]) for name in weights],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sites = tuple(
        Site("vision", "vision.0", f"layers.0/{name}", "x", name, None, None, (width, width)) for name in weights
    )
    scales = {site.key: scale for site, scale in zip(sites, (0.02, 0.005, 0.02), strict=True)}
    with DataFile(tmp_path / "three.data") as file:
        for site in sites:
            add_site(file, site, weights[site.weight], None, scales[site.key])
    stage = StageGraph("vision", tmp_path, model, {proto.name: proto for proto in graph.initializer}, sites)
    rewritten = rewrite(stage, ("vision.0",), Integers("three.data", file.tensors, scales), form)

    assert [node.op_type for node in rewritten.graph.node].count("QuantizeLinear") == 2
    x = rng.normal(0, 0.5, (rows, width)).astype(np.float32)
    found, arrays = run_model(rewritten, tmp_path, {"x": x}), stored(tmp_path, rewritten)
    for site in sites:
        scale = np.float32(scales[site.key])
        integers = np.clip(np.rint(x / scale), -128, 127)
        expected = (
            integers * np.float64(scale) @ (arrays[f"{site.weight}.int8"] * arrays[f"{site.weight}.scale"][:, None]).T
        )
        assert found[f"y{site.weight}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


# --- packing ------------------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("stage", STAGES)
def test_packed_graphs_need_one_file_and_compute_the_same(
    fp32: Prepared, tmp_path: Path, stage: str, form: Form
) -> None:
    blocks = SUBSETS[stage].get("one", SUBSETS[stage]["all"])
    keys = [key for key in fp32.graphs if key[0] == stage]
    with DataFile(tmp_path / "packed.data") as file:
        packed = {key: pack(made(fp32, stage, blocks, form, key), fp32.folder, file) for key in keys}

    assert [path.name for path in tmp_path.iterdir()] == ["packed.data"]
    names = {proto.name for model in packed.values() for proto in model.graph.initializer if proto.external_data}
    assert set(file.tensors) == names  # what two buckets share lies there once
    assert sum(tensor.length for tensor in file.tensors.values()) <= file.bytes
    for key, model in packed.items():
        loose = made(fp32, stage, blocks, form, key)
        here, there = (
            run_model(each, folder, fp32.feeds[key]) for each, folder in ((model, tmp_path), (loose, fp32.folder))
        )
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[name], there[name]) for name in here)
