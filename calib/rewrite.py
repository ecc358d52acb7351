"""Writes a stage with some of its GEMMs in INT8.

Three forms of the same integers:

* `portable`: QuantizeLinear and DequantizeLinear stand before the product, symmetric int8, the weight's DequantizeLinear per channel: what
  TensorRT 10 and 11 and OpenVINO fuse into an INT8 product. Opset 17; the islands around it stay fp32.
* `ort-cpu`: ONNX Runtime's own QGemm on unsigned activations. Its CPU kernels are 30 times slower on signed ones, and it does not fuse the
  portable form (docs/lab-notes.md). uint8 with zero point 128 is the same grid, so the sums are the same.
* `openvino`: the portable form with two things added that change no number. A Max behind every LayerNorm, which takes nothing away that
  quantizing would not: without it OpenVINO pulls gamma and beta into the quantization, which then runs alone and in fp32; with it the
  three run as one kernel: 0.85 of the step. And rows of zeros under the input of some products (`_PADDED_TO`), cut off again behind them.

Attention products, softmax, LayerNorm and residual sums stay as they are. A block that is not INT8 keeps its own weights and its own
LayerNorm parameters: smoothing never reaches beyond a block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import ExportError
from bundle.manifest import Form
from calib.int8_weights import DataFile, Tensor, external
from calib.stage_graph import Site, StageGraph, external_array

_UNSIGNED_ZERO = 128
_LOWEST = -128
# oneDNN's INT8 product takes its rows in equal blocks of 16 to 64, or, if nothing divides them so (257 image tokens), in blocks of 64 and a
# rest. That rest costs a pass over all weights, and where they do not fit a core's cache (more inputs than outputs) so does every block.
# 264 rows, as 6 blocks of 44: 0.91 of the vision stage (docs/lab-notes.md).
_BLOCK_ROWS = 64
_PADDED_TO = 8


@dataclass(frozen=True)
class Integers:
    """A stage's file of integers, and the activation scales by site key."""

    location: str
    tensors: Mapping[str, Tensor]
    activation: Mapping[str, float]


def rewrite(graph: StageGraph, blocks: Collection[str], integers: Integers, form: Form) -> onnx.ModelProto:
    """The stage with the GEMMs of `blocks` in INT8; weights in the bundle's file and in `integers.location`."""
    chosen = {site.name: site for site in graph.sites if site.block in blocks}
    writer = _Writer(graph, integers, form)
    norms = {site.norm for site in chosen.values() if site.norm is not None}
    for node in graph.model.graph.node:
        if node.op_type == "LayerNormalization" and node.name in norms:
            writer.smoothed_norm(node)
        elif node.name in chosen:
            writer.product(node, chosen[node.name])
        else:
            writer.keep(node)
    return writer.model()


