"""The integers of a stage: weights, scales and biases of every site, in one file that the graphs of all assignments and forms share.

Weights are symmetric per output channel, as TensorRT wants them, and lie as [N, K] in every form. The bias of ONNX Runtime's integer
GEMM is int32 in steps of (activation scale x weight scale), far finer than the products' own error; the portable form keeps it in fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from bundle.atomic import disk_errors
from calib.smoothing import fold_norm, fold_weight
from calib.stage_graph import Array, Site, StageGraph

Floats = NDArray[np.float32]
LEVELS = 127
# A page: runtimes map weights without copying them.
_ALIGN = 4096
# Headroom of an int32 bias: the sum of products must fit beside it.
_BIAS_LIMIT = 2.0**29


class Tensor(msgspec.Struct, frozen=True):
    """Where an array lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Ranges:
    """What calibration found: scale of every site's activation, and smoothing factors by the LayerNorm that they fold into."""

    activation: Mapping[str, float]
    smoothing: Mapping[str, Floats]


class DataFile:
    """Writes arrays into one external-data file, page-aligned, hashed on the way; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.bytes = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, array: Array) -> None:
        """Append an array unless one of that name is there."""
        if name in self.tensors:
            return
        self._write(b"\0" * (-self.bytes % _ALIGN))
        plain = np.ascontiguousarray(array)
        self.tensors[name] = Tensor(str(plain.dtype), tuple(plain.shape), self.bytes, plain.nbytes)
        self._write(plain.reshape(-1).view(np.uint8).data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def quantize_weight(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """[N, K] to integers in -127..127 and a scale for each row; a row of zeros, or of what is next to nothing, gets scale 1."""
    steps = np.abs(weight).max(axis=1) / np.float32(LEVELS)
    scales = np.where(steps >= np.finfo(np.float32).tiny, steps, np.float32(1)).astype(np.float32)
    integers = np.clip(np.rint(weight / scales[:, None]), -LEVELS, LEVELS).astype(np.int8)
    return integers, scales


def write_integers(graph: StageGraph, ranges: Ranges, path: Path, advance: Callable[[int], None]) -> DataFile:
    """Quantize every site of a stage into a file, which is closed; names are the graph's own with a suffix.

    `W.int8` [N, K], `W.scale` [N], `W.zero` int8 [N], `W.bias32` int32 [N], `W.bias` float32 [N] for each site's weight W, and `P.smooth`
    for the parameters P of LayerNorms that take smoothing factors.

    Raises:
        StorageError: the disk is full.
    """
    norms = {node.name: node for node in graph.model.graph.node if node.op_type == "LayerNormalization"}
    with disk_errors(path), DataFile(path) as file:
        for site in graph.sites:
            weight = graph.array(site.weight)
            smooth = None if site.norm is None else ranges.smoothing.get(site.norm)
            if site.norm is not None and smooth is not None:
                for parameter in norms[site.norm].input[1:3]:
                    file.add(f"{parameter}.smooth", fold_norm(graph.array(parameter), smooth))
            plain = weight.astype(np.float32) if smooth is None else fold_weight(weight, smooth)
            bias = None if site.bias is None else graph.array(site.bias).astype(np.float32)
            add_site(file, site, plain, bias, ranges.activation[site.key])
            advance(weight.shape[0] * weight.shape[1])
    return file


def add_site(file: DataFile, site: Site, weight: Floats, bias: Floats | None, activation: float) -> None:
    """The integers of one site."""
    integers, scales = quantize_weight(weight)
    if bias is not None:
        # A row of tiny weights beside a large bias would need more than 32 bits.
        low = (np.abs(bias) / (activation * _BIAS_LIMIT)).astype(np.float32)
        if (low > scales).any():
            scales = np.maximum(scales, low)
            integers = np.clip(np.rint(weight / scales[:, None]), -LEVELS, LEVELS).astype(np.int8)
        steps = scales.astype(np.float64) * activation
        file.add(f"{site.weight}.bias32", np.rint(bias / steps).astype(np.int32))
        file.add(f"{site.weight}.bias", bias)
    file.add(f"{site.weight}.int8", integers)
    file.add(f"{site.weight}.scale", scales)
    file.add(f"{site.weight}.zero", np.zeros(len(scales), np.int8))


def external(name: str, tensor: Tensor, location: str) -> TensorProto:
    """An initializer that lies in a file."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    proto = TensorProto(name=name, data_type=kind, dims=tensor.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", tensor.offset), ("length", tensor.length)):
        proto.external_data.add(key=key, value=str(value))
    return proto
