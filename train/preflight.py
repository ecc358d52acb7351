"""What a run is going to be, and everything that speaks against it, before its first step.

`preflight` gathers facts into a Plan - data, steps, memory, disk - and runs all checks of train/preflight_checks.py on it. Errors are
raised together; warnings stay in the plan, which is shown at the start of every run and is all that `--dry-run` does.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from tokenizers import Tokenizer

from train.action_classes import classes_of_model
from train.base import read_base_config
from train.data_facts import (
    AxisFacts,
    InstructionFacts,
    PartFacts,
    axis_facts,
    class_facts,
    instruction_facts,
    part_facts,
)
from train.load_config import LoadedConfig, Notes
from train.memory import Device, MemoryEstimate, ParameterCounts, count_parameters, estimate_memory
from train.preflight_checks import CHECKS
from train.preflight_files import LEDGER_NAME, Problem, existing_parent, file_problems, refuse
from train.robovlms_base import StartingPoint
from train.run_setup import Gathered
from train.sampling import steps_per_epoch

_FLOAT = 4
_STATE = 3  # a run's state holds trained weights and two moments of each


@dataclass(frozen=True)
class DiskFacts:
    """What the run will write at most, on one file system.

    Attributes:
        folder: of the run, or of the cache.
        items: what -> bytes.
        free: bytes.
    """

    folder: Path
    items: dict[str, int]
    free: int

    @property
    def needed(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    Attributes:
        name, folder: of the run.
        exists: an earlier run stands in the folder.
        files: the config and its parents.
        notes: what a lab's config says that does not count, or is not certain.
        base, base_sha256: the directory that training starts from.
        start: the checkpoint that it was made of, if any.
        parameters: of the policy.
        train, val: the two parts.
        action_range: physical values of -1 and +1.
        axes, classes: of the training actions; classes count frames.
        instructions: of both parts.
        steps_per_epoch, steps, warmup_steps: optimizer steps.
        device, processes: what trains.
        memory, memory_free: of the device, bytes.
        positions: slots that the decoder has positions for.
        disk: by file system.
        problems: what the checks found.
    """

    name: str
    folder: Path
    exists: bool
    files: tuple[Path, ...]
    notes: Notes
    base: Path
    base_sha256: str
    start: StartingPoint
    parameters: ParameterCounts
    train: PartFacts
    val: PartFacts
    action_range: tuple[float, float]
    axes: tuple[AxisFacts, ...]
    classes: dict[str, int]
    instructions: tuple[InstructionFacts, ...]
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    device: Device
    processes: int
    memory: MemoryEstimate
    memory_free: int
    positions: int
    disk: tuple[DiskFacts, ...]
    problems: tuple[Problem, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data of everything."""
        plain: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        plain["memory"]["total"] = self.memory.total
        for shown, facts in zip(plain["disk"], self.disk, strict=True):
            shown["needed"] = facts.needed
        return plain


def preflight(
    loaded: LoadedConfig,
    gathered: Gathered,
    *,
    resume: bool | None = None,
    device: Device | None = None,
    processes: int = 1,
    strict: bool = True,
) -> Plan:
    """Plan the run and check it.

    Args:
        gathered: base, episodes and split.
        resume: whether it goes on with an earlier run; None only says that there is one.
        device: what trains; None takes a GPU if there is one.
        processes: of a distributed run.
        strict: False leaves what stands in the way to the caller, in the plan's problems.

    Raises:
        ConfigError: lists everything that stands in the way.
    """
    plan = _plan(loaded, gathered, device or ("cuda" if torch.cuda.is_available() else "cpu"), processes)
    if resume:
        plan = replace(plan, exists=False)
    found = [problem for check in CHECKS for problem in check(plan, loaded.config)]
    plan = replace(plan, problems=(*file_problems(loaded, resume=resume), *found))
    if strict:
        refuse(plan.problems, name=plan.name)
    return plan


def _plan(loaded: LoadedConfig, gathered: Gathered, device: Device, processes: int) -> Plan:
    config, data = loaded.config, loaded.config.data
    train, val = gathered.train, gathered.val
    kosmos = read_base_config(gathered.base)
    counts = count_parameters(kosmos, config)
    prompts = {text: ids.tolist() for text, ids in gathered.prompts.items()}
    per_epoch = steps_per_epoch([len(episode) for episode in train], config.loop, window=data.window)
    width = len(data.cameras) * kosmos.latent_query_num * kosmos.text_config.embed_dim
    return Plan(
        name=config.name,
        folder=gathered.folder,
        exists=(gathered.folder / LEDGER_NAME).exists(),
        files=loaded.files,
        notes=loaded.notes,
        base=gathered.base,
        base_sha256=gathered.base_sha256,
        start=gathered.start,
        parameters=counts,
        train=part_facts(train, window=data.window),
        val=part_facts(val, window=data.window),
        action_range=gathered.action_range,
        axes=axis_facts(train, data.actions, gathered.action_range),
        classes=class_facts(train, data.actions, classes_of_model(config.model)),
        instructions=instruction_facts(train, val, prompts, _unknown_token(gathered.base)),
        steps_per_epoch=per_epoch,
        steps=gathered.steps,
        warmup_steps=config.optimizer.resolved(per_epoch).warmup_steps,
        device=device,
        processes=processes,
        memory=estimate_memory(
            kosmos,
            config,
            device=device,
            prompt_tokens=max(data.pad_prompt_to or 0, *map(len, prompts.values())),
            counts=counts,
        ),
        memory_free=_free_memory(device),
        positions=kosmos.text_config.max_position_embeddings,
        disk=_disk(loaded, gathered, counts, token_bytes=_FLOAT * width),
    )


def _unknown_token(base: Path) -> int:
    """The id of the token for what the tokenizer does not know; -1 if it has none."""
    found = Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id("<unk>")
    return -1 if found is None else int(found)


def _free_memory(device: Device) -> int:
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def _disk(
    loaded: LoadedConfig, gathered: Gathered, counts: ParameterCounts, *, token_bytes: int
) -> tuple[DiskFacts, ...]:
    """What goes where; items of one file system share its free space."""
    config = loaded.config
    train, val = gathered.train, gathered.val
    # A file is complete before it replaces the old one, so one more of each kind is needed.
    kept = {
        "checkpoints": (config.loop.keep_best + 2) * _FLOAT * counts.held,
        "state to resume from": 2 * _STATE * _FLOAT * counts.trained,
        **({"checkpoint in RoboVLMs' layout": _FLOAT * counts.total} if config.output.lightning else {}),
    }
    cached = {"resized frames": gathered.store.bytes_needed(gathered.episodes)}
    if config.loop.cache_image_tokens and not counts.vision:
        frames = sum(map(len, val))
        if not config.augment.changes_pixels:
            frames += sum(map(len, train)) * (1 if config.augment.mirror in (0.0, 1.0) else 2)
        cached["image tokens"] = token_bytes * frames
    places = [(existing_parent(gathered.folder), kept), (existing_parent(gathered.cache), cached)]
    by_system: dict[int, tuple[Path, dict[str, int]]] = {}
    for place, items in places:
        by_system.setdefault(place.stat().st_dev, (place, {}))[1].update(items)
    return tuple(DiskFacts(place, items, shutil.disk_usage(place).free) for place, items in by_system.values())
