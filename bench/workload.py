"""What one tick computes: the sizes of a policy, and every operation of its three stages with its arithmetic and its weights.

The lists follow export/stages.py line by line, because that is what the graphs hold: tests/bench/test_workload.py counts the products of
real graphs and the bytes of real weight files, and both must agree. What stands in no manifest, the widths of the feed-forward layers and
whether there is a second resampler, is found from the length of the weight files. Knows nothing about devices or time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

import msgspec

from bundle.errors import ConfigError
from bundle.manifest import Dimensions, HeadKind, Manifest

STAGES = ("vision", "language", "action_head")
Kind = Literal["linear", "attention", "norm", "softmax", "gelu", "quick_gelu", "move"]
# Kosmos-2: pictures are cut into squares of 14 pixels, feed-forward layers are four times as wide as their input.
PATCH = 14
_FFN_RATIOS = (4, 2, 1, 3, 8)
# RoboVLMs' own resampler, which has one size: train/vision_resampler.py.
_PERCEIVER_LAYERS, _PERCEIVER_HEADS, _PERCEIVER_HEAD_WIDTH = 6, 8, 64
# Widths of the hidden layers of the head's MLP: train/action_head.py.
_MLP = (1024, 512, 256)
_PAGE = 4096  # weights start at multiples of it: export/weight_file.py


@dataclass(frozen=True)
class Op:
    """One operation, `count` times in a stage.

    Attributes:
        m, n, k, batch: of a product [batch, m, k] x [batch, k, n]; 0 for others.
        moved: numbers read and written in the compute type, weights left out.
        moved_island: the same in fp32, whatever the stage's precision.
        weights: numbers of its weights in the compute type, each a tensor.
        island_weights: the same in fp32.
    """

    name: str
    kind: Kind
    count: int = 1
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    moved: int = 0
    moved_island: int = 0
    weights: tuple[int, ...] = ()
    island_weights: tuple[int, ...] = ()

    @property
    def flops(self) -> int:
        """Multiplications and additions of all `count`, 2 m n k batch each; only products count."""
        return 2 * self.m * self.n * self.k * self.batch * self.count


@dataclass(frozen=True)
class Workload:
    """A policy's sizes.

    Attributes:
        name: of the bundle, or of the size.
        cameras: pictures of a tick.
        outputs: width of one chunk step.
        vision_ffn, text_ffn: widths of the feed-forward layers.
        nodes: graph nodes by stage; empty if there is no graph to count.
        perceiver: layers of RoboVLMs' own resampler behind Kosmos-2's.
        told: the head hears the instruction beside the feature.
        buckets: sequence lengths that have a language graph.
        notes: what had to be assumed.
    """

    name: str
    dims: Dimensions
    cameras: int
    head: HeadKind
    outputs: int
    x_attn_causal: bool
    vision_ffn: int
    text_ffn: int
    nodes: dict[str, int]
    buckets: tuple[int, ...]
    notes: tuple[str, ...] = ()
    perceiver: int = 0
    told: bool = False


FULL = Workload(
    name="full",
    dims=Dimensions(
        image_size=224, vision_width=1024, vision_layers=24, vision_heads=16, embed_dim=2048, text_layers=24, text_heads=32,
        vocab_size=65037, image_tokens=64, latent=1, window=8, chunk=10, lstm_layers=4, lstm_hidden=512,
    ),
    cameras=1, head="velocities", outputs=2, x_attn_causal=False, vision_ffn=4096, text_ffn=8192,
    nodes={"vision": 582, "language": 683, "action_head": 83}, buckets=(88, 128),
)  # fmt: skip


def workload_of(manifest: Manifest, name: str = "bundle") -> Workload:
    """A bundle's sizes; never fails, what does not fit the weight files becomes a note."""
    dims = manifest.dimensions
    head = manifest.stages["action_head"].graphs[0]
    draft = Workload(
        name=name,
        dims=dims,
        cameras=len(manifest.preprocessing.cameras),
        head=manifest.action.head,
        outputs=head.outputs[0].shape[-1],
        x_attn_causal=manifest.x_attn_causal,
        vision_ffn=_FFN_RATIOS[0] * dims.vision_width,
        text_ffn=_FFN_RATIOS[0] * dims.embed_dim,
        nodes={stage: entry.graphs[0].nodes for stage, entry in manifest.stages.items()},
        buckets=manifest.prompt.buckets,
        told=manifest.prompt.told,
    )
    notes = []
    for stage, field, width in (("vision", "vision_ffn", dims.vision_width), ("language", "text_ffn", dims.embed_dim)):
        entry = manifest.stages[stage]
        if entry.precision == "int8":  # its weight file is a mixture
            notes.append(f"{stage}: a feed-forward width of {_FFN_RATIOS[0]} times its input is assumed")
            continue
        size = 2 if entry.precision == "fp16" else 4
        resamplers = (0, _PERCEIVER_LAYERS) if stage == "vision" else (draft.perceiver,)
        for ratio, perceiver in product(_FFN_RATIOS, resamplers):
            widths = {"vision_ffn": draft.vision_ffn, "text_ffn": draft.text_ffn, field: ratio * width}
            candidate = dataclasses.replace(
                draft, vision_ffn=widths["vision_ffn"], text_ffn=widths["text_ffn"], perceiver=perceiver
            )
            if 0 <= file_bytes(candidate, stage, size) - entry.weight_bytes < _PAGE:
                draft = candidate
                break
        else:
            notes.append(
                f"{stage}: the weight file has {entry.weight_bytes} bytes where these sizes make "
                f"{file_bytes(draft, stage, size)}; a feed-forward width of {_FFN_RATIOS[0]} times its input is assumed"
            )
    return dataclasses.replace(draft, notes=tuple(notes))


