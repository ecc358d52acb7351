"""Stages of small policies, calibrated and quantized for tests, and ONNX Runtime to run any graph of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bundle.manifest import Manifest
from calib.calibrate import How, Seen, StageCalibration, calibrate_stage
from calib.frames import random_sample
from calib.int8_weights import Ranges, write_integers
from calib.rewrite import Integers
from calib.stage_graph import STAGES, StageGraph, read_stage
from runtime.backends.ort import OrtBackend
from runtime.instruction import load_embedding, prompt_tensors

Feeds = dict[str, NDArray[Any]]
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Prepared:
    """A policy between calibration and search.

    Attributes:
        graphs: by stage and sequence length; blocks are single layers.
        feeds: what each of them sees in the first frame.
    """

    folder: Path
    manifest: Manifest
    seen: tuple[Seen, ...]
    found: dict[str, StageCalibration]
    graphs: dict[Key, StageGraph]
    integers: dict[str, Integers]
    feeds: dict[Key, Feeds]

    def first(self, stage: str) -> Key:
        """The stage's shortest graph."""
        return next(key for key in self.graphs if key[0] == stage)


def prepare(folder: Path, seen: Sequence[Seen], how: How) -> Prepared:
    """Calibrate all stages of the bundle in `folder` and write their integers beside it."""
    manifest = Manifest.load(folder)
    found: dict[str, StageCalibration] = {}
    before = None
    for stage in STAGES:
        found[stage] = calibrate_stage(stage, folder, manifest, seen, before, how, lambda: None)
        before = found[stage].outputs
    graphs = {
        (stage, graph.sequence): read_stage(
            folder, manifest, stage, sequence=graph.sequence, layers_per_block=how.layers_per_block
        )
        for stage in STAGES
        for graph in manifest.stages[stage].graphs
    }
    integers = {}
    for stage in STAGES:
        graph = next(graph for (name, _), graph in graphs.items() if name == stage)
        ranges = Ranges(found[stage].scales, found[stage].smoothing)
        path = folder / f"{stage}.integers.data"
        tensors = write_integers(graph, ranges, path, lambda _: None).tensors
        integers[stage] = Integers(path.name, tensors, found[stage].scales)
    feeds = dict(stage_feeds(folder, manifest, seen[0]))
    return Prepared(folder, manifest, tuple(seen), found, graphs, integers, feeds)


def seen_frames(manifest: Manifest, count: int, *, seed: int = 0, told: str | None = None) -> list[Seen]:
    """Made-up calibration frames of one episode."""
    told = told or manifest.prompt.instructions[0].text
    return [Seen(frame, told, "made up") for frame in random_sample(manifest, frames=count, seed=seed)]


def stage_feeds(folder: Path, manifest: Manifest, seen: Seen) -> Iterator[tuple[Key, Feeds]]:
    """What every graph of the floating-point policy sees in the first step, by stage and sequence length."""
    dims = manifest.dimensions
    feeds: Feeds = {"frames": seen.frame}
    yield ("vision", None), feeds
    tokens = run(folder / manifest.graph("vision").file, feeds)["image_tokens"]
    embedding = load_embedding(folder)
    feature = None
    for bucket in manifest.prompt.buckets:
        prompt = prompt_tensors(folder, manifest, embedding, (bucket,), instruction=seen.instruction)
        feeds = {
            "image_tokens": tokens.astype(np.float32),
            "prompt": prompt.prompt,
            "image_index": prompt.image_index,
            "action_index": prompt.action_index,
        }
        yield ("language", bucket), feeds
        feature = run(folder / manifest.graph("language", bucket).file, feeds)["feature"]
    assert feature is not None
    shape = (dims.window, dims.lstm_layers, dims.latent * dims.lstm_hidden)
    rng = np.random.default_rng(0)
    states = {name: np.tanh(rng.normal(0, 0.5, shape)).astype(np.float32) for name in ("h", "c")}
    yield ("action_head", None), {"feature": feature.astype(np.float32), **states}


def run(
    path: Path, feeds: Mapping[str, NDArray[Any]], tensors: Sequence[str] = (), *, optimized: bool = False
) -> Feeds:
    """Execute a graph file: its outputs, and the inner `tensors`, by name."""
    if tensors:
        model = onnx.load(path, load_external_data=False)
        return run_model(model, path.parent, feeds, tensors, optimized=optimized)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Optimizations may make a QGemm of a Q/DQ pattern.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model: str | bytes = str(path)
    if signed_products_saturate():
        model = with_unsigned_weights(onnx.load(path)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@cache
def signed_products_saturate() -> bool:
    """This CPU has no VNNI, so a session that is not told otherwise computes QGemm wrongly."""
    backend = OrtBackend("ort:cpu", threads=1)
    backend.find_exact_products()
    return backend._unsigned


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same integers as uint8. onnxruntime would do that as an optimization, but these sessions have none."""
    names = {node.input[index] for node in model.graph.node if node.op_type == "QGemm" for index in (3, 5)}
    for proto in model.graph.initializer:
        if proto.name in names:
            shifted = (numpy_helper.to_array(proto).astype(np.int16) + 128).astype(np.uint8)
            proto.CopyFrom(numpy_helper.from_array(shifted, proto.name))
    return model


def run_model(
    model: onnx.ModelProto,
    folder: Path,
    feeds: Mapping[str, NDArray[Any]],
    tensors: Sequence[str] = (),
    *,
    optimized: bool = False,
) -> Feeds:
    """Execute a graph whose external data lies in `folder`."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    own = {value.name for value in [*model.graph.output, *model.graph.input]}
    for name in dict.fromkeys(tensors):
        if name not in own:
            tapped.graph.output.append(helper.make_empty_tensor_value_info(name))
    path = folder / ".test.onnx"
    path.write_bytes(tapped.SerializeToString())
    try:
        found = run(path, feeds, optimized=optimized)
    finally:
        path.unlink()
    return {**{name: feeds[name] for name in tensors if name in feeds}, **found}


def stored(folder: Path, model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """All initializers of a graph, read by onnx's own loader."""
    return {proto.name: numpy_helper.to_array(proto, base_dir=str(folder)) for proto in model.graph.initializer}
