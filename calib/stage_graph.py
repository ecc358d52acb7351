"""A stage's ONNX graph as quantization sees it: the GEMMs that can be INT8, what feeds them, and which block each belongs to.

The graphs are those that export wrote, so their pattern is known: every weight product is a `Gemm` with transB=1, named by its place, and
in an fp16 graph a `Cast` stands between an fp32 island and the product. Weights stay in their file and are mapped one at a time. Knows
nothing about ranges, integers or accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import BundleError
from bundle.manifest import Manifest

STAGES = ("vision", "language", "action_head")
Array = NDArray[np.generic]
# Its input is 8-bit pixels and it is 0.2 % of the work: nothing to gain.
_LEFT_OUT = ("patches/projection",)
_LAYER = re.compile(r"layers\.(\d+)/")


@dataclass(frozen=True)
class Site:
    """One GEMM that can be INT8.

    Attributes:
        stage, block: where it belongs; a block is what the search moves as a whole.
        name: of the node, the same in the graphs of all sequence lengths.
        source: the fp32 (in an fp16 graph possibly fp16) tensor that feeds it; a Cast in between is skipped.
        weight, bias: initializers, [N, K] and [N].
        norm: the LayerNormalization whose output `source` is, directly or by a Gather of rows, and whose every use is such a GEMM:
            smoothing scales can be folded into it. Else None.
        shape: (N, K).
    """

    stage: str
    block: str
    name: str
    source: str
    weight: str
    bias: str | None
    norm: str | None
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """Unique in the policy."""
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True)
class StageGraph:
    """One ONNX file, without its weights in memory.

    Attributes:
        folder: where its external data lies.
        sites: in the order of execution.
    """

    stage: str
    folder: Path
    model: onnx.ModelProto
    initializers: Mapping[str, TensorProto]
    sites: tuple[Site, ...]
    _mapped: dict[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def array(self, name: str) -> Array:
        """An initializer, mapped read-only from its file where it lies in one."""
        proto = self.initializers[name]
        if proto.data_location != TensorProto.EXTERNAL:
            stored: Array = numpy_helper.to_array(proto)
            return stored
        return external_array(proto, self.folder, self._mapped)

    def unmap(self) -> None:
        """Let go of the weights, which count as this process's memory; `array` maps them again."""
        self._mapped.clear()

    def rows(self, site: Site) -> int:
        """How many rows the product has: tokens, or 1 in the action head."""
        return self._rows[site.name]

    @cached_property
    def _rows(self) -> dict[str, int]:
        inferred = onnx.shape_inference.infer_shapes(self.model, strict_mode=True).graph
        shapes = {value.name: value.type.tensor_type.shape for value in (*inferred.value_info, *inferred.output)}
        outputs = {node.name: node.output[0] for node in self.model.graph.node if node.op_type == "Gemm"}
        return {site.name: shapes[outputs[site.name]].dim[0].dim_value for site in self.sites}

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each tensor."""
        return {output: node for node in self.model.graph.node for output in node.output}


def external_array(proto: TensorProto, folder: Path, mapped: dict[str, NDArray[np.uint8]]) -> Array:
    """An initializer that lies in a file of `folder`, read-only; `mapped` keeps the files that were mapped before."""
    place = {entry.key: entry.value for entry in proto.external_data}
    file = place["location"]
    if file not in mapped:
        mapped[file] = np.memmap(folder / file, np.uint8, "r")
    start = int(place.get("offset", 0))
    raw = mapped[file][start : start + int(place["length"])]
    return raw.view(helper.tensor_dtype_to_np_dtype(proto.data_type)).reshape(tuple(proto.dims))


def blocks_of(graphs: Mapping[tuple[str, int | None], StageGraph], stage: str) -> tuple[str, ...]:
    """What of a stage can be INT8, in the order of execution; its graphs of all lengths have the same."""
    return tuple(
        dict.fromkeys(site.block for (name, _), graph in graphs.items() if name == stage for site in graph.sites)
    )


def read_stage(
    folder: Path, manifest: Manifest, stage: str, *, sequence: int | None, layers_per_block: int
) -> StageGraph:
    """Read one floating-point graph of a bundle.

    Args:
        sequence: bucket, for the language stage.
        layers_per_block: transformer layers that the search moves together.

    Raises:
        BundleError: the file is not one that export wrote.
    """
    graph = read_graph(folder, manifest, stage, sequence)
    layers = manifest.dimensions.vision_layers if stage == "vision" else manifest.dimensions.text_layers
    sites = _find_sites(stage, graph.model, graph.initializers, layers, layers_per_block)
    return replace(graph, sites=sites)


def read_graph(folder: Path, manifest: Manifest, stage: str, sequence: int | None) -> StageGraph:
    """Read any graph of a bundle, an INT8 one too, without looking for sites.

    Raises:
        BundleError: the file is not ONNX.
    """
    path = folder / manifest.graph(stage, sequence).file
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own exception types share no public base
        raise BundleError(f"{path} is damaged", got=error, hint="copy the bundle again, or rebuild it.") from None
    return StageGraph(stage, folder, model, {proto.name: proto for proto in model.graph.initializer}, ())


def block_of(stage: str, node: str, layers: int, layers_per_block: int) -> str:
    """`vision.0-5`, `language.18-23`, `projection` or `action_head`."""
    if stage == "action_head":
        return stage
    found = _LAYER.match(node)
    if found is None:
        return "projection"
    first = int(found[1]) // layers_per_block * layers_per_block
    last = min(first + layers_per_block, layers) - 1
    return f"{stage}.{first}" if first == last else f"{stage}.{first}-{last}"


def _find_sites(
    stage: str, model: onnx.ModelProto, initializers: Mapping[str, TensorProto], layers: int, layers_per_block: int
) -> tuple[Site, ...]:
    producers = {output: node for node in model.graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for output in model.graph.output:  # the next stage reads it too
        users.pop(output.name, None)
    sites = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.name in _LEFT_OUT:
            continue
        source = _before_cast(node.input[0], producers)
        n, k = initializers[node.input[1]].dims
        sites.append(
            Site(
                stage=stage,
                block=block_of(stage, node.name, layers, layers_per_block),
                name=node.name,
                source=source,
                weight=node.input[1],
                bias=node.input[2] if len(node.input) > 2 else None,
                norm=_foldable_norm(source, producers, users),
                shape=(n, k),
            )
        )
    blocks: dict[str, set[str]] = {}
    for site in sites:
        if site.norm is not None:
            blocks.setdefault(site.norm, set()).add(site.block)
    # A block moves as a whole; folding must not reach into another one.
    return tuple(
        replace(site, norm=None) if site.norm is not None and len(blocks[site.norm]) > 1 else site for site in sites
    )


def _before_cast(name: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    node = producers.get(name)
    return node.input[0] if node is not None and node.op_type == "Cast" else name


def _foldable_norm(
    source: str, producers: Mapping[str, onnx.NodeProto], users: Mapping[str, list[onnx.NodeProto]]
) -> str | None:
    """The LayerNormalization behind `source` if scaling its output reaches nothing but weight products."""
    node = producers.get(source)
    if node is not None and node.op_type == "Gather":
        node = producers.get(_before_cast(node.input[0], producers))
    if node is None or node.op_type != "LayerNormalization":
        return None
    return node.name if _only_products(node.output[0], users) else None


def _only_products(tensor: str, users: Mapping[str, list[onnx.NodeProto]]) -> bool:
    for user in users.get(tensor, []):
        if user.op_type in ("Cast", "Gather") and user.input[0] == tensor:
            if not _only_products(user.output[0], users):
                return False
        elif not (user.op_type == "Gemm" and user.input[0] == tensor):
            return False
    return bool(users.get(tensor))
