"""Protocol buffers' wire format, as far as a small ONNX file needs it.

A field is a key (its number and wire type), then a varint, or a length and bytes. For where the onnx package is not
installed: robots, and tests of the robot's side. Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from bundle.manifest import Tensor

ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}
"""ONNX's numbers for element types (TensorProto.DataType)."""


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def number(key: int, value: int) -> bytes:
    """Field `key` with an integer."""
    return varint(key << 3) + varint(value)


def message(key: int, value: bytes) -> bytes:
    """Field `key` with bytes or an encoded message."""
    return varint(key << 3 | 2) + varint(len(value)) + value


def text(key: int, value: str) -> bytes:
    """Field `key` with a string."""
    return message(key, value.encode())


def value_info(tensor: Tensor) -> bytes:
    """A ValueInfoProto: name, element type and static shape of an input or output."""
    shape = b"".join(message(1, number(1, size)) for size in tensor.shape)
    kind = number(1, ELEMENTS[tensor.dtype]) + message(2, shape)
    return text(1, tensor.name) + message(2, message(1, kind))
