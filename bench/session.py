"""One latency run from start to result: load, measure, baselines, plan, verdict.

Every phase is kept as soon as it is done, and what stops the run - Ctrl-C, a backend that fails - leaves a result of the phases before,
marked partial. A bundle that fails its hashes or its golden step never gets that far: then there is no number at all.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.baselines import Kind, Limits, measure_baselines
from bench.clocks import JumpWatch, SystemClock, process_age_s
from bench.feed import Feed
from bench.fingerprint import fingerprint, state
from bench.measure import (
    Samples,
    harness_ms,
    measure_memory,
    measure_steps,
    soak,
    soak_samples,
    soaked,
    step_samples,
    summarize,
    timings,
)  # fmt: skip
from bench.nvml import open_nvml
from bench.pacing import loop_samples, looped, run_loop
from bench.power import Used, metered
from bench.results import (
    SCHEMA,
    Baseline,
    Bundle,
    Drive,
    Energy,
    Fact,
    Memory,
    Parity,
    Plan,
    Result,
    Settings,
    Start,
)  # fmt: skip
from bench.verdict import judge
from bundle.errors import BackendError, ConfigError, PromptError
from runtime.golden import Golden
from runtime.policy import ActionChunk, Policy
from runtime.preprocess import resize
from runtime.prompt import choose_bucket, layout
from runtime.tokenizer import TOKENIZER_NAME, token_ids_of

_PROBE_STEPS = 3  # to find out how many steps fit
_SHARE_S = 30.0  # of steps, where their number is not given
_FEWEST, _MOST = 30, 500
_DRIVEN = 400  # frames of an episode that are compared


@dataclass(frozen=True)
class Ask:
    """What to measure; see bench/latency.py for the words.

    Attributes:
        steps: 0 takes as many as fit into half a minute, 30 to 500.
    """

    bundle: Path
    backend: str = "auto"
    threads: int = 0
    steps: int = 0
    warmup: int = 5
    minutes: float = 0.0
    deadline_ms: float = 200.0
    rate_hz: float = 5.0
    ticks: int = 50
    camera_fps: float = 30.0
    baselines: tuple[str, ...] = ()
    checkpoint: Path | None = None
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("warmup", 0), ("minutes", 0), ("ticks", 0), ("rounds", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(
                    f"--{name} is too small", got=getattr(self, name), expected=f"at least {least}", hint="see --help."
                )
        for name in ("deadline_ms", "rate_hz", "camera_fps"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(
                    f"{name} is out of range", got=getattr(self, name), expected="above 0", hint="see --help."
                )


class Screen(Protocol):
    """Where progress is shown."""

    def phase(self, label: str, total: float) -> Callable[[float], None]:
        """A new bar; gives what advances it."""
        ...


@dataclass
class _Found:
    """What has been measured so far."""

    start: Start
    harness: float
    samples: Samples = field(default_factory=step_samples)
    used: Used = field(default_factory=Used)
    memory: Memory | None = None
    loop: Samples = field(default_factory=loop_samples)
    soak: Samples = field(default_factory=soak_samples)
    soak_s: float = 0.0
    baselines: list[Baseline] = field(default_factory=list)
    drive: Drive | None = None
    plan: Plan | None = None


class Watched:
    """A policy as the measurement sees it: one camera, whatever the number of the policy's."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._hand = "hand" in policy.manifest.preprocessing.cameras

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk:
        """See Policy.step."""
        return self.policy.step(frame, hand=frame) if self._hand else self.policy.step(frame)


def run(
    ask: Ask,
    policy: Policy,
    feed: Feed,
    screen: Screen,
    *,
    plan: Callable[[Policy, int], Plan | None] = lambda policy, sequence: None,
    root: Path = Path("/"),
) -> Result:
    """Measure a loaded policy.

    Args:
        plan: what the planner says of this machine, for a sequence length.
        root: where the machine's files are.

    Raises:
        PromptError: the instruction is too long for the bundle.
        BackendError: the very first steps failed; later failures leave a partial result.
    """
    before = state(root)
    watch = JumpWatch(SystemClock())
    prompt = _tell(policy, ask.bundle, feed)
    watched = Watched(policy)
    loaded = process_age_s()
    watched.step(feed.frame(0))
    found = _Found(Start(loaded_s=loaded, first_action_s=process_age_s()), harness_ms())
    steps = ask.steps or _fitting(watched, feed)
    stopped: str | None = None
    try:
        for _ in _phases(ask, policy, watched, feed, found, screen, watch, steps, prompt, plan):
            pass
    except KeyboardInterrupt:
        stopped = "interrupted"
    except BackendError as error:
        stopped = f"{error.what} ({error.got})"
    if not len(found.samples):
        raise BackendError(
            "nothing was measured", got=stopped, expected="at least one step", hint="let it run a little longer."
        )
    return _result(ask, policy, feed, found, before, state(root), watch, steps, prompt, stopped, root)


