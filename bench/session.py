"""One latency run on a loaded policy: its phases in order.

Every phase is kept as soon as it is done, and what stops the run - Ctrl-C, a backend that fails - leaves a result of the phases before,
marked partial. A bundle that fails its hashes or its golden step never gets that far: then there is no number at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.ask import Ask
from bench.baselines import Kind, Limits, measure_baselines
from bench.clocks import JumpWatch, SystemClock, process_age_s
from bench.feed import Feed
from bench.fingerprint import state
from bench.measure import harness_ms, measure_memory, measure_steps, soak
from bench.nvml import open_nvml
from bench.outcome import Found, Told, result_of
from bench.pacing import run_loop
from bench.power import metered
from bench.results import Drive, Plan, Result, Start
from bundle.errors import BackendError, PromptError
from runtime.golden import Golden
from runtime.policy import ActionChunk, Policy
from runtime.preprocess import resize
from runtime.prompt import choose_bucket, layout
from runtime.tokenizer import TOKENIZER_NAME, token_ids_of

_PROBE_STEPS = 3  # to find out how many steps fit
_SHARE_S = 30.0  # of steps, where their number is not given
_FEWEST, _MOST = 30, 500
_DRIVEN = 400  # frames of an episode that are compared


class Screen(Protocol):
    """Where progress is shown."""

    def phase(self, label: str, total: float) -> Callable[[float], None]:
        """A new bar; gives what advances it."""
        ...


def run(
    ask: Ask,
    folder: Path,
    policy: Policy,
    feed: Feed,
    screen: Screen,
    *,
    backend: str = "auto",
    plan: Callable[[Policy, int], Plan | None] = lambda policy, sequence: None,
    root: Path = Path("/"),
) -> Result:
    """Measure a loaded policy.

    Args:
        folder: of its bundle.
        backend: that was asked for.
        plan: what the planner says of this machine, for a sequence length.
        root: where the machine's files are.

    Raises:
        ConfigError: see Ask.check.
        PromptError: the instruction is too long for the bundle.
        BackendError: the very first steps failed; later failures leave a partial result.
    """
    ask.check()
    measuring = _Run(ask, folder, policy, feed, screen, root)
    found = measuring.found
    try:
        measuring.phases(plan)
    except KeyboardInterrupt:
        found.stopped = "interrupted"
    except BackendError as error:
        found.stopped = f"{error.what} ({error.got})"
    if not len(found.samples):
        raise BackendError(
            "nothing was measured", got=found.stopped, expected="at least one step", hint="let it run a little longer."
        )
    return result_of(found, state(root), ask, folder, policy, feed, backend=backend, root=root)


class _OneCamera:
    """A policy as the measurement sees it: one camera, whatever the number of the policy's."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._hand = "hand" in policy.manifest.preprocessing.cameras

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk:
        """See Policy.step."""
        return self._policy.step(frame, hand=frame) if self._hand else self._policy.step(frame)


