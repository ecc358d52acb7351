"""Where a run stands, in one file: enough to go on exactly as if it had never stopped, after any kill.

Order, augmentation and dropout are functions of (seed, epoch, step), so no generator's state is stored: weights that train, the
optimizer, the loss scaler, and counters are all there is. Written atomically and read back without unpickling code.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bundle.errors import CheckpointError
from train.ledger_record import read_run
from train.run_checkpoints import save_torch

STATE_NAME = "state.pt"
_FORMAT = "jetvla-run-state/1"


@dataclass
class RunState:
    """Where a run stands; changed in place by the trainer.

    Attributes:
        epoch: the running one, from 0.
        done: optimizer steps done in it.
        step: optimizer steps done in all.
        seconds: spent in the running epoch, over all processes that worked on it.
        loss_sum: sum over the epoch's steps of the training loss.
        best: (validation loss, checkpoint name) of the kept ones, best first.
        stale: validations since the best one.
        finished: no step is left to do.
    """

    epoch: int = 0
    done: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    best: list[tuple[float, str]] = field(default_factory=list)
    stale: int = 0
    finished: bool = False


def save_state(
    path: Path, state: RunState, *, trained: dict[str, Tensor], optimizer: dict[str, Any], scaler: dict[str, Any] | None
) -> None:
    """Write everything atomically.

    Args:
        trained: parameters that train, by canonical name.

    Raises:
        StorageError: the disk is full.
    """
    weights = {name: tensor.cpu() for name, tensor in trained.items()}
    records = {"format": _FORMAT, "state": asdict(state), "trained": weights, "optimizer": optimizer, "scaler": scaler}
    save_torch(path, records)


def resumed_state(folder: Path) -> tuple[RunState, dict[str, Any] | None]:
    """Where the run in a folder goes on: its state, or the beginning (and None) where it died before it could save one.

    Raises:
        CheckpointError: the state is missing although the run had saved one, or as load_state.
        ConfigError: there is no run.
    """
    record = read_run(folder)
    begun = bool(record.checkpoints) or any(epoch.step > 0 for epoch in record.epochs)
    if not begun and not (folder / STATE_NAME).exists():
        return RunState(), None
    return load_state(folder / STATE_NAME)


def load_state(path: Path) -> tuple[RunState, dict[str, Any]]:
    """The state, and the rest of the file (trained, optimizer, scaler).

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    try:
        records = torch.load(path, map_location="cpu", weights_only=True)
        if records["format"] != _FORMAT:
            raise ValueError(records["format"])
        names = {item.name for item in fields(RunState)}
        if set(records["state"]) != names:
            raise ValueError(sorted(records["state"]))
        state = RunState(**records["state"])
        state.best = [(float(loss), str(name)) for loss, name in state.best]
        return state, records
    except FileNotFoundError:
        raise CheckpointError(
            f"there is nothing to resume: no {path}",
            expected="the state file of a run that has begun",
            hint="without its state a run cannot go on: put the file back, or start a new run under another name.",
        ) from None
    except (
        OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, struct.error,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is damaged, or was written by another version",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected=_FORMAT,
            hint="the checkpoints of the run are intact, but it cannot go on: start a new run under another name.",
        ) from None
