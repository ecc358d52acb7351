"""A plan: what every stage costs on a machine in a precision, whether that meets the deadline, and what memory it takes.

`make_plan` is the whole of it; `plan_here` is the short form for a latency report. Knows nothing about how machines are described
(bench/targets.py) or how plans are shown (bench/plan_view.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from bench.calibration import load_calibration, save_calibration
from bench.nearest import unknown
from bench.probes import machine_of, measure, unprobed
from bench.results import Plan, StageFloor
from bench.roofline import PRECISIONS, Precision, floor, moved_bytes, weight_bytes
from bench.targets import Target, probed_target, recognised, wanted
from bench.workload import STAGES, Workload, io_bytes, stage_ops, workload_of
from bundle.errors import ConfigError, JetvlaError
from bundle.manifest import Manifest

Outcome = Literal["meets", "misses", "impossible", "does not fit"]
# Gigabytes that the process takes beside weights: Python and the runtime's libraries, on a GPU also its context; and what the system itself
# takes of a Jetson's shared memory. Assumptions.
_PROCESS_GB = {"jetson": 0.9, "gpu": 0.6, "cpu": 0.2}
_SYSTEM_GB = {"jetson": 1.5, "gpu": 0.4, "cpu": 1.0}
# An engine build holds the weights of its stage about twice: the language engine (2.42 GB) took 5.6 GB, vision (0.62 GB) 1.7 GB.
_BUILD_COPIES, _BUILD_GB = 2.0, 0.75
_PROBE_S = 7.0


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        weights_mb, activations_mb: 1e6 bytes; activations as if each were written and read once.
        floor_ms, expected_ms, bottleneck: see bench/roofline.py.
    """

    stage: str
    precision: Precision
    gflop: float
    weights_mb: float
    activations_mb: float
    floor_ms: float
    expected_ms: float
    bottleneck: Literal["compute", "memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """Gigabytes (1e9).

    Attributes:
        run: of the loaded policy's process.
        build: of the largest engine build; loading a session on a CPU.
        usable: what the machine has left for it; None if unknown.
    """

    run: float
    build: float
    usable: float | None

    @property
    def fits(self) -> bool:
        return self.usable is None or self.run <= self.usable


@dataclass(frozen=True)
class PolicyPlan:
    """One choice of precisions on one machine."""

    label: str
    stages: tuple[StagePlan, ...]
    memory: MemoryPlan
    deadline_ms: float

    @property
    def floor_ms(self) -> float:
        return sum(stage.floor_ms for stage in self.stages)

    @property
    def expected_ms(self) -> float:
        return sum(stage.expected_ms for stage in self.stages)

    @property
    def outcome(self) -> Outcome:
        if not self.memory.fits:
            return "does not fit"
        if self.expected_ms <= self.deadline_ms:
            return "meets"
        return "misses" if self.floor_ms <= self.deadline_ms else "impossible"


def make_plan(
    work: Workload, sequence: int, mixture: dict[str, Precision], target: Target, deadline_ms: float
) -> PolicyPlan:
    """What a tick of a policy costs on a machine.

    Args:
        sequence: slots of the language graph.
        mixture: precision by stage.
    """
    stages = []
    companion = target.peak.companion
    for stage in STAGES:
        precision = mixture[stage]
        ops = stage_ops(work, stage, sequence)
        bound = floor(ops, target.peak, precision, io_bytes(work, stage, sequence))
        stages.append(
            StagePlan(
                stage=stage,
                precision=precision,
                gflop=sum(op.flops for op in ops) / 1e9,
                weights_mb=sum(weight_bytes(op, precision, companion) for op in ops) / 1e6,
                activations_mb=sum(moved_bytes(op, precision, companion) for op in ops) / 1e6,
                floor_ms=bound.ms,
                expected_ms=max(bound.ms, target.rates.stage_ms(ops, precision, work.nodes.get(stage, 0))),
                bottleneck=bound.bottleneck,
            )
        )
    return PolicyPlan(label(mixture), tuple(stages), _memory(work, sequence, mixture, target), deadline_ms)


def parse_precisions(text: str | None, manifest: Manifest | None) -> tuple[dict[str, Precision], ...]:
    """Choices of precision by stage, from `fp16,int8` or `vision=fp16,language=int8`, or of a bundle for None.

    A plain precision is for vision and language; the action head stays fp32, as it does in bundles, unless it is named. What a mixture
    does not name stays as in the bundle, fp16 without one.

    Raises:
        ConfigError: an unknown stage or precision; the message suggests the nearest.
    """
    built: dict[str, Precision] = {"vision": "fp16", "language": "fp16", "action_head": "fp32"}
    if manifest is not None:
        built = {stage: manifest.stages[stage].precision for stage in STAGES}
    if text is None:
        return (built,) if manifest is not None else (built, built | {"language": "int8"})
    choices: list[dict[str, Precision]] = []
    mixed: dict[str, Precision] = {}
    for part in (part.strip() for part in text.split(",")):
        stage, equals, name = part.rpartition("=")
        precision = _precision(name.strip())
        if equals:
            if stage.strip() not in STAGES:
                raise unknown("stage", stage.strip(), STAGES)
            mixed[stage.strip()] = precision
        else:
            choices.append({"vision": precision, "language": precision, "action_head": "fp32"})
    return (*choices, *([built | mixed] if mixed else []))


def label(mixture: dict[str, Precision]) -> str:
    """`fp16`, or `vision fp16, language int8`; the action head is named where it is not fp32."""
    parts: list[str] = [mixture["vision"]]
    if mixture["vision"] != mixture["language"]:
        parts = [f"vision {mixture['vision']}", f"language {mixture['language']}"]
    return ", ".join([*parts, *([f"action_head {mixture['action_head']}"] if mixture["action_head"] != "fp32" else [])])


def plan_here(manifest: Manifest, sequence: int, *, threads: int, backend: str) -> Plan:
    """What the planner says of the present machine: with a saved calibration, else with probes of some seconds. Never fails.

    A backend that has no probes (`trt`) gets the table's word if the machine is in it. Where there is nothing to say, the plan has no
    stages and a note that says why.
    """
    work = workload_of(manifest)
    (mixture,) = parse_precisions(None, manifest)
    if backend == "ort:openvino" and "int8" in mixture.values():
        # Its probe is an operator that OpenVINO does not take; the floor of another precision would be a lie.
        return Plan(device="unknown", calibrated=False, stages={}, note=f"there is no INT8 probe for {backend}")
    try:
        target = _target(work, sequence, mixture, threads, backend)
    except (JetvlaError, OSError, MemoryError) as error:
        what = error.what if isinstance(error, JetvlaError) else str(error) or type(error).__name__
        return Plan(device="unknown", calibrated=False, stages={}, note=f"this machine could not be probed: {what}")
    if target is None:
        note = f"there are no probes for {backend}, and the table of devices does not have this machine"
        return Plan(device="unknown", calibrated=False, stages={}, note=note)
    return short(make_plan(work, sequence, mixture, target, 0.0), target, *work.notes)


def short(plan: PolicyPlan, target: Target, *notes: str) -> Plan:
    """A plan in the form that results keep."""
    stages = {
        stage.stage: StageFloor(
            gflop=stage.gflop,
            mbytes=stage.weights_mb + stage.activations_mb,
            floor_ms=stage.floor_ms,
            expected_ms=stage.expected_ms,
            bottleneck=stage.bottleneck,
        )
        for stage in plan.stages
    }
    note = "; ".join([target.basis, *target.notes, *notes])
    return Plan(device=target.name, calibrated=target.calibrated, stages=stages, note=note)


def _target(work: Workload, sequence: int, mixture: dict[str, Precision], threads: int, backend: str) -> Target | None:
    if not backend.startswith("ort"):
        return recognised() if backend == "trt" else None
    machine = machine_of(backend, threads or len(os.sched_getaffinity(0)))
    saved = load_calibration(machine)
    stages = wanted(work, sequence, (mixture,))
    if saved is not None and not unprobed(stages, machine.backend, saved):
        return probed_target(saved)
    calibration = measure(machine, stages, budget_s=_PROBE_S, known=saved)
    if calibration.steady:
        save_calibration(calibration)
    if "int8" in mixture.values() and unprobed(stages, machine.backend, calibration):
        # Rates of other precisions would stand in, and a floor that is four times too high is none.
        raise ConfigError(
            f"the probes of INT8 did not finish in {_PROBE_S:g} s",
            expected="a calibration of this machine",
            hint="python bench/plan.py BUNDLE --device here --calibrate takes its time.",
        )
    return probed_target(calibration, *([] if calibration.steady else ["the machine was busy while probing"]))


def _memory(work: Workload, sequence: int, mixture: dict[str, Precision], target: Target) -> MemoryPlan:
    companion = target.peak.companion
    weights = {
        stage: sum(weight_bytes(op, mixture[stage], companion) for op in stage_ops(work, stage, sequence)) / 1e9
        for stage in STAGES
    }
    if target.family == "cpu":
        # ONNX Runtime keeps an fp16 stage's weights in fp32 beside the file that it maps.
        weights = {stage: gb * (3 if mixture[stage] == "fp16" else 1.05) for stage, gb in weights.items()}
    largest = max((op.moved + op.moved_island) * 4 for stage in STAGES for op in stage_ops(work, stage, sequence))
    run = sum(weights.values()) + 4 * largest / 1e9 + _PROCESS_GB[target.family]
    build = run if target.family == "cpu" else _BUILD_COPIES * max(weights.values()) + _BUILD_GB
    usable = None if target.memory_gb is None else target.memory_gb - _SYSTEM_GB[target.family]
    return MemoryPlan(run=run, build=build, usable=usable)


def _precision(name: str) -> Precision:
    for precision in PRECISIONS:
        if precision == name:
            return precision
    raise unknown("precision", name, PRECISIONS)
