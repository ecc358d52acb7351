"""How large the values of an fp16 stage get, which parity on a CPU cannot see.

fp16 ends at 65504. ONNX Runtime's CPU provider computes fp16 graphs in fp32 between casts and drops pairs of casts, so a product beyond
that is right there and infinite on a GPU. So each graph runs once more on verification frames, all of it in fp32, and tells the largest
|x| of every tensor that the bundle holds in fp16, before anything is rounded. Not every NaN is seen; parity sees them. Partial sums
of products are not measured: that they are kept in fp32 is assumed, and proved where engines run.

Weights are read from the bundle's file and widened one at a time, since an fp32 copy of the decoder would be the peak of the build.
Knows nothing about how an operation is kept in fp32 (export/onnx_ops.py) and when (export/builder.py).
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
from onnx import TensorProto, helper

from bundle.atomic import disk_errors
from bundle.manifest import Manifest
from bundle.recording import Episode, Recording
from export.onnx_ops import WIDENED
from export.parity import Fp16Range
from export.weight_file import FP16_MAX
from runtime.instruction import load_embedding, prompt_tensors

# Half of the range: other frames than these reach further.
LIMIT = FP16_MAX / 2
# Frames of each episode that are measured, spread over it. They differ by a few percent, and each costs a step in fp32.
FRAMES = 2
# Operations that move values and make none.
_MOVES = ("Reshape", "Transpose", "Split", "Slice", "Gather", "Concat")

Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class StageRange:
    """Largest |x| by operation.

    Attributes:
        half: of those whose result is fp16.
        beyond: those that must be fp32: their result, or what they read, is beyond LIMIT.
        widened: of those that are fp32 because of that; result or weight.
    """

    half: dict[str, float]
    beyond: frozenset[str]
    widened: dict[str, float]

    def summary(self) -> Fp16Range:
        """What the report keeps."""
        operation = max(self.half, key=lambda name: self.half[name], default="")
        return Fp16Range(self.half.get(operation, 0.0), LIMIT, operation, dict(sorted(self.widened.items())))


def measure(
    folder: Path,
    manifest: Manifest,
    stage: str,
    recording: Recording,
    advance: Callable[[], None],
) -> StageRange:
    """Run a stage of the bundle in `folder` on its share of the reference's inputs; every sequence bucket of the episodes is seen."""
    half: dict[str, float] = {}
    widened: dict[str, float] = {}
    beyond: set[str] = set()
    for file, feeds in _feeds(folder, manifest, stage, recording):
        graph = TappedGraph(onnx.load(folder / file, load_external_data=False))
        peaks = graph.run(folder, feeds, advance)
        beyond |= graph.beyond(peaks)
        for found, tensors in ((half, graph.half), (widened, graph.widened)):
            for tensor, operation in tensors.items():
                found[operation] = float(np.maximum(found.get(operation, 0.0), peaks[tensor]))
    return StageRange(half, frozenset(beyond), widened)


def frames_of(episode: Episode) -> list[int]:
    """Which frames of an episode are measured: its last, and more spread before it."""
    last = len(episode.frames) - 1
    return sorted({round(last * (index + 1) / FRAMES) for index in range(FRAMES)})


def _feeds(folder: Path, manifest: Manifest, stage: str, recording: Recording) -> Iterator[tuple[str, list[Feeds]]]:
    """Graph files of a stage with the inputs that each gets."""
    if stage == "vision":
        yield (
            manifest.graph(stage).file,
            [{"frames": item.frames[index]} for item in recording.episodes for index in frames_of(item)],
        )
        return
    embedding, scale = load_embedding(folder), np.float32(manifest.prompt.embed_scale)
    by_bucket: dict[int, list[Feeds]] = {}
    for episode, steps in zip(recording.episodes, recording.steps, strict=True):
        prompt = prompt_tensors(
            folder,
            manifest,
            embedding,
            manifest.prompt.buckets,
            token_ids=episode.token_ids,
            attention_mask=episode.mask,
        )
        by_bucket.setdefault(prompt.bucket, []).extend(
            {"image_tokens": steps[index].image_tokens[None] * scale, **vars(prompt)} for index in frames_of(episode)
        )
    for bucket, feeds in by_bucket.items():
        yield manifest.graph(stage, bucket).file, feeds


