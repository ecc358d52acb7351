"""What probes measured on a machine: kept in the user's cache, and turned into the rates that an expectation adds up.

A calibration belongs to a CPU or GPU, a number of threads, a backend and its version; another of any of these is another file. Knows
nothing about measuring: see bench/probes.py.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.roofline import BYTES, Peak, Precision, moved_bytes, precision_of
from bench.workload import Op
from bundle.atomic import write_bytes
from bundle.errors import StorageError

SCHEMA = 1
# Shapes further apart than this (in powers of e, rows counting double) say nothing about each other.
_RELATED = 1.5
_SHORT_FLOPS = 1e9
# Backends whose probes say something about the CPU.
ON_CPU = ("ort:cpu", "ort:openvino", "numpy")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts: immutable, keyword-only, no unknown fields."""


class Machine(_Strict, frozen=True):
    """What a calibration holds for.

    Attributes:
        processor: CPU model, or GPU name for a GPU backend.
        backend: of jetvla, or `numpy`.
        version: of what the backend is made of.
    """

    processor: str
    threads: int
    backend: str
    version: str


class Product(_Strict, frozen=True):
    """Rate of [batch, m, k] x [batch, k, n] in a precision; `cold` products stream different weights, others multiply activations."""

    m: int
    n: int
    k: int
    batch: int
    cold: bool
    precision: Precision
    flops: float


class Short(_Strict, frozen=True):
    """All products of a short stage, run right after another session: what it costs to hand over is most of what such a stage costs.

    Attributes:
        shapes: m, n, k and how many, of every product with weights.
    """

    shapes: tuple[tuple[int, int, int, int], ...]
    precision: Precision
    ms: float


class Calibration(_Strict, frozen=True):
    """Everything that was measured.

    Attributes:
        created: UTC, ISO 8601.
        pointwise: bytes a second by kind of operation, fp32.
        bandwidth: bytes a second of streamed weights.
        start_us: of one node.
        drift: the first probe's rate when all were done, over what it had been.
        share: of the CPU time that its threads could have had, what the longest probes got; 1 on a GPU.
    """

    schema: int
    created: str
    machine: Machine
    products: tuple[Product, ...]
    shorts: tuple[Short, ...]
    pointwise: dict[str, float]
    bandwidth: float
    start_us: float
    drift: float
    share: float

    @property
    def steady(self) -> bool:
        """Nobody else used the machine while probing: its rates stayed, and its threads got their CPUs."""
        return 0.87 < self.drift < 1.15 and self.share > 0.85

    def companion(self) -> Precision:
        """See `companion_of`."""
        return companion_of(self.machine.backend)

    def peak(self) -> Peak:
        """The fastest product of each precision. A precision without a probe is taken for as fast as fp32."""
        fastest: dict[Precision, float] = {}
        for product in self.products:
            fastest[product.precision] = max(product.flops, fastest.get(product.precision, 0.0))
        fallback = fastest.get("fp32") or max(fastest.values())
        precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
        return Peak(
            flops={precision: fastest.get(precision, fallback) for precision in precisions},
            bandwidth=self.bandwidth,
            companion=self.companion(),
        )


@dataclass(frozen=True)
class Measured:
    """Rates of a calibration; see `bench.roofline.Rates`."""

    calibration: Calibration

    def stage_ms(self, ops: Sequence[Op], precision: Precision, nodes: int) -> float:
        start = (nodes or sum(op.count for op in ops)) * self.calibration.start_us / 1e3
        shapes = short_shapes(ops)
        for short in self.calibration.shorts:
            if (short.shapes, short.precision) == (shapes, precision):
                rest = sum(self._op_ms(op, precision) for op in ops if op.kind != "linear")
                return short.ms + rest + start
        return sum(self._op_ms(op, precision) for op in ops) + start

    def _op_ms(self, op: Op, precision: Precision) -> float:
        companion = self.calibration.companion()
        typed = precision_of(op, precision, companion)
        if op.flops:
            work = op.flops / self._product_rate(op, typed)
            # The weights of a probe may have stayed in a large cache, where those of a policy never are.
            cold = BYTES[typed] * op.count * sum(op.weights) / self.calibration.bandwidth
            return max(work, cold) * 1e3
        rate = self.calibration.pointwise.get(op.kind, self.calibration.bandwidth)
        return moved_bytes(op, precision, companion) / rate * 1e3

    def _product_rate(self, op: Op, precision: Precision) -> float:
        cold = op.kind == "linear"
        related = [
            (distance, product.flops)
            for product in self.calibration.products
            if product.precision == precision
            and product.cold == cold
            and (distance := _distance(op, product)) <= _RELATED
        ]
        if related:
            return min(related)[1]
        # Nothing like it was probed: the roofline of what was.
        peak = self.calibration.peak()
        traffic = BYTES[precision] * op.batch * op.n * op.k
        work = 2 * op.batch * op.m * op.n * op.k
        return work / max(work / peak.flops[precision], traffic / peak.bandwidth)


def short_shapes(ops: Iterable[Op]) -> tuple[tuple[int, int, int, int], ...] | None:
    """The products of a stage that is short enough to be probed as a whole; None for others."""
    linear = [op for op in ops if op.kind == "linear"]
    if sum(op.flops for op in linear) > _SHORT_FLOPS:
        return None
    return tuple((op.m, op.n, op.k, op.count) for op in linear)


def _distance(op: Op, product: Product) -> float:
    return (
        2 * abs(math.log(op.m / product.m))
        + abs(math.log(op.n / product.n))
        + abs(math.log(op.k / product.k))
        + 0.25 * abs(math.log(op.batch / product.batch))
    )


def companion_of(backend: str) -> Precision:
    """The type in which a backend computes what INT8 leaves out."""
    return "fp32" if backend in ON_CPU else "fp16"


def calibration_path(machine: Machine) -> Path:
    """Where a machine's calibration lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(msgspec.json.encode(machine)).hexdigest()[:16]
    return cache / "jetvla" / f"probes-{key}.json"


def load_calibration(machine: Machine) -> Calibration | None:
    """The saved calibration of a machine; None if there is none, or none that this version reads."""
    try:
        found = msgspec.json.decode(calibration_path(machine).read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found.schema == SCHEMA and found.machine == machine and found.products else None


def save_calibration(calibration: Calibration) -> Path:
    """Keep a calibration; returns its file.

    Raises:
        StorageError: the cache cannot be written.
    """
    path = calibration_path(calibration.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(
            f"cannot make {path.parent}", got=error.strerror, expected="a folder", hint="set XDG_CACHE_HOME to another."
        ) from None
    write_bytes(path, msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")
    return path
