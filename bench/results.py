"""The outcome of a latency run: one strict JSON file, which `bench/compare.py` compares and `bench/report.py` draws.

Everything that a reader needs to believe a number stands beside it: the samples, the machine's fingerprint, what was asked for, and why
the run stopped. A fact that could not be found is kept with the reason; nothing is filled in. Times are milliseconds unless a name says
otherwise. Knows nothing about how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from bundle.atomic import write_bytes
from bundle.errors import ConfigError
from bundle.reading_limits import TEXT_BYTES, read_bytes

SCHEMA = 1
RESULT_NAME = "latency.json"
STORED = 4000  # samples of a distribution that are kept; its percentiles are of all
LAYERS = ("engine", "io", "step", "loop")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts: immutable, keyword-only, no unknown fields."""


class Timing(_Strict, frozen=True):
    """A distribution in milliseconds.

    Attributes:
        count: samples measured.
        p50, p90, p95, p99, p99_9: percentiles, interpolated linearly.
        jitter: p99 - p50.
        samples: in the order of time; every `stride`-th where there were more than STORED.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float
    jitter: float
    samples: tuple[float, ...]
    stride: int = 1

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """From at least one sample."""
        values = np.asarray(samples, np.float64)
        p50, p90, p95, p99, p99_9 = (float(value) for value in np.percentile(values, [50, 90, 95, 99, 99.9]))
        stride = -(-len(values) // STORED)
        return cls(
            count=len(values), mean=float(values.mean()), p50=p50, p90=p90, p95=p95, p99=p99, p99_9=p99_9, max=float(values.max()),
            jitter=p99 - p50, samples=tuple(float(value) for value in values[::stride]), stride=stride,
        )  # fmt: skip


class Fact(_Strict, frozen=True):
    """One thing about the machine.

    Attributes:
        value: as text; None if it could not be found.
        note: where it comes from, or why it is missing.
        warn: it makes the numbers hard to reproduce (unlocked clocks, throttling): shown in red.
    """

    value: str | None
    note: str = ""
    warn: bool = False


class Fingerprint(_Strict, frozen=True):
    """What numbers of this machine depend on; see bench/fingerprint.py. All by name.

    Attributes:
        machine: device, CPUs, memory, clocks and whether locked, power mode, thread settings: must agree for a comparison.
        software: versions of system, driver, backend, Python: must agree as well.
        before, after: temperature, throttling, load, frequencies at both ends of the run: shown, not compared.
    """

    machine: dict[str, Fact]
    software: dict[str, Fact]
    before: dict[str, Fact]
    after: dict[str, Fact]


class Bundle(_Strict, frozen=True):
    """What was measured.

    Attributes:
        name: of the directory.
        manifest_sha256: identifies the content.
        backend: that ran it.
        parity: verdict of the build against the reference policy; with its numbers.
    """

    name: str
    manifest_sha256: str
    jetvla: str
    precision: str
    stage_precision: dict[str, str]
    backend: str
    packing: str
    parity: Parity


class Parity(_Strict, frozen=True):
    """The manifest's parity record, and that of the engines where they ran."""

    verdict: str
    backend: str
    frames: int
    feature_cosine: float
    feature_max_error: float
    action_max_error: float


class Settings(_Strict, frozen=True):
    """What was asked for.

    Attributes:
        steps, warmup, minutes: of the measurement; minutes of the soak, 0 for none.
        deadline_ms, rate_hz: of the control loop.
        threads: 0 takes all.
        frames: where frames came from.
        frame_size: [height, width] of what was fed.
        sequence: slots of the language graph that the instruction takes.
    """

    steps: int
    warmup: int
    minutes: float
    deadline_ms: float
    rate_hz: float
    threads: int
    instruction: str
    frames: str
    frame_size: tuple[int, int]
    sequence: int


class Loop(_Strict, frozen=True):
    """The control loop at a fixed rate: a camera that never waits, the newest frame wins.

    Attributes:
        ticks: decisions made.
        misses: decisions later than the deadline, counted from the tick at which they were due.
        skipped: ticks that had to be left out because a decision took longer than a period.
        reaction: camera timestamp to command.
        decision: tick to command: what the deadline is about.
        period: between commands.
    """

    ticks: int
    misses: int
    skipped: int
    reaction: Timing
    decision: Timing
    period: Timing | None

    @property
    def miss_rate(self) -> float:
        """Share of ticks without a command in time."""
        due = self.ticks + self.skipped
        return (self.misses + self.skipped) / due if due else 0.0


class Soak(_Strict, frozen=True):
    """A long run without pauses.

    Attributes:
        minutes: it lasted.
        step: over all of it.
        first, last: median of the first and last tenth: do they differ, the machine got hot.
        rss_growth_mb: resident memory at the end less that after the first tenth.
    """

    minutes: float
    step: Timing
    first: float
    last: float
    rss_growth_mb: float


