"""What a run has found so far, and the result that is made of it: of all of it, or of what there was when it was stopped."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from bench.ask import Ask
from bench.feed import Feed
from bench.fingerprint import fingerprint
from bench.measure import Samples, soak_samples, soaked, step_samples, summarize, timings
from bench.nvml import open_nvml
from bench.pacing import loop_samples, looped
from bench.power import Used
from bench.results import SCHEMA, Baseline, Bundle, Drive, Energy, Fact, Memory, Parity, Plan, Result, Settings, Start
from bench.verdict import judge
from bundle.manifest import Manifest
from runtime.policy import Policy


@dataclass(frozen=True)
class Told:
    """What the policy was told: number of tokens, slots of the graph that runs, and whether it is what was asked for."""

    tokens: int
    sequence: int
    asked: bool


@dataclass
class Found:
    """What has been measured so far; filled while it is measured."""

    start: Start
    harness: float
    told: Told
    before: dict[str, Fact]
    steps: int
    samples: Samples = field(default_factory=step_samples)
    used: Used = field(default_factory=Used)
    memory: Memory | None = None
    loop: Samples = field(default_factory=loop_samples)
    soak: Samples = field(default_factory=soak_samples)
    soak_s: float = 0.0
    baselines: list[Baseline] = field(default_factory=list)
    drive: Drive | None = None
    plan: Plan | None = None
    jumps: list[float] = field(default_factory=list)
    stopped: str | None = None


def result_of(
    found: Found,
    after: dict[str, Fact],
    ask: Ask,
    folder: Path,
    policy: Policy,
    feed: Feed,
    *,
    backend: str,
    root: Path,
) -> Result:
    """The result; there must be at least one step.

    Args:
        after: the machine's state at the end.
        folder: of the bundle.
        backend: that was asked for.
        root: where the machine's files are.
    """
    measured = summarize(found.samples)
    sections, layers = timings(measured.sections), timings(measured.layers)
    machine = fingerprint(found.before, after, root=root)
    loop = looped(found.loop, ask.deadline_ms) if len(found.loop) else None
    if loop is not None:
        layers["loop"] = loop.decision
    partial, jumps = found.stopped is not None, tuple(found.jumps)
    verdict = judge(
        step=sections["total"],
        loop=loop,
        deadline_ms=ask.deadline_ms,
        backend=policy.backend,
        fallback=fallbacks(backend, policy),
        remark=policy.remark,
        fingerprint=machine,
        harness_ms=found.harness,
        clock_jumps=jumps,
        partial=partial,
    )
    return Result(
        schema=SCHEMA,
        jetvla=importlib.metadata.version("jetvla"),
        created=datetime.now(timezone.utc),
        partial=partial,
        stopped=found.stopped,
        bundle=_bundle(folder, policy.manifest, policy.backend),
        settings=_settings(found, ask, feed),
        fingerprint=machine,
        start=found.start,
        layers=layers,
        sections=sections,
        harness_ms=found.harness,
        loop=loop,
        soak=soaked(found.soak, found.soak_s / 60) if len(found.soak) else None,
        memory=found.memory,
        energy=_energy(found.used, measured.count + ask.warmup),
        clock_jumps=jumps,
        baselines=tuple(found.baselines),
        plan=found.plan,
        drive=found.drive,
        verdict=verdict,
    )


def fallbacks(asked: str, policy: Policy) -> tuple[str, ...]:
    """Why the backend is not the one that should have run."""
    found = [f"{policy.backend} runs because another backend failed: {why}" for why in policy.failed_backends]
    if asked in ("auto", "ort") and policy.backend in ("ort:cpu", "ort:openvino") and not found:
        with open_nvml() as gpu:
            if gpu.name:
                found.append(f"{policy.backend} runs although there is a GPU ({gpu.name})")
    return tuple(found)


def _bundle(folder: Path, manifest: Manifest, backend: str) -> Bundle:
    parity = manifest.parity
    return Bundle(
        name=folder.resolve().name,
        manifest_sha256=manifest.manifest_sha256,
        jetvla=manifest.jetvla,
        precision=manifest.precision,
        stage_precision={name: stage.precision for name, stage in manifest.stages.items()},
        backend=backend,
        packing=manifest.prompt.packing,
        parity=Parity(
            verdict=parity.verdict,
            backend=parity.backend,
            frames=parity.frames,
            feature_cosine=parity.feature_cosine,
            feature_max_error=parity.feature_max_error,
            action_max_error=parity.action_max_error,
        ),
    )


def _settings(found: Found, ask: Ask, feed: Feed) -> Settings:
    told = feed.instruction if found.told.asked else "another: this bundle cannot tokenise the one asked for"
    return Settings(
        steps=found.steps,
        warmup=ask.warmup,
        minutes=ask.minutes,
        deadline_ms=ask.deadline_ms,
        rate_hz=ask.rate,
        threads=ask.threads,
        instruction=told,
        frames=feed.about,
        frame_size=(feed.frames.shape[1], feed.frames.shape[2]),
        sequence=found.told.sequence,
    )


def _energy(used: Used, steps: int) -> Energy:
    if used.joules is None or not used.seconds:
        return Energy(sensor=used.sensor, joules_per_step=None, watts=None, note=used.note)
    return Energy(
        sensor=used.sensor, joules_per_step=used.joules / steps, watts=used.joules / used.seconds, note=used.note
    )
