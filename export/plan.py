"""What a build will do, decided before anything is written: manifest, stage keys, what is cached, what it will cost.

A stage's key covers everything that decides its bytes - weights, adapters, graph-building code, precision, shapes - so an equal key in the
present bundle means that its files can be linked instead of built. Writes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
from rich.table import Table

from bundle.errors import BundleError, ConfigError, StorageError
from bundle.hashing import content_bytes, sha256_content, sha256_file
from bundle.manifest import (
    SCHEMA,
    Dimensions,
    File,
    FloatPrecision,
    Instruction,
    Manifest,
    Parity,
    Preprocessing,
    Prompt,
    Source,
    Stage,
)
from bundle.prompt_template import takes_words
from export.action_spec import action_spec
from export.config import BuildConfig, code_sha256
from export.console import human_bytes, plain_table
from export.stages import StageDims
from export.to_onnx import round_up, stage_dims
from export.weights import STAGES, MergedWeights, stage_bytes, stage_sha256
from runtime.prompt import layout, pad_tokens
from runtime.tokenizer import TOKENIZER_NAME, tokenize
from train.checkpoint import LoadedPolicy
from train.policy import CLIP_MEAN, CLIP_STD

EMBEDDING_WEIGHT = "backbone.text_model.model.embed_tokens.weight"
# Sources whose change must rebuild a stage.
_GRAPH_CODE = (
    *(f"export/{name}.py" for name in ("onnx_ops", "ops", "stages", "to_onnx", "weight_file", "weights")),
    "train/vision_resampler.py",
)
# The dimensions and conventions that each stage's code reads; tests hold this against what it really reads.
_STAGE_DIMS = {
    "vision": (
        "image_size", "patch", "patches", "vision_width", "vision_layers", "vision_heads", "vision_eps", "width", "heads", "latents",
        "cameras", "image_tokens", "embed_scale", "x_attn_causal", "mean", "std", "perceiver",
    ),
    "language": ("width", "layers", "heads", "eps", "image_tokens", "head", "feature"),
    "action_head": ("window", "chunk", "head", "hidden", "feature"),
}  # fmt: skip
_DEFAULT_INSTRUCTION = "Navigate to the gray basket on the left"
_NO_NORM = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Weight bytes that fp32 instead of fp16 may add to a stage before it counts as a cost: 0.16 ms of an Orin NX's memory bandwidth.
_FREE_BYTES = 16 << 20
_NOT_VERIFIED = Parity(
    verdict="FAIL", backend="none", frames=0, feature_cosine=0.0, feature_max_error=0.0, action_max_error=0.0
)


@dataclass(frozen=True)
class Plan:
    """What will be written and what is reused, decided before anything is.

    Attributes:
        manifest: everything but stages, files and parity.
        precision: of the whole; that of a stage may be higher.
        keys: content key per stage and precision; see `key`.
        sizes: fp32 bytes per stage.
        reusable: stages of the present bundle with a key of this plan, by stage and precision.
        known_files: integrity records of the reusable stages' files, just checked.
        prompts: token ids to verify with, every bucket among them.
    """

    manifest: Manifest
    precision: FloatPrecision
    dims: StageDims
    keys: dict[tuple[str, FloatPrecision], str]
    sizes: dict[str, int]
    reusable: dict[tuple[str, FloatPrecision], Stage]
    known_files: dict[str, File]
    prompts: tuple[tuple[int, ...], ...]
    tokenizer: Path | None

    def precisions(self) -> dict[str, FloatPrecision]:
        """The precision that each stage starts with. The action head is recurrent and small: rounding it saves nothing and adds up."""
        return {stage: "fp32" if stage == "action_head" else self.precision for stage in STAGES}

    def size(self, stage: str, precision: FloatPrecision) -> int:
        """Weight bytes of a stage."""
        return self.sizes[stage] // (2 if precision == "fp16" else 1)

    def key(self, stage: str, precision: FloatPrecision, wide: Collection[str] = ()) -> str:
        """The content key of a stage whose operations `wide` are computed in fp32. Which ones, only measuring tells."""
        key = self.keys[stage, precision]
        return hashlib.sha256(" ".join([key, *sorted(wide)]).encode()).hexdigest() if wide else key

    def promotable(self, precisions: dict[str, FloatPrecision]) -> str | None:
        """The next fp16 stage, if any, that fp32 would not make larger by more than _FREE_BYTES."""
        for stage in ("language", "vision"):
            if precisions[stage] == "fp16" and self.sizes[stage] // 2 <= _FREE_BYTES:
                return stage
        return None


def make_plan(config: BuildConfig, loaded: LoadedPolicy, advance: Callable[[int], None]) -> Plan:
    """Plan the build of a loaded checkpoint; hashes its weights and its file, `advance` gets the bytes done."""
    policy = loaded.policy
    preprocessing = preprocessing_of(config, loaded)
    dims = stage_dims(policy, loaded.base, mean=preprocessing.mean, std=preprocessing.std)
    if policy.spec.image_size != dims.image_size:
        raise ConfigError(
            "config and base disagree about the image size",
            got=f"image_size {policy.spec.image_size}",
            expected=f"{dims.image_size}, the base's",
            hint="position embeddings are not interpolated; train and deploy at the base's size.",
        )
    weights = merged_weights(loaded)
    hashes = {part: stage_sha256(weights, part, advance) for part in (*STAGES, "embedding")}
    tokenizer = tokenizer_of(config, loaded)
    prompt, prompts = _prompt(config, loaded, dims, tokenizer)
    keys = {
        (stage, precision): _stage_key(stage, precision, hashes[stage], dims, prompt.buckets)
        for stage in STAGES
        for precision in get_args(FloatPrecision)
    }
    manifest = Manifest(
        schema=SCHEMA,
        jetvla=importlib.metadata.version("jetvla"),
        precision=config.graph_precision,
        source=Source(
            checkpoint=config.checkpoint.name,
            checkpoint_format=loaded.raw.kind,
            checkpoint_sha256=sha256_content(config.checkpoint, advance),
            checkpoint_bytes=content_bytes(config.checkpoint),
            weights_sha256=hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest(),
            base_sha256=loaded.base_sha256 or loaded.raw.recorded.get("base_sha256"),
            base_tensors=len(loaded.from_base),
            lora_modules=len(loaded.adapted),
            ignored_keys=loaded.ignored + loaded.idle,
        ),
        dimensions=Dimensions(
            image_size=dims.image_size,
            vision_width=dims.vision_width,
            vision_layers=dims.vision_layers,
            vision_heads=dims.vision_heads,
            embed_dim=dims.width,
            text_layers=dims.layers,
            text_heads=dims.heads,
            vocab_size=loaded.state[EMBEDDING_WEIGHT].shape[0],
            image_tokens=dims.latents,
            latent=dims.head.latent,
            window=dims.window,
            chunk=dims.chunk,
            lstm_layers=dims.head.layers,
            lstm_hidden=dims.head.hidden,
        ),
        x_attn_causal=policy.conventions.x_attn_causal,
        x_attn_causal_source=policy.conventions.x_attn_causal_source,
        prompt=prompt,
        preprocessing=preprocessing,
        fps=None if loaded.facts is None else loaded.facts.fps,
        action=action_spec(policy.spec, config, loaded.facts),
        stages={},
        quantized=None,
        files={},
        parity=_NOT_VERIFIED,
    )
    sizes = {stage: stage_bytes(weights.state, stage) for stage in STAGES}
    reusable, known_files = ({}, {}) if config.force else _reusable(config.target, keys)
    return Plan(manifest, config.graph_precision, dims, keys, sizes, reusable, known_files, prompts, tokenizer)


def preprocessing_of(config: BuildConfig, loaded: LoadedPolicy) -> Preprocessing:
    """The manifest's preprocessing part: stated by the user, recorded in the checkpoint, or upstream's - in this order."""
    facts = loaded.facts
    resize, pixel_norm = config.resize, config.pixel_norm
    if resize == "auto":
        resize = loaded.policy.spec.resize if facts is None else facts.resize
    if pixel_norm == "auto":
        pixel_norm = "clip" if facts is None else facts.pixel_norm
    mean, std = (CLIP_MEAN, CLIP_STD) if pixel_norm == "clip" else _NO_NORM
    cameras = ("hand", "static") if loaded.policy.spec.hand_camera else ("static",)
    return Preprocessing(color="RGB", resize=resize, mean=mean, std=std, cameras=cameras)


def tokenizer_of(config: BuildConfig, loaded: LoadedPolicy) -> Path | None:
    """The tokenizer.json to use: the stated one, else the base's, else none.

    Raises:
        ConfigError: the stated one does not exist.
    """
    if config.tokenizer is not None and not config.tokenizer.exists():
        raise ConfigError(
            f"{config.tokenizer} does not exist", expected="a tokenizer.json", hint="correct --tokenizer."
        )
    return config.tokenizer or loaded.base.tokenizer


def tokens_of(instruction: str, config: BuildConfig, loaded: LoadedPolicy) -> tuple[int, ...]:
    """An instruction's token ids, special tokens included.

    Raises:
        PromptError: there is no tokenizer.
    """
    return tokenize(
        instruction, loaded.policy.spec.prompt_template, tokenizer_of(config, loaded) or Path(TOKENIZER_NAME)
    )


def plan_table(plan: Plan, loaded: LoadedPolicy) -> Table:
    table = plain_table("stage", "precision", "weights", "key", "state")
    for stage, precision in plan.precisions().items():
        state = "cached" if (stage, precision) in plan.reusable else "build"
        table.add_row(
            stage, precision, human_bytes(plan.size(stage, precision)), plan.keys[stage, precision][:8], state
        )
    table.add_row("embedding", "fp32", human_bytes(loaded.state[EMBEDDING_WEIGHT].nbytes), "", "write")
    return table


def check_space(target: Path, plan: Plan) -> None:
    table = plan.manifest.dimensions.vocab_size * plan.dims.width * 4
    stages = (item for item in plan.precisions().items() if item not in plan.reusable)
    needed = (table + sum(plan.size(stage, precision) for stage, precision in stages)) * 11 // 10
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"not enough room to build {target}",
            got=f"{human_bytes(free)} free",
            expected=f"about {human_bytes(needed)}",
            hint="free some space or choose another folder with --out.",
        )


def merged_weights(loaded: LoadedPolicy) -> MergedWeights:
    lora = loaded.policy.spec.lora
    idle = set(loaded.idle)
    state = {name: tensor for name, tensor in loaded.state.items() if name not in idle}
    return MergedWeights(state, lora.scaling if lora else 0.0)


def stage_files(entry: Stage) -> tuple[str, ...]:
    """Names of all files of a stage."""
    return (entry.weights, *(graph.file for graph in entry.graphs))


def _prompt(
    config: BuildConfig, loaded: LoadedPolicy, dims: StageDims, tokenizer: Path | None
) -> tuple[Prompt, tuple[tuple[int, ...], ...]]:
    """The manifest's prompt part, and the prompts to verify with: two, and one for each bucket that they leave out."""
    policy, text = loaded.policy, loaded.base.kosmos.text_config
    pad_to = policy.spec.pad_to
    instructions = tuple(
        Instruction(text=item, token_ids=tokens_of(item, config, loaded)) for item in config.instruction
    )
    prompts = [item.token_ids for item in instructions]
    if not prompts and tokenizer is not None:
        told = _DEFAULT_INSTRUCTION if takes_words(policy.spec.prompt_template) else ""
        prompts = [tokens_of(told, config, loaded)]
    elif not prompts:
        prompts = [_made_up_tokens(text.vocab_size, 16, text.eos_token_id)]
    padded = [pad_tokens(item, pad_to, text.pad_token_id) for item in prompts]
    longest = _made_up_tokens(text.vocab_size, config.max_prompt_tokens, text.eos_token_id)
    if pad_to is not None:
        # In a padded prompt </s> is not the last column, and stays in front of the action token.
        longest = pad_tokens(longest[:pad_to], pad_to, text.pad_token_id)
    candidates = [padded[0], padded[-1], *padded[1:-1], longest]
    bucket_of = {
        ids: round_up(
            layout(
                ids,
                packing=policy.conventions.packing,
                image_tokens=dims.image_tokens,
                latent=dims.head.latent,
                pad_id=text.pad_token_id,
            ).length
            + dims.head.told
        )
        for ids in candidates
    }
    verified = candidates[:2]
    for ids in candidates[2:]:
        if bucket_of[ids] not in {bucket_of[known] for known in verified}:
            verified.append(ids)
    spec = Prompt(
        packing=policy.conventions.packing,
        packing_source=policy.conventions.packing_source,
        template=policy.spec.prompt_template,
        template_source=policy.spec.prompt_source,
        pad_id=text.pad_token_id,
        eos_id=text.eos_token_id,
        pad_to=pad_to,
        embed_scale=dims.embed_scale,
        buckets=tuple(sorted(set(bucket_of.values()))),
        instructions=instructions,
        told=dims.head.told,
    )
    return spec, tuple(verified)


