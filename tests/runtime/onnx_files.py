"""Writes small ONNX files without the onnx package, for tests that run where it is not installed.

An ONNX file is one protocol-buffers message (https://onnx.ai/onnx/repo-docs/IR.html); the few fields that a graph of plain nodes
and constants needs are written here byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.onnx_wire import ELEMENTS, message, number, text, value_info
from bundle.manifest import Tensor


@dataclass
class GraphWriter:
    """Collects nodes and constants of one graph, then gives its file (opset 17; of other domains 1)."""

    nodes: list[bytes] = field(default_factory=list)
    constants: list[bytes] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)

    def add(self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: int) -> str:
        """Append a node; returns the name of its output."""
        output = out or f"t{len(self.nodes)}"
        body = b"".join(text(1, name) for name in inputs) + text(2, output) + text(4, op)
        for name, value in attributes.items():
            body += message(5, text(1, name) + number(3, value) + number(20, 2))
        self.nodes.append(message(1, body + text(7, domain) if domain else body))
        self.domains.update([domain] if domain else [])
        return output

    def constant(self, value: NDArray[np.generic], file: Path | None = None) -> str:
        """A constant, in the graph or at the end of a file beside it; returns its name."""
        name = f"c{len(self.constants)}"
        dims = b"".join(number(1, size) for size in value.shape)
        kind = number(2, ELEMENTS[str(value.dtype)])
        if file is None:
            content = message(9, value.tobytes())
        else:
            offset = file.stat().st_size if file.exists() else 0
            facts = {"location": file.name, "offset": str(offset), "length": str(value.nbytes)}
            content = b"".join(message(13, text(1, key) + text(2, fact)) for key, fact in facts.items()) + number(14, 1)
            with file.open("ab") as data:
                data.write(value.tobytes())
        self.constants.append(message(5, dims + kind + text(8, name) + content))
        return name

    def numbers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def reshape(self, value: str, *shape: int, out: str | None = None) -> str:
        return self.add("Reshape", value, self.numbers(*shape), out=out)

    def model(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bytes:
        body = b"".join([*self.nodes, text(2, "tiny"), *self.constants])
        body += b"".join(message(11, value_info(tensor)) for tensor in inputs)
        body += b"".join(message(12, value_info(tensor)) for tensor in outputs)
        others = [message(8, text(1, domain) + number(2, 1)) for domain in sorted(self.domains)]
        return number(1, 8) + message(7, body) + b"".join([message(8, number(2, 17)), *others])