def _phases(
    ask: Ask,
    policy: Policy,
    watched: Watched,
    feed: Feed,
    found: _Found,
    screen: Screen,
    watch: JumpWatch,
    steps: int,
    prompt: _Told,
    plan: Callable[[Policy, int], Plan | None],
) -> Iterator[None]:
    """One after the other; each leaves what it found in `found`."""
    advance = screen.phase("steps", ask.warmup + steps)
    with metered() as used:
        found.used = used
        measured = measure_steps(
            watched, feed, steps, warmup=ask.warmup, watch=watch, samples=found.samples, advance=lambda: advance(1)
        )
    yield
    with open_nvml() as gpu:
        found.memory = measure_memory(watched, feed, measured, gpu_mb=gpu.memory_mb())
    yield
    if ask.ticks:
        tick = screen.phase("control loop", ask.ticks)
        run_loop(
            watched,
            feed,
            ask.ticks,
            rate_hz=ask.rate_hz,
            deadline_ms=ask.deadline_ms,
            camera_fps=ask.camera_fps,
            watch=watch,
            samples=found.loop,
            advance=lambda: tick(1),
        )
    yield
    if feed.recorded is not None and prompt.asked:
        count = min(len(feed.frames), _DRIVEN)
        shown = screen.phase("episode", count)
        found.drive = _drive(policy, watched, ask.bundle, feed, count, lambda: shown(1))
    yield
    if ask.minutes:
        bar, last = screen.phase("soak", 60 * ask.minutes), [0.0]

        def gone(seconds: float) -> None:
            bar(seconds - last[0])
            last[0] = found.soak_s = seconds

        soak(watched, feed, ask.minutes, watch=watch, samples=found.soak, advance=gone)
    yield
    found.plan = plan(policy, prompt.sequence)
    yield
    if ask.baselines:
        resized = np.stack(
            [resize(feed.frame(0), policy.manifest.preprocessing, policy.manifest.dimensions.image_size)]
        )
        resized = np.repeat(resized, len(policy.manifest.preprocessing.cameras), axis=0)
        bars: list[Callable[[float], None]] = []

        def begin(kind: Kind, rounds: int) -> None:
            bars.append(screen.phase(kind.name, rounds + 1))

        for name in ask.baselines:
            found.baselines += measure_baselines(
                (name,),
                lambda: policy.step_resized(resized),
                policy.manifest,
                folder=ask.bundle,
                checkpoint=ask.checkpoint,
                tokens=prompt.tokens,
                threads=ask.threads,
                limits=Limits(rounds=ask.rounds),
                on_start=begin,
                advance=lambda: bars[-1](1),
            )
            yield


@dataclass(frozen=True)
class _Told:
    """What the policy was told: number of tokens, slots of the graph that runs, and whether it is what was asked for."""

    tokens: int
    sequence: int
    asked: bool


def _tell(policy: Policy, folder: Path, feed: Feed) -> _Told:
    """Reset the policy."""
    prompt = policy.manifest.prompt
    ids: Sequence[int]
    asked = True
    try:
        ids = token_ids_of(feed.instruction, prompt, folder / TOKENIZER_NAME)
    except PromptError:
        # No tokenizer here, and words that were not known at build time: any prompt takes as long, but means something else.
        asked = False
        ids = [int(token) for token in Golden.load(folder).token_ids]
    policy.reset(token_ids=ids)
    slots = layout(
        ids,
        packing=prompt.packing,
        image_tokens=policy.image_tokens,
        latent=policy.manifest.dimensions.latent,
        pad_id=prompt.pad_id,
    )
    return _Told(len(ids), choose_bucket(slots.length, policy.buckets), asked)


