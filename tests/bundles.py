"""Tiny bundles made without torch or onnx: a signed manifest, real ONNX graphs written by hand, and a golden step.

The three graphs are a toy policy, but keep what the runtime relies on: a frame becomes image tokens, padding of the prompt adds
nothing, and the head carries one recurrent state for each frame of the window, the oldest first. `TinyModel` computes the same in
numpy from the whole window, as the reference does, so that the runtime has something to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.hashing import sha256_file
from bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    Action,
    Dimensions,
    File,
    Form,
    Graph,
    HeadKind,
    Instruction,
    Manifest,
    Measured,
    Packing,
    Parity,
    Preprocessing,
    Prompt,
    Quantized,
    Source,
    Stage,
    Tensor,
)
from runtime.golden import Golden
from runtime.prompt import PromptTensors, assemble, choose_bucket, layout
from tests.runtime.onnx_files import GraphWriter

GO_LEFT = "go to the basket on the left"
GO_RIGHT = "go to the basket on the right"
LEFT_IDS = (0, 7, 8, 9, 10, 2)
RIGHT_IDS = (0, 7, 8, 9, 11, 2)
# As many tokens as the smaller bucket cannot hold.
LONG_IDS = (0, *range(3, 15), 2)
IMAGE_SIZE, IMAGE_TOKENS, WIDTH, VOCAB = 8, 4, 8, 16
WINDOW, CHUNK, LAYERS, HIDDEN = 3, 2, 2, 5


@dataclass(frozen=True)
class Tiny:
    """What varies between tiny bundles."""

    cameras: tuple[str, ...] = ("static",)
    head: HeadKind = "velocities"
    latent: int = 1
    packing: Packing = "upstream"
    buckets: tuple[int, ...] = (12, 24)
    pad_to: int | None = None
    resize: str = "bicubic"
    mu: float | None = None
    instructions: tuple[Instruction, ...] = (
        Instruction(text=GO_LEFT, token_ids=LEFT_IDS),
        Instruction(text=GO_RIGHT, token_ids=RIGHT_IDS),
    )
    seed: int = 0

    @property
    def columns(self) -> int:
        """Width of a chunk step."""
        return 2 if self.head == "velocities" else 3


def make_bundle(folder: Path, tiny: Tiny | None = None, *, golden_ids: Sequence[int] = LEFT_IDS) -> Path:
    """Write a complete, verified bundle into `folder`, which may exist; returns it."""
    tiny = tiny or Tiny()
    folder.mkdir(parents=True, exist_ok=True)
    model = TinyModel(tiny)
    graphs = {
        "vision": (_vision(model),),
        "language": tuple(_language(model, bucket) for bucket in tiny.buckets),
        "action_head": (_action_head(model),),
    }
    for draft in (draft for drafts in graphs.values() for draft in drafts):
        (folder / draft.graph.file).write_bytes(draft.model)
    np.save(folder / "token_embedding.npy", model.embedding)
    frames = random_frames(1, cameras=len(tiny.cameras))[0]
    model.reset(golden_ids)
    feature, action = model.step(frames)
    Golden(frames, np.array(golden_ids, np.int64), feature, action).save(folder)
    stages = {
        name: Stage(
            key=f"{index:064x}",
            precision="fp32",
            weights=drafts[0].graph.file,
            weight_bytes=len(drafts[0].model),
            graphs=tuple(draft.graph for draft in drafts),
        )
        for index, (name, drafts) in enumerate(graphs.items())
    }
    manifest = msgspec.structs.replace(_manifest(tiny), stages=stages)
    manifest.save(folder)
    rehash(folder)
    return folder


def add_int8(folder: Path, **changes: object) -> Manifest:
    """Give a bundle an INT8 variant that computes what its floating-point stages do; returns the manifest.

    Its graphs are copies of vision's and language's, in both forms, under names of their own.

    Args:
        changes: fields of Quantized.
    """
    manifest = Manifest.load(folder)
    forms: tuple[Form, ...] = ("portable", "ort-cpu")
    stages = {}
    for index, name in enumerate(("vision", "language")):
        source = manifest.stages[name]
        graphs = []
        for form in forms:
            for graph in source.graphs:
                length = "" if graph.sequence is None else f".s{graph.sequence}"
                file = f"{name}.int8.{form}{length}.onnx"
                (folder / file).write_bytes((folder / graph.file).read_bytes())
                graphs.append(msgspec.structs.replace(graph, file=file, form=form))
        weights = f"{name}.int8.onnx.data"
        (folder / weights).write_bytes(f"{name}'s small integers".encode())
        stages[name] = Stage(
            key=f"{index + 8:064x}",
            precision="int8",
            weights=weights,
            weight_bytes=(folder / weights).stat().st_size,
            graphs=tuple(graphs),
        )
    quantized = Quantized(
        stages=stages,
        calibration_sha256="e" * 64,
        calibration_frames=16,
        random=False,
        method="99.99 %, smoothed by 0.5",
        assignment={"vision.0": "int8", "vision.1": "fp32", "language.0": "int8"},
        budget=0.02,
        action_error=0.01,
        frames=200,
        verdict="PASS",
        golden_cosine=0.999,
        golden_error=0.003,
        machine="a CPU",
        measured=(
            Measured(backend="ort:cpu", precision="int8", step_ms=1.0),
            Measured(backend="ort:cpu", precision="fp32", step_ms=2.0),
        ),
    )
    quantized = msgspec.structs.replace(quantized, **changes)
    edit_manifest(folder, lambda old: msgspec.structs.replace(old, quantized=quantized))
    return rehash(folder)


def signed_manifest(jetvla: str = "0.1.0") -> bytes:
    """A valid manifest of a bundle without files; its `jetvla` tells it from others."""
    return msgspec.structs.replace(_manifest(Tiny()), jetvla=jetvla).encode()


def rehash(folder: Path) -> Manifest:
    """Record the present files of a bundle in its manifest, as if they had been built so."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {
        name: File(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size)
        for name in names
        if name != MANIFEST_NAME
    }
    return edit_manifest(folder, lambda manifest: msgspec.structs.replace(manifest, files=files))


