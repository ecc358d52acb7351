"""Runs as training records them, for tests of the ledger and of comparisons: real folders with real (tiny) checkpoint files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.ledger import BaseFacts, DataFile, Ledger, ParameterCounts, SplitFacts
from train.ledger_record import DataKind, Part

CONFIG: dict[str, Any] = {
    "name": "run",
    "base": {"model": "base", "weights": None, "sha256": None},
    "data": {
        "sources": ({"files": ("episodes/*.h5",), "kind": "real", "schema": None, "instruction": None},),
        "actions": ("linear_x", "linear_y"),
        "window": 8,
        "chunk": 10,
        "action_range": (-1.15, 1.15),
        "val_share": 0.2,
        "split_seed": 0,
    },
    "model": {"head": "velocities", "lora": {"targets": "all", "r": 32, "alpha": 16.0}},
    "augment": {"mirror": 0.0, "brightness": 0.0, "hue": 0.0},
    "loss": {"huber_delta": 1.0, "class_weights": "balanced"},
    "optimizer": {"learning_rate": 1e-4},
    "loop": {"epochs": 4, "batch_size": 1, "accumulate": 8, "seed": 0, "workers": 0},
    "output": {"runs": "runs"},
}
MACHINE: dict[str, Any] = {"cpu": "a cpu", "gpus": [], "world_size": 1}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def episode(name: str, part: Part = "train", *, kind: DataKind = "real", content: str | None = None) -> DataFile:
    return DataFile(path=f"episodes/{name}.h5", sha256=digest(content or name), frames=18, kind=kind, part=part)


DATA = (*(episode(f"left_{index}") for index in range(4)), episode("left_4", "val"))


def facts(changes: dict[str, Any] | None = None, **replaced: Any) -> dict[str, Any]:
    """Keyword arguments of Ledger.start; `changes` are settings by dotted path."""
    config = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        section = config
        *outer, last = key.split(".")
        for name in outer:
            section = section[name]
        section[last] = value
    data: Sequence[DataFile] = replaced.pop("data", DATA)
    counts = {part: sum(file.part == part for file in data) for part in ("train", "val")}
    names = json.dumps([[file.path, file.part] for file in data])
    return {
        "name": config["name"],
        "config": config,
        "split": SplitFacts(sha256=digest(names), **counts),
        "data": data,
        "base": BaseFacts(path="base", sha256=digest("base")),
        "parameters": ParameterCounts(trainable=1000, total=5000),
        "machine": MACHINE,
    } | replaced


def write_checkpoint(folder: Path, name: str, content: str) -> Path:
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def make_run(
    folder: Path,
    losses: Sequence[float] = (0.5, 0.2, 0.1, 0.15),
    changes: dict[str, Any] | None = None,
    *,
    untrained: float | None = None,
    end: Callable[[Ledger], None] | None = Ledger.finish,
    extra: Callable[[int, float], dict[str, float]] = lambda epoch, loss: {"val_rmse_linear_x": loss * 2},
    **replaced: Any,
) -> Path:
    """A run that did one epoch of 10 steps per loss, counted from 1; keeps the best checkpoint and the last, as training does.

    Args:
        untrained: the loss before training.
        end: how it ended; None leaves it running.
        extra: further metrics of an epoch.
    """
    ledger = Ledger.start(folder, **facts({"name": folder.name} | (changes or {}), **replaced))
    if untrained is not None:
        ledger.epoch(0, 0, 0.0, {"val_loss": untrained})
    best: tuple[float, Path] | None = None
    for number, loss in enumerate(losses, start=1):
        step = 10 * number
        kinds = {"last.safetensors": "last"}
        if best is None or loss < best[0]:
            kinds[f"epoch={number:03d}-step={step:07d}.safetensors"] = "best"
        for name, kind in kinds.items():
            path = write_checkpoint(folder, name, f"weights after step {step}")
            ledger.checkpoint(path, kind=kind, epoch=number, step=step, val_loss=loss)  # type: ignore[arg-type]
            if kind == "best":
                if best is not None:
                    ledger.removed(best[1])
                    best[1].unlink()
                best = (loss, path)
        ledger.epoch(number, step, 1.5, {"train_loss": loss * 0.9, "val_loss": loss, **extra(number, loss)})
    if end is not None:
        end(ledger)
    return folder
