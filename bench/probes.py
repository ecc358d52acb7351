"""Measures what this machine reaches: products of a policy's own shapes, pointwise operations, streamed weights, and what a node costs.

Through the backend that will run the policy (runtime/backends/ort.py), because a library's product is what a policy gets and a processor's
datasheet is not. Weights of a probe are too many for the caches, as a policy's are. Without ONNX Runtime numpy multiplies instead,
which the calibration says. Knows nothing about policies beyond the operations it is given.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np

from bench import probe_graphs
from bench.calibration import ON_CPU, SCHEMA, Calibration, Machine, Product, Short, companion_of, short_shapes
from bench.nvml import open_nvml
from bench.probe_graphs import ProbeGraph
from bench.roofline import Precision, precision_of
from bench.workload import Op
from runtime.backends.base import Feeds, Stage
from runtime.processor import processor_name

_SAMPLE_S = 0.12
_RUNS = 4
_HANDOVERS = 15
_ROWS_BEFORE = 64
_BUSY_FLOPS = 1e8  # a product of so many operations keeps all threads busy
# A policy's weights fit no cache; those that many cores of a server share are large.
_STREAMED = 512 * 2**20
_POINTWISE = ("norm", "softmax", "gelu", "quick_gelu", "move")
Run = Callable[[], object]


@dataclass(frozen=True)
class Wanted:
    """A product to probe."""

    op: Op
    precision: Precision


Stages = Sequence[tuple[Sequence[Op], Precision]]


def machine_of(backend: str, threads: int) -> Machine:
    """This machine, as calibrations know it; `threads` must not be 0."""
    version = _version("onnxruntime") or _version("onnxruntime-gpu")
    here = processor_name() or platform.machine()
    if version is None:
        return Machine(processor=here, threads=threads, backend="numpy", version=np.__version__)
    if backend not in ON_CPU:
        with open_nvml() as gpu:
            return Machine(
                processor=gpu.name or f"GPU beside {here}", threads=threads, backend=backend, version=version
            )
    return Machine(processor=here, threads=threads, backend=backend, version=version)


def measure(
    machine: Machine,
    stages: Stages,
    *,
    budget_s: float = float("inf"),
    known: Calibration | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Probe a machine at the shapes of a policy's stages.

    Args:
        stages: operations and precision of each; equal shapes are probed once, the longest first.
        budget_s: stop after this many seconds, with what is there; one product at least.
        known: products that need no probing again.
        advance: called with the name of every probe before it runs.

    Raises:
        BackendError: the backend is not there, or refuses a probe.
    """
    probe = _Prober(machine)
    end = time.monotonic() + budget_s
    ops = _typed(stages, machine.backend)
    products = {_key(product): product for product in (known.products if known else ())}
    missing = unprobed(stages, machine.backend, known)
    advance("nodes")
    start_us = probe.start_us()
    pointwise = {}
    for kind in _POINTWISE:
        sizes = [op.moved + op.moved_island for op, _ in ops if op.kind == kind and op.moved + op.moved_island]
        if sizes:
            advance(kind)
            pointwise[kind] = probe.pointwise(kind, max(sizes))
    advance("weights")
    first = probe.stream()
    shorts = {(short.shapes, short.precision): short for short in (known.shorts if known else ())}
    for stage, precision in stages:
        shapes = short_shapes(stage)
        if shapes and (shapes, precision) not in shorts and machine.backend != "numpy":
            advance("a short stage")
            shorts[shapes, precision] = Short(shapes=shapes, precision=precision, ms=probe.short_ms(shapes, precision))
    for want in missing:
        if products and time.monotonic() > end:
            break
        advance(f"{want.op.name} {want.op.m} x {want.op.n} x {want.op.k} {want.precision}")
        product = _product(want, probe.product(want, start_us))
        products[_key(product)] = product
    advance("weights again")
    last = probe.stream()
    return Calibration(
        schema=SCHEMA,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        products=tuple(products.values()),
        shorts=tuple(shorts.values()),
        pointwise=pointwise,
        bandwidth=max(first, last),
        start_us=start_us,
        drift=last / first,
        share=probe.share(),
    )


def unprobed(stages: Stages, backend: str, known: Calibration | None) -> list[Wanted]:
    """Products of which no rate is known: each once, those that a policy spends most on first."""
    products = {_key(product) for product in (known.products if known else ())}
    return [want for want in _longest_first(_typed(stages, backend)) if _key(_product(want, 1.0)) not in products]


def _typed(stages: Stages, backend: str) -> list[tuple[Op, Precision]]:
    """All operations, each with the type that it is computed in."""
    companion = companion_of(backend)
    return [(op, precision_of(op, precision, companion)) for ops, precision in stages for op in ops]