class Start(_Strict, frozen=True):
    """Seconds from the start of the process: to the loaded policy (hashes and golden step included), and to its first action."""

    loaded_s: float
    first_action_s: float


class Memory(_Strict, frozen=True):
    """Memory of the process.

    Attributes:
        rss_mb, rss_peak_mb: resident; mapped weights count.
        gpu_mb: of this process, None if there is no GPU or it does not tell.
        python_kb_per_step: transient Python and numpy allocations of a step, at their peak.
        blocks_per_step: Python objects that stay after a step, in the mean: 0 unless something leaks.
        page_faults_per_step: pages that the system had to provide.
    """

    rss_mb: float
    rss_peak_mb: float
    gpu_mb: float | None
    python_kb_per_step: float
    blocks_per_step: float
    page_faults_per_step: float


class Energy(_Strict, frozen=True):
    """Energy of a step over the power sensors of the machine; None with the reason where there are none.

    Attributes:
        joules_per_step: of everything the sensor sees, idle power included.
        watts: mean while measuring.
    """

    sensor: str | None
    joules_per_step: float | None
    watts: float | None
    note: str


class Baseline(_Strict, frozen=True):
    """Another way to compute the same step, measured in turns with ours.

    Attributes:
        name, about: what it is.
        skipped: why it was not measured; None if it was.
        ours, theirs: of the same rounds.
        ratio: median of ours / theirs over the rounds, and its 95 % bootstrap interval.
        frames: that it computes for one decision.
    """

    name: str
    about: str
    skipped: str | None = None
    ours: Timing | None = None
    theirs: Timing | None = None
    ratio: tuple[float, float, float] | None = None
    frames: int = 1


class StageFloor(_Strict, frozen=True):
    """What the planner says of one stage: see bench/roofline.py.

    Attributes:
        gflop, mbytes: of one run.
        floor_ms: at the machine's peak.
        expected_ms: at what its own probes reach.
        bottleneck: compute or memory.
    """

    gflop: float
    mbytes: float
    floor_ms: float
    expected_ms: float
    bottleneck: Literal["compute", "memory"]


class Plan(_Strict, frozen=True):
    """The planner's word about this machine, or why there is none."""

    device: str
    calibrated: bool
    stages: dict[str, StageFloor]
    note: str = ""


class Drive(_Strict, frozen=True):
    """Predicted against recorded commands of the episode that was fed, by its own frames; float lists [T][axes]."""

    episode: str
    instruction: str
    fps: float | None
    axes: tuple[str, ...]
    units: tuple[str, ...]
    predicted: tuple[tuple[float, ...], ...]
    recorded: tuple[tuple[float, ...], ...]


class Verdict(_Strict, frozen=True):
    """The answer.

    Attributes:
        outcome: `pass`, `miss` (of the deadline), or `invalid` (a silent fall-back, say).
        line: one sentence.
        reasons: why one should or should not believe it.
    """

    outcome: Literal["pass", "miss", "invalid"]
    line: str
    reasons: tuple[str, ...]


class Result(_Strict, frozen=True):
    """One run. Read with `read_result`.

    Attributes:
        partial: stopped before its end; `stopped` says by what.
        layers: cumulative: `engine` inside the engines alone, `io` with copies and states, `step` with preprocessing, `loop` from tick to
            command.
        sections: preprocess, vision, language, action_head, glue (total less all of these), total.
        harness_ms: what the harness itself adds to a step, measured on a policy that does nothing.
        clock_jumps: seconds by which the wall clock jumped or the machine slept while measuring; times are monotonic and do not move.
    """

    schema: int
    jetvla: str
    created: datetime
    partial: bool
    stopped: str | None
    bundle: Bundle
    settings: Settings
    fingerprint: Fingerprint
    start: Start
    layers: dict[str, Timing]
    sections: dict[str, Timing]
    harness_ms: float
    loop: Loop | None
    soak: Soak | None
    memory: Memory | None
    energy: Energy | None
    clock_jumps: tuple[float, ...]
    baselines: tuple[Baseline, ...]
    plan: Plan | None
    drive: Drive | None
    verdict: Verdict


def write_result(path: Path, result: Result) -> None:
    """Write a result as JSON, atomically.

    Raises:
        StorageError: the disk refuses.
    """
    write_bytes(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def read_result(path: Path) -> Result:
    """Read what `write_result` wrote.

    Raises:
        ConfigError: missing, damaged, or of another schema.
    """
    hint = "python bench/latency.py BUNDLE --out FOLDER writes one."
    try:
        raw = read_bytes(path, TEXT_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read", got=error.strerror, expected=f"a {RESULT_NAME}", hint=hint
        ) from None
    try:
        head = msgspec.json.decode(raw, type=dict[str, object])
        found = head.get("schema")
        if found != SCHEMA:
            raise ConfigError(
                f"{path} has another schema", got=found, expected=SCHEMA, hint="measure again with this version."
            )
        return msgspec.json.decode(raw, type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no latency result", got=error, expected=f"a {RESULT_NAME}", hint=hint) from None
