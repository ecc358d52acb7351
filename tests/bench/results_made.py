"""Latency results that nobody measured: invented numbers of the size that a robot's computer would show."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.results import (
    SCHEMA,
    Baseline,
    Bundle,
    Drive,
    Energy,
    Fact,
    Fingerprint,
    Loop,
    Memory,
    Parity,
    Plan,
    Result,
    Settings,
    Soak,
    StageFloor,
    Start,
    Timing,
)  # fmt: skip
from bench.verdict import judge

# Medians in milliseconds.
STAGES = {"preprocess": 6.2, "vision": 38.0, "language": 71.0, "action_head": 2.4, "glue": 0.3}
INSTRUCTION = "Navigate to the gray basket on the left"


def noise(count: int, rng: np.random.Generator, *, rho: float = 0.6, sigma: float = 0.02) -> NDArray[np.float64]:
    """Factors around 1 as a machine shared with others gives them: an AR(1) process, and bursts in which everything takes longer."""
    walk = np.empty(count)
    walk[0] = rng.normal()
    for index, step in enumerate(rng.normal(0, np.sqrt(1 - rho**2), count - 1)):
        walk[index + 1] = rho * walk[index] + step
    factors = np.exp(sigma * walk)
    for start in np.flatnonzero(rng.random(count) < 0.01):
        factors[start : start + rng.integers(1, 4)] *= 1 + rng.exponential(0.4)
    return factors


def made_sections(count: int, seed: int, *, speed: float = 1.0, rho: float = 0.6) -> dict[str, Timing]:
    """Sections of `count` steps whose times are `speed` times the usual ones."""
    rng = np.random.default_rng(seed)
    common = noise(count, rng, rho=rho)
    columns = {name: speed * ms * common * rng.normal(1, 0.005, count) for name, ms in STAGES.items()}
    columns["total"] = np.sum(list(columns.values()), axis=0)
    return {name: Timing.of(column.tolist()) for name, column in columns.items()}


def made_fingerprint() -> Fingerprint:
    """A computer on a robot whose GPU clocks nobody has locked."""
    return Fingerprint(
        machine={
            "device": Fact(value="Made-up Orin NX 16 GB", note="device tree"),
            "cpus": Fact(value="8 of 8"),
            "cpu clocks": Fact(value="1.98 GHz", note="locked"),
            "gpu clocks": Fact(value="0.31-0.92 GHz", note="not locked: they move with load", warn=True),
            "memory clock": Fact(value=None, note="no memory controller that tells (on a Jetson it needs root)"),
            "power mode": Fact(value="25W"),
        },
        software={
            "system": Fact(value="Ubuntu 22.04.4 LTS"),
            "jetpack": Fact(value="R36 (release), REVISION: 4.3"),
            "gpu driver": Fact(value="540.3.0"),
            "python": Fact(value="3.10.12"),
            "tensorrt": Fact(value="10.7.0"),
        },
        before={
            "temperature": Fact(value="51.5 C", note="hottest zone: cpu-thermal"),
            "throttling": Fact(value="0 events"),
            "load average": Fact(value="0.41 0.30 0.21", note="1, 5 and 15 minutes"),
        },
        after={
            "temperature": Fact(value="66.0 C", note="hottest zone: gpu-thermal"),
            "throttling": Fact(value="3 events", note="while measuring", warn=True),
            "load average": Fact(value="1.12 0.52 0.29", note="1, 5 and 15 minutes"),
        },
    )


def made_result(*, seed: int = 0, steps: int = 300, speed: float = 1.0, rho: float = 0.6, **changes: Any) -> Result:
    """A complete result.

    Args:
        speed: factor on every time of a step.
        changes: fields of Result to replace.
    """
    rng = np.random.default_rng([seed, 1])
    sections = made_sections(steps, seed, speed=speed, rho=rho)
    step = np.asarray(sections["total"].samples)
    engine = sum(np.asarray(sections[name].samples) for name in ("vision", "language", "action_head"))
    decision = 118.0 * speed * noise(120, rng) + 1.5
    decision[[40, 41, 97]] *= 1.8
    waited = rng.uniform(0, 1000 / 30, len(decision))
    soaked = 118.0 * speed * noise(3000, rng) * np.linspace(1, 1.06, 3000)
    fingerprint = made_fingerprint()
    loop = Loop(
        ticks=len(decision),
        misses=int((decision > 200).sum()),
        skipped=1,
        reaction=Timing.of((decision + waited).tolist()),
        decision=Timing.of(decision.tolist()),
        period=Timing.of((200 + rng.normal(0, 0.4, len(decision) - 1)).tolist()),
    )
    result = Result(
        schema=SCHEMA,
        jetvla="0.1.0",
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        partial=False,
        stopped=None,
        bundle=Bundle(
            name="made-up.bundle",
            manifest_sha256="5eed" * 16,
            jetvla="0.1.0",
            precision="fp16",
            stage_precision={"vision": "fp16", "language": "fp16", "action_head": "fp32"},
            backend="trt",
            packing="upstream",
            parity=Parity(
                verdict="PASS",
                backend="trt",
                frames=24,
                feature_cosine=0.9999991,
                feature_max_error=0.0021,
                action_max_error=0.0013,
            ),
        ),
        settings=Settings(
            steps=steps,
            warmup=5,
            minutes=6.0,
            deadline_ms=200.0,
            rate_hz=5.0,
            threads=0,
            instruction=INSTRUCTION,
            frames="made-up episode, 96 frames, schema v1",
            frame_size=(720, 1280),
            sequence=88,
        ),
        fingerprint=fingerprint,
        start=Start(loaded_s=7.91, first_action_s=8.16),
        layers={
            "engine": Timing.of((0.97 * engine).tolist()),
            "io": Timing.of(engine.tolist()),
            "step": Timing.of(step.tolist()),
            "loop": Timing.of(decision.tolist()),
        },
        sections=sections,
        harness_ms=0.021,
        loop=loop,
        soak=Soak(minutes=6.0, step=Timing.of(soaked.tolist()), first=118.4, last=125.3, rss_growth_mb=0.4),
        memory=Memory(
            rss_mb=1910.0,
            rss_peak_mb=2640.0,
            gpu_mb=3480.0,
            python_kb_per_step=31.0,
            blocks_per_step=0.0,
            page_faults_per_step=0.2,
        ),
        energy=Energy(sensor="VDD_IN (INA3221)", joules_per_step=2.31, watts=19.4, note=""),
        clock_jumps=(),
        baselines=(
            Baseline(
                name="eager-fp16",
                about="PyTorch eager fp16, one frame",
                ours=Timing.of((118 * noise(20, rng)).tolist()),
                theirs=Timing.of((402 * noise(20, rng)).tolist()),
                ratio=(0.294, 0.288, 0.301),
            ),
            Baseline(
                name="eager-fp16-window",
                about="PyTorch eager fp16, the whole window",
                ours=Timing.of((118 * noise(20, rng)).tolist()),
                theirs=Timing.of((2970 * noise(20, rng)).tolist()),
                ratio=(0.0397, 0.0391, 0.0404),
                frames=8,
            ),
            Baseline(
                name="eager-fp32",
                about="PyTorch eager fp32, one frame",
                skipped="out of memory: the model takes 6.7 GB, 5.9 GB are free",
            ),
        ),
        plan=Plan(
            device="Made-up Orin NX 16 GB, 25W",
            calibrated=False,
            stages={
                "vision": StageFloor(gflop=182.0, mbytes=640.0, floor_ms=9.1, expected_ms=31.0, bottleneck="compute"),
                "language": StageFloor(
                    gflop=190.0, mbytes=2460.0, floor_ms=24.0, expected_ms=58.0, bottleneck="memory"
                ),
                "action_head": StageFloor(gflop=0.1, mbytes=50.0, floor_ms=0.5, expected_ms=1.9, bottleneck="memory"),
            },
        ),
        drive=_made_drive(rng),
        verdict=judge(
            step=sections["total"],
            loop=loop,
            deadline_ms=200.0,
            backend="trt",
            fallback=(),
            fingerprint=fingerprint,
            harness_ms=0.021,
            clock_jumps=(),
            partial=False,
        ),
    )
    return msgspec.structs.replace(result, **changes)


def _made_drive(rng: np.random.Generator) -> Drive:
    time = np.arange(96) / 10
    recorded = np.stack([0.6 + 0.5 * np.tanh(time - 1), 0.4 * np.sin(time / 2)], axis=1)
    recorded = np.clip(np.round(recorded / 0.115) * 0.115, -1.15, 1.15)
    predicted = recorded + rng.normal(0, 0.06, recorded.shape)
    return Drive(
        episode="made-up.h5",
        instruction=INSTRUCTION,
        fps=10.0,
        axes=("linear_x", "linear_y"),
        units=("m/s", "m/s"),
        predicted=tuple(map(tuple, predicted.tolist())),
        recorded=tuple(map(tuple, recorded.tolist())),
    )