class TappedGraph:
    """A graph in fp32, with the largest |x| of its fp16 tensors as further outputs.

    Attributes:
        half: fp16 tensors that are measured, with the operation that makes each.
        widened: the same of tensors that are fp32 because fp16 did not hold them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._nodes = list(model.graph.node)
        stored = {item.name: item.data_type for item in model.graph.initializer}
        self._half = {name for name, kind in stored.items() if kind == TensorProto.FLOAT16}
        self._weights = frozenset(self._half)
        self.half: dict[str, str] = {}
        self.widened: dict[str, str] = {}
        listed = {item.key: item.value for item in model.metadata_props}.get(WIDENED, "").split()
        self.widened |= {name: name for name in listed if name in stored}
        for node in self._nodes:
            cast = node.op_type == "Cast"
            if node.attribute[0].i == TensorProto.FLOAT16 if cast else node.input[0] in self._half:
                self._half.update(node.output)
                if node.op_type not in _MOVES:
                    self.half[node.output[0]] = node.name
            elif node.name in listed:
                weights = (name for name in node.input if stored.get(name) == TensorProto.FLOAT)
                self.widened |= dict.fromkeys((node.output[0], *weights), node.name)

    def run(self, folder: Path, feeds: Sequence[Feeds], advance: Callable[[], None]) -> dict[str, float]:
        """Largest |x| by tensor, over all feeds."""
        tensors = [*self.half, *self.widened]
        with self._session(folder, tensors) as session:
            peaks = np.zeros(len(tensors), np.float32)
            for item in feeds:
                found = session.run([_tap(name) for name in tensors], dict(item))
                peaks = np.maximum(peaks, np.array(found, np.float32))
                advance()
        return dict(zip(tensors, map(float, peaks), strict=True))

    def beyond(self, peaks: Mapping[str, float]) -> set[str]:
        """The operations with an fp16 result that read or make a tensor beyond LIMIT. Moving keeps the type that a tensor has."""
        # A NaN is over too, where the tap shows it; ReduceMax may lose one.
        over = {name for name in self.half if not peaks[name] <= LIMIT}
        found = set()
        for node in self._nodes:
            reads = any(name in over for name in node.input)
            if node.op_type in _MOVES and reads:
                over.update(node.output)
            elif node.output[0] in self.half and (reads or node.output[0] in over):
                found.add(node.name)
        return found

    @contextmanager
    def _session(self, folder: Path, tensors: Sequence[str]) -> Iterator[Any]:
        import onnxruntime

        path = folder / f".range.{os.getpid()}.onnx"
        options = onnxruntime.SessionOptions()
        # Folding constants would keep fp32 copies of all weights, and fusions hide tensors.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Nodes run as they are listed, a weight's cast right before its product. In the default order all casts come first.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            with disk_errors(path):
                path.write_bytes(self._in_fp32(tensors).SerializeToString())
            yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        finally:
            path.unlink(missing_ok=True)

    def _in_fp32(self, tensors: Sequence[str]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.node[:]
        single: set[str] = set()
        for original in self._nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16:
                node.attribute[0].i = TensorProto.FLOAT
            for index, name in enumerate(node.input):
                if name in self._weights:
                    node.input[index] = f"{name}|single"
                    if name not in single:
                        single.add(name)
                        model.graph.node.append(
                            helper.make_node("Cast", [name], [node.input[index]], to=TensorProto.FLOAT)
                        )
            model.graph.node.append(node)
        for name in tensors:
            model.graph.node.append(helper.make_node("Abs", [name], [f"{name}|abs"]))
            model.graph.node.append(helper.make_node("ReduceMax", [f"{name}|abs"], [_tap(name)], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(_tap(name), TensorProto.FLOAT, []))
        return model


def _tap(name: str) -> str:
    return f"{name}|max"