def edit_manifest(folder: Path, edit: Callable[[Manifest], Manifest]) -> Manifest:
    """Replace a bundle's manifest by another, signed one."""
    edit(Manifest.load(folder)).save(folder)
    return Manifest.load(folder)


def random_frames(count: int, *, cameras: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """Frames in the size of the tiny vision stage, uint8 [count, cameras, 8, 8, 3]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, cameras, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


class TinyModel:
    """The toy policy in numpy. `step` recomputes the whole window from a zero state, frame after frame."""

    def __init__(self, tiny: Tiny) -> None:
        rng = np.random.default_rng(tiny.seed)
        self.tiny = tiny
        self.images = IMAGE_TOKENS * len(tiny.cameras)
        pixels = len(tiny.cameras) * IMAGE_SIZE * IMAGE_SIZE * 3
        states = tiny.latent * HIDDEN
        self.embedding = rng.normal(0, 0.3, (VOCAB + 1, WIDTH)).astype(np.float32)
        self.vision = (rng.normal(0, 0.4, (pixels, self.images * WIDTH)) / 255).astype(np.float32)
        self.into_state = rng.normal(0, 0.7, (tiny.latent * WIDTH, LAYERS * states)).astype(np.float32)
        self.into_action = rng.normal(0, 0.5, (LAYERS * states, CHUNK * tiny.columns)).astype(np.float32)
        self._prompt: PromptTensors | None = None
        self._features: list[NDArray[np.float32]] = []

    def reset(self, token_ids: Sequence[int], mask: Sequence[int] | None = None) -> None:
        tiny = self.tiny
        slots = layout(token_ids, packing=tiny.packing, image_tokens=self.images, latent=tiny.latent, mask=mask)
        bucket = choose_bucket(slots.length, tiny.buckets)
        scale = _manifest(tiny).prompt.embed_scale
        self._prompt = assemble(slots, self.embedding, bucket=bucket, embed_scale=scale, image_tokens=self.images)
        self._features = []

    def step(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Feature [latent * D] and normalised chunk [n, A] of resized frames [cameras, 8, 8, 3]."""
        assert self._prompt is not None
        tokens = np.tanh(frames.astype(np.float32).reshape(-1) @ self.vision).reshape(self.images, WIDTH)
        table = np.concatenate([tokens, np.zeros((1, WIDTH), np.float32)])
        row = self._prompt.prompt[0] + table[self._prompt.image_index]
        feature = np.tanh(0.3 * row[self._prompt.action_index] + 0.02 * row.sum(axis=0)).reshape(-1)
        self._features = [*self._features, feature][-WINDOW:]
        h = c = np.zeros(LAYERS * self.tiny.latent * HIDDEN, np.float32)
        for seen in self._features:
            h = np.tanh(np.float32(0.7) * h + seen @ self.into_state)
            c = np.tanh(np.float32(0.5) * c + h)
        return feature, np.tanh(c @ self.into_action).reshape(CHUNK, self.tiny.columns)


# --- manifest -----------------------------------------------------------------------------------------------------------------


def _manifest(tiny: Tiny) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        jetvla="0.1.0",
        precision="fp32",
        source=Source(
            checkpoint="epoch=0-step=2.ckpt",
            checkpoint_format="lightning",
            checkpoint_sha256="c" * 64,
            checkpoint_bytes=12345,
            weights_sha256="d" * 64,
            base_sha256=None,
            base_tensors=0,
            lora_modules=0,
            ignored_keys=("model.lm_head.weight",),
        ),
        dimensions=Dimensions(
            image_size=IMAGE_SIZE,
            vision_width=6,
            vision_layers=1,
            vision_heads=2,
            embed_dim=WIDTH,
            text_layers=1,
            text_heads=2,
            vocab_size=VOCAB,
            image_tokens=IMAGE_TOKENS,
            latent=tiny.latent,
            window=WINDOW,
            chunk=CHUNK,
            lstm_layers=LAYERS,
            lstm_hidden=HIDDEN,
        ),
        x_attn_causal=False,
        x_attn_causal_source="stated",
        prompt=Prompt(
            packing=tiny.packing,
            packing_source="stated",
            template="<grounding>An image of a robot {instruction}",
            pad_id=1,
            eos_id=2,
            pad_to=tiny.pad_to,
            embed_scale=2.5,
            buckets=tiny.buckets,
            instructions=tiny.instructions,
        ),
        preprocessing=Preprocessing(
            color="RGB",
            resize=tiny.resize,  # type: ignore[arg-type]
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            cameras=tiny.cameras,
        ),
        fps=None,
        action=_action(tiny),
        stages={},
        quantized=None,
        files={},
        parity=Parity(
            verdict="PASS",
            backend="ort:cpu",
            frames=22,
            feature_cosine=0.9999999,
            feature_max_error=3e-6,
            action_max_error=8e-6,
        ),
    )


