"""Compares a plan with measured times: of a bundle that is run here and now, or of a latency result that kept its plan.

An error is expected over measured less one: positive where the planner was too careful. Knows nothing about how plans are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.planning import PolicyPlan
from bench.results import Result
from bench.workload import STAGES
from bundle.errors import ConfigError
from bundle.manifest import Manifest
from runtime.golden import Golden
from runtime.policy import Policy
from runtime.prompt import choose_bucket, layout, pad_tokens


@dataclass(frozen=True)
class Deviation:
    """Of one stage, milliseconds; `measured_ms` is the median."""

    stage: str
    expected_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        return self.expected_ms / self.measured_ms - 1


def run_stages(policy: Policy, golden: Golden, steps: int, *, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of every stage of a loaded policy, on the bundle's golden step.

    Raises:
        ConfigError: the backend cannot tell its stages apart.
        BackendError: a step failed.
    """
    policy.reset(token_ids=[int(token) for token in golden.token_ids])
    timings = [policy.step_resized(golden.frames).timing for _ in range(warmup + steps)][warmup:]
    missing = [stage for stage in STAGES if stage not in timings[0]]
    if missing:
        raise ConfigError(
            f"{policy.backend} cannot tell its stages apart", got=f"no time of {', '.join(missing)}",
            expected="a time for every stage", hint="check with --backend ort:cpu.",
        )  # fmt: skip
    return {stage: float(np.median([timing[stage] for timing in timings])) for stage in STAGES}


def golden_bucket(manifest: Manifest, golden: Golden) -> int:
    """Slots of the language graph that the golden step takes, which is what `run_stages` runs."""
    prompt, dims = manifest.prompt, manifest.dimensions
    slots = layout(
        pad_tokens([int(token) for token in golden.token_ids], prompt.pad_to, prompt.pad_id),
        packing=prompt.packing,
        image_tokens=dims.image_tokens * len(manifest.preprocessing.cameras),
        latent=dims.latent,
        pad_id=prompt.pad_id,
    )
    return choose_bucket(slots.length, prompt.buckets)


def deviations(plan: PolicyPlan, measured: dict[str, float]) -> tuple[Deviation, ...]:
    """Of a plan that was just made."""
    return tuple(Deviation(stage.stage, stage.expected_ms, measured[stage.stage]) for stage in plan.stages)


def kept_deviations(result: Result, path: Path) -> tuple[Deviation, ...]:
    """Of the plan that a latency result kept.

    Raises:
        ConfigError: it has none, or no times by stage.
    """
    expected = {} if result.plan is None else {name: floor.expected_ms for name, floor in result.plan.stages.items()}
    found = tuple(
        Deviation(stage, expected[stage], result.sections[stage].p50)
        for stage in STAGES
        if stage in expected and stage in result.sections
    )
    if not found:
        why = "no plan" if not expected else "no times by stage"
        raise ConfigError(
            f"{path} has nothing to compare",
            got=f"{why}{': ' + result.plan.note if result.plan is not None and not expected else ''}",
            expected="a plan, and a time for every stage",
            hint="measure with bench/latency.py, plan included, on a backend that times its stages (ort:cpu).",
        )
    return found
