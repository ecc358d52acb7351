"""The manifest: everything that export promises and the runtime relies on, in one strict JSON file.

Nothing here is optional in spirit: the facts that no checkpoint records (packing, cross-attention masking, resize filter,
action scaling) stand beside the facts that it does, because a robot that assumes one of them wrongly still drives - badly.
Strict means: an unknown, missing or mistyped field is an error that names its path; a newer schema is refused; every file is
hashed, the manifest itself included. Knows nothing about torch, ONNX or engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from bundle.atomic import write_bytes
from bundle.errors import BundleError, BundleVersionError
from bundle.hashing import sha256_file
from bundle.reading_limits import read_bytes

SCHEMA = 2
MANIFEST_NAME = "manifest.json"

_STAGES = ("vision", "language", "action_head")

Packing = Literal["upstream", "fork_overwrite"]
FloatPrecision = Literal["fp32", "fp16"]
Precision = Literal["fp32", "fp16", "int8"]
Form = Literal["portable", "ort-cpu", "openvino"]
HeadKind = Literal["actions_gripper", "velocities", "classes"]
Verdict = Literal["PASS", "WARN", "FAIL"]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all manifest parts: immutable, keyword-only, no unknown fields."""


class Source(_Strict, frozen=True):
    """Where the weights came from. Hashes are sha256 hex digests; `base_sha256` is over tensors, not files.

    `base_tensors` counts what the checkpoint lacked and the base directory gave.
    """

    checkpoint: str
    checkpoint_format: str
    checkpoint_sha256: str
    checkpoint_bytes: int
    weights_sha256: str
    base_sha256: str | None
    base_tensors: int
    lora_modules: int
    ignored_keys: tuple[str, ...]


class Dimensions(_Strict, frozen=True):
    """Sizes of the policy. `image_tokens` is per camera; `feature` is latent * embed_dim."""

    image_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    embed_dim: int
    text_layers: int
    text_heads: int
    vocab_size: int
    image_tokens: int
    latent: int
    window: int
    chunk: int
    lstm_layers: int
    lstm_hidden: int

    @property
    def feature(self) -> int:
        return self.latent * self.embed_dim


class Instruction(_Strict, frozen=True):
    """An instruction tokenised at build time, with the tokenizer's special tokens; works without a tokenizer."""

    text: str
    token_ids: tuple[int, ...]


class Prompt(_Strict, frozen=True, omit_defaults=True):
    """How an instruction becomes decoder input.

    `embed_scale` multiplies rows of token_embedding.npy, whose last row is the action token. `buckets` are the sequence lengths
    for which a language graph exists, ascending. `pad_to` reproduces deployments that pad the prompt (it moves the action
    token's position); null means natural length. `template` is the text around an instruction (bundle/prompt_template.py), and
    `template_source` says where it and `pad_to` are from; bundles from before it was recorded have none. `told` says that the head
    hears the instruction beside the feature: the mean of the prompt's embeddings stands in the slot behind the action token.
    """

    packing: Packing
    packing_source: str
    template: str
    pad_id: int
    eos_id: int
    pad_to: int | None
    embed_scale: float
    buckets: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    template_source: str = ""
    told: bool = False


