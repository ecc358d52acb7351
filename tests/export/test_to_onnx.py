"""The graphs that are written: valid, static, deterministic, typed as meant, and nothing in them that does no work."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference

from bundle.hashing import sha256_file
from bundle.manifest import File, Graph, Precision, Stage
from export import stages
from export.ops import TorchOps
from export.to_onnx import export_stage, round_up
from export.weights import STAGES
from runtime.backends.ort import OrtBackend
from tests.policies import (
    LATENTS,
    Row,
    TinyOptions,
    TinyPolicy,
    exact_row,
    largest,
    prompt_ids,
    reference_actions,
    reference_features,
    reference_images,
    run_action_head,
    run_language,
    run_vision,
    tiny_policy,
    visible_slots,
)

BUCKETS = (24, 32)
FORBIDDEN = {
    "Dropout",
    "Identity",
    "Shape",
    "If",
    "Loop",
    "Scan",
    "Constant",
    "ConstantOfShape",
    "Squeeze",
    "Unsqueeze",
}
# Constants small enough to stand in the graph: shapes, axes, scalars.
TINY_BYTES = 32
NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}

UPSTREAM = TinyOptions(dtype=torch.float32)
VARIANTS = (
    UPSTREAM,
    TinyOptions(dtype=torch.float32, head="velocities", packing="fork_overwrite", window=1),
    TinyOptions(dtype=torch.float32, head="classes", hand_camera=True, latent=2, window=2),
    TinyOptions(dtype=torch.float32, head="classes", told=True, vision_resampler=True),
    TinyOptions(dtype=torch.float32, x_attn_causal=True, lora=False, text_layers=1, vision_layers=1, lstm_layers=1),
)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
cases = pytest.mark.parametrize(
    ("options", "precision"),
    [(options, precision) for options in VARIANTS for precision in PRECISIONS],
    ids=lambda value: value.name if isinstance(value, TinyOptions) else str(value),
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass(frozen=True)
class Exported:
    """All three stages of a policy, as they lie in a bundle."""

    folder: Path
    entries: dict[str, Stage]
    files: dict[str, File]

    @functools.cached_property
    def graphs(self) -> dict[str, tuple[Graph, onnx.ModelProto]]:
        """By file name: the manifest's entry, and the graph without its weights."""
        found = [graph for entry in self.entries.values() for graph in entry.graphs]
        return {graph.file: (graph, onnx.load(self.folder / graph.file, load_external_data=False)) for graph in found}

    def types(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and static shape of every value of a graph, by name."""
        model = shape_inference.infer_shapes(self.graphs[file][1], check_type=True, strict_mode=True, data_prop=True)
        graph = model.graph
        known = {
            value.name: (
                NAMES[value.type.tensor_type.elem_type],
                tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in (*graph.input, *graph.output, *graph.value_info)
        }
        return known | {item.name: (NAMES[item.data_type], tuple(item.dims)) for item in graph.initializer}


def export(tiny: TinyPolicy, folder: Path, precision: Precision) -> Exported:
    folder.mkdir(exist_ok=True)
    entries, files = {}, {}
    for stage in STAGES:
        entries[stage], written = export_stage(
            stage, folder, tiny.weights, tiny.dims, precision=precision, buckets=BUCKETS, key=f"key of {stage}"
        )
        files |= written
    return Exported(folder, entries, files)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedCache:
    return ExportedCache(tmp_path_factory)


class ExportedCache:
    """Each policy and precision is exported once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._made: dict[tuple[TinyOptions, Precision], Exported] = {}

    def __call__(self, options: TinyOptions, precision: Precision) -> Exported:
        if (options, precision) not in self._made:
            folder = self._factory.mktemp("stages")
            self._made[options, precision] = export(tiny_policy(options), folder, precision)
        return self._made[options, precision]


# --- the files ------------------------------------------------------------------------------------------------------------


@cases
def test_graphs_are_valid_and_say_what_the_manifest_says(
    exported: ExportedCache, options: TinyOptions, precision: Precision
) -> None:
    made = exported(options, precision)
    for graph, model in made.graphs.values():
        onnx.checker.check_model(str(made.folder / graph.file), full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert graph.nodes == len(model.graph.node)
        for tensors, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            types = made.types(graph.file)
            assert [tensor.name for tensor in tensors] == [value.name for value in values]
            for tensor in tensors:
                named = {"float32": "fp32"}.get(tensor.dtype, tensor.dtype)
                assert types[tensor.name] == (named, tensor.shape)
    assert {stage: entry.precision for stage, entry in made.entries.items()} == dict.fromkeys(STAGES, precision)
    assert [graph.sequence for graph in made.entries["language"].graphs] == list(BUCKETS)
    assert [entry.graphs[0].sequence for name, entry in made.entries.items() if name != "language"] == [None, None]


@cases
def test_every_shape_is_static(exported: ExportedCache, options: TinyOptions, precision: Precision) -> None:
    made = exported(options, precision)
    for file, (_, model) in made.graphs.items():
        types = made.types(file)
        for node in model.graph.node:
            for name in node.output:
                assert all(size > 0 for size in types[name][1]), f"{node.name}: {types[name]}"


@cases
def test_no_node_is_idle(exported: ExportedCache, options: TinyOptions, precision: Precision) -> None:
    made = exported(options, precision)
    for file, (_, model) in made.graphs.items():
        operators = {node.op_type for node in model.graph.node}
        assert not operators & FORBIDDEN
        used = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
        idle = [node.name for node in model.graph.node if not used & set(node.output)]
        assert not idle, f"{file}: {idle}"
        assert {item.name for item in model.graph.initializer} <= used
        assert {value.name for value in model.graph.input} <= used
        names = [node.name for node in model.graph.node]
        assert len(names) == len(set(names))


@cases
def test_weights_lie_aligned_in_one_file_and_fill_it(
    exported: ExportedCache, options: TinyOptions, precision: Precision
) -> None:
    made = exported(options, precision)
    for stage, entry in made.entries.items():
        path = made.folder / entry.weights
        size = path.stat().st_size
        assert entry.weights == f"{stage}.{precision}.onnx.data"
        assert entry.weight_bytes == size
        assert made.files[entry.weights] == File(sha256=sha256_file(path), bytes=size)
        spans = set()
        for graph in entry.graphs:
            for item in made.graphs[graph.file][1].graph.initializer:
                if item.data_location != TensorProto.EXTERNAL:
                    assert item.ByteSize() < TINY_BYTES + len(item.name) + 32
                    assert len(item.raw_data) <= TINY_BYTES
                    continue
                record = {pair.key: pair.value for pair in item.external_data}
                assert record["location"] == entry.weights
                offset, length = int(record["offset"]), int(record["length"])
                assert offset % 4096 == 0
                assert offset + length <= size
                assert length == np.prod(item.dims, dtype=int) * (4 if item.data_type == TensorProto.FLOAT else 2)
                spans.add((offset, length))
        ordered = sorted(spans)
        for (start, length), (following, _) in zip(ordered, [*ordered[1:], (-1, 0)], strict=True):
            assert following == (-1 if following == -1 else -(-(start + length) // 4096) * 4096)
        assert sum(ordered[-1]) == size


def test_buckets_share_their_weights(exported: ExportedCache) -> None:
    made = exported(UPSTREAM, "fp32")
    stored = []
    for graph in made.entries["language"].graphs:
        items = made.graphs[graph.file][1].graph.initializer
        stored.append({item.name: tuple(pair.value for pair in item.external_data) for item in items})
    both = {name for name in stored[0].keys() & stored[1].keys() if stored[0][name]}
    assert all(stored[0][name] == stored[1][name] for name in both)
    own = {name for name, record in stored[0].items() if record} - both
    assert own == {f"causal_mask.{BUCKETS[0]}"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_exports_are_the_same_bytes(exported: ExportedCache, tmp_path: Path, precision: Precision) -> None:
    first = exported(UPSTREAM, precision)
    second = export(tiny_policy(UPSTREAM), tmp_path / "again", precision)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.folder.iterdir())
    assert len(names) == 3 + 2 + len(BUCKETS)
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    assert first.entries == second.entries

    other = export(tiny_policy(dataclasses.replace(UPSTREAM, seed=1)), tmp_path / "other", precision)
    for stage in STAGES:
        assert other.files[other.entries[stage].weights] != first.files[first.entries[stage].weights]
        graph = first.entries[stage].graphs[0].file
        assert (other.folder / graph).read_bytes() == (first.folder / graph).read_bytes()


def test_progress_counts_every_weight_byte(tmp_path: Path) -> None:
    tiny = tiny_policy(UPSTREAM)
    done: list[int] = []
    entry, _ = export_stage(
        "vision", tmp_path, tiny.weights, tiny.dims, precision="fp32", buckets=(), key="k", progress=done.append
    )
    assert 0 < sum(done) <= entry.weight_bytes
    assert entry.weight_bytes - sum(done) < 4096 * len(done)


# --- types ----------------------------------------------------------------------------------------------------------------


@cases
def test_types_stand_in_the_graph(exported: ExportedCache, options: TinyOptions, precision: Precision) -> None:
    """In fp16 every GEMM is fp16 and every norm, softmax and L2 norm fp32; in fp32 nothing is fp16."""
    made = exported(options, precision)
    seen: Counter[tuple[str, str]] = Counter()
    for file, (_, model) in made.graphs.items():
        types = made.types(file)
        for node in model.graph.node:
            kinds = {types[name][0] for name in (*node.input, *node.output)} - {"int64"}
            for kind in kinds:
                seen[node.op_type, kind] += 1
            if node.op_type != "Cast":
                indices = node.op_type == "Slice" and not kinds  # of slots
                assert len(kinds) == 1 or indices, f"{node.name} mixes {kinds}"
    if precision == "fp32":
        assert not [key for key in seen if key[1] == "fp16"]
        return
    for operator in ("Gemm", "MatMul"):
        assert seen[operator, "fp16"] > 0
    assert seen["Gemm", "fp32"] == 0
    # What a head is told is the same at each recurrent step, so its rounding would add up.
    assert seen["MatMul", "fp32"] == (len(BUCKETS) if options.told else 0)
    for operator in ("LayerNormalization", "Softmax", "ReduceL2"):
        assert seen[operator, "fp32"] > 0
        assert seen[operator, "fp16"] == 0
    # Everything that sums up - residuals, recurrent states - is an island too; what is left only multiplies and moves.
    narrow = {operator for operator, kind in seen if kind == "fp16"}
    assert narrow <= {"Gemm", "MatMul", "Mul", "Sigmoid", "Sub", "Relu"} | {
        "Cast", "Reshape", "Transpose", "Split", "Concat", "Gather", "Slice",
    }  # fmt: skip
    assert seen["Add", "fp32"] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_island_weights_are_fp32_and_the_others_follow_the_precision(
    exported: ExportedCache, precision: Precision
) -> None:
    made = exported(UPSTREAM, precision)
    islands = ("norm", "causal_mask", "positions", "class_token", "fresh_state", "no_image")
    for _, model in made.graphs.values():
        for item in model.graph.initializer:
            if item.data_location != TensorProto.EXTERNAL:
                continue
            island = any(word in item.name for word in islands)
            assert NAMES[item.data_type] == ("fp32" if island else precision), item.name


# --- how much there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_node_counts_grow_by_a_constant_a_layer(tmp_path: Path, precision: Precision) -> None:
    counts: dict[str, list[int]] = {stage: [] for stage in STAGES}
    for layers in (1, 2, 3, 5):
        options = TinyOptions(dtype=torch.float32, text_layers=layers, vision_layers=layers, lstm_layers=layers)
        made = export(tiny_policy(options), tmp_path / str(layers), precision)
        for stage, entry in made.entries.items():
            assert len({graph.nodes for graph in entry.graphs}) == 1
            counts[stage].append(entry.graphs[0].nodes)
    for stage, (one, two, three, five) in counts.items():
        if stage == "action_head":
            # A single layer needs no splitting of the state and shares none of its input.
            assert five - three == 2 * (three - two)
            continue
        a_layer = two - one
        assert (three - two, five - three) == (a_layer, 2 * a_layer)
        # One layer is a handful of GEMMs and what lies between; a traced graph has several times as many nodes.
        assert a_layer < (45 if precision == "fp16" else 35)


def test_a_decoder_layer_is_four_gemms_and_two_products(exported: ExportedCache) -> None:
    made = exported(UPSTREAM, "fp32")
    _, model = made.graphs[made.entries["language"].graphs[0].file]
    for layer, gemms in ((0, 4), (1, 5)):
        prefix = f"layers.{layer}/"
        operators = Counter(node.op_type for node in model.graph.node if node.name.startswith(prefix))
        assert operators["Gemm"] == gemms
        assert operators["MatMul"] == 2
        assert operators["LayerNormalization"] == 4


# --- what the graphs compute ----------------------------------------------------------------------------------------------


class OrtPolicy:
    """Exported stages in onnxruntime, run like tests.policies runs them in torch."""

    def __init__(self, made: Exported, sequence: int) -> None:
        backend = OrtBackend(threads=1)
        graphs = {stage: entry.graphs[0] for stage, entry in made.entries.items()}
        graphs["language"] = next(graph for graph in made.entries["language"].graphs if graph.sequence == sequence)
        self._stages = {stage: backend.load(made.folder, graph) for stage, graph in graphs.items()}

    def vision(self, frames: np.ndarray) -> torch.Tensor:
        runs = [self._stages["vision"].run({"frames": views})["image_tokens"].copy() for views in frames]
        return torch.from_numpy(np.concatenate(runs))

    def language(self, images: torch.Tensor, row: Row) -> torch.Tensor:
        fixed = {key: getattr(row, key).numpy() for key in ("prompt", "image_index", "action_index")}
        runs = [
            self._stages["language"].run({"image_tokens": one[None].numpy(), **fixed})["feature"].copy()
            for one in images
        ]
        return torch.from_numpy(np.concatenate(runs))

    def action_head(self, features: torch.Tensor, tiny: TinyPolicy) -> torch.Tensor:
        shape = (tiny.dims.window, tiny.dims.head.layers, tiny.dims.hidden)
        h, c = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        chunks = []
        for feature in features:
            out = self._stages["action_head"].run({"feature": feature[None].numpy(), "h": h, "c": c})
            chunks.append(out["action"].copy())
            h, c = out["next_h"].copy(), out["next_c"].copy()
        return torch.from_numpy(np.concatenate(chunks))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options.name)
@pytest.mark.parametrize("sequence", BUCKETS)
def test_onnxruntime_computes_what_torch_does(exported: ExportedCache, options: TinyOptions, sequence: int) -> None:
    """The same stages, executed and written down; and both are the reference, frame after frame."""
    tiny = tiny_policy(options)
    engines = OrtPolicy(exported(options, "fp32"), sequence)
    ids = prompt_ids(LATENTS - 2)
    frames = tiny.frames(2 * options.window + 1)
    row = exact_row(tiny, visible_slots(tiny, ids), bucket=sequence, ids=ids)
    ops = TorchOps()

    images = run_vision(tiny, frames, ops)
    features = run_language(tiny, images, row, ops)
    actions = run_action_head(tiny, features, ops)

    # RoboVLMs' own resampler ends in a LayerNorm, so its tokens are as large as the embedding scale.
    size = max(1.0, float(images.std()))
    assert largest(engines.vision(frames), images) < 1e-5 * size
    assert largest(engines.language(images, row), features) < 1e-5
    assert largest(engines.action_head(features, tiny), actions) < 1e-5
    assert features.std(0).max() > 1e-2

    expected_images = reference_images(tiny, frames)
    expected_features = reference_features(tiny, frames, ids)
    expected_actions = reference_actions(tiny, expected_features)
    chained = engines.language(engines.vision(frames), row)
    assert largest(engines.vision(frames), expected_images * tiny.dims.embed_scale) < 5e-5
    assert largest(chained, expected_features) < 5e-5
    assert largest(engines.action_head(chained, tiny), expected_actions) < 5e-5


def test_onnxruntime_in_fp16_is_near_and_not_equal(exported: ExportedCache) -> None:
    tiny = tiny_policy(UPSTREAM)
    engines = OrtPolicy(exported(UPSTREAM, "fp16"), BUCKETS[0])
    frames = tiny.frames(4)
    row = exact_row(tiny, visible_slots(tiny, prompt_ids(6)), bucket=BUCKETS[0])
    ops = TorchOps()
    images = run_vision(tiny, frames, ops)
    features = run_language(tiny, images, row, ops)
    actions = run_action_head(tiny, features, ops)
    assert 1e-6 < largest(engines.vision(frames), images) < 5e-2
    assert 1e-6 < largest(engines.language(images, row), features) < 5e-2
    assert 1e-6 < largest(engines.action_head(features, tiny), actions) < 5e-2


def test_a_perturbed_weight_is_seen(exported: ExportedCache, tmp_path: Path) -> None:
    """The agreement above is of these weights: a weight file with one changed number computes something else."""
    tiny = tiny_policy(UPSTREAM)
    frames = tiny.frames(1)
    name = "backbone.vision_model.model.encoder.layers.0.mlp.fc1.weight"
    weight = tiny.weights.state[name].clone()
    weight[3, 5] += 1
    changed = export(tiny.with_state({name: weight}), tmp_path / "changed", "fp32")
    same = OrtPolicy(exported(UPSTREAM, "fp32"), BUCKETS[0]).vision(frames)
    assert largest(OrtPolicy(changed, BUCKETS[0]).vision(frames), same) > 1e-4


# --- what cannot be written -----------------------------------------------------------------------------------------------


def test_a_weight_beyond_fp16_makes_one_product_fp32(exported: ExportedCache, tmp_path: Path) -> None:
    """In every bucket's graph; the other products stay fp16, and all names are those of the plain graph."""
    tiny = tiny_policy(UPSTREAM)
    name = "backbone.text_model.model.layers.0.ffn.fc2.weight"
    weight = tiny.weights.state[name].clone()
    weight[0, 0] = 1e6
    made = export(tiny.with_state({name: weight}), tmp_path / "wide", "fp16")
    plain = exported(UPSTREAM, "fp16")
    for file in (graph.file for graph in made.entries["language"].graphs):
        types = made.types(file)
        products = [node for node in made.graphs[file][1].graph.node if node.op_type == "Gemm"]
        assert [node.name for node in products if types[node.output[0]][0] == "fp32"] == ["layers.0/fc2"]
        for node in products:
            assert len({types[tensor][0] for tensor in (*node.input, *node.output)}) == 1
        names = [{node.name for node in model.graph.node} for model in (made.graphs[file][1], plain.graphs[file][1])]
        # Neither of the casts around it is left.
        assert names[1] - names[0] == {"layers.0/fc2/float32", "layers.0/ffn_norm/float16"}
        assert names[0] <= names[1]


def test_buckets_are_multiples_of_eight() -> None:
    assert [round_up(length) for length in (1, 8, 9, 87, 88, 129)] == [8, 8, 16, 88, 88, 136]


def test_the_language_stage_needs_a_bucket_of_at_least_the_row(exported: ExportedCache) -> None:
    """A longer bucket costs time and nothing else: both give the feature of the shorter."""
    tiny = tiny_policy(UPSTREAM)
    made = exported(UPSTREAM, "fp32")
    slots = visible_slots(tiny, prompt_ids(6))
    images = run_vision(tiny, tiny.frames(1), TorchOps())
    features = [
        OrtPolicy(made, sequence).language(images, exact_row(tiny, slots, bucket=sequence)) for sequence in BUCKETS
    ]
    assert largest(*features) < 1e-5
    assert stages.MASKED < -1e4
