"""Where a quantization works, beside the bundle: killed at any moment, it goes on where it was.

The folder has every file of the bundle under a second name (hard links), so graphs that are tried find their weights, and the bundle itself
is never touched. What is finished - calibration of a stage, a stage's integers, an evaluated assignment - is written atomically and taken
up by the next run with the same request; a folder of another request is removed.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.atomic import disk_errors, link_or_copy, publish_file, write_bytes
from bundle.errors import StorageError
from bundle.hashing import sha256_file
from bundle.manifest import MANIFEST_NAME, Manifest
from calib.calibrate import StageCalibration
from calib.int8_weights import DataFile, Tensor

T = TypeVar("T")
_JOURNAL = "evaluations.jsonl"


class IntegersRecord(msgspec.Struct, frozen=True):
    """A finished file of integers."""

    sha256: str
    bytes: int
    tensors: dict[str, Tensor]


class Workspace:
    """The working folder of one request.

    Args:
        bundle: folder of the bundle.
        manifest: of its floating-point policy; the files that it names are linked.
        request: hash of everything that decides calibration and evaluations.
    """

    def __init__(self, bundle: Path, manifest: Manifest, request: str) -> None:
        bundle = bundle.resolve()
        self.folder = bundle.parent / f"{_prefix(bundle)}{request[:12]}"
        remove_workspaces(bundle, but=self.folder)
        self.resumed = self.folder.is_dir()
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            for name in (MANIFEST_NAME, *manifest.files):
                target = self.folder / name
                if name.startswith("reports/") or (target.exists() and target.samefile(bundle / name)):
                    continue
                target.unlink(missing_ok=True)  # half a copy, or of the bundle that was there before
                link_or_copy(bundle / name, target)

    def remove(self) -> None:
        """Throw the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load_times(self, backend: str) -> dict[str, float] | None:
        """Milliseconds by stage of everything in INT8, to which the latencies in the journal are relative."""
        return self._decode(f"times.{backend.replace(':', '-')}.json", dict[str, float])

    def save_times(self, backend: str, times: Mapping[str, float]) -> None:
        """Keep them: another measurement on another day is another scale."""
        write_bytes(self.folder / f"times.{backend.replace(':', '-')}.json", msgspec.json.encode(dict(times)))

    def load_fastest(self) -> str | None:
        """The backend that was searched on."""
        return self._decode("fastest.json", str)

    def save_fastest(self, backend: str) -> None:
        """Keep it: on a near tie another measurement would begin another search."""
        write_bytes(self.folder / "fastest.json", msgspec.json.encode(backend))

    def load_calibration(self, stage: str) -> StageCalibration | None:
        """What an earlier run finished."""
        arrays = self._load_arrays(f"calibration.{stage}.npz")
        parts: dict[str, dict[str, NDArray[Any]]] = {"scales": {}, "smoothing": {}, "peaks": {}, "norms": {}}
        try:
            outputs = arrays.pop("outputs")
            for name, value in arrays.items():
                part, _, key = name.partition(":")
                parts[part][key] = value
            scales = {key: float(value) for key, value in parts["scales"].items()}
        except (KeyError, ValueError):
            return None
        norms = {key: str(value) for key, value in parts["norms"].items()}
        return StageCalibration(scales, parts["smoothing"], parts["peaks"], norms, outputs)

    def save_calibration(self, stage: str, found: StageCalibration) -> None:
        """Keep a stage's calibration."""
        arrays: dict[str, NDArray[Any]] = {"outputs": found.outputs}
        for part, values in (
            ("scales", found.scales),
            ("smoothing", found.smoothing),
            ("peaks", found.peaks),
            ("norms", found.norms),
        ):
            arrays |= {f"{part}:{key}": np.asarray(value) for key, value in values.items()}
        self._save_arrays(f"calibration.{stage}.npz", arrays)

    def integers(self, stage: str) -> Path:
        """The file of a stage's integers."""
        return self.folder / f"{stage}.integers.data"

    def load_integers(self, stage: str) -> dict[str, Tensor] | None:
        """The finished and intact integers of an earlier run."""
        record = self._decode(f"{stage}.integers.json", IntegersRecord)
        path = self.integers(stage)
        intact = record is not None and path.is_file() and sha256_file(path) == record.sha256
        return record.tensors if record is not None and intact else None

    def save_integers(self, stage: str, file: DataFile) -> None:
        """Call when the file is complete."""
        record = IntegersRecord(file.sha256, file.bytes, file.tensors)
        write_bytes(self.folder / f"{stage}.integers.json", msgspec.json.encode(record))

    def load_reference(self) -> dict[str, NDArray[np.float32]]:
        """Actions of the floating-point policy, by stretch."""
        return self._load_arrays("reference.npz")

    def save_reference(self, actions: dict[str, NDArray[np.float32]]) -> None:
        """Keep them."""
        self._save_arrays("reference.npz", actions)

    def journal(self, kind: type[T]) -> list[T]:
        """Everything appended so far; a last line cut by a kill is left out."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.folder / _JOURNAL).read_bytes().splitlines():
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    found.append(msgspec.json.decode(line, type=kind))
        return found

    def append(self, entry: msgspec.Struct) -> None:
        """Add an entry to the journal."""
        path = self.folder / _JOURNAL
        try:
            known = path.read_bytes() if path.exists() else b""
            if known and not known.endswith(b"\n"):
                known = known[: known.rfind(b"\n") + 1]
            write_bytes(path, known + msgspec.json.encode(entry) + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}", got=error, hint="free some space; nothing is lost.") from None

    def _load_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """All arrays of a file; none of one that is missing or damaged."""
        try:
            with (self.folder / name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return {}

    def _save_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        target = self.folder / name
        temporary = target.with_name(f".{name}.tmp")
        with disk_errors(target):
            with temporary.open("wb") as file:
                # numpy 1 would store allow_pickle=False as one more array.
                np.savez(file, **arrays)  # type: ignore[arg-type]
            publish_file(temporary, target)

    def _decode(self, name: str, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode((self.folder / name).read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def remove_workspaces(bundle: Path, *, but: Path | None = None) -> None:
    """Remove the working folders of a bundle, except one. The caller holds the bundle's lock."""
    bundle = bundle.resolve()
    for folder in bundle.parent.glob(f"{glob.escape(_prefix(bundle))}*"):
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(bundle: Path) -> str:
    return f".{bundle.name}.quantizing-"


def request_sha256(*parts: object) -> str:
    """Name of a request."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
