"""Tries an assignment of precisions: builds its graphs, drives the runtime with them, and returns actions and times.

The code that runs is the robot's own (runtime.policy on a backend), so an error or a millisecond seen here is one of the robot's. What two
assignments share is computed once: a decoder that is tried anew gets the image tokens that are there already.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.atomic import disk_errors
from bundle.manifest import Graph, Manifest, Stage
from calib.rewrite import Integers, rewrite
from calib.sample import Stretch
from calib.stage_graph import STAGES, StageGraph, blocks_of
from runtime.backends.select import form_of, open_backend
from runtime.chain import SECTIONS
from runtime.policy import Policy

Floats = NDArray[np.float32]
Blocks = frozenset[str]
# Image tokens of this many vision assignments are kept: the common one and the one at hand.
_KEPT = 3


@dataclass(frozen=True)
class Held:
    """A held-out stretch, a name for its episode that no other of the sample has, and its frames uint8 [T, cameras, s, s, 3]."""

    stretch: Stretch
    episode: str
    frames: NDArray[np.uint8]

    @property
    def key(self) -> str:
        """Unique among the stretches of a sample."""
        return f"{self.episode}:{self.stretch.start}-{self.stretch.stop}"


class Trials:
    """Runs assignments on one backend.

    Args:
        folder: working folder with the bundle's files.
        manifest: the bundle's.
        graphs: every graph by stage and sequence length.
        integers: by stage; their files lie in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        graphs: Mapping[tuple[str, int | None], StageGraph],
        integers: Mapping[str, Integers],
        *,
        backend: str,
        threads: int = 0,
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._graphs, self._integers = graphs, integers
        self.backend, self._threads = backend, threads
        self._form = form_of(backend)
        self._tokens: OrderedDict[Blocks, list[Floats]] = OrderedDict()
        self._blocks = {stage: blocks_of(graphs, stage) for stage in STAGES}

    @property
    def blocks(self) -> tuple[str, ...]:
        """Everything that can be INT8, in the order of execution."""
        return tuple(block for stage in STAGES for block in self._blocks[stage])

    def stages_of(self, blocks: Collection[str]) -> tuple[str, ...]:
        """The stages that an assignment touches."""
        return tuple(stage for stage in STAGES if not set(blocks).isdisjoint(self._blocks[stage]))

    def policy(self, blocks: Blocks) -> Policy:
        """The policy with these blocks in INT8, loaded; close it when done."""
        return Policy(self._folder, self.view(blocks), open_backend(self.backend, threads=self._threads))

    def view(self, blocks: Blocks) -> Manifest:
        """A manifest of it, whose graphs are written into the working folder."""
        if not blocks:
            return self._manifest
        stages = dict(self._manifest.stages)
        for stage in STAGES:
            chosen = blocks.intersection(self._blocks[stage])
            if chosen:
                stages[stage] = self._write(stage, chosen)
        return msgspec.structs.replace(self._manifest, precision="int8", stages=stages, quantized=None)

    def _write(self, stage: str, blocks: Blocks) -> Stage:
        base = self._manifest.stages[stage]
        key = hashlib.sha256(repr((stage, sorted(blocks), self._form)).encode()).hexdigest()
        graphs = []
        for graph in base.graphs:
            suffix = "" if graph.sequence is None else f".s{graph.sequence}"
            file = f".try.{stage}.{key[:12]}{suffix}.onnx"
            model = rewrite(self._graphs[stage, graph.sequence], blocks, self._integers[stage], self._form)
            with disk_errors(self._folder / file):
                (self._folder / file).write_bytes(model.SerializeToString())
            graphs.append(
                Graph(
                    file=file,
                    form=self._form,
                    sequence=graph.sequence,
                    nodes=len(model.graph.node),
                    inputs=graph.inputs,
                    outputs=graph.outputs,
                )
            )
        return msgspec.structs.replace(
            base, key=key, precision="int8", weights=self._integers[stage].location, graphs=tuple(graphs)
        )

    def actions(
        self, policy: Policy, blocks: Blocks, held: Sequence[Held], advance: Callable[[], None]
    ) -> list[Floats]:
        """Stream the stretches from a reset each: actions float32 [T, n, A] as the head gives them."""
        seen = blocks.intersection(self._blocks["vision"])
        tokens = self._tokens.get(seen)
        if tokens is None:
            tokens = [
                np.stack([policy.run_vision(frames)[0].copy() for frames in each.frames]).astype(np.float32)
                for each in held
            ]
            self._tokens[seen] = tokens
        self._tokens.move_to_end(seen)
        while len(self._tokens) > _KEPT:
            self._tokens.popitem(last=False)
        found = []
        for each, images in zip(held, tokens, strict=True):
            policy.reset(each.stretch.instruction)
            rows = []
            for image in images:
                feature = policy.run_language(image[None]).copy()
                rows.append(policy.run_action_head(feature)[0].copy())
                advance()
            found.append(np.stack(rows).astype(np.float32))
        return found


def stream(policy: Policy, held: Held, advance: Callable[[], None]) -> Floats:
    """The same as Trials.actions for one stretch, step by step as the robot does it."""
    policy.reset(held.stretch.instruction)
    rows = []
    for frames in held.frames:
        rows.append(policy.step_resized(frames).normalized.copy())
        advance()
    return np.stack(rows)


def stage_times(policies: Sequence[Policy], held: Held, rounds: int) -> list[dict[str, float]]:
    """Median milliseconds of every stage of each policy, taken in turns: what disturbs the machine disturbs all of them.

    In each turn one step goes before the one that counts: the threads of the policy before spin on for a while, and a robot's steps
    follow steps of their own.
    """
    spent: list[dict[str, list[float]]] = [{stage: [] for stage in SECTIONS} for _ in policies]
    for policy in policies:
        policy.reset(held.stretch.instruction)
    for index in range(rounds):
        frames = held.frames[index % len(held.frames)]
        for policy, sections in zip(policies, spent, strict=True):
            policy.step_resized(frames)
            timing = policy.step_resized(frames).timing
            for stage in SECTIONS:
                sections[stage].append(timing[stage])
    return [{stage: float(np.median(values)) for stage, values in sections.items()} for sections in spent]
