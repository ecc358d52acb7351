"""The machine that a plan is for: one of the table, or the present one as far as probes or its own description tell.

Knows how to answer `--device`, `--power` and `--device here`; the numbers themselves are in bench/devices.py and bench/calibration.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.calibration import ON_CPU, Calibration, Measured, load_calibration
from bench.devices import DEVICES, Device, Family, Mode, find_device, find_mode
from bench.nearest import unknown
from bench.nvml import open_nvml
from bench.probes import machine_of, measure
from bench.roofline import Derated, Peak, Precision, Rates
from bench.workload import STAGES, Op, Workload, stage_ops
from runtime.backends.ort import PROVIDERS

# fp32 operations a clock and core by what the CPU says it can, best first: two fused multiply-adds of its vector width.
_FLAGS = (("avx512f", 64), ("avx2", 32), ("asimd", 16))
_OTHER = 8
_CORE_GBPS, _MOST_GBPS = 10.0, 50.0


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        name: with the power mode, if it has several.
        basis: one sentence on where the expectation comes from.
        memory_gb: in all; None if unknown.
    """

    name: str
    family: Family
    peak: Peak
    rates: Rates
    calibrated: bool
    basis: str
    memory_gb: float | None
    notes: tuple[str, ...] = ()


def table_target(key: str, power: str | None) -> Target:
    """A device of the table.

    Raises:
        ConfigError: unknown device or power mode.
    """
    device = find_device(key)
    return _of_table(device, find_mode(device, power))


def _of_table(device: Device, mode: Mode, *notes: str) -> Target:
    derated = device.derated(mode)
    rate = f"{mode.processors} x {mode.mhz:g} MHz, {mode.gbps:g} GB/s, clock: {mode.source}"
    return Target(
        name=f"{device.name}, {mode.name}" if len(device.modes) > 1 else device.name,
        family=device.family,
        peak=derated.peak,
        rates=derated,
        calibrated=False,
        basis=f"{derated.compute:.0%} of the peak rate and {derated.memory:.0%} of the bandwidth, assumed; {rate}",
        memory_gb=device.memory_gb,
        notes=(*notes, *([device.note] if device.note else [])),
    )


def here(
    work: Workload,
    sequence: int,
    precisions: Sequence[dict[str, Precision]],
    *,
    backend: str,
    threads: int,
    calibrate: bool,
    budget_s: float = float("inf"),
    advance: Callable[[str], None] = lambda _: None,
) -> tuple[Target, Calibration | None]:
    """The present machine, from probes.

    Args:
        threads: 0 takes all that this process may use.
        calibrate: probe now, all shapes anew; else a saved calibration is taken as it is, and without one the machine's description.

    Returns:
        The target, and the new calibration if there is one; saving it is up to the caller.

    Raises:
        ConfigError: there is no such backend.
        BackendError: the backend cannot be probed.
    """
    if backend not in PROVIDERS:
        raise unknown("backend", backend, PROVIDERS)
    machine = machine_of(backend, threads or len(os.sched_getaffinity(0)))
    saved = load_calibration(machine)
    new = None
    if calibrate:
        new = measure(machine, wanted(work, sequence, precisions), budget_s=budget_s, advance=advance)
    found = new or saved
    if found is None:
        return (recognised() if backend not in ON_CPU else None) or _described(backend), None
    notes = []
    if found.machine.backend == "numpy":
        notes.append("ONNX Runtime is not installed: numpy's products were measured, and no INT8")
    if not found.steady:
        notes.append(
            f"the machine was busy while probing: its threads got {found.share:.0%} of their CPUs and rates moved by "
            f"{abs(found.drift - 1):.0%}; calibrate again when it is quiet"
        )
    return probed_target(found, *notes), new


def probed_target(calibration: Calibration, *notes: str) -> Target:
    """The present machine as a calibration knows it."""
    machine = calibration.machine
    family: Family = "cpu" if calibration.companion() == "fp32" else "gpu"
    return Target(
        name=f"{machine.processor}, {machine.threads} threads" if family == "cpu" else machine.processor,
        family=family,
        peak=calibration.peak(),
        rates=Measured(calibration),
        calibrated=True,
        basis=f"probes of {calibration.created}, {machine.backend} {machine.version}: products of these shapes",
        memory_gb=_memory_gb() if family == "cpu" else None,
        notes=notes,
    )


def wanted(
    work: Workload, sequence: int, precisions: Sequence[dict[str, Precision]]
) -> list[tuple[tuple[Op, ...], Precision]]:
    """What to probe for a policy: its stages, each in the precisions that were asked for."""
    return [(stage_ops(work, stage, sequence), mixture[stage]) for mixture in precisions for stage in STAGES]


def recognised() -> Target | None:
    """The present GPU or Jetson, if the table has it; its power mode is not asked, the fastest is taken."""
    assumed = "recognised by its name; its fastest clocks are assumed"
    try:
        model = Path("/proc/device-tree/model").read_text(errors="replace").lower()
    except OSError:
        model = ""
    jetsons = [device for device in DEVICES.values() if device.family == "jetson" and not device.key.endswith("super")]
    memory = _memory_gb() or 0.0
    for device in sorted(jetsons, key=lambda device: abs(device.memory_gb - memory)):
        kind = re.sub(r"-\d+gb$", "", device.key).replace("-", " ")
        if all(re.search(rf"\b{word}\b", model) for word in kind.split()):
            return _of_table(device, device.modes[0], assumed)
    with open_nvml() as gpu:
        name = (gpu.name or "").lower()
    for device in DEVICES.values():
        if device.family == "gpu" and re.search(rf"\b{device.key.replace('-', ' ')}\b", name):
            return _of_table(device, device.modes[0], assumed)
    return None


def _described(backend: str) -> Target:
    """This CPU as it describes itself, for want of probes."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    words = set(text.split())
    rate = next((rate for flag, rate in _FLAGS if flag in words), _OTHER)
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    mhz = max(clocks, default=2000.0)
    cores = len(os.sched_getaffinity(0))
    flops = rate * mhz * 1e6 * cores
    peak = Peak(
        flops={"fp32": flops, "fp16": flops, "int8": 4 * flops},
        bandwidth=min(_CORE_GBPS * cores, _MOST_GBPS) * 1e9,
        companion="fp32",
    )
    derated = Derated(peak, 0.75, 0.6, 5.0)
    return Target(
        name=f"this machine, {cores} CPUs",
        family="cpu",
        peak=peak,
        rates=derated,
        calibrated=False,
        basis=f"no calibration for {backend}: {derated.compute:.0%} of {cores} x {mhz:.0f} MHz x {rate} operations a clock, "
        f"and {peak.bandwidth / 1e9:.0f} GB/s, assumed",
        memory_gb=_memory_gb(),
        notes=("run with --calibrate to measure this machine",),
    )


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return None
