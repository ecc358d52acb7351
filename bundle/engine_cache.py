"""The engines of a bundle: what lies under engines/, for which machine it was built, and whether it may be loaded.

    BUNDLE/engines/<fingerprint>/<stage>[.s<length>].<key>.engine    what TensorRT serialized
    BUNDLE/engines/<fingerprint>/<stage>[.s<length>].<key>.json      its record: content, machine, settings, hash
    BUNDLE/engines/<fingerprint>/timing.cache                        what TensorRT measured
    BUNDLE/engines/<fingerprint>/parity.json, parity.int8.json       what the engines were proved with

Engines are not in the manifest, because they are made later and elsewhere: on the robot. So each carries its record, written after it;
an engine without one is the leftover of a killed build. A record says which graph and weights the engine was made of (`content`), so
that an engine of another checkpoint is never taken for this one's. Loading an engine runs its code: a record proves that it is complete and
unchanged, not who made it. Knows nothing about TensorRT.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from bundle.atomic import disk_errors, link_or_copy, publish_file, write_bytes
from bundle.errors import EngineError
from bundle.hashing import sha256_file
from bundle.manifest import Graph, Manifest, Tensor

ENGINES = "engines"
TIMING_CACHE = "timing.cache"
ENGINE_PARITY = "parity.json"
ENGINE_PARITY_INT8 = "parity.int8.json"
_CACHES = (TIMING_CACHE, ENGINE_PARITY, ENGINE_PARITY_INT8)
# What may lie beside an engine, by suffix: its record, its layers after fusion (for people), kernels compiled when it was loaded.
_COMPANIONS = (".json", ".layers", ".jit")
_RECORD_SCHEMA = 1
# Enough of a sha256 for a file name; the record has all of it.
_KEY_LETTERS = 16
_FINGERPRINT = re.compile(r"[a-z0-9][a-z0-9.+-]{0,119}")

# As fingerprints were before the number of multiprocessors told Orins apart.
_OUTDATED = re.compile(r".+-sm\d+-trt.+")

Origin = Literal["built", "refitted"]


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the builder was told; part of an engine's key.

    `code` is the hash of the sources that decide how an engine is built; `graph` that of the graph's file, which holds operations and types
    but no weights: only engines of the same graph can take each other's weights.
    """

    optimization_level: int
    refit: bool
    code: str
    graph: str


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine: what it is, what it was made of, for which machine, and how it can be recognised.

    `layers` counts the parsed network's, before TensorRT fuses them. `inputs` and `outputs` are as in the parsed network. `built_at` is
    ISO 8601 in UTC.
    """

    schema: int
    stage: str
    sequence: int | None
    content: str
    key: str
    fingerprint: str
    settings: EngineSettings
    origin: Origin
    sha256: str
    bytes: int
    layers: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    seconds: float
    built_at: str

    @property
    def label(self) -> str:
        """For people: `language.s88`."""
        return engine_label(self.stage, self.sequence)

    @property
    def file(self) -> str:
        """Path of the engine inside the bundle."""
        return f"{ENGINES}/{self.fingerprint}/{self.label}.{self.key[:_KEY_LETTERS]}.engine"


@dataclass(frozen=True)
class Found:
    """Something under engines/, usable or not.

    Attributes:
        path: the engine, or the stray file.
        bytes: its size.
        record: None if there is none, or none that can be read.
        state: `current`, `stale` (of other graphs or weights than the bundle's), or `broken`.
        reason: why it is not current.
    """

    path: Path
    bytes: int
    record: EngineRecord | None
    state: Literal["current", "stale", "broken"]
    reason: str = ""


def engine_label(stage: str, sequence: int | None) -> str:
    """`vision`, or `language.s88` for a graph of one sequence length."""
    return stage if sequence is None else f"{stage}.s{sequence}"


def content_key(manifest: Manifest, stage: str, graph: Graph) -> str:
    """Hash of what an engine is made of: graph, weights, precision."""
    entry = manifest.stages[stage]
    parts = [
        stage,
        entry.precision,
        graph.sequence,
        manifest.files[graph.file].sha256,
        manifest.files[entry.weights].sha256,
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def engine_key(content: str, fingerprint: str, settings: EngineSettings) -> str:
    """Hash of everything that decides an engine: content, machine and TensorRT, settings."""
    return hashlib.sha256(msgspec.json.encode([content, fingerprint, settings], order="sorted")).hexdigest()


def graphs(manifest: Manifest) -> Iterator[tuple[str, Graph]]:
    """All graphs of a bundle, or of its INT8 view, each one engine: (stage, graph)."""
    for stage in ("vision", "language", "action_head"):
        for graph in manifest.stages[stage].graphs:
            yield stage, graph


def fingerprint_folder(bundle: Path, fingerprint: str) -> Path:
    """Where the engines of one machine lie.

    Raises:
        EngineError: the fingerprint is not a name that jetvla makes.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise EngineError(
            "an engine fingerprint is not one",
            got=repr(fingerprint),
            expected="small letters, digits, dot, plus and hyphen, e.g. orin-sm87x8-trt10.3.0-cuda12",
            hint="list the engines with export/engines.py list BUNDLE.",
        )
    return bundle / ENGINES / fingerprint


def parity_file(bundle: Path, manifest: Manifest, fingerprint: str) -> Path:
    """What the engines of a bundle, or of its INT8 view, were proved with on that machine."""
    name = ENGINE_PARITY_INT8 if manifest.precision == "int8" else ENGINE_PARITY
    return fingerprint_folder(bundle, fingerprint) / name


def find(bundle: Path, fingerprint: str, key: str, stage: str, sequence: int | None) -> EngineRecord | None:
    """The record of the engine with exactly this key, if both are there and the engine is as long as it was."""
    name = f"{engine_label(stage, sequence)}.{key[:_KEY_LETTERS]}.json"
    record = _read(fingerprint_folder(bundle, fingerprint) / name)
    if record is None or record.key != key or record.fingerprint != fingerprint:
        return None
    return record if _size(bundle / record.file) == record.bytes else None


def newest(bundle: Path, manifest: Manifest, fingerprint: str) -> dict[tuple[str, int | None], EngineRecord]:
    """Per (stage, sequence) the newest engine of this machine that is made of the bundle's own graphs, whatever its settings."""
    wanted = {(stage, graph.sequence): content_key(manifest, stage, graph) for stage, graph in graphs(manifest)}
    best: dict[tuple[str, int | None], EngineRecord] = {}
    for path in sorted(fingerprint_folder(bundle, fingerprint).glob("*.json")):
        record = _read(path)
        if record is None or record.fingerprint != fingerprint or _size(bundle / record.file) != record.bytes:
            continue
        place = (record.stage, record.sequence)
        if wanted.get(place) == record.content and (place not in best or record.built_at > best[place].built_at):
            best[place] = record
    return best


def verify(bundle: Path, record: EngineRecord) -> None:
    """Hash an engine.

    Raises:
        EngineError: it is missing or not what its record says.
    """
    path = bundle / record.file
    size = _size(path)
    digest = sha256_file(path) if size == record.bytes else None
    if digest != record.sha256:
        raise EngineError(
            f"{path} is corrupt",
            got="missing" if size is None else f"{size} bytes" if digest is None else f"sha256 {digest}",
            expected=f"{record.bytes} bytes, sha256 {record.sha256}",
            hint="it was not loaded; python export/build_engines.py --engines-only BUNDLE builds it again.",
        )


def publish(bundle: Path, temporary: Path, record: EngineRecord) -> None:
    """Move a finished engine to its place, then write its record: killed in between, the engine is as good as absent.

    Raises:
        StorageError: the disk is full or read-only.
    """
    target = bundle / record.file
    sidecar = target.with_suffix(".json")
    with disk_errors(target):
        # The old record must not vouch for the new engine while its own is not written.
        sidecar.unlink(missing_ok=True)
    publish_file(temporary, target)
    write_bytes(sidecar, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def survey(bundle: Path, manifest: Manifest) -> list[Found]:
    """Everything under engines/ but TensorRT's caches, by name; sizes are checked, hashes are not.

    Args:
        manifest: the bundle's, not a view: engines of both its precisions are of use.
    """
    live = _live(manifest)
    found = []
    for path in sorted((bundle / ENGINES).glob("*/*")):
        if path.name in _CACHES or not path.is_file():
            continue
        if path.suffix == ".engine":
            found.append(_judge(bundle, path, live))
        elif not (path.suffix in _COMPANIONS and path.with_suffix(".engine").is_file()):
            found.append(Found(path, path.stat().st_size, None, "broken", "left over, without an engine"))
    return found


def remove(found: Found) -> int:
    """Delete an engine with its record, or a stray file; returns the bytes freed."""
    with disk_errors(found.path):
        # The record first: an engine without one is not loaded. A stray file has none: `x.txt` beside `x.engine` is not its owner.
        for suffix in _COMPANIONS if found.path.suffix == ".engine" else ():
            found.path.with_suffix(suffix).unlink(missing_ok=True)
        found.path.unlink(missing_ok=True)
    with suppress(OSError):
        if _OUTDATED.fullmatch(found.path.parent.name):
            for name in _CACHES:  # of engines that nothing loads
                (found.path.parent / name).unlink(missing_ok=True)
        found.path.parent.rmdir()  # if it was the last
    return found.bytes


def carry_over(old: Path, new: Path, manifest: Manifest) -> int:
    """Link what the bundle `new` can use of `old`'s engines into it: engines of unchanged stages, refittable ones, timing caches.

    Args:
        manifest: of the new bundle, with its stages and files.

    Returns:
        How many engines.
    """
    live = _live(manifest)
    count = 0
    for path in sorted((old / ENGINES).glob("*/*")):
        if _OUTDATED.fullmatch(path.parent.name):
            continue
        record = _read(path.with_suffix(".json")) if path.suffix == ".engine" else None
        wanted = record is not None and (record.content in live or record.settings.refit)
        if not wanted and path.name != TIMING_CACHE:
            continue
        for source in (path, *(path.with_suffix(suffix) for suffix in _COMPANIONS)) if wanted else (path,):
            if source.exists():
                link_or_copy(source, new / source.relative_to(old))
        count += wanted
    return count


def new_record(**fields: object) -> EngineRecord:
    """A record of the present schema."""
    return msgspec.convert({"schema": _RECORD_SCHEMA, **fields}, EngineRecord)


def _live(manifest: Manifest) -> set[str]:
    """Content keys of all engines that the bundle could use, in floating point and in INT8."""
    views = [manifest] if manifest.quantized is None else [manifest, manifest.int8()]
    return {content_key(view, stage, graph) for view in views for stage, graph in graphs(view)}


def _judge(bundle: Path, path: Path, live: set[str]) -> Found:
    size = path.stat().st_size
    record = _read(path.with_suffix(".json"))
    if record is None:
        return Found(
            path,
            size,
            None,
            "broken",
            "no record: a build was interrupted, or jetvla did not make it, or an older one did",
        )
    if bundle / record.file != path:
        return Found(path, size, record, "broken", "its record is of another engine")
    if record.bytes != size:
        return Found(path, size, record, "broken", f"truncated: {size} of {record.bytes} bytes")
    if record.content not in live:
        return Found(path, size, record, "stale", "made of other graphs or weights than the bundle's")
    if _OUTDATED.fullmatch(record.fingerprint):
        return Found(
            path, size, record, "stale", "of a machine without its number of multiprocessors; nothing loads it any more"
        )
    return Found(path, size, record, "current")


def _read(path: Path) -> EngineRecord | None:
    """A record, or None for anything that is not one of this schema: an engine without a record is simply built again."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    intact = record.key == engine_key(record.content, record.fingerprint, record.settings)
    return record if intact and record.schema == _RECORD_SCHEMA else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
