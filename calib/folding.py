"""What smoothing did to a published INT8 variant, shown on its floating-point graphs: nothing but rounding.

The factors are taken from the variant's own files, as the quotient of a LayerNorm's parameters before and after. Each stage then runs
twice in floating point, as it is and with the factors folded into LayerNorms and weights, on a frame that the bundle has recorded; and
every integer of the variant is compared with the folded weight that it stands for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from bundle.errors import ConfigError
from bundle.manifest import Manifest
from bundle.recording import Recording
from calib.smoothing import fold_norm, fold_weight
from calib.stage_graph import Site, StageGraph, read_graph, read_stage
from runtime.instruction import load_embedding, prompt_tensors

Floats = NDArray[np.float32]
Feeds = dict[str, NDArray[Any]]
# Relative; what the rounding of one product after the other adds up to in fp32, and where weights are fp16.
_LIMITS = {"fp32": 1e-5, "fp16": 5e-3}
# In steps of an integer: a half is rounding, the rest is fp32's own.
_LIMIT_STEPS = 0.51


@dataclass(frozen=True)
class FoldCheck:
    """One stage.

    Attributes:
        norms: LayerNorms with factors.
        smallest, largest: factor.
        difference: largest difference of the stage's output with and without them, relative to its largest value.
        off: largest distance between an INT8 weight and the folded weight, in steps.
        limit: of `difference`.
    """

    stage: str
    norms: int
    smallest: float
    largest: float
    difference: float
    off: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit and self.off <= _LIMIT_STEPS


def check_folding(folder: Path, *, threads: int = 0, advance: Callable[[], None] = lambda: None) -> Iterator[FoldCheck]:
    """Check every stage of a bundle whose LayerNorms were smoothed.

    Args:
        advance: called after each of four steps a stage: two runs, the factors, the integers.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: it has no INT8 variant.
    """
    manifest = Manifest.load(folder)
    if manifest.quantized is None:
        raise ConfigError(
            "the bundle has no INT8 variant",
            got=folder,
            expected="one",
            hint="python calib/quantize.py BUNDLE EPISODES",
        )
    manifest.verify(folder)
    variant = manifest.int8()
    feeds, sequence = _vision_feed(folder), None
    for stage in ("vision", "language"):
        graph = read_stage(folder, manifest, stage, sequence=sequence, layers_per_block=1)
        quantized = read_graph(folder, variant, stage, sequence)
        smoothing = stored_factors(graph, quantized)
        advance()
        plain = run_folded(graph, {}, feeds, threads=threads)
        advance()
        if smoothing:
            changed = fold(graph, smoothing)
            # Of LayerNorms, what the variant will really run.
            stored = {name: f"{name}.smooth" for name in changed if f"{name}.smooth" in quantized.initializers}
            changed |= {name: quantized.array(other).astype(np.float32) for name, other in stored.items()}
            found = run_folded(graph, changed, feeds, threads=threads)
            advance()
            values = np.concatenate(list(smoothing.values()))
            yield FoldCheck(
                stage,
                len(smoothing),
                float(values.min()),
                float(values.max()),
                float(np.abs(found - plain).max() / np.abs(plain).max()),
                max(weight_error(graph, quantized, site, smoothing) for site in graph.sites),
                _LIMITS[manifest.precision],
            )
            advance()
        if stage == "vision":
            feeds, sequence = _language_feed(folder, manifest, plain)


def stored_factors(graph: StageGraph, quantized: StageGraph) -> dict[str, Floats]:
    """Smoothing factors [K] of a variant by LayerNorm; 1 in channels where gamma and beta are zero."""
    nodes = {node.name: node for node in graph.model.graph.node}
    found = {}
    for name in {site.norm for site in graph.sites if site.norm is not None}:
        parameters = nodes[name].input[1:3]
        if f"{parameters[0]}.smooth" not in quantized.initializers:
            continue
        s = np.ones(quantized.array(f"{parameters[0]}.smooth").shape)
        for parameter in parameters[::-1]:
            before = graph.array(parameter).astype(np.float64)
            after = quantized.array(f"{parameter}.smooth").astype(np.float64)
            s = np.divide(before, after, out=s, where=after != 0)
        found[name] = s.astype(np.float32)
    return found


def fold(graph: StageGraph, smoothing: Mapping[str, Floats]) -> dict[str, Floats]:
    """The parameters that change, by name: gamma / s and beta / s of the LayerNorms, W s of the products that read them."""
    nodes = {node.name: node for node in graph.model.graph.node}
    changed = {
        parameter: fold_norm(graph.array(parameter), s)
        for name, s in smoothing.items()
        for parameter in nodes[name].input[1:3]
    }
    for site in graph.sites:
        if site.norm is not None and site.norm in smoothing:
            changed[site.weight] = fold_weight(graph.array(site.weight), smoothing[site.norm])
    return changed


def run_folded(graph: StageGraph, changed: Mapping[str, Floats], feeds: Feeds, *, threads: int = 0) -> Floats:
    """The stage's output, with some of its parameters replaced; nothing is written."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of all weights
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    kept = []  # what the session points to
    for proto in model.graph.initializer:
        if proto.name not in changed:
            continue
        value = changed[proto.name].astype(graph.array(proto.name).dtype)
        if proto.data_location == TensorProto.EXTERNAL:
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(value))
            options.add_external_initializers([proto.name], [kept[-1]])
        else:
            proto.CopyFrom(numpy_helper.from_array(value, proto.name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output: Floats = session.run(None, feeds)[0].astype(np.float32)
    return output


def weight_error(graph: StageGraph, quantized: StageGraph, site: Site, smoothing: Mapping[str, Floats]) -> float:
    """Largest distance between an INT8 weight of a site and the weight that it stands for, in steps; 0 if it is none."""
    if f"{site.weight}.int8" not in quantized.initializers:
        return 0.0
    weight = graph.array(site.weight).astype(np.float32)
    if site.norm is not None and site.norm in smoothing:
        weight = fold_weight(weight, smoothing[site.norm])
    steps = weight / quantized.array(f"{site.weight}.scale").astype(np.float32)[:, None]
    return float(np.abs(steps - quantized.array(f"{site.weight}.int8").astype(np.float32)).max())


def _vision_feed(folder: Path) -> Feeds:
    return {"frames": Recording.load(folder).episodes[0].frames[0]}


def _language_feed(folder: Path, manifest: Manifest, tokens: Floats) -> tuple[Feeds, int]:
    episode = Recording.load(folder).episodes[0]
    prompt = prompt_tensors(
        folder,
        manifest,
        load_embedding(folder),
        manifest.prompt.buckets,
        token_ids=episode.token_ids,
        attention_mask=episode.mask,
    )
    feeds: Feeds = {
        "image_tokens": tokens,
        "prompt": prompt.prompt,
        "image_index": prompt.image_index,
        "action_index": prompt.action_index,
    }
    return feeds, prompt.bucket
