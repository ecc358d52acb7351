"""Writes small ONNX files without the onnx package, for tests that run where it is not installed.

An ONNX file is one protocol-buffers message (https://onnx.ai/onnx/repo-docs/IR.html); the few fields that a graph of plain nodes
and constants needs are written here byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Tensor

_ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int64": 7}


@dataclass
class GraphWriter:
    """Collects nodes and constants of one graph, then gives its file (opset 17)."""

    nodes: list[bytes] = field(default_factory=list)
    constants: list[bytes] = field(default_factory=list)

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: int) -> str:
        """Append a node; returns the name of its output."""
        output = out or f"t{len(self.nodes)}"
        body = b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, op)
        for name, value in attributes.items():
            body += _bytes(5, _text(1, name) + _number(3, value) + _number(20, 2))
        self.nodes.append(_bytes(1, body))
        return output

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        dims = b"".join(_number(1, size) for size in value.shape)
        kind = _number(2, _ELEMENT_TYPES[str(value.dtype)])
        self.constants.append(_bytes(5, dims + kind + _text(8, name) + _bytes(9, value.tobytes())))
        return name

    def numbers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def reshape(self, value: str, *shape: int, out: str | None = None) -> str:
        return self.add("Reshape", value, self.numbers(*shape), out=out)

    def model(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bytes:
        body = b"".join([*self.nodes, _text(2, "tiny"), *self.constants])
        body += b"".join(_bytes(11, _value_info(tensor)) for tensor in inputs)
        body += b"".join(_bytes(12, _value_info(tensor)) for tensor in outputs)
        return _number(1, 8) + _bytes(7, body) + _bytes(8, _number(2, 17))


def _value_info(tensor: Tensor) -> bytes:
    shape = b"".join(_bytes(1, _number(1, size)) for size in tensor.shape)
    kind = _number(1, _ELEMENT_TYPES[tensor.dtype]) + _bytes(2, shape)
    return _text(1, tensor.name) + _bytes(2, _bytes(1, kind))


# Protocol buffers' wire format: a key (field number and wire type), then a varint or a length and bytes.


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _number(key: int, value: int) -> bytes:
    return _varint(key << 3) + _varint(value)


def _bytes(key: int, value: bytes) -> bytes:
    return _varint(key << 3 | 2) + _varint(len(value)) + value


def _text(key: int, value: str) -> bytes:
    return _bytes(key, value.encode())