class _Writer:
    """Collects nodes and the initializers that they use."""

    def __init__(self, graph: StageGraph, integers: Integers, form: Form) -> None:
        self._graph, self._integers, self._form = graph, integers, form
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._quantized: dict[tuple[str, float], str] = {}
        self._made: set[str] = set()
        self._producers = graph.producers()

    def keep(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in self._graph.initializers:
                self._initializers[name] = self._graph.initializers[name]
        self._nodes.append(node)

    def smoothed_norm(self, node: onnx.NodeProto) -> None:
        folded = onnx.NodeProto()
        folded.CopyFrom(node)
        for index in (1, 2):
            name = f"{node.input[index]}.smooth"
            if name in self._integers.tensors:
                folded.input[index] = self._stored(name)
        self.keep(folded)

    def product(self, node: onnx.NodeProto, site: Site) -> None:
        scale = np.float32(self._integers.activation[site.key])
        half = self._graph.initializers[site.weight].data_type == TensorProto.FLOAT16
        output = f"{node.output[0]}.fp32" if half else node.output[0]
        weight, weight_scale, zero = (self._stored(f"{site.weight}.{part}") for part in ("int8", "scale", "zero"))
        quantized, scale_name, zero_name = self._quantize(site.source, scale)
        if self._form == "ort-cpu":
            inputs = [quantized, scale_name, zero_name, weight, weight_scale, zero]
            if site.bias is not None:
                inputs.append(self._stored(f"{site.weight}.bias32"))
            self._add("QGemm", inputs, output, name=node.name, domain="com.microsoft", transB=1)
        else:
            more = self._rows_to_add(site)
            activation = self._dequantized(self._padded(quantized, more), scale_name, zero_name)
            self._add("DequantizeLinear", [weight, weight_scale, zero], f"{weight}.float", axis=0)
            inputs = [activation, f"{weight}.float"]
            if site.bias is not None:
                inputs.append(self._stored(f"{site.weight}.bias"))
            self._gemm(node.name, inputs, output, more)
        if half:
            self._add("Cast", [output], node.output[0], to=TensorProto.FLOAT16)

    def _rows_to_add(self, site: Site) -> int:
        n, k = site.shape
        rows = self._graph.rows(site)
        return -rows % _PADDED_TO if self._form == "openvino" and rows > _BLOCK_ROWS and k > n else 0

    def _padded(self, quantized: str, more: int) -> str:
        name = f"{quantized}.padded"
        if more and name not in self._made:
            pads = self._constant(f"rows.{more}", np.array([0, 0, more, 0], np.int64))
            self._add("Pad", [quantized, pads], name)
        return name if more else quantized

    def _gemm(self, name: str, inputs: list[str], output: str, more: int) -> None:
        """A product; if rows were added to its input, without them."""
        whole = f"{output}.padded" if more else output
        self._add("Gemm", inputs, whole, name=name, transB=1)
        if more:
            cut = [("rows.first", 0), (f"rows.minus.{more}", -more), ("rows.axis", 0)]
            self._add(
                "Slice", [whole, *(self._constant(key, np.array([value], np.int64)) for key, value in cut)], output
            )

    def model(self) -> onnx.ModelProto:
        """The graph without nodes that nothing reads any more (casts in front of products)."""
        old = self._graph.model
        wanted = {output.name for output in old.graph.output}
        nodes = []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                nodes.append(node)
                wanted |= set(node.input)
        used = [proto for name, proto in sorted(self._initializers.items()) if name in wanted]
        graph = helper.make_graph(nodes[::-1], old.graph.name, old.graph.input, old.graph.output, used)
        opsets = [helper.make_opsetid("", old.opset_import[0].version)]
        if self._form == "ort-cpu":
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=old.ir_version, producer_name="jetvla")

    def _quantize(self, source: str, scale: np.float32) -> tuple[str, str, str]:
        """The integers of a tensor, its scale and its zero point; once for all products that read it with that scale."""
        unsigned = self._form == "ort-cpu"
        zero = np.array(_UNSIGNED_ZERO, np.uint8) if unsigned else np.array(0, np.int8)
        zero_name = self._constant("zero.uint8" if unsigned else "zero.int8", zero)
        known = self._quantized.get((source, float(scale)))
        name = known or f"{source}.int8" + (f".{len(self._quantized)}" if self._taken(source) else "")
        scale_name = self._constant(f"{name}.scale", np.array(scale, np.float32))
        if known is None:
            self._quantized[source, float(scale)] = name
            value = self._single(source)
            if self._form == "openvino" and self._is_norm(source):
                least = self._constant(f"{name}.least", np.array(_LOWEST * scale, np.float32))
                self._add("Max", [value, least], f"{name}.max")
                value = f"{name}.max"
            self._add("QuantizeLinear", [value, scale_name, zero_name], name)
        return name, scale_name, zero_name

    def _taken(self, source: str) -> bool:
        return any(other == source for other, _ in self._quantized)

    def _single(self, source: str) -> str:
        """The tensor in fp32: in an fp16 graph some products are fed by fp16 ones."""
        if not self._is_half(source):
            return source
        name = f"{source}.fp32"
        if name not in self._made:
            self._add("Cast", [source], name, to=TensorProto.FLOAT)
        return name

    def _is_norm(self, tensor: str) -> bool:
        producer = self._producers.get(tensor)
        return producer is not None and producer.op_type == "LayerNormalization"

    def _is_half(self, tensor: str) -> bool:
        """Whether a tensor is fp16: decided by what made it."""
        node = self._producers.get(tensor)
        if node is None:
            kinds = {value.name: value.type.tensor_type.elem_type for value in self._graph.model.graph.input}
            stored = self._graph.initializers.get(tensor)
            kind = stored.data_type if stored is not None else kinds.get(tensor)
            return kind == TensorProto.FLOAT16
        if node.op_type == "Cast":
            return bool(node.attribute[0].i == TensorProto.FLOAT16)
        return self._is_half(node.input[0])

    def _dequantized(self, quantized: str, scale: str, zero: str) -> str:
        name = f"{quantized}.float"
        if name not in self._made:
            self._add("DequantizeLinear", [quantized, scale, zero], name)
        return name

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))  # type: ignore[arg-type]
        self._made.add(output)

    def _stored(self, name: str) -> str:
        self._initializers[name] = external(name, self._integers.tensors[name], self._integers.location)
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._initializers[name] = numpy_helper.from_array(value, name)
        return name


def pack(model: onnx.ModelProto, folder: Path, file: DataFile) -> onnx.ModelProto:
    """The same graph with all its external data in one file; what several graphs share is written once."""
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    mapped: dict[str, NDArray[np.uint8]] = {}
    for proto in packed.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            file.add(proto.name, external_array(proto, folder, mapped))
            proto.CopyFrom(external(proto.name, file.tensors[proto.name], file.path.name))
    return packed


def check(path: Path) -> None:
    """ONNX's own checker, for portable graphs.

    Raises:
        ExportError: it rejects the file.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{path.name} is not valid ONNX", got=error, hint="this is a bug in jetvla; please report it."
        ) from error
