"""Writes a stage down as an ONNX graph whose weights stream straight into one external file.

Opset 17, static shapes, deterministic names, types in the graph (strong typing): what TensorRT 10 and 11 and ONNX Runtime all
read. Emitting nodes ourselves instead of tracing torch gives exactly these nodes on every torch version, in seconds, and never
holds a second copy of the weights (docs/decisions/0002-own-graph-emitter.md). Knows nothing about what a stage computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bundle.errors import ExportError
from bundle.manifest import Tensor as TensorSpec
from export.ops import Make

OPSET = 17
# IR version 8 is the newest that ONNX Runtime 1.14 reads.
IR_VERSION = 8
# Weight offsets are page-aligned so that runtimes can map them without copying.
_PAGE = 4096
_ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Value:
    """A tensor in the graph under construction."""

    name: str
    dtype: str


@dataclass(frozen=True)
class _Stored:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """The external data of a stage, shared by its graphs; hashed while it is written.

    A weight is made, written and dropped; asking for a name again returns where it lies. Use as a context manager.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._progress = progress
        self._stored: dict[str, _Stored] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, make: Make, dtype: str) -> _Stored:
        """Store a weight as `dtype` unless it is there.

        Raises:
            ExportError: a value does not fit fp16.
        """
        if name in self._stored:
            return self._stored[name]
        array = _to_array(name, make(), dtype)
        self._write(b"\0" * (-self.bytes % _PAGE))
        stored = _Stored(str(array.dtype), tuple(array.shape), self.bytes, array.nbytes)
        self._write(array.reshape(-1).view(np.uint8).data)
        self._stored[name] = stored
        if self._progress is not None:
            self._progress(array.nbytes)
        return stored

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None, "used outside its `with` block"
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def _to_array(name: str, tensor: torch.Tensor, dtype: str) -> NDArray[np.generic]:
    if dtype == "float16":
        peak = float(tensor.abs().max()) if tensor.numel() else 0.0
        if peak > _FP16_MAX:
            raise ExportError(
                f"weight {name} does not fit fp16",
                got=f"|w| up to {peak:.3g}",
                expected=f"at most {_FP16_MAX:.0f}",
                hint="build with --precision fp32.",
            )
    array: NDArray[np.generic] = tensor.to(getattr(torch, dtype)).contiguous().numpy()
    return array


class OnnxOps:
    """Builds one graph; see `Ops` for what the methods mean.

    Args:
        weights: where constants go.
        compute: `float32` or `float16`, the type of GEMMs; islands are always float32.
    """

    def __init__(self, weights: WeightFile, compute: str) -> None:
        self._weights = weights
        self._compute = compute
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
        inputs = [x, self.weight(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias))
        return self._node("Gemm", inputs, x.dtype, name=name, transB=1)

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
        return x if x.dtype == dtype else self._node("Cast", [x], dtype, to=_ELEMENT[dtype])

    def _node(
        self, op: str, inputs: Sequence[Value], dtype: str, *, name: str | None = None, **attributes: Any
    ) -> Value:
        full = self._unique(op) if name is None else self._path(name)
        output = f"{full}:0"
        self._nodes.append(helper.make_node(op, [value.name for value in inputs], [output], name=full, **attributes))
        return Value(output, dtype)

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
