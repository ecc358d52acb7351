"""The small ONNX graphs that probes run: products, pointwise operations and empty chains of the shapes that a policy has.

Written byte by byte (an ONNX file is one protocol-buffers message: https://onnx.ai/onnx/repo-docs/IR.html), because a robot has no onnx
package and is where probes matter most. Knows nothing about time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.onnx_wire import ELEMENTS, message, number, text, value_info, varint
from bench.roofline import Precision
from bundle.manifest import Graph, Tensor

# One probe's weights together: larger than the caches that a core has to itself.
COLD_BYTES = 128 * 2**20
_COPIES = 48
_TYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "int8": "uint8"}
_SIZES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
REPEATS = 8


@dataclass(frozen=True)
class ProbeGraph:
    """A graph and what one run of it amounts to.

    Attributes:
        feeds: input arrays.
        work: operations for products, bytes for others, nodes for `chain`.
        glue: nodes beside what is measured.
    """

    model: bytes
    graph: Graph
    feeds: dict[str, NDArray[np.generic]]
    work: float
    glue: int = 0


def linear(m: int, n: int, k: int, precision: Precision, *, cold_bytes: int = COLD_BYTES) -> ProbeGraph:
    """[m, k] times several different [n, k]: `cold_bytes` of weights, within reason."""
    copies = max(1, min(_COPIES, cold_bytes // (n * k * _SIZES[precision])))
    return linears(((m, n, k, copies),), precision)


def linears(shapes: Sequence[tuple[int, int, int, int]], precision: Precision) -> ProbeGraph:
    """All products of a stage with its weights, one after the other: (m, n, k, how many) each."""
    writer = _Writer()
    dtype = "int8" if precision == "int8" else _TYPES[precision]
    feeds: dict[str, NDArray[np.generic]] = {}
    total = ""
    for index, (m, n, k, count) in enumerate(shapes):
        feeds[f"x{index}"] = np.ones((m, k), _TYPES[precision])
        for copy in range(count):
            # Content does not matter, but equal weights would be merged.
            if precision == "int8":
                weight = writer.constant(np.full((k, n), 1 + (index + copy) % 100, dtype))
                product = writer.add("MatMulInteger", f"x{index}", weight)
            else:
                weight = writer.constant(np.full((n, k), 1e-3 * (index + copy + 1), dtype))
                product = writer.add("Gemm", f"x{index}", weight, writer.constant(np.zeros(n, dtype)), transB=1)
            corner = writer.add("Slice", product, writer.numbers(0, 0), writer.numbers(1, 1), writer.numbers(0, 1))
            total = writer.add("Add", total, corner) if total else corner
    return writer.finish(
        writer.add("Cast", total, to=ELEMENTS["float32"]),
        feeds,
        Tensor(name="y", dtype="float32", shape=(1, 1)),
        work=sum(2.0 * m * n * k * count for m, n, k, count in shapes),
        glue=2 * sum(count for *_, count in shapes),
    )


def attention(m: int, n: int, k: int, batch: int, precision: Precision) -> ProbeGraph:
    """Scores [m, k] x [k, n] and context [m, n] x [n, k] in turns, a batch of heads at once."""
    writer = _Writer()
    dtype = _TYPES[precision]
    x = "x"
    for _ in range(REPEATS):
        x = writer.add("MatMul", writer.add("MatMul", x, "keys"), "values")
    rng = np.random.default_rng(0)
    spread = (n * k) ** -0.25  # so that numbers neither grow nor vanish
    feeds = {
        name: (rng.normal(size=(batch, *shape)) * spread).astype(dtype)
        for name, shape in (("x", (m, k)), ("keys", (k, n)), ("values", (n, k)))
    }
    return writer.finish(
        x, feeds, Tensor(name="y", dtype=dtype, shape=(batch, m, k)), work=4.0 * batch * m * n * k * REPEATS
    )


def pointwise(kind: str, rows: int, width: int) -> ProbeGraph:
    """`norm`, `softmax`, `gelu`, `quick_gelu` or `move` over fp32 [rows, width], several times in a row."""
    writer = _Writer()
    ones = writer.constant(np.ones(width, np.float32))
    zeros = writer.constant(np.zeros(width, np.float32))

    def scalar(value: float) -> str:
        return writer.constant(np.array(value, np.float32))

    def gelu(x: str) -> str:
        erf = writer.add("Erf", writer.add("Div", x, scalar(math.sqrt(2.0))))
        return writer.add("Mul", writer.add("Mul", x, writer.add("Add", erf, scalar(1.0))), scalar(0.5))

    steps: dict[str, Callable[[str], str]] = {
        "norm": lambda x: writer.add("LayerNormalization", x, ones, zeros),
        "softmax": lambda x: writer.add("Softmax", x),
        "gelu": gelu,
        "quick_gelu": lambda x: writer.add("Mul", x, writer.add("Sigmoid", writer.add("Mul", x, scalar(1.702)))),
        "move": lambda x: writer.add("Add", x, "x"),
    }
    x = "x"
    for _ in range(REPEATS):
        x = steps[kind](x)
    touched = 3 if kind == "move" else 2
    array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    output = Tensor(name="y", dtype="float32", shape=(rows, width))
    return writer.finish(x, {"x": array}, output, work=4.0 * touched * rows * width * REPEATS)


def chain(nodes: int) -> ProbeGraph:
    """Additions of a few numbers, one after the other: what a node costs beside its work."""
    writer = _Writer()
    x = "x"
    for _ in range(nodes):
        x = writer.add("Add", x, "x")
    feeds: dict[str, NDArray[np.generic]] = {"x": np.zeros((1, 16), np.float32)}
    return writer.finish(x, feeds, Tensor(name="y", dtype="float32", shape=(1, 16)), work=nodes)


@dataclass
class _Writer:
    """Collects nodes and constants of one graph (opset 17)."""

    nodes: list[bytes] = field(default_factory=list)
    constants: list[bytes | memoryview] = field(default_factory=list)
    count: int = 0

    def add(self, op: str, *inputs: str, **attributes: int) -> str:
        output = f"t{len(self.nodes)}"
        body = b"".join(text(1, name) for name in inputs) + text(2, output) + text(4, op)
        for name, value in attributes.items():
            body += message(5, text(1, name) + number(3, value) + number(20, 2))
        self.nodes.append(message(1, body))
        return output

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"c{self.count}"
        self.count += 1
        dims = b"".join(number(1, size) for size in value.shape)
        kind = number(2, ELEMENTS[str(value.dtype)])
        head = dims + kind + text(8, name) + varint(9 << 3 | 2) + varint(value.nbytes)
        # Half a gigabyte of weights is copied once, when the file is put together.
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        self.constants += [varint(5 << 3 | 2) + varint(len(head) + len(raw)) + head, raw]
        return name

    def numbers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def finish(
        self, last: str, feeds: dict[str, NDArray[np.generic]], output: Tensor, *, work: float, glue: int = 0
    ) -> ProbeGraph:
        """`last` becomes the output; the inputs are those that are fed."""
        self.nodes.append(message(1, text(1, last) + text(2, output.name) + text(4, "Identity")))
        inputs = tuple(Tensor(name=name, dtype=str(array.dtype), shape=array.shape) for name, array in feeds.items())
        values = [*(message(11, value_info(tensor)) for tensor in inputs), message(12, value_info(output))]
        body = [*self.nodes, text(2, "probe"), *self.constants, *values]
        length = varint(sum(len(part) for part in body))
        model = b"".join([number(1, 8), varint(7 << 3 | 2), length, *body, message(8, number(2, 17))])
        nodes = len(self.nodes)
        graph = Graph(file="probe.onnx", form="portable", sequence=None, nodes=nodes, inputs=inputs, outputs=(output,))
        return ProbeGraph(model, graph, feeds, work, glue)