def sized(text: str) -> Workload:
    """`full`, or what differs from it: `embed_dim=1024,text_layers=12,cameras=2`.

    Raises:
        ConfigError: an unknown size, or no positive number.
    """
    if text == "full":
        return FULL
    known = (*Dimensions.__struct_fields__, "cameras", "vision_ffn", "text_ffn")
    sizes: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in known or not value.strip().isdecimal() or int(value) < 1:
            raise ConfigError(
                "--size is not understood",
                got=part.strip() or "nothing",
                expected=f"full, or NAME=NUMBER,... with a name of {', '.join(known)}",
                hint="for example --size embed_dim=1024,text_layers=12",
            )
        sizes[key] = int(value)
    dims = msgspec.structs.replace(
        FULL.dims, **{key: value for key, value in sizes.items() if key in Dimensions.__struct_fields__}
    )
    for width, heads in ((dims.vision_width, dims.vision_heads), (dims.embed_dim, dims.text_heads)):
        if width % heads:
            raise ConfigError(
                "--size gives heads of unequal width",
                got=f"{width} / {heads}",
                expected="a whole number",
                hint="change one.",
            )
    return dataclasses.replace(
        FULL,
        name=text,
        dims=dims,
        cameras=sizes.get("cameras", 1),
        vision_ffn=sizes.get("vision_ffn", _FFN_RATIOS[0] * dims.vision_width),
        text_ffn=sizes.get("text_ffn", _FFN_RATIOS[0] * dims.embed_dim),
        nodes={},
    )


def stage_ops(work: Workload, stage: str, sequence: int) -> tuple[Op, ...]:
    """All operations of one run of a stage; `sequence` is the language graph's slots."""
    emit: dict[str, Callable[[], Iterator[Op]]] = {
        "vision": lambda: _vision(work),
        "language": lambda: _language(work, sequence),
        "action_head": lambda: _action_head(work),
    }
    return tuple(emit[stage]())


def io_bytes(work: Workload, stage: str, sequence: int) -> int:
    """What a stage must at least read and write beside its weights."""
    dims = work.dims
    tokens = work.cameras * dims.image_tokens * dims.embed_dim
    state = dims.window * dims.lstm_layers * dims.latent * dims.lstm_hidden
    return {
        "vision": work.cameras * dims.image_size**2 * 3 + 4 * tokens,
        "language": 4 * (tokens + sequence * dims.embed_dim + dims.feature),
        "action_head": 4 * (dims.feature + 4 * state + dims.chunk * work.outputs),
    }[stage]