class Preprocessing(_Strict, frozen=True):
    """From a camera frame to the vision stage's uint8 input; mean and std are folded into the stage's weights."""

    color: Literal["RGB"]
    resize: Literal["bicubic", "bilinear", "letterbox"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cameras: tuple[str, ...]

    @property
    def how(self) -> str:
        """In words: what becomes of the shape, and by which filter."""
        return "letterbox" if self.resize == "letterbox" else f"{self.resize} squash"


class Action(_Strict, frozen=True, omit_defaults=True):
    """What the head's numbers mean.

    `names` and `units` describe `ActionChunk.values`. Values are 0.5 (x + 1) (maximum - minimum) + minimum when `normalized`,
    after undoing mu-law companding where `mu` is set. For `classes` heads, `class_values` maps a class to its command,
    and `classes_source` says where their order is from; bundles from before it was recorded have none.
    """

    head: HeadKind
    names: tuple[str, ...]
    units: tuple[str, ...]
    normalized: bool
    minimum: float
    maximum: float
    mu: float | None
    class_names: tuple[str, ...]
    class_values: tuple[tuple[float, ...], ...]
    classes_source: str = ""


class Tensor(_Strict, frozen=True):
    """One input or output of a graph; `shape` is static."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Graph(_Strict, frozen=True):
    """One ONNX file of a stage. `sequence` is the bucket it was built for (language stage only).

    `form` says who runs it best: `portable` is plain ONNX for everybody; `ort-cpu` and `openvino` have the same integers written in the way
    that those two execute fast (calib/rewrite.py says what and why).
    """

    file: str
    form: Form
    sequence: int | None
    nodes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Stage(_Strict, frozen=True):
    """A separately cached part of the policy; its graphs share one external weight file.

    `key` names its content. `precision` may be finer than the bundle's: the action head stays fp32, and so does a stage for
    which fp32 costs nothing and fp16 showed in the actions.
    """

    key: str
    precision: Precision
    weights: str
    weight_bytes: int
    graphs: tuple[Graph, ...]


class File(_Strict, frozen=True):
    """Integrity record of one file of the bundle."""

    sha256: str
    bytes: int


class Parity(_Strict, frozen=True):
    """Summary of reports/parity.json: the engine against the reference policy (torch, adapter form, fp32)."""

    verdict: Verdict
    backend: str
    frames: int
    feature_cosine: float
    feature_max_error: float
    action_max_error: float


class Measured(_Strict, frozen=True):
    """How long a step took on the machine that quantized the bundle: median of one run in which all took turns."""

    backend: str
    precision: Precision
    step_ms: float


class Quantized(_Strict, frozen=True):
    """The INT8 variant of a bundle, made by calib/quantize.py.

    Attributes:
        stages: those with INT8 parts; the others are the bundle's own.
        calibration_sha256: id of the calibration frames (pixels and instructions).
        calibration_frames: how many.
        random: calibrated on made-up pictures; its accuracy means nothing, and it is run only when it is named.
        method: how ranges were chosen and how far activations were smoothed.
        assignment: precision of every block that could be INT8.
        budget, action_error, frames: largest action error allowed and found on held-out frames, in the head's units.
        verdict: of the acceptance; a FAIL is not published.
        golden_cosine, golden_error: what the golden step gives, so that a backend is held to what INT8 explains.
        machine: CPU (or GPU) of the measurement.
        measured: the fastest first.
    """

    stages: dict[str, Stage]
    calibration_sha256: str
    calibration_frames: int
    random: bool
    method: str
    assignment: dict[str, Precision]
    budget: float
    action_error: float
    frames: int
    verdict: Verdict
    golden_cosine: float
    golden_error: float
    machine: str
    measured: tuple[Measured, ...]

    @property
    def trusted(self) -> bool:
        """May be run without being named."""
        return self.verdict != "FAIL" and not self.random


class Manifest(_Strict, frozen=True):
    """The contract of one bundle. Read with `Manifest.load`, check the files with `verify`.

    `precision` and `stages` are those of the floating-point policy; `int8` gives the view of the quantized one. `fps` is the cadence of the
    training frames, null where the checkpoint does not tell.
    """

    schema: int
    jetvla: str
    precision: Precision
    source: Source
    dimensions: Dimensions
    x_attn_causal: bool
    x_attn_causal_source: str
    prompt: Prompt
    preprocessing: Preprocessing
    fps: float | None
    action: Action
    stages: dict[str, Stage]
    quantized: Quantized | None
    files: dict[str, File]
    parity: Parity
    manifest_sha256: str = ""

    @classmethod
    def load(cls, bundle: str | Path) -> Manifest:
        """Read and validate BUNDLE/manifest.json (not the other files: see `verify`).

        Raises:
            BundleError: no manifest, not JSON, a field unknown, missing or mistyped, or altered after the build.
            BundleVersionError: written by another schema.
        """
        path = _manifest_path(bundle)
        try:
            raw = read_bytes(path)
        except OSError:
            raise BundleError(
                f"{path.parent} is not a bundle",
                got=f"{'unreadable' if path.exists() else 'no'} {MANIFEST_NAME}",
                expected="a directory made by export/build_engines.py",
                hint="python export/build_engines.py CKPT --out BUNDLE makes one; an interrupted build leaves none.",
            ) from None
        return cls.decode(raw, origin=str(path))

    @classmethod
    def decode(cls, raw: bytes, *, origin: str = MANIFEST_NAME) -> Manifest:
        """Validate the bytes of a manifest; `origin` stands in error messages."""
        rebuild = "rebuild the bundle with export/build_engines.py, or copy it again."
        try:
            head: Any = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{origin} is not JSON", got=error, hint=rebuild) from None
        found = head.get("schema") if isinstance(head, dict) else None
        if not isinstance(found, int) or found != SCHEMA:
            newer = isinstance(found, int) and found > SCHEMA
            raise BundleVersionError(
                f"{origin} has another schema version",
                got=found,
                expected=SCHEMA,
                hint="update jetvla on this machine to the version that built the bundle." if newer else rebuild,
            )
        try:
            manifest = msgspec.json.decode(raw, type=cls)
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            raise BundleError(f"{origin} does not fit schema {SCHEMA}", got=error, hint=rebuild) from None
        digest = manifest.digest()
        if digest != manifest.manifest_sha256:
            raise BundleError(
                f"{origin} was changed after the build",
                got=digest,
                expected=manifest.manifest_sha256,
                hint=f"manifests are not edited by hand; {rebuild}",
            )
        return manifest

    def _check_names(self, origin: Path) -> None:
        """Every part of a policy must be there; every file that a stage names must have an integrity record, and lie inside the bundle."""
        self._check_int8(origin)
        named = self.all_stage_files() | {"golden.npz", "token_embedding.npy"}
        missing = sorted(set(_STAGES) - set(self.stages))
        if not missing:
            built = {graph.sequence for graph in self.stages["language"].graphs}
            missing = [f"language graph of bucket {bucket}" for bucket in self.prompt.buckets if bucket not in built]
        if missing:
            raise BundleError(
                f"{origin} lacks parts of a policy",
                got=f"no {', '.join(missing)}",
                expected="vision, action_head, and language for every bucket",
                hint="rebuild the bundle with export/build_engines.py.",
            )
        unrecorded = sorted(named - set(self.files))
        outside = sorted(
            name for name in self.files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        )
        if unrecorded or outside:
            raise BundleError(
                f"{origin} names files that it does not vouch for",
                got=", ".join(unrecorded + outside),
                expected="files inside the bundle, each with its hash",
                hint="rebuild the bundle with export/build_engines.py.",
            )

    def _check_int8(self, origin: Path) -> None:
        """Whatever view `int8` gives must have all its graphs, and the manifest itself must not be such a view."""
        wrong: list[str] = []
        if self.precision == "int8":
            wrong.append("precision int8 of the bundle itself")
        for name, stage in (self.quantized.stages if self.quantized is not None else {}).items():
            if name not in _STAGES:
                wrong.append(f"an INT8 stage {name!r}")
                continue
            sequences = self.prompt.buckets if name == "language" else (None,)
            for form in ("portable", *sorted({graph.form for graph in stage.graphs} - {"portable"})):
                built = {graph.sequence for graph in stage.graphs if graph.form == form}
                wrong += [
                    f"no {form} INT8 graph of {name}" + (f", bucket {sequence}" if sequence is not None else "")
                    for sequence in sequences
                    if sequence not in built
                ]
        if wrong:
            raise BundleError(
                f"{origin} has an INT8 variant that cannot be run",
                got="; ".join(wrong),
                expected=f"a bundle in floating point; INT8 graphs of {', '.join(_STAGES)}, for every bucket",
                hint="rebuild the bundle with export/build_engines.py, then quantize it with calib/quantize.py.",
            )

    def digest(self) -> str:
        """sha256 of the canonical encoding of everything but `manifest_sha256`."""
        bare = msgspec.structs.replace(self, manifest_sha256="")
        return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()

    def encode(self) -> bytes:
        """Pretty JSON with the digest filled in."""
        signed = msgspec.structs.replace(self, manifest_sha256=self.digest())
        return msgspec.json.format(msgspec.json.encode(signed), indent=2) + b"\n"

    def save(self, bundle: str | Path) -> Path:
        """Write BUNDLE/manifest.json atomically."""
        path = Path(bundle) / MANIFEST_NAME
        write_bytes(path, self.encode())
        return path

    def int8(self, form: Form = "portable") -> Manifest:
        """The INT8 policy as a manifest of its own: its stages in place of the floating-point ones, in one form.

        Stages without graphs of that form keep their portable ones. Not for saving: the digest stays that of the bundle.

        Raises:
            BundleError: the bundle has no INT8 variant.
        """
        if self.quantized is None:
            raise BundleError(
                "the bundle has no INT8 variant",
                got=f"its {self.precision} stages alone",
                expected="one made by calib/quantize.py",
                hint="python calib/quantize.py BUNDLE EPISODES makes one, or leave --precision int8 out.",
            )
        stages = dict(self.stages)
        for name, stage in self.quantized.stages.items():
            graphs = tuple(graph for graph in stage.graphs if graph.form == form)
            portable = tuple(graph for graph in stage.graphs if graph.form == "portable")
            stages[name] = msgspec.structs.replace(stage, graphs=graphs or portable)
        return msgspec.structs.replace(self, precision="int8", stages=stages)

    def stage_files(self) -> frozenset[str]:
        """Names of all graphs and weights of `stages`: what ONNX Runtime reads, and engines were made of."""
        return _names_of(self.stages)

    def all_stage_files(self) -> frozenset[str]:
        """The same, with those of the INT8 variant."""
        return self.stage_files() | (_names_of(self.quantized.stages) if self.quantized is not None else frozenset())

    def verify(self, bundle: str | Path, *, without: Collection[str] = (), only: Collection[str] | None = None) -> None:
        """Hash every file of the bundle and compare (sha256, about 1.5 GB/s a core; files in parallel).

        Args:
            without: names of files of which only the size is checked.
            only: names of files to look at; by default all.

        Raises:
            BundleError: a file is missing, has another size, or other bytes; the message names the first.
        """
        root = _manifest_path(bundle).parent
        self.verify_sizes(root, only=only)
        names = self.files.keys() if only is None else set(only)
        # The largest first, so that the pool does not end with one long file on one core.
        order = sorted(names - set(without), key=lambda name: -self.files[name].bytes)
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(order, pool.map(lambda name: sha256_file(root / name), order), strict=True))
        for name in sorted(digests):
            if digests[name] != self.files[name].sha256:
                raise BundleError(
                    f"{root / name} is corrupt",
                    got=digests[name],
                    expected=self.files[name].sha256,
                    hint="copy the bundle again, or rebuild it: export/build_engines.py CKPT --out BUNDLE --force",
                )

    def verify_sizes(self, bundle: str | Path, *, only: Collection[str] | None = None) -> None:
        """The cheap part of `verify`: every file, or each of `only`, is there and as long as it was.

        Raises:
            BundleError: a file is missing, has another size, lies elsewhere, or has no record.
        """
        self._check_names(_manifest_path(bundle))
        for name, record in self.files.items():
            if only is None or name in only:
                _check_size(_manifest_path(bundle).parent, name, record)

    def graph(self, stage: str, sequence: int | None = None) -> Graph:
        """The graph of a stage; of the language stage, the one built for bucket `sequence`."""
        return next(graph for graph in self.stages[stage].graphs if graph.sequence == sequence)


def _names_of(stages: dict[str, Stage]) -> frozenset[str]:
    graphs = (graph.file for stage in stages.values() for graph in stage.graphs)
    return frozenset([*graphs, *(stage.weights for stage in stages.values())])


def _check_size(root: Path, name: str, record: File) -> None:
    path = root / name
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise BundleError(
            f"{path} is missing", expected=f"{record.bytes} bytes", hint="copy the whole bundle directory again."
        )
    if size != record.bytes:
        raise BundleError(
            f"{path} is truncated or replaced",
            got=f"{size} bytes",
            expected=f"{record.bytes} bytes",
            hint="copy the bundle again, or rebuild it: export/build_engines.py CKPT --out BUNDLE --force",
        )


def _manifest_path(bundle: str | Path) -> Path:
    path = Path(bundle)
    return path if path.name == MANIFEST_NAME else path / MANIFEST_NAME
