"""The ledger of a run: runs/NAME/run.json, rewritten whole after every change, so that a kill at any moment leaves a true record.

Nothing is ever recorded in advance: a checkpoint enters with the hash of the file that lies there, an epoch when it is over. A run whose
process is gone is shown as died by readers, not by itself. One process writes; a second one that takes the run over stops the first at
its next write. What the record holds stands in train/ledger_record.py. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from bundle.atomic import disk_errors, write_bytes
from bundle.errors import ConfigError, JetvlaError, TrainingError
from bundle.hashing import sha256_file
from train.git_state import code_facts
from train.ledger_record import (
    RUN_NAME,
    SCHEMA,
    BaseFacts,
    CheckpointKind,
    CheckpointRecord,
    DataFile,
    EpochRecord,
    ErrorRecord,
    ParameterCounts,
    Problem,
    ResumeRecord,
    RunRecord,
    SplitFacts,
    flat,
    mix_of,
    read_run,
    stored_number,
    stored_text,
    stored_value,
    verify_checkpoints,
)
from train.run_process import is_alive, this_process

__all__ = [
    "BaseFacts",
    "DataFile",
    "Ledger",
    "ParameterCounts",
    "Problem",
    "RunRecord",
    "SplitFacts",
    "read_run",
    "verify_checkpoints",
]

_SHOWN_DIFFERENCES = 10


class Ledger:
    """The writing side; make one with `start` or `resume`, in the first process of a run only.

    Every method that records raises StorageError if the disk refuses, and TrainingError if another process took the run over.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self._path = folder / RUN_NAME
        self._record = record

    @property
    def record(self) -> RunRecord:
        """What was written last."""
        return self._record

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        name: str,
        config: dict[str, Any],
        split: SplitFacts,
        data: Sequence[DataFile],
        base: BaseFacts,
        parameters: ParameterCounts,
        machine: dict[str, Any],
    ) -> Ledger:
        """Begin a run in a folder that holds none; the folder is made if need be.

        Args:
            config: the effective settings, defaults included, as plain data.
            machine: names of CPU and GPUs, world size; plain data.

        Raises:
            ConfigError: there is a run.json already.
            StorageError: the disk refuses.
        """
        if (folder / RUN_NAME).exists():
            raise ConfigError(
                f"{folder} holds a run already",
                expected="a folder without run.json",
                hint="choose another name, or go on with this one with --resume. A run is never overwritten.",
            )
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files = _stored_files(data)
        ledger = cls(
            folder,
            RunRecord(
                schema=SCHEMA,
                name=stored_text(name),
                status="running",
                started=_now(),
                ended=None,
                process=this_process(),
                config=stored_value(config),
                split=split,
                data=files,
                mix=mix_of(files),
                base=_stored_base(base),
                code=code_facts(),
                machine=stored_value(machine),
                parameters=parameters,
            ),
        )
        ledger._write(ledger._record)
        return ledger

    @classmethod
    def resume(
        cls,
        folder: Path,
        *,
        name: str,
        config: dict[str, Any],
        split: SplitFacts,
        data: Sequence[DataFile],
        base: BaseFacts,
        parameters: ParameterCounts,
        machine: dict[str, Any],
        from_step: int,
    ) -> Ledger:
        """Go on with a run that was stopped, failed or died; epochs recorded past `from_step` are taken back, as they will be done again.

        Code and machine may have changed since: that is recorded, and counts when runs are compared.

        Raises:
            ConfigError: no run there, it is finished or still running, or config, split, data, base or parameters are others; the
                message lists the differences.
            StorageError: the disk refuses.
        """
        record = read_run(folder)
        process = this_process()
        check_resumable(record, folder)
        files = _stored_files(data)
        found = [
            *_differences("config", record.config, stored_value(config)),
            *_differences("name", record.name, stored_text(name)),
            *_differences("split", msgspec.to_builtins(record.split), msgspec.to_builtins(split)),
            *_data_differences(record.data, files),
            *_differences("base.sha256", record.base.sha256, base.sha256),
            # Records of before this was recorded do not say.
            *_differences(
                "base.weights_sha256", record.base.weights_sha256 or base.weights_sha256, base.weights_sha256
            ),
            *_differences("parameters", msgspec.to_builtins(record.parameters), msgspec.to_builtins(parameters)),
        ]
        if found:
            more = len(found) - _SHOWN_DIFFERENCES
            raise ConfigError(
                f"{folder} was started with other settings",
                got="; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else ""),
                expected="what the run was started with",
                hint="resume with the config and data of the run, or start a new one under another name.",
            )
        code, here = code_facts(), stored_value(machine)
        sittings = [resume.code for resume in record.resumes if resume.code is not None]
        machines = [resume.machine for resume in record.resumes if resume.machine is not None]
        resume = ResumeRecord(
            time=_now(),
            from_step=from_step,
            code=code if code != [record.code, *sittings][-1] else None,
            machine=here if here != [record.machine, *machines][-1] else None,
        )
        ledger = cls(folder, record)
        ledger._write(
            msgspec.structs.replace(
                record,
                status="running",
                ended=None,
                stop_reason=None,
                error=None,
                process=process,
                epochs=tuple(entry for entry in record.epochs if entry.step <= from_step),
                resumes=(*record.resumes, resume),
            )
        )
        return ledger

    def epoch(self, epoch: int, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Record a finished epoch; the one recorded last may be repeated, as after a kill that came before its state was saved.

        Args:
            epoch: passes done; 0 is the untrained policy.
            step: optimizer steps done in all.
            metrics: any floats, also not finite ones.
        """
        entry = EpochRecord(
            epoch=epoch,
            step=step,
            seconds=stored_number(seconds),
            metrics={name: stored_number(value) for name, value in metrics.items()},
        )
        before = self._record.epochs
        if before and (before[-1].epoch, before[-1].step) == (epoch, step):
            before = before[:-1]
        if before and (before[-1].epoch >= epoch or before[-1].step > step):
            raise ValueError(f"epoch {epoch} at step {step} after epoch {before[-1].epoch} at step {before[-1].step}")
        self._change(epochs=(*before, entry))

    def checkpoint(self, path: Path, *, kind: CheckpointKind, epoch: int, step: int, val_loss: float | None) -> None:
        """Record a checkpoint that was just written, with its size and hash; it replaces an earlier record of the same file.

        Args:
            path: inside the run's folder.
        """
        name = self._relative(path)
        entry = CheckpointRecord(
            file=name,
            kind=kind,
            epoch=epoch,
            step=step,
            val_loss=None if val_loss is None else stored_number(val_loss),
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
        )
        others = (other for other in self._record.checkpoints if other.file != name)
        self._change(checkpoints=(*others, entry))

    def removed(self, path: Path) -> None:
        """Record that a checkpoint is deleted; call it before deleting, so that the record never names a file that is not there."""
        name = self._relative(path)
        if all(entry.file != name for entry in self._record.checkpoints):
            raise ValueError(f"{name} was never recorded")
        self._change(
            checkpoints=tuple(
                msgspec.structs.replace(entry, removed=True) if entry.file == name else entry
                for entry in self._record.checkpoints
            )
        )

    def finish(self) -> None:
        """The run did all it was to do."""
        self._change(status="finished", ended=_now())

    def stop(self, reason: str) -> None:
        """The run was asked to stop early and can be resumed."""
        self._change(status="stopped", ended=_now(), stop_reason=stored_text(reason))

    def fail(self, error: BaseException, *, batch: str | None = None) -> None:
        """The run died of `error`. Never raises a JetvlaError: what is to be told is `error`, and unrecorded it shows as died."""
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        recorded = ErrorRecord(
            type=name, message=stored_text(str(error)), batch=None if batch is None else stored_text(batch)
        )
        with suppress(JetvlaError):
            self._write(msgspec.structs.replace(self._record, status="failed", ended=_now(), error=recorded))

    def _relative(self, path: Path) -> str:
        return stored_text(path.resolve().relative_to(self._path.parent.resolve()).as_posix())

    def _change(self, **changes: Any) -> None:
        if self._record.status != "running":
            raise ValueError(f"the run is {self._record.status}")
        self._write(msgspec.structs.replace(self._record, **changes))

    def _write(self, record: RunRecord) -> None:
        self._check_owner()
        signed = record.signed()
        write_bytes(self._path, signed.encode())
        self._record = signed

    def _check_owner(self) -> None:
        try:
            written = read_run(self._path)
        except ConfigError:
            return  # none yet, or damaged by others: what is written now is whole
        if written.process != self._record.process:
            raise TrainingError(
                f"another process took over {self._path.parent}",
                got=f"process {written.process.pid} on {written.process.host}",
                expected=f"process {self._record.process.pid} on {self._record.process.host}",
                hint="one process writes a run. This one stops here; the other goes on.",
            )


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _stored_files(data: Sequence[DataFile]) -> tuple[DataFile, ...]:
    return tuple(msgspec.structs.replace(file, path=stored_text(file.path)) for file in data)


def _stored_base(base: BaseFacts) -> BaseFacts:
    weights = None if base.weights is None else stored_text(base.weights)
    return msgspec.structs.replace(base, path=stored_text(base.path), weights=weights)


def check_resumable(record: RunRecord, folder: Path) -> None:
    """Refuse to go on with a run that is over, or that another process is at.

    Raises:
        ConfigError: it is.
    """
    if record.status == "finished":
        raise ConfigError(
            f"{folder} is finished",
            got=f"{max((epoch.epoch for epoch in record.epochs), default=0)} epochs, ended {record.ended}",
            expected="a run that was stopped, failed or died",
            hint="start a new run under another name, e.g. with more epochs.",
        )
    # A process may resume what it began itself: nobody else writes then.
    if record.status == "running" and record.process != this_process() and is_alive(record.process):
        raise ConfigError(
            f"{folder} is still running",
            got=f"process {record.process.pid} on {record.process.host}",
            expected="a run that was stopped, failed or died",
            hint=f"wait for it, or stop it: kill {record.process.pid}",
        )


def _differences(path: str, before: Any, now: Any) -> list[str]:
    """Leaves in which two plain values differ, as `path: before -> now`."""
    old, new = flat(before, path), flat(now, path)
    keys = sorted(key for key in old.keys() | new.keys() if key not in old or key not in new or old[key] != new[key])
    shown = [[repr(side[key]) if key in side else "nothing" for side in (old, new)] for key in keys]
    return [f"{key}: {was} -> {is_now}" for key, (was, is_now) in zip(keys, shown, strict=True)]


def _data_differences(before: Sequence[DataFile], now: Sequence[DataFile]) -> list[str]:
    """By name and content: the folder that the episodes lie in may move between sittings."""
    old = {(Path(file.path).name, file.sha256): file for file in before}
    new = {(Path(file.path).name, file.sha256): file for file in now}
    found = [f"data: {name} is gone or has other bytes" for name, digest in old if (name, digest) not in new]
    found += [f"data: {name} is new or has other bytes" for name, digest in new if (name, digest) not in old]
    for key in old.keys() & new.keys():
        facts = [(file.frames, file.kind, file.part) for file in (old[key], new[key])]
        found += _differences(f"data.{key[0]}", *facts)
    return found
