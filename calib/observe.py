"""What flows into every GEMM while the floating-point policy looks at the calibration frames.

Two passes: largest magnitudes per channel of all frames (smoothing factors come from them), then histograms of the smoothed activations
of some frames (ranges come from them). The graph is the bundle's own with the inputs of its GEMMs as further outputs, run by ONNX Runtime
without packing its weights a second time. The action head is observed until its memory is full, as its states are inputs of its products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bundle.atomic import disk_errors
from calib.ranges import Histogram
from calib.stage_graph import Site, StageGraph

Floats = NDArray[np.float32]
Feeds = Mapping[str, NDArray[np.generic]]
Observe = Callable[[Site, Floats], None]


class Tap:
    """A stage whose GEMM inputs can be read.

    Args:
        graph: of the bundle; its external data must lie in `graph.folder`, and a graph file is written beside it while the session starts.
    """

    def __init__(self, graph: StageGraph, *, threads: int = 0) -> None:
        import onnxruntime

        self._sites = graph.sites
        self._outputs = [output.name for output in graph.model.graph.output]
        inputs = {value.name for value in graph.model.graph.input}
        self._sources = sorted({site.source for site in graph.sites} - inputs - set(self._outputs))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", "1")
        with tapped_file(graph, self._sources) as path:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Feeds, observe: Observe | None = None) -> dict[str, NDArray[np.generic]]:
        """Execute once, show every GEMM's input [rows, K] to `observe`, return the stage's own outputs."""
        names = [*self._outputs, *(self._sources if observe is not None else ())]
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        if observe is not None:
            for site in self._sites:
                value = found[site.source] if site.source in found else feeds[site.source]
                observe(site, value.reshape(-1, site.shape[1]).astype(np.float32, copy=False))
        return {name: found[name] for name in self._outputs}


@contextmanager
def tapped_file(graph: StageGraph, tensors: Sequence[str]) -> Iterator[Path]:
    """The graph with `tensors` as further outputs, as a file beside its external data."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for name in tensors:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    path = graph.folder / f".tap.{graph.stage}.{os.getpid()}.onnx"
    try:
        with disk_errors(path):
            path.write_bytes(model.SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)


@dataclass
class Peaks:
    """Largest |x| of every channel of every GEMM input, by site key: float32 [K]."""

    found: dict[str, Floats]

    def observe(self, site: Site, value: Floats) -> None:
        peak = np.abs(value).max(axis=0)
        known = self.found.get(site.key)
        self.found[site.key] = peak if known is None else np.maximum(known, peak)


class Distributions:
    """Histograms of |x / s| of every GEMM input, by site key.

    Args:
        peaks: of the first pass.
        factors: smoothing factors [K] by site key; sites without one are not smoothed.
    """

    def __init__(self, peaks: Mapping[str, Floats], factors: Mapping[str, Floats]) -> None:
        self._factors = factors
        self.histograms = {
            key: Histogram.empty(float((peak / factors[key] if key in factors else peak).max()))
            for key, peak in peaks.items()
        }

    def observe(self, site: Site, value: Floats) -> None:
        smooth = self._factors.get(site.key)
        self.histograms[site.key].add(np.abs(value if smooth is None else value / smooth))
