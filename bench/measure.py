"""Times the steps of a policy: warm-up, N steps, a soak, and what a step allocates.

A step is what a robot does: `Policy.step` on a camera frame. Its layers come from the same steps, so that they add up: inside the engines,
with copies and states, with preprocessing. Samples go into arrays that exist before the first step, and whatever stops a measurement
leaves those that are done. Knows nothing about baselines, rates or reports.
"""

from __future__ import annotations

import array
import gc
import os
import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.clocks import Clock, JumpWatch, SystemClock
from bench.feed import Feed
from bench.results import Memory, Soak, Timing

SECTIONS = ("preprocess", "vision", "language", "action_head", "glue", "total")
_TRACED = 3


class Steps(Protocol):
    """The part of a policy that is measured."""

    def step(self, frame: NDArray[np.uint8]) -> Any:
        """A chunk with `timing`, milliseconds per section, and `engine_ms`."""
        ...


@dataclass(frozen=True)
class Measured:
    """Samples in milliseconds, in the order of time, all of one length.

    Attributes:
        sections: see SECTIONS; those that the chain could not tell apart are missing.
        layers: engine, io, step; engine is missing where the chain cannot tell.
        faults: pages that the system had to provide while measuring.
        blocks: Python objects that stayed after a step of the second half, in the mean; the first fills caches.
        seconds: it took, for energy.
    """

    sections: dict[str, NDArray[np.float64]]
    layers: dict[str, NDArray[np.float64]]
    faults: int
    blocks: float
    seconds: float

    @property
    def count(self) -> int:
        return len(self.sections["total"])


class Samples:
    """Rows of milliseconds, filled one a step."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._columns = {name: array.array("d") for name in names}

    def add(self, values: dict[str, float]) -> None:
        """One step; what is missing is not a number."""
        for name, column in self._columns.items():
            column.append(values.get(name, np.nan))

    def __len__(self) -> int:
        return len(self._columns[self._names[0]])

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """By name, in the order of the names; those without a single number are left out."""
        found = {name: np.frombuffer(column, np.float64).copy() for name, column in self._columns.items() if column}
        return {name: values for name, values in found.items() if not np.isnan(values).all()}


def step_samples() -> Samples:
    """An empty record of `measure_steps`."""
    return Samples(("wall", *SECTIONS[:-2], "total", "engine"))


def measure_steps(
    policy: Steps,
    feed: Feed,
    steps: int,
    *,
    warmup: int,
    watch: JumpWatch,
    clock: Clock | None = None,
    samples: Samples | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Warm up, then time `steps` steps.

    Args:
        watch: is asked after every step.
        samples: is filled meanwhile, for who catches what stops this.
        advance: called after every step, warm-up included.

    Raises:
        BackendError: a step failed.
    """
    clock = clock or SystemClock()
    samples = step_samples() if samples is None else samples
    for index in range(warmup):
        policy.step(feed.frame(index))
        advance()
    gc.collect()
    half = steps // 2
    before, faults, start = sys.getallocatedblocks(), _faults(), clock.now()
    for index in range(steps):
        if index == half:
            paused = clock.now()
            gc.collect()
            before = sys.getallocatedblocks()
            start += clock.now() - paused
        frame = feed.frame(index)
        begin = clock.now()
        chunk = policy.step(frame)
        wall = (clock.now() - begin) * 1e3
        samples.add({**chunk.timing, "engine": chunk.engine_ms, "wall": wall})
        watch.look()
        advance()
    seconds = clock.now() - start
    del chunk
    gc.collect()
    return summarize(
        samples, faults=_faults() - faults, blocks=(sys.getallocatedblocks() - before) / (steps - half), seconds=seconds
    )


def summarize(samples: Samples, *, faults: int = 0, blocks: float = 0.0, seconds: float = 0.0) -> Measured:
    """Layers and sections of the samples so far; at least one."""
    found = samples.arrays()
    wall = found.pop("wall")
    engine = found.pop("engine", None)
    own = [found[name] for name in SECTIONS[:-2] if name in found]
    total = found.pop("total")
    sections = {
        **{name: found[name] for name in SECTIONS[:-2] if name in found},
        "glue": wall - sum(own),
        "total": wall,
    }
    layers = {} if engine is None else {"engine": engine}
    preprocess = found.get("preprocess")
    layers |= {"io": total if preprocess is None else total - preprocess, "step": wall}
    return Measured(sections, layers, faults, blocks, seconds)


def timings(values: dict[str, NDArray[np.float64]]) -> dict[str, Timing]:
    """Distributions by name."""
    return {name: Timing.of(samples.tolist()) for name, samples in values.items()}


def soak_samples() -> Samples:
    """An empty record of `soak`."""
    return Samples(("wall", "rss"))


def soak(
    policy: Steps,
    feed: Feed,
    minutes: float,
    *,
    watch: JumpWatch,
    clock: Clock | None = None,
    samples: Samples | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Soak:
    """Steps without a pause for some minutes.

    Args:
        advance: called with the seconds gone, after every step.
    """
    clock = clock or SystemClock()
    samples = soak_samples() if samples is None else samples
    start = clock.now()
    index = 0
    while True:
        begin = clock.now()
        policy.step(feed.frame(index))
        end = clock.now()
        samples.add({"wall": (end - begin) * 1e3, "rss": rss_mb()})
        watch.look()
        advance(end - start)
        index += 1
        if end - start >= 60 * minutes:
            return soaked(samples, (end - start) / 60)


def soaked(samples: Samples, minutes: float) -> Soak:
    """Of the samples so far; at least one."""
    found = samples.arrays()
    wall, rss = found["wall"], found["rss"]
    tenth = max(1, len(wall) // 10)
    return Soak(
        minutes=minutes,
        step=Timing.of(wall.tolist()),
        first=float(np.median(wall[:tenth])),
        last=float(np.median(wall[-tenth:])),
        rss_growth_mb=float(rss[-1] - rss[tenth - 1]),
    )


def measure_memory(policy: Steps, feed: Feed, measured: Measured, *, gpu_mb: float | None) -> Memory:
    """What a step allocates: a few steps more, under Python's tracer, which slows them."""
    peaks = []
    with _traced():
        for index in range(_TRACED):
            gc.collect()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            policy.step(feed.frame(index))
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    now = rss_mb()
    return Memory(
        rss_mb=now,
        # The kernel counts the peak a little behind.
        rss_peak_mb=max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        gpu_mb=gpu_mb,
        python_kb_per_step=min(peaks) / 1e3,
        blocks_per_step=measured.blocks,
        page_faults_per_step=measured.faults / measured.count,
    )


def harness_ms(*, batches: int = 20, steps: int = 50) -> float:
    """What `measure_steps` adds to a step: its own time around a policy that does nothing, in the batch that others disturbed least."""
    idle, clock = _Idle(), SystemClock()
    feed = Feed(np.zeros((1, 1, 1, 3), np.uint8), "", "")
    found = [measure_steps(idle, feed, steps, warmup=0, watch=JumpWatch(clock), clock=clock) for _ in range(batches)]
    return min(each.seconds for each in found) / steps * 1e3


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class _Idle:
    engine_ms = 0.0

    def __init__(self) -> None:
        self.timing = dict.fromkeys(("preprocess", "vision", "language", "action_head", "total"), 0.0)

    def step(self, frame: NDArray[np.uint8]) -> _Idle:
        del frame
        return self


@contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
