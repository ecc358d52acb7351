"""What run.json holds, and reading it: strictly, so that nothing that a run did not write passes for its record.

An unknown, missing or mistyped field is an error that names its path, and so is a file that was edited afterwards (its digest). Numbers
that are not finite are stored by name, as JSON has none of them. Writing is train/ledger.py's business. Needs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bundle.errors import ConfigError
from bundle.hashing import sha256_file
from bundle.reading_limits import TEXT_BYTES, read_bytes
from train.git_state import CodeFacts
from train.run_process import ProcessFacts, is_alive

SCHEMA = 1
RUN_NAME = "run.json"

Status = Literal["running", "finished", "stopped", "failed"]
EffectiveStatus = Literal["running", "finished", "stopped", "failed", "died"]
DataKind = Literal["real", "sim", "augmented"]
Part = Literal["train", "val"]
CheckpointKind = Literal["best", "last", "lightning"]
Number = float | Literal["nan", "inf", "-inf"]

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0)]
Time = Annotated[datetime, Meta(tz=True)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts: immutable, keyword-only, no unknown fields."""


class SplitFacts(_Strict, frozen=True):
    """Which episodes were on which side: hash of the split file's names, and the number of episodes."""

    sha256: Sha256
    train: Count
    val: Count


class DataFile(_Strict, frozen=True):
    """An episode file, and the side of the split that it was on."""

    path: str
    sha256: Sha256
    frames: Count
    kind: DataKind
    part: Part


class Mix(_Strict, frozen=True):
    """How much there was of one kind."""

    files: Count
    frames: Count


class BaseFacts(_Strict, frozen=True, omit_defaults=True):
    """What training started from: the directory, and the hash of the weights that were in fact loaded.

    Attributes:
        weights, weights_sha256: the checkpoint that the directory was made of, and the hash of its bytes.
        taken: what of it.
    """

    path: str
    sha256: Sha256
    weights: str | None = None
    weights_sha256: Sha256 | None = None
    taken: str | None = None


class ParameterCounts(_Strict, frozen=True):
    """Numbers of parameters."""

    trainable: Count
    total: Count


class EpochRecord(_Strict, frozen=True):
    """What was measured after `epoch` passes over the training windows and `step` optimizer steps; epoch 0 is the untrained policy.

    `seconds` is what the pass took.
    """

    epoch: Count
    step: Count
    seconds: Number
    metrics: dict[str, Number]

    def value(self, metric: str) -> float | None:
        """A metric as a float (nan and infinities included), or None if it was not measured."""
        stored = self.metrics.get(metric)
        return None if stored is None else float(stored)


class CheckpointRecord(_Strict, frozen=True):
    """A checkpoint file as it was written; `file` is relative to the run's folder. `removed`: the run deleted it itself."""

    file: str
    kind: CheckpointKind
    epoch: Count
    step: Count
    val_loss: Number | None
    bytes: Count
    sha256: Sha256
    removed: bool = False


class ErrorRecord(_Strict, frozen=True):
    """What a failed run died of. `batch` names the data in hand, where that is known."""

    type: str
    message: str
    batch: str | None = None


class ResumeRecord(_Strict, frozen=True):
    """A later sitting. `code` and `machine` are None where they were those of the sitting before."""

    time: Time
    from_step: Count
    code: CodeFacts | None = None
    machine: dict[str, Any] | None = None


class RunRecord(_Strict, frozen=True):
    """One run. Read it with `read_run`; `effective_status` is the status to show."""

    schema: int
    name: str
    status: Status
    started: Time
    ended: Time | None
    process: ProcessFacts
    config: dict[str, Any]
    split: SplitFacts
    data: tuple[DataFile, ...]
    mix: dict[DataKind, Mix]
    base: BaseFacts
    code: CodeFacts
    machine: dict[str, Any]
    parameters: ParameterCounts
    epochs: tuple[EpochRecord, ...] = ()
    checkpoints: tuple[CheckpointRecord, ...] = ()
    resumes: tuple[ResumeRecord, ...] = ()
    stop_reason: str | None = None
    error: ErrorRecord | None = None
    record_sha256: str = ""

    def effective_status(self) -> EffectiveStatus:
        """The status, where "running" without its process is "died". A process that cannot be asked from here counts as running."""
        if self.status == "running" and is_alive(self.process) is False:
            return "died"
        return self.status

    def digest(self) -> str:
        """sha256 of the canonical encoding of everything but `record_sha256`."""
        bare = msgspec.structs.replace(self, record_sha256="")
        return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()

    def signed(self) -> RunRecord:
        """The same with the digest filled in."""
        return msgspec.structs.replace(self, record_sha256=self.digest())

    def encode(self) -> bytes:
        """JSON of `signed`."""
        return msgspec.json.format(msgspec.json.encode(self.signed()), indent=1) + b"\n"