def _action(tiny: Tiny) -> Action:
    names, units = ("linear_x", "linear_y"), ("m/s", "m/s")
    if tiny.head == "actions_gripper":
        names, units = (*names, "gripper"), (*units, "-1 or 1")
    classes = tiny.head == "classes"
    return Action(
        head=tiny.head,
        names=names,
        units=units,
        normalized=not classes,
        minimum=-1.15,
        maximum=1.15,
        mu=tiny.mu,
        class_names=("Stop", "F", "L") if classes else (),
        class_values=((0.0, 0.0), (1.15, 0.0), (0.0, 1.15)) if classes else (),
    )


# --- graphs -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    graph: Graph
    model: bytes


def _vision(model: TinyModel) -> _Draft:
    writer = GraphWriter()
    pixels = writer.reshape(writer.add("Cast", "frames", to=1), 1, -1)
    tokens = writer.add("Tanh", writer.add("MatMul", pixels, writer.constant(model.vision)))
    writer.reshape(tokens, 1, model.images, WIDTH, out="image_tokens")
    frames = _tensor("frames", "uint8", len(model.tiny.cameras), IMAGE_SIZE, IMAGE_SIZE, 3)
    return _draft("vision.fp32.onnx", writer, (frames,), (_tensor("image_tokens", "float32", 1, model.images, WIDTH),))