def _fitting(policy: Watched, feed: Feed) -> int:
    start = time.perf_counter()
    for index in range(_PROBE_STEPS):
        policy.step(feed.frame(index))
    each = (time.perf_counter() - start) / _PROBE_STEPS
    return int(np.clip(_SHARE_S / each, _FEWEST, _MOST))


def _drive(
    policy: Policy, watched: Watched, folder: Path, feed: Feed, count: int, advance: Callable[[], None]
) -> Drive | None:
    """The episode once more from its beginning, for its commands."""
    recorded = feed.recorded
    assert recorded is not None
    action = policy.manifest.action
    axes = tuple(name for name in action.names if name in recorded.names)
    if not axes:
        return None
    columns = [action.names.index(name) for name in axes]
    _tell(policy, folder, feed)
    predicted = []
    for index in range(count):
        predicted.append(watched.step(feed.frames[index]).values[0, columns].tolist())
        advance()
    theirs = recorded.actions[:count, [recorded.names.index(name) for name in axes]]
    return Drive(
        episode=recorded.episode,
        instruction=feed.instruction,
        fps=recorded.fps,
        axes=axes,
        units=tuple(action.units[column] for column in columns),
        predicted=tuple(map(tuple, predicted)),
        recorded=tuple(map(tuple, theirs.tolist())),
    )


def _result(
    ask: Ask,
    policy: Policy,
    feed: Feed,
    found: _Found,
    before: dict[str, Fact],
    after: dict[str, Fact],
    watch: JumpWatch,
    steps: int,
    prompt: _Told,
    stopped: str | None,
    root: Path,
) -> Result:
    manifest = policy.manifest
    measured = summarize(found.samples)
    sections, layers = timings(measured.sections), timings(measured.layers)
    machine = fingerprint(before, after, root=root)
    loop = looped(found.loop, ask.deadline_ms) if len(found.loop) else None
    if loop is not None:
        layers["loop"] = loop.decision
    jumps = tuple(watch.jumps)
    verdict = judge(
        step=sections["total"],
        loop=loop,
        deadline_ms=ask.deadline_ms,
        backend=policy.backend,
        fallback=fallbacks(ask.backend, policy),
        fingerprint=machine,
        harness_ms=found.harness,
        clock_jumps=jumps,
        partial=stopped is not None,
    )
    parity = manifest.parity
    return Result(
        schema=SCHEMA,
        jetvla=importlib.metadata.version("jetvla"),
        created=datetime.now(timezone.utc),
        partial=stopped is not None,
        stopped=stopped,
        bundle=Bundle(
            name=ask.bundle.resolve().name,
            manifest_sha256=manifest.manifest_sha256,
            jetvla=manifest.jetvla,
            precision=manifest.precision,
            stage_precision={name: stage.precision for name, stage in manifest.stages.items()},
            backend=policy.backend,
            packing=manifest.prompt.packing,
            parity=Parity(
                verdict=parity.verdict,
                backend=parity.backend,
                frames=parity.frames,
                feature_cosine=parity.feature_cosine,
                feature_max_error=parity.feature_max_error,
                action_max_error=parity.action_max_error,
            ),
        ),
        settings=Settings(
            steps=steps,
            warmup=ask.warmup,
            minutes=ask.minutes,
            deadline_ms=ask.deadline_ms,
            rate_hz=ask.rate_hz,
            threads=ask.threads,
            instruction=feed.instruction if prompt.asked else "another: this bundle cannot tokenise the one asked for",
            frames=feed.about,
            frame_size=(feed.frames.shape[1], feed.frames.shape[2]),
            sequence=prompt.sequence,
        ),
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


def _energy(used: Used, steps: int) -> Energy:
    joules = None if used.joules is None or not used.seconds else used.joules
    return Energy(
        sensor=used.sensor,
        joules_per_step=None if joules is None else joules / steps,
        watts=None if joules is None else joules / used.seconds,
        note=used.note,
    )


def fallbacks(asked: str, policy: Policy) -> tuple[str, ...]:
    """Why the backend is not the one that should have run."""
    found = [f"{policy.backend} runs because another backend failed: {why}" for why in policy.failed_backends]
    if asked in ("auto", "ort") and policy.backend == "ort:cpu" and not found:
        with open_nvml() as gpu:
            if gpu.name:
                found.append(f"ort:cpu runs although there is a GPU ({gpu.name})")
    return tuple(found)