def file_bytes(work: Workload, stage: str, size: int) -> int:
    """Length of a stage's weight file, up to a page too long: compute weights of `size` bytes a number, page-aligned."""
    ops = list(stage_ops(work, stage, work.buckets[0]))
    if stage == "language":  # the graphs share all weights but the mask
        ops += [Op("mask", "move", island_weights=(bucket * bucket,)) for bucket in work.buckets[1:]]
    tensors = ((op.count, number * width) for op in ops for number, width in _sizes(op, size))
    return sum(count * -(-length // _PAGE) * _PAGE for count, length in tensors)


def _sizes(op: Op, size: int) -> Iterable[tuple[int, int]]:
    return [*((number, size) for number in op.weights), *((number, 4) for number in op.island_weights)]


# --- the stages, in the order of export/stages.py ---------------------------------------------------------------------------------


def _linear(name: str, m: int, n: int, k: int, *, count: int = 1, bias: bool = True) -> Op:
    weights = (n * k, n) if bias else (n * k,)
    return Op(name, "linear", count, m=m, n=n, k=k, moved=m * (k + n), weights=weights)


def _norm(name: str, rows: int, width: int, *, count: int = 1) -> Op:
    return Op(name, "norm", count, moved_island=2 * rows * width, island_weights=(width, width))


def _attention(
    batch: int,
    rows: int,
    keys: int,
    width: int,
    *,
    count: int = 1,
    masked: bool = False,
    constant: tuple[int, ...] = (),
) -> Iterator[Op]:
    """Scores, softmax and context; the transposes that make and undo the heads."""
    scores = batch * rows * keys
    inner = batch * width * (rows + keys)
    yield Op("scores", "attention", count, m=rows, n=keys, k=width, batch=batch, moved=inner + scores, weights=constant)
    if masked:
        yield Op("mask", "move", count, moved_island=2 * scores)
    yield Op("softmax", "softmax", count, moved_island=2 * scores)
    yield Op("context", "attention", count, m=rows, n=width, k=keys, batch=batch, moved=inner + scores)
    yield Op("heads", "move", count, moved=2 * batch * width * (2 * rows + 2 * keys))


def _vision(work: Workload) -> Iterator[Op]:
    dims, cameras = work.dims, work.cameras
    width, layers, heads, ffn = dims.vision_width, dims.vision_layers, dims.vision_heads, work.vision_ffn
    patches = max(1, dims.image_size // PATCH) ** 2
    rows, pixels = cameras * (patches + 1), PATCH * PATCH * 3
    yield Op("pixels", "move", moved=4 * cameras * patches * pixels, weights=(1,))
    yield _linear("patches", cameras * patches, width, pixels, bias=False)
    yield Op("positions", "move", moved_island=5 * rows * width, island_weights=(patches * width, cameras * width))
    yield _norm("pre_norm", rows, width)
    yield _norm("norm1", rows, width, count=layers)
    yield _linear("qkv", rows, 3 * width, width, count=layers)
    yield Op("split", "move", layers, moved=6 * rows * width)
    yield from _attention(cameras * heads, patches + 1, patches + 1, width // heads, count=layers)
    yield _linear("out", rows, width, width, count=layers)
    yield Op("residual", "move", 2 * layers, moved_island=3 * rows * width)
    yield _norm("norm2", rows, width, count=layers)
    yield _linear("fc1", rows, ffn, width, count=layers)
    yield Op("gelu", "quick_gelu", layers, moved=2 * rows * ffn)
    yield _linear("fc2", rows, width, ffn, count=layers)
    yield _norm("post_norm", rows, width)
    yield Op("l2", "move", moved_island=4 * rows * width)
    out, latents = dims.embed_dim, dims.image_tokens
    keys = latents if work.x_attn_causal else patches + 1
    yield _linear("kv", cameras * keys, 2 * out, width)
    yield Op("queries", "move", weights=(latents * out,))
    if work.x_attn_causal:
        yield Op("mask", "move", island_weights=(latents * latents,))
    else:
        yield Op("latents", "move", moved=4 * cameras * keys * out, weights=(cameras * latents * out,) * 2)
        keys += latents
    yield from _attention(cameras * dims.text_heads, latents, keys, out // dims.text_heads, masked=work.x_attn_causal)
    yield _linear("resampled", cameras * latents, out, out)
    if work.perceiver:
        yield from _perceive(cameras, latents, out, work.perceiver)


def _perceive(cameras: int, latents: int, width: int, layers: int) -> Iterator[Op]:
    rows, inner = cameras * latents, _PERCEIVER_HEADS * _PERCEIVER_HEAD_WIDTH
    yield Op("perceiver", "move", moved_island=4 * layers * rows * width, island_weights=(rows * width,))
    yield _norm("norm_media", rows, width, count=layers)
    yield _norm("norm_latents", rows, width, count=layers)
    yield _linear("perceiver_kv", 2 * rows, 2 * inner, width, count=layers, bias=False)
    yield _linear("perceiver_q", rows, inner, width, count=layers, bias=False)
    yield from _attention(cameras * _PERCEIVER_HEADS, latents, 2 * latents, _PERCEIVER_HEAD_WIDTH, count=layers)
    yield _linear("perceiver_out", rows, width, inner, count=layers, bias=False)
    yield _norm("perceiver_norm", rows, width, count=layers)
    yield _linear("perceiver_fc1", rows, 4 * width, width, count=layers, bias=False)
    yield Op("gelu", "gelu", layers, moved_island=8 * rows * width)
    yield _linear("perceiver_fc2", rows, width, 4 * width, count=layers, bias=False)
    yield Op("residual", "move", 2 * layers, moved_island=3 * rows * width)
    yield _norm("perceived", rows, width)


def _language(work: Workload, sequence: int) -> Iterator[Op]:
    dims = work.dims
    width, heads = dims.embed_dim, dims.text_heads
    yield Op("slots", "move", moved_island=5 * sequence * width, island_weights=(sequence * sequence, width))
    # The last layer computes keys and values of all slots, and everything else of the action slots only.
    for last, rows, count in ((False, sequence, dims.text_layers - 1), (True, dims.latent, 1)):
        if count == 0:
            continue
        yield _norm("norm1", sequence, width, count=count)
        if last:
            yield _linear("kv", sequence, 2 * width, width)
            yield _linear("q", rows, width, width)
        else:
            yield _linear("qkv", rows, 3 * width, width, count=count)
        yield Op("split", "move", count, moved=6 * sequence * width)
        yield from _attention(heads, rows, sequence, width // heads, count=count, masked=True)
        yield _norm("inner_norm", rows, width, count=count)
        yield _linear("out", rows, width, width, count=count)
        yield Op("residual", "move", 2 * count, moved_island=3 * rows * width)
        yield _norm("norm2", rows, width, count=count)
        yield _linear("fc1", rows, work.text_ffn, width, count=count)
        yield Op("gelu", "gelu", count, moved_island=2 * rows * work.text_ffn)
        yield _norm("ffn_norm", rows, work.text_ffn, count=count)
        yield _linear("fc2", rows, width, work.text_ffn, count=count)
    yield _norm("final_norm", dims.latent, width)
    if work.told:
        out = dims.latent * width
        yield Op("told", "linear", m=1, n=out, k=width, moved_island=width + out, island_weights=(width * out, out))


def _action_head(work: Workload) -> Iterator[Op]:
    dims = work.dims
    rows, hidden = dims.window, dims.latent * dims.lstm_hidden
    gates = 4 * hidden
    yield _linear("input", 1, gates, dims.feature)
    yield _linear("state", rows, gates, hidden, bias=False)
    if dims.lstm_layers > 1:
        yield _linear("gates", rows, gates, 2 * hidden, count=dims.lstm_layers - 1)
    yield Op("cell", "quick_gelu", dims.lstm_layers, moved_island=2 * rows * (gates + 3 * hidden))
    yield Op(
        "states", "move", moved_island=8 * rows * dims.lstm_layers * hidden, island_weights=(dims.lstm_layers * hidden,)
    )
    if work.head == "classes":
        yield _linear("logits", 1, dims.chunk * work.outputs, hidden)
        return
    arms = (
        {"actions": work.outputs - 1, "gripper": 1} if work.head == "actions_gripper" else {"velocities": work.outputs}
    )
    for name, columns in arms.items():
        sizes = (hidden, *_MLP, dims.chunk * columns)
        for index, (k, n) in enumerate(pairwise(sizes)):
            yield _linear(f"{name}.{index}", 1, n, k)
