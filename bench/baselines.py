"""Other ways to compute the same decision, measured in turns with ours: A B A B, so that a noisy machine favours neither.

Each baseline runs in a process of its own, one at a time: torch's threads and memory are not ours, an export that dies or a model that does
not fit costs one line of the table, and without torch installed there is simply nothing to start. The process waits for a line, computes,
and answers with the milliseconds that it took; what is compared are pairs of neighbours in time. Knows nothing about torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.results import Baseline, Timing
from bundle.manifest import Manifest

_ROOT = Path(__file__).resolve().parent.parent
_WORKER = Path(__file__).with_name("baseline_worker.py")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Kind:
    """A baseline.

    Attributes:
        name: as --baselines takes it.
        about: for tables.
        dtype: of weights and arithmetic.
        how: what runs the model.
        frames: per decision: 1, or the whole window again.
    """

    name: str
    about: str
    dtype: str = "float32"
    how: str = "eager"
    window: bool = False


KINDS = (
    Kind("eager-fp32", "PyTorch eager fp32, one frame"),
    Kind("eager-fp32-window", "PyTorch eager fp32, the whole window", window=True),
    Kind("eager-bf16", "PyTorch eager bf16, one frame", dtype="bfloat16"),
    Kind("eager-bf16-window", "PyTorch eager bf16, the whole window", dtype="bfloat16", window=True),
    Kind("eager-fp16", "PyTorch eager fp16, one frame", dtype="float16"),
    Kind("compile-fp32", "torch.compile fp32, one frame", how="compile"),
    Kind("ort-plain-fp32", "ONNX Runtime on a plain export, fp32, one frame", how="ort"),
)
NAMES = tuple(kind.name for kind in KINDS)


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        rounds: pairs of each baseline.
        start_s: until a baseline is ready: building a model, compiling or exporting it.
        step_s: for one decision.
    """

    rounds: int = 10
    start_s: float = 1200.0
    step_s: float = 300.0


class _SkipError(Exception):
    """Why a baseline is not measured."""


def measure_baselines(
    names: Sequence[str],
    ours: Callable[[], object],
    manifest: Manifest,
    *,
    folder: Path,
    checkpoint: Path | None,
    tokens: int,
    threads: int,
    limits: Limits,
    command: Sequence[str] = (sys.executable, str(_WORKER)),
    on_start: Callable[[Kind, int], None] = lambda kind, rounds: None,
    advance: Callable[[], None] = lambda: None,
) -> list[Baseline]:
    """Measure the named baselines one after the other, each in turns with `ours`.

    Args:
        ours: decides once, on a frame that is resized already, as the baselines do.
        folder: of the bundle, whose graphs tell the model's dimensions.
        checkpoint: the model itself; without one the baseline has random weights of the same shapes, which take the same time.
        tokens: of the instruction, special ones included.
        command: the worker's program, to which its task is appended; for tests.
        on_start, advance: for progress: a baseline begins; a pair is done.
    """
    found = []
    for kind in (kind for kind in KINDS if kind.name in names):
        on_start(kind, limits.rounds)
        task = {
            **asdict(kind),
            "folder": str(folder),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "packing": manifest.prompt.packing,
            "tokens": tokens,
            "threads": threads or len(os.sched_getaffinity(0)),
            "window_frames": manifest.dimensions.window,
            "chunk": manifest.dimensions.chunk,
            "hidden": manifest.dimensions.lstm_hidden,
            "layers": manifest.dimensions.lstm_layers,
        }
        try:
            found.append(_measure(kind, ours, [*command, json.dumps(task)], manifest, limits, advance))
        except _SkipError as reason:
            found.append(
                Baseline(name=kind.name, about=kind.about, skipped=str(reason), frames=_frames(kind, manifest))
            )
    return found


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median of ours / theirs over the pairs, with a 95 % percentile-bootstrap interval over them."""
    ratios = np.asarray(ours, np.float64) / np.asarray(theirs, np.float64)
    drawn = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def _measure(
    kind: Kind,
    ours: Callable[[], object],
    command: Sequence[str],
    manifest: Manifest,
    limits: Limits,
    advance: Callable[[], None],
) -> Baseline:
    with _Worker(command) as worker:
        worker.answer(limits.start_s, "getting ready")
        own, theirs = [], []
        for index in range(limits.rounds + 1):
            start = time.perf_counter()
            ours()
            middle = time.perf_counter()
            other = worker.ask(limits.step_s)
            if index:  # the first pair warms both up
                own.append((middle - start) * 1e3)
                theirs.append(other)
            advance()
    return Baseline(
        name=kind.name,
        about=kind.about,
        ours=Timing.of(own),
        theirs=Timing.of(theirs),
        ratio=paired_ratio(own, theirs),
        frames=_frames(kind, manifest),
    )


def _frames(kind: Kind, manifest: Manifest) -> int:
    return manifest.dimensions.window if kind.window else 1


class _Worker:
    """The process of one baseline, and the lines that go both ways."""

    def __init__(self, command: Sequence[str]) -> None:
        modules = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            env={**os.environ, "PYTHONPATH": modules},
            start_new_session=True,  # Ctrl-C is for us: we end it
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._noise):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def ask(self, limit_s: float) -> float:
        """Milliseconds of one decision."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will be why
        return float(self.answer(limit_s, "computing")["ms"])

    def answer(self, limit_s: float, doing: str) -> dict[str, Any]:
        """The next line."""
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], limit_s)
        if not ready:
            raise _SkipError(f"{doing} took longer than {limit_s:g} s")
        line = stdout.readline()
        if not line:
            raise _SkipError(self._why())
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            raise _SkipError(f"it answered otherwise than agreed: {line[:80]!r}") from None
        if "skip" in said:
            raise _SkipError(said["skip"])
        return said

    def _why(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "killed, probably for want of memory"
        self._noise.seek(0)
        last = self._noise.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"it failed: {last or f'exit status {status}'}"
