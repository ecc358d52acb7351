"""How large fp16 values get, measured before they are rounded, and the same graph with what is too large in fp32.

What is real is what onnx.reference makes of a graph: numpy arrays that are fp16 at every edge, as on a GPU and unlike ONNX Runtime's CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bundle.errors import ExportError
from bundle.recording import Episode
from export.fp16_range import LIMIT, TappedGraph, frames_of
from export.onnx_ops import OnnxOps
from export.ops import Ops, TorchOps
from export.weight_file import WeightFile

Body = Callable[[Ops[Any], Any], Any]
ROWS, WIDTH = 3, 4


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(7))


def ignore() -> None:
    pass


def layer(ops: Ops[Any], x: Any, name: str, scale: float = 1.0) -> Any:
    return ops.linear(x, name, lambda: noise(WIDTH, WIDTH, scale=scale), lambda: noise(WIDTH, scale=scale))


def normed(ops: Ops[Any], x: Any) -> Any:
    """What follows a large product in the stages, and undoes its size."""
    return ops.layer_norm(ops.island(x), "norm", lambda: torch.ones(WIDTH), lambda: torch.zeros(WIDTH), 1e-5)


def scores(ops: Ops[Any], x: Any) -> Any:
    q = ops.compute(x)
    return ops.softmax(ops.island(ops.matmul(q, ops.transpose(q, [1, 0]))))


def attention(ops: Ops[Any], x: Any) -> Any:
    """Keys and values of one product, more keys that are weights, and queries that are: as in the resampler."""
    k, v = ops.split(ops.reshape(ops.compute(x), [2 * ROWS, WIDTH // 2]), 2, 1)
    k = ops.concat([ops.mul(k, ops.weight("gain", lambda: torch.tensor(3e4))), ops.weight("k", lambda: noise(1, 1))], 0)
    y = ops.matmul(ops.weight("q", lambda: noise(ROWS, 1)), ops.transpose(k, [1, 0]))
    y = ops.compute(ops.softmax(ops.island(ops.slice(y, 1, 0, 2 * ROWS))))
    return ops.matmul(y, v)


@dataclass(frozen=True)
class Case:
    """A stage in miniature, how large its input is, and which operations must be fp32."""

    name: str
    body: Body
    size: float
    beyond: set[str]


CASES = (
    Case(
        "a product in front of an island", lambda ops, x: normed(ops, layer(ops, ops.compute(x), "fc", 2e4)), 5, {"fc"}
    ),
    Case(
        "products with an activation in fp16 between them",
        lambda ops, x: normed(ops, layer(ops, ops.quick_gelu(layer(ops, ops.compute(x), "fc1", 2e4)), "fc2")),
        5,
        {"fc1", "Mul_0", "Sigmoid_0", "Mul_1", "fc2"},
    ),
    Case("attention scores", scores, 300, {"MatMul_0"}),
    Case("a cast", lambda ops, x: normed(ops, layer(ops, ops.compute(x), "fc")), 1e5, {"x/float16", "fc"}),
    Case("moved, and beside weights", attention, 5, {"Mul_0", "MatMul_0"}),
)


def write(
    folder: Path, body: Body, wide: Collection[str] = (), shape: Sequence[int] = (ROWS, WIDTH)
) -> onnx.ModelProto:
    with WeightFile(folder / "g.data") as weights:
        ops = OnnxOps(weights, "float16", wide)
        x = ops.input("x", "float32", shape)
        out = body(TorchOps(), torch.ones(*shape)).shape
        ops.save(folder / "g.onnx", "g", [("y", ops.island(body(ops, x)), tuple(out))])
    return onnx.load(folder / "g.onnx", load_external_data=False)


def in_real_fp16(folder: Path, x: Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        (found,) = ReferenceEvaluator(onnx.load(folder / "g.onnx")).run(None, {"x": x.numpy()})
    assert isinstance(found, np.ndarray)
    return found


def on_the_cpu(folder: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / "g.onnx"), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_leaves_the_range_is_found_and_is_right_in_fp32(tmp_path: Path, case: Case) -> None:
    x = noise(ROWS, WIDTH, scale=case.size)
    expected = case.body(TorchOps(), x).numpy()
    plain = TappedGraph(write(tmp_path, case.body))
    assert not np.isfinite(in_real_fp16(tmp_path, x)).all()
    peaks = plain.run(tmp_path, [{"x": x.numpy()}], ignore)
    assert max(peaks.values()) > 65504
    assert plain.beyond(peaks) == case.beyond
    assert plain.widened == {}

    model = write(tmp_path, case.body, case.beyond)
    # Half of what 11 bits resolve of sums of a few terms.
    np.testing.assert_allclose(in_real_fp16(tmp_path, x), expected, atol=2e-2)
    np.testing.assert_allclose(on_the_cpu(tmp_path, x), expected, atol=2e-2)
    wide = TappedGraph(model)
    again = wide.run(tmp_path, [{"x": x.numpy()}], ignore)
    assert wide.beyond(again) == set()
    assert all(again[name] <= LIMIT for name in wide.half)
    results = {name for name in case.beyond if not name.endswith("float16")}  # a cast that is not made has no result
    assert set(wide.widened.values()) == results
    assert max(again.values()) > 65504 or case.name == "a cast"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.data", "g.onnx"]


def test_peaks_are_those_of_every_fp16_tensor_over_all_inputs(tmp_path: Path) -> None:
    def body(ops: Ops[Any], x: Any) -> Any:
        y = ops.reshape(ops.mul(ops.compute(x), ops.weight("three", lambda: torch.tensor(3.0))), [WIDTH, ROWS])
        return ops.mul(ops.island(ops.relu(y)), ops.weight("large", lambda: torch.tensor(1e9), island=True))

    graph = TappedGraph(write(tmp_path, body))
    frames = [np.full((ROWS, WIDTH), value, np.float32) for value in (2.0, -40.0, 30000.0)]
    names = {"x/float16": 1, "Mul_0": 3, "Relu_0": 3}
    for count in (1, 2, 3):
        peaks = graph.run(tmp_path, [{"x": frame} for frame in frames[:count]], ignore)
        largest = float(np.abs(frames[count - 1]).max())
        relu = 2.0 if count < 3 else 30000.0
        assert {graph.half[name]: peak for name, peak in peaks.items()} == {
            name: factor * (relu if name == "Relu_0" else largest) for name, factor in names.items()
        }
    assert graph.beyond(peaks) == {"Mul_0", "Relu_0"}


@pytest.mark.parametrize(
    ("peak", "beyond"), [(LIMIT, False), (math.nextafter(LIMIT, math.inf), True), (math.inf, True), (math.nan, True)]
)
def test_the_limit_is_half_of_the_range(tmp_path: Path, peak: float, beyond: bool) -> None:
    assert LIMIT == 32752
    graph = TappedGraph(write(tmp_path, lambda ops, x: ops.compute(x)))
    assert graph.beyond(dict.fromkeys(graph.half, peak)) == ({"x/float16"} if beyond else set())


def test_a_product_that_only_multiplies_beyond_the_limit_is_found(tmp_path: Path) -> None:
    """quick_gelu of 25000: x fits, 1.702 x does not."""
    body: Body = lambda ops, x: ops.quick_gelu(ops.compute(x))  # noqa: E731
    x = torch.full((ROWS, WIDTH), 25000.0)
    graph = TappedGraph(write(tmp_path, body))
    beyond = graph.beyond(graph.run(tmp_path, [{"x": x.numpy()}], ignore))
    assert beyond == {"Mul_0", "Sigmoid_0"}
    write(tmp_path, body, beyond)
    np.testing.assert_allclose(in_real_fp16(tmp_path, x), x.numpy(), rtol=1e-3)


@pytest.mark.parametrize("part", ["weight", "bias", "both", "table"])
def test_weights_beyond_fp16_make_their_operation_fp32(tmp_path: Path, part: str) -> None:
    large = noise(WIDTH, WIDTH)
    large[1, 2] = 70000.0
    weight = large if part in ("weight", "both") else noise(WIDTH, WIDTH)
    bias = large[1] if part in ("bias", "both") else noise(WIDTH)

    def body(ops: Ops[Any], x: Any) -> Any:
        y = ops.linear(ops.compute(x), "fc", lambda: weight, lambda: bias)
        if part == "table":
            y = ops.mul(y, ops.weight("table", lambda: large[1]))
        return normed(ops, y)

    x = noise(ROWS, WIDTH, scale=0.1)
    graph = TappedGraph(write(tmp_path, body))
    expected = {"weight": {"fc"}, "bias": {"fc.bias"}, "both": {"fc"}, "table": {"table"}}[part]
    assert set(graph.widened.values()) == expected
    peaks = graph.run(tmp_path, [{"x": x.numpy()}], ignore)
    assert max(peaks[name] for name in graph.widened) == pytest.approx(70000, rel=1e-4)
    assert graph.beyond(peaks) == set()
    np.testing.assert_allclose(in_real_fp16(tmp_path, x), body(TorchOps(), x).numpy(), atol=2e-2)


def test_without_a_reason_types_are_not_mixed(tmp_path: Path) -> None:
    """Crossing between fp16 and its islands stays explicit: a forgotten one is an error and no silent fp32."""
    with pytest.raises(ExportError, match="the graph of stage g is not valid ONNX"):
        write(tmp_path, lambda ops, x: ops.add(x, ops.compute(x)))


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (12, [6, 11])])
def test_frames_are_spread_over_the_episode(count: int, expected: list[int]) -> None:
    assert frames_of(Episode(np.zeros((count, 1, 2, 2, 3), np.uint8), (0, 2), (1, 1))) == expected
