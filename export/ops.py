"""The vocabulary that stages are written in, and its execution by torch.

A stage (export/stages.py) is written once against `Ops`. `TorchOps` runs it - in float64 to prove that a shortcut changes nothing, in
float16 to see what rounding does - and `OnnxOps` (export/onnx_ops.py) writes the same stage down as a graph. So what is tested
is what ships. Two kinds of numbers flow: `compute` (fp16 in an fp16 build) for GEMMs, and `island` (always fp32 there) for residual
sums, LayerNorm, softmax and L2 norms, where fp16 is a trap. Crossing is explicit, so the types end up in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

Make = Callable[[], Tensor]
T = TypeVar("T")


class Ops(Protocol[T]):
    """What a stage may do. Shapes are static; matrices are 2-D [rows, width] unless said otherwise."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Context manager: prefix the names of weights and nodes inside."""
        ...

    def weight(self, name: str, make: Make, *, island: bool = False) -> T:
        """A constant, made when it is needed: compute type, or fp32 with `island`."""
        ...

    def linear(self, x: T, name: str, weight: Make, bias: Make | None) -> T:
        """x W^T + b in the compute type; W is [out, in]."""
        ...

    def layer_norm(self, x: T, name: str, gamma: Make, beta: Make, eps: float) -> T:
        """LayerNorm over the last axis; island in, island out."""
        ...

    def island(self, x: T) -> T:
        """To fp32."""
        ...

    def compute(self, x: T) -> T:
        """To the compute type."""
        ...

    def matmul(self, a: T, b: T) -> T: ...
    def add(self, a: T, b: T) -> T: ...
    def sub(self, a: T, b: T) -> T: ...
    def mul(self, a: T, b: T) -> T: ...
    def div(self, a: T, b: T) -> T: ...
    def softmax(self, x: T) -> T: ...
    def sigmoid(self, x: T) -> T: ...
    def tanh(self, x: T) -> T: ...
    def relu(self, x: T) -> T: ...

    def gelu(self, x: T) -> T:
        """Exact: x/2 (1 + erf(x / sqrt 2))."""
        ...

    def quick_gelu(self, x: T) -> T:
        """x sigmoid(1.702 x)."""
        ...

    def l2_norm(self, x: T, floor: float) -> T:
        """max(||x||, floor) over the last axis, kept."""
        ...

    def reshape(self, x: T, shape: Sequence[int]) -> T: ...
    def transpose(self, x: T, axes: Sequence[int]) -> T: ...
    def concat(self, parts: Sequence[T], axis: int) -> T: ...

    def split(self, x: T, parts: int, axis: int) -> Sequence[T]:
        """Equal parts."""
        ...

    def slice(self, x: T, axis: int, start: int, stop: int) -> T: ...

    def gather(self, x: T, index: T) -> T:
        """Rows of axis 0."""
        ...


class TorchOps:
    """Executes a stage eagerly.

    Args:
        compute: type of GEMMs.
        island: type of everything else; float64 together with `compute` for proofs.
    """

    def __init__(self, compute: torch.dtype = torch.float32, island: torch.dtype = torch.float32) -> None:
        self._compute = compute
        self._island = island

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        yield

    def weight(self, name: str, make: Make, *, island: bool = False) -> Tensor:
        return make().to(self._island if island else self._compute)

    def linear(self, x: Tensor, name: str, weight: Make, bias: Make | None) -> Tensor:
        return functional.linear(x, self.weight(name, weight), None if bias is None else self.weight(name, bias))

    def layer_norm(self, x: Tensor, name: str, gamma: Make, beta: Make, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], gamma().to(x.dtype), beta().to(x.dtype), eps)

    def island(self, x: Tensor) -> Tensor:
        return x.to(self._island)

    def compute(self, x: Tensor) -> Tensor:
        return x.to(self._compute)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def tanh(self, x: Tensor) -> Tensor:
        return x.tanh()

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def gelu(self, x: Tensor) -> Tensor:
        return functional.gelu(x)

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()

    def l2_norm(self, x: Tensor, floor: float) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.clamp_min(floor)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), axis)

    def split(self, x: Tensor, parts: int, axis: int) -> Sequence[Tensor]:
        return x.chunk(parts, axis)

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)