def _made_up_tokens(vocab: int, count: int, eos: int) -> tuple[int, ...]:
    """A prompt of `count` tokens without words, for lengths and for bases without a tokenizer."""
    words = np.random.default_rng(0).integers(3, vocab, count - 2)
    return (0, *(int(word) for word in words), eos)


def _stage_key(stage: str, precision: FloatPrecision, weights: str, dims: StageDims, buckets: tuple[int, ...]) -> str:
    """Hash of everything that decides the bytes of a stage's files."""
    parts = {
        "stage": stage,
        "weights": weights,
        "code": code_sha256(_GRAPH_CODE),
        "precision": precision,
        "dims": {name: getattr(dims, name) for name in _STAGE_DIMS[stage]},
        "buckets": buckets if stage == "language" else (),
        "calibration": None,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _reusable(
    target: Path, keys: dict[tuple[str, FloatPrecision], str]
) -> tuple[dict[tuple[str, FloatPrecision], Stage], dict[str, File]]:
    """Stages of the bundle in `target` with these keys and intact files, and the records of those files."""
    try:
        old = Manifest.load(target)
    except BundleError:
        return {}, {}
    found: dict[tuple[str, FloatPrecision], Stage] = {}
    records: dict[str, File] = {}
    for (stage, precision), key in keys.items():
        entry = old.stages.get(stage)
        if entry is None or entry.key != key:
            continue
        names = stage_files(entry)
        if all(_is_intact(target / name, old.files.get(name)) for name in names):
            found[stage, precision] = entry
            records |= {name: old.files[name] for name in names}
    return found, records


def _is_intact(path: Path, record: File | None) -> bool:
    return record is not None and path.is_file() and sha256_file(path) == record.sha256
