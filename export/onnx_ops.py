"""Writes a stage down as an ONNX graph; its weights go into an external file (export/weight_file.py).

Opset 17, static shapes, deterministic names, types in the graph (strong typing): what TensorRT 10 and 11 and ONNX Runtime all
read. Emitting nodes ourselves instead of tracing torch gives exactly these nodes on every torch version, in seconds, and never
holds a second copy of the weights (docs/decisions/0002-own-graph-emitter.md). Knows nothing about what a stage computes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bundle.errors import ExportError
from bundle.manifest import Tensor as TensorSpec
from export.ops import Make
from export.weight_file import WeightFile

OPSET = 17
# IR version 8 is the newest that ONNX Runtime 1.14 reads.
IR_VERSION = 8
_ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
# Key of the graph's metadata that lists the operations of an fp16 graph that are computed in fp32, separated by spaces.
WIDENED = "jetvla.fp32"


@dataclass(frozen=True)
class Value:
    """A tensor in the graph under construction."""

    name: str
    dtype: str


class OnnxOps:
    """Builds one graph; see `Ops` for what the methods mean.

    Args:
        weights: where constants go.
        compute: `float32` or `float16`, the type of GEMMs; islands are always float32.
        wide: operations, by node name, that are computed in fp32 all the same: their values leave fp16's range. Those whose weights do
            are found while they are stored. What follows stays fp32 up to the next weights; names are those of the graph without `wide`.
    """

    def __init__(self, weights: WeightFile, compute: str, wide: Collection[str] = ()) -> None:
        self._weights = weights
        self._compute = compute
        self._wide = set(wide)
        self._casts: dict[str, Value] = {}
        self._unrounded: dict[str, Value] = {}
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[TensorSpec] = []

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        """Declare a graph input."""
        self._inputs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(shape)))
        return Value(name, dtype)

    def save(
        self, path: Path, name: str, outputs: Sequence[tuple[str, Value, Sequence[int]]]
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
        """Name the outputs, write the graph, check it. Returns (inputs, outputs, node count).

        Raises:
            ExportError: ONNX's checker or shape inference rejects the graph.
        """
        specs = []
        for output, value, shape in outputs:
            self._rename(value.name, output)
            specs.append(TensorSpec(name=output, dtype=value.dtype, shape=tuple(shape)))
        # Casts whose readers all take the fp32 value instead.
        read = {value for node in self._nodes for value in node.input} | {spec.name for spec in specs}
        self._nodes = [node for node in self._nodes if node.op_type != "Cast" or node.output[0] in read]
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(t.name, _ELEMENT[t.dtype], t.shape) for t in self._inputs],
            [helper.make_tensor_value_info(t.name, _ELEMENT[t.dtype], t.shape) for t in specs],
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="jetvla"
        )
        if self._wide:
            helper.set_model_props(model, {WIDENED: " ".join(sorted(self._wide))})
        path.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"the graph of stage {name} is not valid ONNX",
                got=error,
                hint="this is a bug in jetvla; please report it.",
            ) from error
        return tuple(self._inputs), tuple(specs), len(self._nodes)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        yield
        self._scope.pop()

    def weight(self, name: str, make: Make, *, island: bool = False) -> Value:
        full = self._path(name)
        value = self._store(full, make, island=island or full in self._wide)
        if not island and value.dtype != self._compute:
            self._wide.add(full)
        return value

    def _store(self, full: str, make: Make, *, island: bool) -> Value:
        stored = self._weights.add(full, make, "float32" if island else self._compute)
        if full not in self._initializers:
            proto = TensorProto(name=full, data_type=_ELEMENT[stored.dtype], dims=stored.shape)
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", self._weights.path.name),
                ("offset", stored.offset),
                ("length", stored.length),
            ):
                proto.external_data.add(key=key, value=str(value))
            self._initializers[full] = proto
        return Value(full, stored.dtype)

    def linear(self, x: Value, name: str, weight: Make, bias: Make | None) -> Value:
        full = self._path(name)
        w = self._store(f"{full}.weight", weight, island=full in self._wide)
        if w.dtype != self._compute:
            self._wide.add(full)
        inputs = [self._single(x) if w.dtype == "float32" else self._cast(x, w.dtype), w]
        b = None if bias is None else self._store(f"{full}.bias", bias, island=full in self._wide)
        if b is None or b.dtype == w.dtype:
            return self._node("Gemm", [*inputs, *([] if b is None else [b])], w.dtype, name=name, transB=1)
        # Only the bias does not fit fp16: it is added behind the product.
        self._wide.add(b.name)
        return self._node(
            "Add", [self._node("Gemm", inputs, w.dtype, name=name, transB=1), b], b.dtype, name=f"{name}.sum"
        )

    def layer_norm(self, x: Value, name: str, gamma: Make, beta: Make, eps: float) -> Value:
        inputs = [
            x,
            self.weight(f"{name}.weight", gamma, island=True),
            self.weight(f"{name}.bias", beta, island=True),
        ]
        return self._node("LayerNormalization", inputs, x.dtype, name=name, axis=-1, epsilon=eps)

    def island(self, x: Value) -> Value:
        return self._cast(x, "float32")

    def compute(self, x: Value) -> Value:
        return self._cast(x, self._compute)

    def matmul(self, a: Value, b: Value) -> Value:
        return self._node("MatMul", [a, b], a.dtype)

    def add(self, a: Value, b: Value) -> Value:
        return self._node("Add", [a, b], a.dtype)

    def sub(self, a: Value, b: Value) -> Value:
        return self._node("Sub", [a, b], a.dtype)

    def mul(self, a: Value, b: Value) -> Value:
        return self._node("Mul", [a, b], a.dtype)

    def div(self, a: Value, b: Value) -> Value:
        return self._node("Div", [a, b], a.dtype)

    def softmax(self, x: Value) -> Value:
        return self._node("Softmax", [x], x.dtype, axis=-1)

    def sigmoid(self, x: Value) -> Value:
        return self._node("Sigmoid", [x], x.dtype)

    def tanh(self, x: Value) -> Value:
        return self._node("Tanh", [x], x.dtype)

    def relu(self, x: Value) -> Value:
        return self._node("Relu", [x], x.dtype)

    def gelu(self, x: Value) -> Value:
        # Gelu is an operator from opset 20 on only; runtimes recognise this pattern and fuse it.
        erf = self._node("Erf", [self._node("Div", [x, self._scalar(math.sqrt(2.0), x.dtype)], x.dtype)], x.dtype)
        gate = self._node("Add", [erf, self._scalar(1.0, x.dtype)], x.dtype)
        return self._node("Mul", [self.mul(x, gate), self._scalar(0.5, x.dtype)], x.dtype)

    def quick_gelu(self, x: Value) -> Value:
        return self.mul(x, self.sigmoid(self._node("Mul", [x, self._scalar(1.702, x.dtype)], x.dtype)))

    def l2_norm(self, x: Value, floor: float) -> Value:
        norm = self._node("ReduceL2", [x], x.dtype, axes=[-1], keepdims=1)
        return self._node("Max", [norm, self._scalar(floor, x.dtype)], x.dtype)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return self._node("Reshape", [x, self._integers(shape)], x.dtype)

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        return self._node("Transpose", [x], x.dtype, perm=list(axes))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        return self._node("Concat", list(parts), parts[0].dtype, axis=axis)

    def split(self, x: Value, parts: int, axis: int) -> Sequence[Value]:
        if parts == 1:
            return [x]
        name = self._unique("Split")
        outputs = [f"{name}:{index}" for index in range(parts)]
        self._nodes.append(helper.make_node("Split", [x.name], outputs, name=name, axis=axis))
        return [Value(output, x.dtype) for output in outputs]

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        bounds = [self._integers([bound]) for bound in (start, stop, axis)]
        return self._node("Slice", [x, *bounds], x.dtype)

    def gather(self, x: Value, index: Value) -> Value:
        return self._node("Gather", [x, index], x.dtype, axis=0)

    def _cast(self, x: Value, dtype: str) -> Value:
        # Named by what is cast, so that a cast more or less renames no other operation.
        name = f"{x.name.removesuffix(':0')}/{dtype}"
        if x.dtype == dtype:
            return x
        if dtype == "float16" and name in self._wide:
            return self._cast(x, "float32")
        if name not in self._casts:
            self._casts[name] = self._emit("Cast", [x], dtype, name, to=_ELEMENT[dtype])
            if x.dtype == "float32":
                self._unrounded[f"{name}:0"] = x
        return self._casts[name]

    def _single(self, x: Value) -> Value:
        """A value in fp32: what was cast to fp16, not what came out of the cast."""
        return self._unrounded.get(x.name) or self._cast(x, "float32")

    def _node(
        self, op: str, inputs: Sequence[Value], dtype: str, *, name: str | None = None, **attributes: Any
    ) -> Value:
        full = self._unique(op) if name is None else self._path(name)
        if self._wide and (full in self._wide or {"float16", "float32"} <= {value.dtype for value in inputs}):
            inputs = [self._single(value) if value.dtype == "float16" else value for value in inputs]
            dtype = "float32"
        return self._emit(op, inputs, dtype, full, **attributes)

    def _emit(self, op: str, inputs: Sequence[Value], dtype: str, name: str, **attributes: Any) -> Value:
        self._nodes.append(
            helper.make_node(op, [value.name for value in inputs], [f"{name}:0"], name=name, **attributes)
        )
        return Value(f"{name}:0", dtype)

    def _scalar(self, value: float, dtype: str) -> Value:
        return self._inline(f"const/{value:.9g}/{dtype}", np.asarray(value, dtype))

    def _integers(self, values: Sequence[int]) -> Value:
        return self._inline("const/" + "x".join(map(str, values)), np.asarray(values, np.int64))

    def _inline(self, name: str, array: NDArray[np.generic]) -> Value:
        """Constants of a few bytes stay in the graph: shapes must be readable without the weight file."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return Value(name, str(array.dtype))

    def _path(self, name: str) -> str:
        return "/".join([*self._scope, name])

    def _unique(self, op: str) -> str:
        base = self._path(op)
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        return f"{base}_{count}"

    def _rename(self, old: str, new: str) -> None:
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