@dataclass(frozen=True)
class Problem:
    """A checkpoint that is not what the ledger says."""

    file: str
    what: Literal["missing", "size", "hash"]
    got: str
    expected: str

    def __str__(self) -> str:
        word = {"missing": "does not exist", "size": "has another size", "hash": "has other bytes"}[self.what]
        return f"{self.file} {word} (got {self.got}, expected {self.expected})"


def read_run(folder_or_file: Path) -> RunRecord:
    """Read and check a run.json, by its own path or its folder's.

    Raises:
        ConfigError: missing, not JSON, of another schema, a field unknown, missing or mistyped, or changed after it was written.
    """
    path = folder_or_file if folder_or_file.name == RUN_NAME else folder_or_file / RUN_NAME
    try:
        raw = read_bytes(path, TEXT_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path.parent} is not a run",
            got=f"no {RUN_NAME}" if not path.exists() else error.strerror,
            expected="a folder that training made",
            hint="name a folder below output.runs; a folder without run.json was not written by this trainer.",
        ) from None
    return _decode(raw, origin=path)


def verify_checkpoints(record: RunRecord, folder: Path) -> list[Problem]:
    """Compare every checkpoint that was not removed with the file on disk: existence, size, sha256 (1-2 GB/s)."""
    found = (_problem(entry, folder / entry.file) for entry in record.checkpoints if not entry.removed)
    return [problem for problem in found if problem is not None]


def stored_number(value: float) -> Number:
    """A number as run.json stores it: what is not finite by its name."""
    number = float(value)
    if math.isnan(number):
        return "nan"
    if math.isinf(number):
        return "inf" if number > 0 else "-inf"
    return number


def stored_value(value: Any) -> Any:
    """Plain data as run.json gives it back: lists for tuples, text for paths, names for numbers that are not finite."""
    if isinstance(value, dict):
        return {stored_text(str(key)): stored_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stored_value(item) for item in value]
    if isinstance(value, float):
        return stored_number(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (str, Path)):
        return stored_text(str(value))
    raise TypeError(f"a {type(value).__name__} cannot be recorded: {value!r}")


def stored_text(text: str) -> str:
    """Text that JSON can hold: a file name that is not UTF-8 keeps its bytes as escapes."""
    return text.encode(errors="backslashreplace").decode()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of plain data by dotted path: `loop.epochs`, `data.sources[0].kind`. Lists that hold no sections are leaves."""
    if isinstance(value, dict) and value:
        sections = {f"{path}.{key}" if path else key: item for key, item in value.items()}
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        sections = {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {key: leaf for name, item in sections.items() for key, leaf in flat(item, name).items()}


def mix_of(data: Sequence[DataFile]) -> dict[DataKind, Mix]:
    """Files and frames of each kind that occurs."""
    kinds = sorted({file.kind for file in data})
    frames = {kind: [file.frames for file in data if file.kind == kind] for kind in kinds}
    return {kind: Mix(files=len(counts), frames=sum(counts)) for kind, counts in frames.items()}


def _problem(entry: CheckpointRecord, path: Path) -> Problem | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return Problem(entry.file, "size", f"{size} bytes", f"{entry.bytes} bytes")
        digest = sha256_file(path)
    except OSError as error:
        return Problem(entry.file, "missing", error.strerror or "no file", f"{entry.bytes} bytes")
    return None if digest == entry.sha256 else Problem(entry.file, "hash", digest[:12], entry.sha256[:12])


def _decode(raw: bytes, *, origin: Path) -> RunRecord:
    hint = "it was damaged or edited; a run's record cannot be mended, only made again."
    try:
        head: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{origin} is not JSON", got=error, hint=hint) from None
    found = head.get("schema") if isinstance(head, dict) else None
    if found != SCHEMA or isinstance(found, bool):
        newer = isinstance(found, int) and found > SCHEMA
        raise ConfigError(
            f"{origin} has another schema version",
            got=found,
            expected=SCHEMA,
            hint="update jetvla to the version that made the run." if newer else hint,
        )
    try:
        record = msgspec.json.decode(raw, type=RunRecord)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin} does not fit schema {SCHEMA}", got=error, hint=hint) from None
    digest = record.digest()
    if digest != record.record_sha256:
        raise ConfigError(
            f"{origin} was changed after it was written", got=digest, expected=record.record_sha256, hint=hint
        )
    outside = [entry.file for entry in record.checkpoints if not _is_inside(entry.file)]
    if outside:
        raise ConfigError(
            f"{origin} names checkpoints outside its folder", got=outside[0], expected="relative paths", hint=hint
        )
    return record


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
