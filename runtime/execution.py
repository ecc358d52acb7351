"""From chunks to one command for now: the ways to execute a chunk of future actions.

Row i of a chunk is meant for i decision periods after its frame was taken. All strategies go by that time and not by how often they are
asked, so publishing faster than deciding changes nothing about what the robot does. Knows nothing about limits or staleness, but says how
old its answer is, which safety judges.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.robot_file import Loop


@dataclass(frozen=True, eq=False)
class TimedChunk:
    """A chunk and the time it starts at.

    Attributes:
        values: float32 [n, A].
        captured_s: when the frame that it was decided from was taken.
    """

    values: NDArray[np.float32]
    captured_s: float


class Execution(Protocol):
    """One strategy, with the chunks it needs."""

    def add(self, chunk: TimedChunk) -> None:
        """A new decision."""
        ...

    def command(self, now_s: float) -> tuple[NDArray[np.floating] | None, float]:
        """The row float [A] for now, and its age in seconds; None and infinity without a chunk."""
        ...

    def clear(self) -> None:
        """Forget all chunks."""
        ...


class RecedingHorizon:
    """Step 0 of the newest chunk until the next one comes; its age is its frame's."""

    def __init__(self) -> None:
        self._newest: TimedChunk | None = None

    def add(self, chunk: TimedChunk) -> None:
        self._newest = chunk

    def command(self, now_s: float) -> tuple[NDArray[np.floating] | None, float]:
        if self._newest is None:
            return None, math.inf
        return self._newest.values[0], now_s - self._newest.captured_s

    def clear(self) -> None:
        self._newest = None


class PlayedChunk:
    """The newest chunk's steps in time, `steps` of them at most; the last one ages beyond its own time."""

    def __init__(self, period_s: float, steps: int) -> None:
        self._period_s, self._steps = period_s, steps
        self._newest: TimedChunk | None = None

    def add(self, chunk: TimedChunk) -> None:
        self._newest = chunk

    def command(self, now_s: float) -> tuple[NDArray[np.floating] | None, float]:
        if self._newest is None:
            return None, math.inf
        index = _index(self._newest, now_s, self._period_s)
        index = min(max(index, 0), min(self._steps, len(self._newest.values)) - 1)
        return self._newest.values[index], now_s - self._newest.captured_s - index * self._period_s

    def clear(self) -> None:
        self._newest = None


class TemporalEnsemble:
    """The weighted mean of what the first `steps` steps of all chunks say of now, weight exp(-decay * age in steps).

    As old as a played chunk would be.

    Source: temporal ensembling of ACT (Zhao et al., 2023), but favouring newer chunks, since this policy's history is complete in each.
    """

    def __init__(self, period_s: float, steps: int, decay: float) -> None:
        self._period_s, self._steps, self._decay = period_s, steps, decay
        self._chunks: deque[TimedChunk] = deque(maxlen=64)  # longer than any chunk that covers now
        self._played = PlayedChunk(period_s, steps)

    def add(self, chunk: TimedChunk) -> None:
        self._chunks.append(chunk)
        self._played.add(chunk)

    def command(self, now_s: float) -> tuple[NDArray[np.floating] | None, float]:
        row, age_s = self._played.command(now_s)
        if row is None:
            return None, age_s
        voices = []
        for chunk in self._chunks:
            index = _index(chunk, now_s, self._period_s)
            if 0 <= index < min(self._steps, len(chunk.values)):
                voices.append((index, chunk.values[index]))
        if not voices:
            return row, age_s
        # Relative to the newest, so that no decay, however steep, leaves nothing.
        newest = min(index for index, _ in voices)
        weights = [math.exp(-self._decay * (index - newest)) for index, _ in voices]
        return np.average([values for _, values in voices], axis=0, weights=weights), age_s

    def clear(self) -> None:
        self._chunks.clear()
        self._played.clear()


def make_execution(loop: Loop, period_s: float) -> Execution:
    """The strategy that a robot file asks for; `period_s` is that of decisions."""
    if loop.strategy == "chunk":
        return PlayedChunk(period_s, loop.chunk_steps)
    if loop.strategy == "ensemble":
        return TemporalEnsemble(period_s, loop.chunk_steps, loop.ensemble_decay)
    return RecedingHorizon()


def _index(chunk: TimedChunk, now_s: float, period_s: float) -> int:
    # A hair, so that asking exactly at a step's time gives that step whatever the rounding.
    return math.floor((now_s - chunk.captured_s) / period_s + 1e-6)
