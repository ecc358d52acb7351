"""A backend without weights, for tests of everything above it and for trying a robot program on a laptop.

Deterministic: outputs depend on nothing but the inputs' bytes and the output's name, stay in [-1, 1], and change when the inputs do.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from bundle.errors import BackendError
from bundle.manifest import Graph, Manifest
from runtime.backends.base import Feeds, Outputs, checked_feed
from runtime.chain import Chain, HostChain


class FakeBackend:
    """Answers every graph with hashed noise of the right shape; `fail_at` makes the n-th run of a stage raise.

    `runs` counts executed runs per graph file.
    """

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.name = "fake"
        self.remark = ""
        self.runs: dict[str, int] = {}
        self._fail_at = fail_at

    def open(self, folder: Path, manifest: Manifest) -> Chain:
        return HostChain(self, folder, manifest)

    def load(self, folder: Path, graph: Graph) -> FakeStage:
        self.runs[graph.file] = 0
        return FakeStage(self, graph)

    def count(self, file: str) -> None:
        self.runs[file] += 1
        if self.runs[file] == self._fail_at:
            raise BackendError(f"{file} failed while running", got="planned failure", hint="this is the fake backend.")


class FakeStage:
    """See FakeBackend."""

    def __init__(self, backend: FakeBackend, graph: Graph) -> None:
        self._backend = backend
        self._graph = graph

    def run(self, feeds: Feeds) -> Outputs:
        self._backend.count(self._graph.file)
        seed = 0
        for tensor in self._graph.inputs:
            array = checked_feed(
                self._graph.file, tensor.name, feeds[tensor.name], tensor.shape, np.dtype(tensor.dtype)
            )
            seed = zlib.crc32(np.ascontiguousarray(array).tobytes(), seed)
        return {
            tensor.name: np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
            .uniform(-1, 1, tensor.shape)
            .astype(tensor.dtype)
            for tensor in self._graph.outputs
        }
