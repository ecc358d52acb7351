"""Arithmetic of the roofline: how long a stage must take on a machine, and how long it should.

The floor is what no implementation can beat: all products at the peak rate, or all weights through the memory once, whichever is longer;
activations are supposed never to leave the chip. The expectation adds up the operations at rates that somebody answers for: a
derating of the peak (`Derated`), or what probes measured on the machine (bench/calibration.py). Times are milliseconds, rates per second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from bench.workload import Kind, Op

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_FUSED: tuple[Kind, ...] = ("gelu", "quick_gelu", "move")


@dataclass(frozen=True)
class Peak:
    """What a machine can do at most.

    Attributes:
        flops: operations a second by precision.
        bandwidth: bytes a second from memory.
        companion: the type in which it computes what INT8 leaves out (attention, pointwise operations).
    """

    flops: Mapping[Precision, float]
    bandwidth: float
    companion: Precision


class Rates(Protocol):
    """Somebody who knows how long a stage takes."""

    def stage_ms(self, ops: Sequence[Op], precision: Precision, nodes: int) -> float:
        """Of one run; `nodes` of its graph, 0 if unknown."""
        ...


@dataclass(frozen=True)
class Derated:
    """A peak, and the shares of it that are usually reached.

    Attributes:
        compute, memory: shares in 0..1.
        start_us: of one kernel.

    Activations and reshapes are taken for fused into a product and cost nothing but their constants; what a product reads and writes
    beside its weights is a megabyte or so, which caches hold.
    """

    peak: Peak
    compute: float
    memory: float
    start_us: float

    def stage_ms(self, ops: Sequence[Op], precision: Precision, nodes: int) -> float:
        del nodes  # of the graph; an engine has other layers
        kernels = sum(op.count for op in ops if op.kind not in _FUSED)
        return sum(self._op_ms(op, precision) for op in ops) + kernels * self.start_us / 1e3

    def _op_ms(self, op: Op, precision: Precision) -> float:
        companion = self.peak.companion
        work = op.flops / (self.peak.flops[precision_of(op, precision, companion)] * self.compute)
        traffic = weight_bytes(op, precision, companion)
        if op.flops == 0 and op.kind not in _FUSED:
            traffic += moved_bytes(op, precision, companion)
        return max(work, traffic / (self.peak.bandwidth * self.memory)) * 1e3


@dataclass(frozen=True)
class Bound:
    """The floor of a stage.

    Attributes:
        compute_ms, memory_ms: each alone.
    """

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def bottleneck(self) -> Literal["compute", "memory"]:
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


def floor(ops: Iterable[Op], peak: Peak, precision: Precision, io: int) -> Bound:
    """The floor of a stage; `io` are the bytes of its inputs and outputs."""
    ops = tuple(ops)
    compute = sum(op.flops / peak.flops[precision_of(op, precision, peak.companion)] for op in ops)
    traffic = sum(weight_bytes(op, precision, peak.companion) for op in ops) + io
    return Bound(compute * 1e3, traffic / peak.bandwidth * 1e3)


def precision_of(op: Op, precision: Precision, companion: Precision) -> Precision:
    """The type that a stage of this precision computes an operation in: INT8 is for products with weights."""
    return companion if precision == "int8" and op.kind != "linear" else precision


def weight_bytes(op: Op, precision: Precision, companion: Precision) -> int:
    """Of all `op.count`."""
    size = BYTES[precision_of(op, precision, companion)]
    return op.count * (size * sum(op.weights) + 4 * sum(op.island_weights))


def moved_bytes(op: Op, precision: Precision, companion: Precision) -> int:
    """Activations read and written by all `op.count`, in the types of the stage; a fused engine moves less."""
    # A quantised product reads 8 bits and writes the companion's type; taken for the latter, which is the larger.
    size = BYTES[companion if precision == "int8" else precision]
    return op.count * (size * op.moved + 4 * op.moved_island)
