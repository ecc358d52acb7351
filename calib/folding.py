"""What smoothing did to a published INT8 variant, shown on its floating-point graphs: nothing but rounding.

The factors are taken from the variant's own files, as the quotient of a LayerNorm's parameters before and after. Each stage then runs
twice in floating point, as it is and with the factors folded into LayerNorms and weights, on a frame that the bundle has recorded. The
integers, scales and biases of all stages are compared with the folded weights that they stand for, and every graph of every form and
length must read the smoothed parameters exactly where its products read the smoothed weights. What an INT8 graph computes is not run
here: quantizing judges that on recordings.
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

from bundle.errors import BackendError, ConfigError
from bundle.manifest import MANIFEST_NAME, Manifest
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
_STAGES = ("vision", "language", "action_head")
# onnxruntime takes a graph from memory with weights in files since this version.
_RUNTIME = (1, 21)


@dataclass(frozen=True)
class FoldCheck:
    """One stage.

    Attributes:
        norms: LayerNorms with factors.
        smallest, largest: factor; 1 where there are none.
        difference: largest difference of the stage's output with and without them, relative to its largest value; 0 where there are none.
        off: largest distance between an INT8 weight, or an int32 bias, and what it stands for, in steps.
        misread: LayerNorms and products that read other parameters than they should, by graph.
        limit: of `difference`.
    """

    stage: str
    norms: int
    smallest: float
    largest: float
    difference: float
    off: float
    misread: tuple[str, ...]
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit and self.off <= _LIMIT_STEPS and not self.misread


def check_folding(folder: Path, *, threads: int = 0, advance: Callable[[], None] = lambda: None) -> Iterator[FoldCheck]:
    """Check every stage of a bundle that has INT8 products.

    Args:
        folder: of the bundle, or its manifest.
        advance: called after each of three steps a stage: two runs, the integers.

    Raises:
        BackendError: onnxruntime is too old.
        BundleError: the bundle is damaged.
        ConfigError: it has no INT8 variant.
    """
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < _RUNTIME:
        raise BackendError(
            "this needs a newer ONNX Runtime",
            got=onnxruntime.__version__,
            expected=".".join(map(str, _RUNTIME)) + " or newer",
            hint="pip install -U onnxruntime.",
        )
    folder = folder.parent if folder.name == MANIFEST_NAME else folder
    manifest = Manifest.load(folder)
    if manifest.quantized is None:
        raise ConfigError(
            "the bundle has no INT8 variant",
            got=f"{folder}, floating point alone",
            expected="a bundle that calib/quantize.py was run on",
            hint="python calib/quantize.py BUNDLE EPISODES",
        )
    manifest.verify(folder)
    feeds, sequence = _vision_feed(folder), None
    for stage in _STAGES:
        graph = read_stage(folder, manifest, stage, sequence=sequence, layers_per_block=1)
        quantized = read_graph(folder, manifest.int8(), stage, sequence)
        smoothing = stored_factors(graph, quantized)
        difference = 0.0
        if stage != "action_head":  # no LayerNorm there
            plain = run_folded(graph, {}, feeds, threads=threads)
            advance()
            if smoothing:
                changed = fold(graph, smoothing)
                # Of LayerNorms, what the variant will really run.
                stored = {name: f"{name}.smooth" for name in changed if f"{name}.smooth" in quantized.initializers}
                changed |= {name: quantized.array(other).astype(np.float32) for name, other in stored.items()}
                found = run_folded(graph, changed, feeds, threads=threads)
                difference = float(np.abs(found - plain).max() / np.abs(plain).max())
            advance()
        if stage in manifest.quantized.stages:
            values = np.concatenate([np.ones(1, np.float32), *smoothing.values()])
            yield FoldCheck(
                stage,
                len(smoothing),
                float(values.min()),
                float(values.max()),
                difference,
                float(np.max([site_error(graph, quantized, site, smoothing) for site in graph.sites])),
                tuple(_misread(folder, manifest, stage, graph, smoothing)),
                _LIMITS[manifest.stages[stage].precision],
            )
        advance()
        if stage == "vision":
            feeds, sequence = _language_feed(folder, manifest, plain)
        else:
            sequence = None


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
        value = changed[proto.name].astype(graph.array(proto.name).dtype, copy=False)
        if proto.data_location == TensorProto.EXTERNAL:
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(value))
            options.add_external_initializers([proto.name], [kept[-1]])
        else:
            proto.CopyFrom(numpy_helper.from_array(value, proto.name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output: Floats = session.run(None, feeds)[0].astype(np.float32)
    return output


def site_error(graph: StageGraph, quantized: StageGraph, site: Site, smoothing: Mapping[str, Floats]) -> float:
    """Largest distance between the integers of a site and what they stand for, in steps; 0 for one that stayed in floating point."""
    if f"{site.weight}.int8" not in quantized.initializers:
        return 0.0

    def stored(part: str) -> Floats:
        return quantized.array(f"{site.weight}.{part}").astype(np.float32)

    weight = graph.array(site.weight).astype(np.float32)
    if site.norm is not None and site.norm in smoothing:
        weight = fold_weight(weight, smoothing[site.norm])
    errors = [np.abs(weight / stored("scale")[:, None] - stored("int8")).max(), np.abs(stored("zero")).max()]
    if site.bias is not None:
        bias = graph.array(site.bias).astype(np.float32)
        errors.append(0.0 if np.array_equal(bias, stored("bias")) else np.inf)
    return float(np.max(errors))


def _misread(
    folder: Path, manifest: Manifest, stage: str, graph: StageGraph, smoothing: Mapping[str, Floats]
) -> Iterator[str]:
    """Nodes of all forms and lengths whose parameters are not those of the variant."""
    assert manifest.quantized is not None
    for entry in manifest.quantized.stages[stage].graphs:
        variant = read_graph(folder, manifest.int8(entry.form), stage, entry.sequence)
        nodes = {node.name: node for node in variant.model.graph.node if node.name}
        producers = variant.producers()
        for site in graph.sites:
            product = nodes[site.name]
            inputs = set(product.input)
            for name in product.input:
                if name in producers and producers[name].op_type == "DequantizeLinear":
                    inputs |= set(producers[name].input)
            integers = {f"{site.weight}.{part}" for part in ("int8", "scale", "zero")} <= inputs
            if not integers and site.weight not in inputs:
                yield f"{entry.file}: {site.name}"
            norm = nodes[site.norm] if site.norm is not None else None
            if norm is not None:
                smooth = [name.endswith(".smooth") for name in norm.input[1:3]]
                if smooth != [integers and site.norm in smoothing] * 2:
                    yield f"{entry.file}: {norm.name}"
            if entry.form == "ort-cpu" and integers and site.bias is not None:
                activation, weight = (
                    variant.array(name).astype(np.float64) for name in (product.input[1], f"{site.weight}.scale")
                )
                scales = activation * weight
                steps = graph.array(site.bias).astype(np.float64) / scales
                if not np.abs(steps - variant.array(f"{site.weight}.bias32").astype(np.float64)).max() <= _LIMIT_STEPS:
                    yield f"{entry.file}: {site.name}, its bias"


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