def _language(model: TinyModel, bucket: int) -> _Draft:
    latent = model.tiny.latent
    writer = GraphWriter()
    table = writer.add("Concat", "image_tokens", writer.constant(np.zeros((1, 1, WIDTH), np.float32)), axis=1)
    row = writer.add("Add", writer.add("Gather", table, "image_index", axis=1), "prompt")
    own = writer.add("Mul", writer.add("Gather", row, "action_index", axis=1), writer.constant(np.float32([0.3])))
    everything = writer.add("ReduceSum", row, writer.numbers(1), keepdims=1)
    mixed = writer.add("Add", own, writer.add("Mul", everything, writer.constant(np.float32([0.02]))))
    writer.reshape(writer.add("Tanh", mixed), 1, latent * WIDTH, out="feature")
    inputs = (
        _tensor("image_tokens", "float32", 1, model.images, WIDTH),
        _tensor("prompt", "float32", 1, bucket, WIDTH),
        _tensor("image_index", "int64", bucket),
        _tensor("action_index", "int64", latent),
    )
    outputs = (_tensor("feature", "float32", 1, latent * WIDTH),)
    return _draft(f"language.fp32.s{bucket}.onnx", writer, inputs, outputs, bucket)


def _action_head(model: TinyModel) -> _Draft:
    latent, columns = model.tiny.latent, model.tiny.columns
    states = (WINDOW, LAYERS, latent * HIDDEN)
    writer = GraphWriter()
    new = writer.reshape(writer.add("MatMul", "feature", writer.constant(model.into_state)), 1, *states[1:])
    h = writer.add("Tanh", writer.add("Add", writer.add("Mul", "h", writer.constant(np.float32([0.7]))), new))
    c = writer.add("Tanh", writer.add("Add", writer.add("Mul", "c", writer.constant(np.float32([0.5]))), h))
    oldest = writer.reshape(writer.add("Slice", c, writer.numbers(0), writer.numbers(1), writer.numbers(0)), 1, -1)
    action = writer.add("Tanh", writer.add("MatMul", oldest, writer.constant(model.into_action)))
    writer.reshape(action, 1, CHUNK, columns, out="action")
    fresh = writer.constant(np.zeros((1, *states[1:]), np.float32))
    for name, value in (("next_h", h), ("next_c", c)):
        younger = writer.add("Slice", value, writer.numbers(1), writer.numbers(WINDOW), writer.numbers(0))
        writer.add("Concat", younger, fresh, out=name, axis=0)
    inputs = (
        _tensor("feature", "float32", 1, latent * WIDTH),
        _tensor("h", "float32", *states),
        _tensor("c", "float32", *states),
    )
    outputs = (
        _tensor("action", "float32", 1, CHUNK, columns),
        _tensor("next_h", "float32", *states),
        _tensor("next_c", "float32", *states),
    )
    return _draft("action_head.fp32.onnx", writer, inputs, outputs)


def _draft(
    file: str, writer: GraphWriter, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], sequence: int | None = None
) -> _Draft:
    nodes = len(writer.nodes)
    graph = Graph(file=file, form="portable", sequence=sequence, nodes=nodes, inputs=inputs, outputs=outputs)
    return _Draft(graph, writer.model(inputs, outputs))


def _tensor(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name=name, dtype=dtype, shape=shape)