class _Run:
    """The phases of one run; `found` fills up."""

    def __init__(self, ask: Ask, folder: Path, policy: Policy, feed: Feed, screen: Screen, root: Path) -> None:
        self._ask, self._folder, self._policy, self._feed, self._screen = ask, folder, policy, feed, screen
        self._watched = _OneCamera(policy)
        before = state(root)
        told = self._tell()
        loaded = process_age_s()
        self._watched.step(feed.frame(0))
        start = Start(loaded_s=loaded, first_action_s=process_age_s())
        steps = ask.steps or self._fitting()
        self._watch = JumpWatch(SystemClock())
        self.found = Found(start, harness_ms(), told, before, steps, jumps=self._watch.jumps)

    def phases(self, plan: Callable[[Policy, int], Plan | None]) -> None:
        """One after the other."""
        self.found.plan = plan(self._policy, self.found.told.sequence)
        self._steps()
        if self._ask.ticks:
            self._loop()
        if self._feed.recorded is not None and self.found.told.asked:
            self._drive()
        if self._ask.minutes:
            self._soak()
        self._baselines()

    def _tell(self) -> Told:
        """Reset the policy to the feed's instruction."""
        policy, prompt = self._policy, self._policy.manifest.prompt
        ids: Sequence[int]
        asked = True
        try:
            ids = token_ids_of(self._feed.instruction, prompt, self._folder / TOKENIZER_NAME)
        except PromptError:
            # No tokenizer here, and words that were not known at build time: any prompt takes as long, but means something else.
            asked = False
            ids = [int(token) for token in Golden.load(self._folder).token_ids]
        policy.reset(token_ids=ids)
        slots = layout(
            ids,
            packing=prompt.packing,
            image_tokens=policy.image_tokens,
            latent=policy.manifest.dimensions.latent,
            pad_id=prompt.pad_id,
        )
        return Told(len(ids), choose_bucket(slots.length, policy.buckets), asked)

    def _fitting(self) -> int:
        start = time.perf_counter()
        for index in range(_PROBE_STEPS):
            self._watched.step(self._feed.frame(index))
        each = (time.perf_counter() - start) / _PROBE_STEPS
        return int(np.clip(_SHARE_S / each, _FEWEST, _MOST))

    def _steps(self) -> None:
        found, ask = self.found, self._ask
        advance = self._screen.phase("steps", ask.warmup + found.steps)
        with metered() as found.used:
            measured = measure_steps(
                self._watched,
                self._feed,
                found.steps,
                warmup=ask.warmup,
                watch=self._watch,
                samples=found.samples,
                advance=lambda: advance(1),
            )
        with open_nvml() as gpu:
            found.memory = measure_memory(self._watched, self._feed, measured, gpu_mb=gpu.memory_mb())

    def _loop(self) -> None:
        ask = self._ask
        advance = self._screen.phase("control loop", ask.ticks)
        run_loop(
            self._watched,
            self._feed,
            ask.ticks,
            rate_hz=ask.rate,
            deadline_ms=ask.deadline_ms,
            camera_fps=ask.camera_fps,
            watch=self._watch,
            samples=self.found.loop,
            advance=lambda: advance(1),
        )

    def _drive(self) -> None:
        """The episode once more from its beginning, for its commands."""
        recorded, action = self._feed.recorded, self._policy.manifest.action
        assert recorded is not None
        axes = tuple(name for name in action.names if name in recorded.names)
        if not axes:
            return
        ours = [action.names.index(name) for name in axes]
        theirs = [recorded.names.index(name) for name in axes]
        count = min(len(self._feed.frames), _DRIVEN)
        advance = self._screen.phase("episode", count)
        self._tell()
        predicted = []
        for index in range(count):
            predicted.append(tuple(self._watched.step(self._feed.frames[index]).values[0, ours].tolist()))
            advance(1)
        self.found.drive = Drive(
            episode=recorded.episode,
            instruction=self._feed.instruction,
            fps=recorded.fps,
            axes=axes,
            units=tuple(action.units[column] for column in ours),
            predicted=tuple(predicted),
            recorded=tuple(map(tuple, recorded.actions[:count, theirs].tolist())),
        )

    def _soak(self) -> None:
        found, minutes = self.found, self._ask.minutes
        advance = self._screen.phase("soak", 60 * minutes)

        def gone(seconds: float) -> None:
            advance(seconds - found.soak_s)
            found.soak_s = seconds

        soak(self._watched, self._feed, minutes, watch=self._watch, samples=found.soak, advance=gone)

    def _baselines(self) -> None:
        ask, manifest = self._ask, self._policy.manifest
        frame = resize(self._feed.frame(0), manifest.preprocessing, manifest.dimensions.image_size)
        frames = np.stack([frame] * len(manifest.preprocessing.cameras))
        bars: list[Callable[[float], None]] = []

        def begin(kind: Kind, rounds: int) -> None:
            bars.append(self._screen.phase(kind.name, rounds + 1))

        for name in ask.kinds:  # one by one: what is done stays if the next is interrupted
            self.found.baselines += measure_baselines(
                (name,),
                lambda: self._policy.step_resized(frames),
                manifest,
                folder=self._folder,
                checkpoint=ask.checkpoint,
                tokens=self.found.told.tokens,
                threads=ask.threads,
                limits=Limits(rounds=ask.rounds),
                on_start=begin,
                advance=lambda: bars[-1](1),
            )
