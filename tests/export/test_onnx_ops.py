"""Each operation written down as ONNX and run by onnxruntime is the same operation run by torch, for random shapes.

And the file that the weights go into: aligned, hashed, each weight once, and nothing in it that fp16 cannot hold.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bundle.errors import ExportError
from bundle.hashing import sha256_file
from export.onnx_ops import IR_VERSION, OPSET, OnnxOps
from export.ops import Ops, TorchOps
from export.weight_file import WeightFile

# A stage in miniature: the operations under test, on any implementation of the vocabulary.
Body = Callable[[Ops[Any], list[Any]], Any]

many = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 6)
counter = itertools.count()


def in_onnxruntime(folder: Path, body: Body, inputs: list[Tensor], compute: str = "float32") -> Tensor:
    """What onnxruntime makes of the graph that the body writes down."""
    name = f"graph{next(counter)}"
    with WeightFile(folder / f"{name}.data") as weights:
        ops = OnnxOps(weights, compute)
        values = [
            ops.input(f"x{i}", str(tensor.dtype).removeprefix("torch."), tensor.shape)
            for i, tensor in enumerate(inputs)
        ]
        expected = body(TorchOps(getattr(torch, compute)), inputs)
        result = body(ops, values)
        assert result.dtype == str(expected.dtype).removeprefix("torch.")
        ops.save(folder / f"{name}.onnx", name, [("y", result, expected.shape)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
    return torch.from_numpy(session.run(["y"], feeds)[0])


def assert_same(folder: Path, body: Body, *inputs: Tensor, compute: str = "float32", tolerance: float = 1e-5) -> None:
    expected = body(TorchOps(getattr(torch, compute)), list(inputs))
    actual = in_onnxruntime(folder, body, list(inputs), compute)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def noise(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- one by one -----------------------------------------------------------------------------------------------------------


@many
@given(rows=sizes, inputs=sizes, outputs=sizes, bias=st.booleans())
def test_linear(tmp_path: Path, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    weight, offset = noise(outputs, inputs, seed=1), noise(outputs, seed=2)
    make_bias = (lambda: offset) if bias else None
    assert_same(tmp_path, lambda ops, x: ops.linear(x[0], "fc", lambda: weight, make_bias), noise(rows, inputs))


@many
@given(rows=sizes, width=st.integers(2, 9), eps=st.sampled_from([1e-5, 1e-2]))
def test_layer_norm(tmp_path: Path, rows: int, width: int, eps: float) -> None:
    gamma, beta = noise(width, seed=1), noise(width, seed=2)
    assert_same(
        tmp_path,
        lambda ops, x: ops.layer_norm(x[0], "norm", lambda: gamma, lambda: beta, eps),
        noise(rows, width),
        tolerance=1e-4,
    )


@many
@given(batch=st.lists(sizes, max_size=2), rows=sizes, inner=sizes, columns=sizes)
def test_matmul(tmp_path: Path, batch: list[int], rows: int, inner: int, columns: int) -> None:
    a, b = noise(*batch, rows, inner), noise(*batch, inner, columns, seed=1)
    assert_same(tmp_path, lambda ops, x: ops.matmul(x[0], x[1]), a, b)


@many
@given(op=st.sampled_from(["add", "sub", "mul", "div"]), rows=sizes, width=sizes, broadcast=st.booleans())
def test_arithmetic_broadcasts(tmp_path: Path, op: str, rows: int, width: int, broadcast: bool) -> None:
    a, b = noise(rows, width), noise(1 if broadcast else rows, width, seed=1).abs() + 0.5
    assert_same(tmp_path, lambda ops, x: getattr(ops, op)(x[0], x[1]), a, b)


@many
@given(
    op=st.sampled_from(["softmax", "sigmoid", "tanh", "relu", "gelu", "quick_gelu"]),
    shape=st.lists(sizes, min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_activations(tmp_path: Path, op: str, shape: list[int], scale: float) -> None:
    assert_same(tmp_path, lambda ops, x: getattr(ops, op)(x[0]), noise(*shape, scale=scale))


@many
@given(rows=sizes, width=sizes, scale=st.sampled_from([0.0, 1e-13, 1.0, 1e4]))
def test_l2_norm_has_a_floor(tmp_path: Path, rows: int, width: int, scale: float) -> None:
    x = noise(rows, width, scale=scale)
    assert_same(tmp_path, lambda ops, x: ops.div(x[0], ops.l2_norm(x[0], 1e-12)), x)


@many
@given(data=st.data(), shape=st.lists(sizes, min_size=2, max_size=4))
def test_reshape_and_transpose(tmp_path: Path, data: st.DataObject, shape: list[int]) -> None:
    axes = data.draw(st.permutations(range(len(shape))))
    flat = [-1, shape[axes[-1]]]
    assert_same(tmp_path, lambda ops, x: ops.reshape(ops.transpose(x[0], axes), flat), noise(*shape))


@many
@given(data=st.data(), parts=st.integers(1, 4), shape=st.lists(sizes, min_size=2, max_size=3))
def test_concat_and_split(tmp_path: Path, data: st.DataObject, parts: int, shape: list[int]) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    order = data.draw(st.permutations(range(parts)))

    def body(ops: Ops[Any], x: list[Any]) -> Any:
        pieces = ops.split(ops.concat(x, axis), parts, axis)
        return ops.concat([pieces[index] for index in order], axis)

    assert_same(tmp_path, body, *(noise(*shape, seed=seed) for seed in range(parts)))


@many
@given(data=st.data(), shape=st.lists(sizes, min_size=1, max_size=4))
def test_slice(tmp_path: Path, data: st.DataObject, shape: list[int]) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, shape[axis]))
    assert_same(tmp_path, lambda ops, x: ops.slice(x[0], axis, start, stop), noise(*shape))


@many
@given(data=st.data(), rows=sizes, width=sizes)
def test_gather(tmp_path: Path, data: st.DataObject, rows: int, width: int) -> None:
    index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    assert_same(tmp_path, lambda ops, x: ops.gather(x[0], x[1]), noise(rows, width), torch.tensor(index))


@many
@given(shape=st.lists(sizes, min_size=1, max_size=3), compute=st.sampled_from(["float32", "float16"]))
def test_types_change_where_they_are_told_to(tmp_path: Path, shape: list[int], compute: str) -> None:
    """uint8 to compute, compute to island and back: values as torch rounds them, and no cast that does nothing."""
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    third = torch.tensor(1 / 3)

    def body(ops: Ops[Any], x: list[Any]) -> Any:
        scaled = ops.mul(ops.compute(x[0]), ops.weight("third", lambda: third))
        return ops.compute(ops.add(ops.island(scaled), ops.weight("exact", lambda: third, island=True)))

    assert_same(tmp_path, body, x, compute=compute, tolerance=1e-3 if compute == "float16" else 1e-6)


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_casts_that_do_nothing_are_not_written(tmp_path: Path, compute: str) -> None:
    with WeightFile(tmp_path / "w.data") as weights:
        ops = OnnxOps(weights, compute)
        x = ops.input("x", "float32", [2])
        y = ops.island(ops.compute(ops.compute(ops.island(x))))
        ops.save(tmp_path / "g.onnx", "g", [("y", ops.relu(y), [2])])
    nodes = [node.op_type for node in onnx.load(tmp_path / "g.onnx").graph.node]
    assert nodes == (["Relu"] if compute == "float32" else ["Cast", "Cast", "Relu"])


def test_a_different_operation_would_be_seen(tmp_path: Path) -> None:
    """The comparison above tells gelu from its fast approximation, and one eps from another."""
    x = noise(3, 8)
    exact = in_onnxruntime(tmp_path, lambda ops, x: ops.gelu(x[0]), [x])
    assert (exact - torch.nn.functional.gelu(x, approximate="tanh")).abs().max() > 1e-4
    assert (exact - TorchOps().quick_gelu(x)).abs().max() > 1e-3


# --- the graph ------------------------------------------------------------------------------------------------------------


def test_names_scopes_and_versions(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "w.data") as weights:
        ops = OnnxOps(weights, "float32")
        x = ops.input("x", "float32", [2, 3])
        with ops.scope("block"), ops.scope("0"):
            y = ops.linear(x, "fc", lambda: torch.ones(4, 3), None)
            y = ops.add(ops.relu(y), ops.relu(y))
        inputs, outputs, nodes = ops.save(tmp_path / "g.onnx", "stage", [("y", y, [2, 4])])
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    assert [opset.version for opset in model.opset_import] == [OPSET] == [17]
    assert model.ir_version == IR_VERSION == 8
    assert [node.name for node in model.graph.node] == [
        "block/0/fc",
        "block/0/Relu_0",
        "block/0/Relu_1",
        "block/0/Add_0",
    ]
    assert [tensor.name for tensor in model.graph.initializer] == ["block/0/fc.weight"]
    assert nodes == 4
    assert (inputs[0].name, inputs[0].dtype, inputs[0].shape) == ("x", "float32", (2, 3))
    assert (outputs[0].name, outputs[0].dtype, outputs[0].shape) == ("y", "float32", (2, 4))
    assert [value.name for value in model.graph.output] == ["y"]


def test_a_promised_shape_that_is_wrong_is_refused(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "w.data") as weights:
        ops = OnnxOps(weights, "float32")
        x = ops.input("x", "float32", [2, 3])
        with pytest.raises(ExportError, match="the graph of stage broken is not valid ONNX") as caught:
            ops.save(tmp_path / "g.onnx", "broken", [("y", ops.relu(x), [2, 4])])
    assert "hint: this is a bug in jetvla; please report it." in str(caught.value)


def test_an_impossible_operation_is_refused(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "w.data") as weights:
        ops = OnnxOps(weights, "float32")
        a, b = ops.input("a", "float32", [2, 3]), ops.input("b", "float32", [2, 3])
        with pytest.raises(ExportError, match="the graph of stage broken is not valid ONNX"):
            ops.save(tmp_path / "g.onnx", "broken", [("y", ops.matmul(a, b), [2, 3])])


# --- the weight file ------------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(1, 5000), min_size=1, max_size=5), dtype=st.sampled_from(["float32", "float16"]))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weights_are_page_aligned_and_hashed_on_the_way(tmp_path: Path, counts: list[int], dtype: str) -> None:
    path = tmp_path / "w.data"
    reported = []
    tensors = {f"w{index}": noise(count, seed=index) for index, count in enumerate(counts)}
    with WeightFile(path, reported.append) as file:
        stored = {name: file.add(name, lambda tensor=tensor: tensor, dtype) for name, tensor in tensors.items()}
    data = path.read_bytes()
    assert file.bytes == len(data)
    assert file.sha256 == hashlib.sha256(data).hexdigest() == sha256_file(path)
    assert reported == [record.length for record in stored.values()]
    end = 0
    for name, record in stored.items():
        assert record.offset % 4096 == 0
        assert record.offset >= end
        end = record.offset + record.length
        assert end <= len(data)
        values = np.frombuffer(data[record.offset : end], dtype)
        np.testing.assert_array_equal(values, tensors[name].numpy().astype(dtype))
    assert end == len(data)


def test_a_weight_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.ones(3)

    with WeightFile(tmp_path / "w.data") as file:
        first, second = file.add("w", make, "float32"), file.add("w", make, "float32")
    assert first is second
    assert len(made) == 1
    assert file.bytes == 12


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (-65504.0, True), (65600.0, False), (-1e9, False)])
def test_a_weight_beyond_fp16_is_stored_in_fp32(tmp_path: Path, value: float, fits: bool) -> None:
    weight = torch.tensor([0.5, value])
    with WeightFile(tmp_path / "w.data") as file:
        record = file.add("w", lambda: weight, "float16")
    dtype = np.float16 if fits else np.float32
    assert (record.dtype, record.length) == (np.dtype(dtype).name, 2 * np.dtype(dtype).itemsize)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w.data", dtype), weight.numpy())


def test_weights_keep_their_order_whatever_their_strides(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert not transposed.is_contiguous()
    with WeightFile(tmp_path / "w.data") as file:
        record = file.add("w", lambda: transposed, "float32")
    assert record.shape == (3, 2)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w.data", np.float32), [0, 3, 1, 4, 2, 5])
