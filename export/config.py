"""What to build, and whether it has been built already - decided without importing torch.

A build's request is its options, its inputs (by path, size and modification time, as make(1) does) and the code that would run. An equal
request on an intact bundle means there is nothing to do, and saying so must not cost the seconds that importing torch does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import tyro

from bundle.errors import BundleError, ConfigError
from bundle.manifest import FloatPrecision, Manifest, Packing
from export.engine_options import EngineOptions, EnginePrecision, will_build
from runtime.backends.ort import PROVIDERS

BUILD_REPORT = "reports/build.json"
_CODE = ("bundle", "episodes", "export", "runtime", "train")
_LIBRARIES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "numpy", "pillow", "tokenizers")
_ROOT = Path(__file__).resolve().parent.parent
# Kosmos-2's max_position_embeddings.
_MAX_PROMPT = 2048
# A build names its backend: parity is a statement about one.
_CHOICES = {
    "precision": (*get_args(FloatPrecision), "auto"),
    "packing": (*get_args(Packing), "auto"),
    "resize": ("bicubic", "bilinear", "letterbox", "auto"),
    "pixel_norm": ("clip", "none", "auto"),
    "backend": tuple(PROVIDERS),
}


@dataclass(frozen=True)
class BuildConfig:
    """Turn a checkpoint into a verified bundle.

    Attributes:
        checkpoint: Lightning .ckpt, .pt, or jetvla .safetensors.
        out: bundle directory; by default the checkpoint's name with .bundle, in the current folder.
        precision: fp32, or fp16 (fp16 weights and GEMMs, fp32 islands, and fp32 for operations whose values leave fp16's range); auto is
            fp16 if engines are built, else fp32.
        promote: in an fp16 build, give fp32 to stages for which that costs next to nothing (16 MB) if fp16 shows in the actions.
        base: Kosmos-2 directory (config.json, tokenizer.json, weights if the checkpoint lacks them).
        config: RoboVLMs training JSON; by default the one in the checkpoint, else beside it.
        packing: how training laid out a row; must be stated for policies of the 2-DoF fork.
        infer_from: H5 episode of the training set: find packing, x_attn_causal and the prompt's text, where not stated, by which of them
            predicts it.
        x_attn_causal: the resampler was trained causal (transformers 4.52 to 5.0, sdpa).
        instruction: tokenised into the manifest; also decides the sequence buckets. Repeatable.
        max_prompt_tokens: longest prompt that any later instruction may have, special tokens included.
        prompt_template: text around an instruction, with {instruction} in it (without: a policy that was trained without words); by default
            what the checkpoint records, else what the lab's code does with the config.
        pad_prompt_to: pad every prompt to this many tokens, 0 for its own length; by default as above. It changes the result.
        tokenizer: tokenizer.json, if it is not in the base directory.
        resize: filter of the training data; auto is what the checkpoint records, else that of the loader that its config names (bilinear
            for the fork's and the lab's HDF5 loaders, letterbox if they were told so, bicubic for upstream's).
        pixel_norm: clip subtracts CLIP's mean and divides by its std; none was the fork's loader before February 2026. auto is what the
            checkpoint records, else clip.
        action_range: physical values of -1 and +1, if not those of the config (norm_min, norm_max).
        action_names: columns of the action, if neither recorded nor the usual ones of the head.
        classes: a class head's classes in order: names out of Stop F B L R FL FR BL BR TurnL TurnR, or NAME=vx,vy[,wz] in m/s and rad/s.
        class_speed: linear speed of classes without numbers, in m/s, if not the one that the checkpoint records, else 1.15.
        verify_frames: frames to compare per stream; 0 means window + 4, and window + 2 after the reset.
        verify_episode: H5 episode to take frames from; by default random pictures.
        backend: what verification runs; the runtime chooses its own when it starts.
        force: rebuild everything, reuse nothing.
        dry_run: print the plan and stop.
        engines: TensorRT engines to build from the graphs.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    out: Path | None = None
    precision: FloatPrecision | Literal["auto"] = "auto"
    promote: bool = True
    base: Path | None = None
    config: Path | None = None
    packing: Packing | Literal["auto"] = "auto"
    x_attn_causal: bool | None = None
    infer_from: Path | None = None
    instruction: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    max_prompt_tokens: int = 64
    prompt_template: str | None = None
    pad_prompt_to: int | None = None
    tokenizer: Path | None = None
    resize: Literal["bicubic", "bilinear", "letterbox", "auto"] = "auto"
    pixel_norm: Literal["clip", "none", "auto"] = "auto"
    action_range: tuple[float, float] | None = None
    action_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    class_speed: float | None = None
    verify_frames: int = 0
    verify_episode: Path | None = None
    backend: str = "ort:cpu"
    force: bool = False
    dry_run: bool = False
    engines: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        # Scripts pass plain strings; the annotations promise paths.
        for name in ("checkpoint", "out", "base", "config", "tokenizer", "infer_from", "verify_episode"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                flag = name.replace("_", "-")
                raise ConfigError(f"unknown {name}", got=repr(value), expected=", ".join(known), hint=f"see --{flag}.")
        object.__setattr__(self, "instruction", tuple(text.strip() for text in self.instruction))
        if self.pad_prompt_to is not None and not (self.pad_prompt_to == 0 or 2 <= self.pad_prompt_to <= _MAX_PROMPT):
            raise ConfigError(
                "pad_prompt_to is not usable",
                got=self.pad_prompt_to,
                expected=f"0, or 2 to {_MAX_PROMPT} tokens",
                hint="the lab's NavDataset pads to 256.",
            )
        if not 2 <= self.max_prompt_tokens <= _MAX_PROMPT:
            size = "small" if self.max_prompt_tokens < 2 else "large"
            raise ConfigError(
                f"max_prompt_tokens is too {size}",
                got=self.max_prompt_tokens,
                expected=f"at least 2, at most {_MAX_PROMPT}",
                hint="64 is the default.",
            )
        numbers = (*(self.action_range or ()), *(() if self.class_speed is None else (self.class_speed,)))
        if not all(math.isfinite(number) for number in numbers):
            raise ConfigError(
                "action_range or class_speed is not finite",
                got=", ".join(map(str, numbers)),
                expected="finite numbers",
                hint="for example --action-range -1.15 1.15",
            )

        if self.verify_frames < 0:
            raise ConfigError(
                "verify_frames is negative",
                got=self.verify_frames,
                expected="0, or a number of frames",
                hint="0 takes a little more than a window.",
            )

    @property
    def graph_precision(self) -> FloatPrecision:
        """`precision`, decided: fp16 is what engines are for, and slow on a CPU."""
        if self.precision == "auto":
            return "fp16" if will_build(self.engines) else "fp32"
        return self.precision

    @property
    def target(self) -> Path:
        """Where the bundle goes: by default a folder called after the checkpoint, and after its run if that is ours, whose checkpoints
        have the same names in every run."""
        if self.out is not None:
            return self.out
        run = self.checkpoint.absolute().parent.parent
        ours = self.checkpoint.absolute().parent.name == "checkpoints" and (run / "run.json").is_file()
        return Path(f"{run.name}-{self.checkpoint.stem}.bundle" if ours else f"{self.checkpoint.stem}.bundle")


@dataclass(frozen=True)
class EnginesConfig:
    """Build the engines of a bundle, on the machine that will run them.

    Attributes:
        engines_only: the bundle.
        engines: which ones.
        precision: engines of the bundle's INT8 variant, or of what it was exported in; auto is INT8 if the bundle has a variant that may
            run without being named.
        force: build also what is there.
        dry_run: print the plan and stop.
    """

    engines_only: Annotated[Path, tyro.conf.arg(metavar="BUNDLE")]
    engines: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)
    precision: EnginePrecision = "auto"
    force: bool = False
    dry_run: bool = False

    @property
    def options(self) -> EngineOptions:
        """`engines` with the precision that was asked for."""
        return self.engines if self.precision == "auto" else replace(self.engines, precision=self.precision)

    @property
    def bundle(self) -> Path:
        return Path(self.engines_only)


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that a build read or looked for, as it was then; an absent one has -1 bytes."""

    path: str
    target: str
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Input:
        """The file's present state; `target` is what its path leads to through links."""
        try:
            status = path.stat()
        except OSError:
            return cls(str(path.absolute()), "", -1, -1)
        return cls(str(path.absolute()), str(path.resolve()), status.st_size, status.st_mtime_ns)


class BuildReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """reports/build.json: how a bundle came to be."""

    request: str
    inputs: tuple[Input, ...]
    reused_stages: tuple[str, ...]
    seconds: dict[str, float]
    peak_rss_mb: int
    versions: dict[str, str]


def code_sha256(files: Iterable[str] | None = None) -> str:
    """Hash of jetvla's own sources (`files` relative to the root; by default all that a build runs)."""
    chosen = (
        sorted(files)
        if files is not None
        else sorted(str(path.relative_to(_ROOT)) for folder in _CODE for path in (_ROOT / folder).rglob("*.py"))
    )
    digest = hashlib.sha256()
    for name in chosen:
        digest.update(name.encode() + b"\0" + (_ROOT / name).read_bytes())
    return digest.hexdigest()


def request_sha256(config: BuildConfig) -> str:
    """Hash of everything that decides a bundle except the contents of its input files."""
    options = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in vars(config).items()
        if name not in ("out", "force", "dry_run", "engines")
    } | {"precision": config.graph_precision}
    return hashlib.sha256(msgspec.json.encode([options, code_sha256(), library_versions()], order="sorted")).hexdigest()


def library_versions() -> dict[str, str]:
    """Installed versions of what a build computes with."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def is_up_to_date(config: BuildConfig) -> bool:
    """True if the target was built by this very request from unchanged inputs, and none of its files changed size."""
    target = config.target
    try:
        report = msgspec.json.decode((target / BUILD_REPORT).read_bytes(), type=BuildReport)
        manifest = Manifest.load(target)
        same_inputs = all(Input.of(Path(known.path)) == known for known in report.inputs)
        intact = all((target / name).stat().st_size == record.bytes for name, record in manifest.files.items())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, BundleError):
        return False
    return same_inputs and intact and report.request == request_sha256(config)