class _Prober:
    """Runs probes through ONNX Runtime, or what numpy can of them."""

    def __init__(self, machine: Machine) -> None:
        self._numpy = machine.backend == "numpy"
        self._threads = machine.threads
        self._on_cpu = machine.backend in ON_CPU
        self._shares: list[float] = []
        self._streaming: tuple[Stage, Feeds, float] | None = None
        if not self._numpy:
            from runtime.backends.ort import OrtBackend

            self._backend = OrtBackend(machine.backend, threads=machine.threads)
            if machine.backend == "ort:cpu":
                self._backend.find_exact_products()  # what is timed is what a policy will run

    def start_us(self) -> float:
        """Microseconds of one more node in a graph."""
        nodes = 200
        if self._numpy:
            x = np.zeros((1, 16), np.float32)
            return _seconds(lambda: x + x) * 1e6
        short, long = (self._graph(probe_graphs.chain(count)) for count in (1, nodes + 1))
        return max(long - short, 0.0) / nodes * 1e6

    def pointwise(self, kind: str, numbers: int) -> float:
        """Bytes a second over about `numbers` numbers."""
        width = 256 if kind == "softmax" else 2048
        rows = max(1, numbers // 2 // width)
        if self._numpy:
            x = np.ones((rows, width), np.float32)
            step: Run = (lambda: x + x) if kind == "move" else (lambda: np.exp(x))
            return x.nbytes * (3 if kind == "move" else 2) / _seconds(step)
        graph = probe_graphs.pointwise(kind, rows, width)
        return graph.work / self._graph(graph)

    def stream(self) -> float:
        """Bytes a second of weights that are used once each."""
        if self._numpy:
            weights = np.ones((_STREAMED // (4 * 4096 * 2048), 4096, 2048), np.float32)
            vector = np.ones(2048, np.float32)
            return weights.nbytes / _seconds(lambda: [weight @ vector for weight in weights])
        if self._streaming is None:
            graph = probe_graphs.linear(1, 4096, 2048, "fp32", cold_bytes=_STREAMED)
            self._streaming = self._load(graph), graph.feeds, graph.work / 2 * 4
        stage, feeds, work = self._streaming
        return work / _seconds(lambda: stage.run(feeds))

    def short_ms(self, shapes: tuple[tuple[int, int, int, int], ...], precision: Precision) -> float:
        """Milliseconds of products right after another session, which leaves cold caches and threads that still wait for work."""
        assert self._streaming is not None, "stream first"
        streaming, weights, _ = self._streaming
        # Streaming empties the caches, but not every library spreads one row over its threads: many rows leave them waiting.
        before = probe_graphs.linear(_ROWS_BEFORE, 4096, 2048, "fp32")
        session = self._load(before)
        graph = probe_graphs.linears(shapes, precision)
        stage = self._load(graph)
        spent = []
        for _ in range(_HANDOVERS):
            streaming.run(weights)
            session.run(before.feeds)
            begin = time.perf_counter()
            stage.run(graph.feeds)
            spent.append(time.perf_counter() - begin)
        return float(np.median(spent)) * 1e3

    def product(self, want: Wanted, start_us: float) -> float:
        """Operations a second."""
        op = want.op
        if self._numpy:
            dtype = np.float16 if want.precision == "fp16" else np.float32
            a, b = np.ones((op.batch, op.m, op.k), dtype), np.ones((op.batch, op.k, op.n), dtype)
            return op.flops / op.count / _seconds(lambda: a @ b)
        if op.kind == "linear":
            graph = probe_graphs.linear(op.m, op.n, op.k, want.precision)
        else:
            graph = probe_graphs.attention(op.m, op.n, op.k, op.batch, want.precision)
        spent = self._graph(graph, busy=op.flops / op.count >= _BUSY_FLOPS)
        # What starting the helpers costs is no more than half of a tiny product.
        return graph.work / max(spent - graph.glue * start_us * 1e-6, 0.5 * spent)

    def share(self) -> float:
        """Of the CPU time that large products could have had."""
        return min(1.0, float(np.median(self._shares))) if self._shares else 1.0

    def _graph(self, probe: ProbeGraph, *, busy: bool = False) -> float:
        stage = self._load(probe)
        cpu, wall = time.process_time(), time.perf_counter()
        spent = _seconds(lambda: stage.run(probe.feeds))
        if busy and self._on_cpu:
            self._shares.append((time.process_time() - cpu) / (time.perf_counter() - wall) / self._threads)
        return spent

    def _load(self, probe: ProbeGraph) -> Stage:
        # In memory where the system has such a folder: a probe is half a gigabyte, and disks are slow.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="jetvla-probe-", dir=memory) as folder:
            Path(folder, probe.graph.file).write_bytes(probe.model)
            return self._backend.load(Path(folder), probe.graph)


def _seconds(run: Run) -> float:
    """The lower quartile of several runs: what disturbs a run makes it longer, never shorter."""
    run()
    spent: list[float] = []
    start = time.perf_counter()
    while len(spent) < _RUNS or time.perf_counter() - start < _SAMPLE_S:
        begin = time.perf_counter()
        run()
        spent.append(time.perf_counter() - begin)
    return float(np.percentile(spent, 25))


def _longest_first(ops: Iterable[tuple[Op, Precision]]) -> list[Wanted]:
    """Every product once, those that a policy spends most on first."""
    unique: dict[tuple[object, ...], tuple[float, Wanted]] = {}
    for op, precision in ops:
        if op.flops:
            want = Wanted(op, precision)
            key = _key(_product(want, 1.0))
            # Weighs work against traffic as an ordinary machine does, 15 operations to a byte.
            cost = op.flops + 15 * 4 * op.count * sum(op.weights)
            unique[key] = (cost + unique.get(key, (0.0, want))[0], want)
    return [want for _, want in sorted(unique.values(), key=lambda item: -item[0])]


def _product(want: Wanted, flops: float) -> Product:
    op = want.op
    return Product(
        m=op.m, n=op.n, k=op.k, batch=op.batch, cold=op.kind == "linear", precision=want.precision, flops=flops
    )  # fmt: skip


def _key(product: Product) -> tuple[object, ...]:
    return (product.m, product.n, product.k, product.batch, product.cold, product.precision)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
