"""What a latency report says: the result's parts as rows of text, and its pictures; the page only places them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import figures
from bench.results import Drive, Energy, Memory, Result

_STAGES = ("preprocess", "vision", "language", "action_head", "glue")


def content(result: Result) -> dict[str, Any]:
    """Variables of report_page.html.jinja, by name."""
    judged = result.loop.decision if result.loop else result.sections["total"]
    fingerprint, plan = result.fingerprint, result.plan
    device = next(
        (fact.value for name in ("device", "cpu") if (fact := fingerprint.machine.get(name)) and fact.value), ""
    )
    return {
        "result": result,
        "device": device or "unknown machine",
        "judged_timing": judged,
        "keys": _keys(result),
        "figures": _figures(result),
        "stages": [
            (name, floor, result.sections[name].p50 if name in result.sections else None)
            for name, floor in (plan.stages.items() if plan else ())
        ],
        "drive": _drive(result.drive) if result.drive else [],
        "start": [
            ("loaded, hashes and golden step included", f"{result.start.loaded_s:.2f} s"),
            ("first action", f"{result.start.first_action_s:.2f} s"),
        ],
        "memory": _memory(result.memory),
        "energy": _energy(result.energy),
        "parity": _parity(result),
        "states": [
            (name, fingerprint.before.get(name), fingerprint.after.get(name))
            for name in dict.fromkeys((*fingerprint.before, *fingerprint.after))
        ],
        "settings": _settings(result),
        "bundle": _bundle(result),
    }


def _keys(result: Result) -> list[tuple[str, str, str]]:
    """(label, number, unit) of what one looks for first."""
    judged, total = result.loop.decision if result.loop else None, result.sections["total"]
    keys = [("step, p50", f"{total.p50:.1f}", "ms"), ("step, p99", f"{total.p99:.1f}", "ms")]
    if judged and result.loop:
        keys += [
            ("tick to command, p99", f"{judged.p99:.1f}", "ms"),
            ("ticks late", f"{result.loop.miss_rate:.1%}", f"of {result.loop.ticks + result.loop.skipped}"),
        ]
    keys.append(("first action after", f"{result.start.first_action_s:.1f}", "s"))
    if result.memory:
        keys.append(("memory, peak", f"{result.memory.rss_peak_mb / 1e3:.2f}", "GB"))
    if result.energy and result.energy.joules_per_step is not None:
        keys.append(("energy", f"{result.energy.joules_per_step:.2f}", "J a step"))
    return keys


def _figures(result: Result) -> dict[str, Any]:
    """Pictures by name, as markup; none without matplotlib."""
    if not figures.available():
        return {}
    from markupsafe import Markup  # jinja2 brings it

    deadline = result.settings.deadline_ms
    total = result.sections["total"]
    drawn = {
        "histogram": figures.histogram(
            result.loop.decision if result.loop else total,
            deadline,
            "histogram",
            of="decisions" if result.loop else "steps",
        ),
        "timeline": figures.timeline(total, deadline, "timeline", x_label="step"),
        "stages": figures.stage_bars(
            result.sections,
            result.plan.stages if result.plan else {},
            [name for name in _STAGES if name in result.sections],
            "stages",
        ),
    }
    if result.loop:
        drawn["loop"] = figures.timeline(result.loop.decision, deadline, "loop", x_label="tick")
    if result.soak:
        drawn["soak"] = figures.timeline(
            result.soak.step, deadline, "soak", x_label="minutes", last=result.soak.minutes
        )
    if result.drive:
        predicted, recorded = _columns(result.drive)
        for index in range(len(result.drive.axes)):
            name = f"drive{index}"
            drawn[name] = figures.driven(predicted[:, index], recorded[:, index], result.drive.fps, name)
    # Ours: foreign text is not drawn.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _columns(drive: Drive) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted and recorded commands, float64 [T, axes], of the frames that have both."""
    count = min(len(drive.predicted), len(drive.recorded))
    shape = (count, len(drive.axes))
    return (
        np.array(drive.predicted[:count], np.float64).reshape(shape),
        np.array(drive.recorded[:count], np.float64).reshape(shape),
    )


def _drive(drive: Drive) -> list[dict[str, Any]]:
    predicted, recorded = _columns(drive)
    if not len(predicted):
        return []
    rmse = np.sqrt(((predicted - recorded) ** 2).mean(axis=0))
    return [
        {
            "name": name,
            "unit": unit,
            "rmse": float(rmse[index]),
            "predicted": float(predicted[:, index].mean()),
            "recorded": float(recorded[:, index].mean()),
        }
        for index, (name, unit) in enumerate(zip(drive.axes, drive.units, strict=True))
    ]


def _memory(memory: Memory | None) -> list[tuple[str, str]]:
    if memory is None:
        return [("memory", "not measured")]
    gpu = "missing: no GPU, or it does not tell" if memory.gpu_mb is None else f"{memory.gpu_mb:.0f} MB"
    return [
        ("resident, mapped weights included", f"{memory.rss_mb:.0f} MB"),
        ("resident, peak", f"{memory.rss_peak_mb:.0f} MB"),
        ("on the GPU", gpu),
        ("Python allocates in a step", f"{memory.python_kb_per_step:.0f} kB at its peak"),
        ("Python objects left by a step", f"{memory.blocks_per_step:.2f}"),
        ("page faults of a step", f"{memory.page_faults_per_step:.2f}"),
    ]


def _energy(energy: Energy | None) -> list[tuple[str, str]]:
    if energy is None or energy.joules_per_step is None or energy.watts is None:
        return [("energy", f"missing: {energy.note}" if energy and energy.note else "not measured")]
    rows = [
        ("a step, idle power included", f"{energy.joules_per_step:.3g} J"),
        ("mean power", f"{energy.watts:.1f} W"),
        ("sensor", energy.sensor or "unknown"),
    ]
    return [*rows, ("note", energy.note)] if energy.note else rows


def _parity(result: Result) -> list[tuple[str, str]]:
    parity = result.bundle.parity
    return [
        ("verdict", parity.verdict),
        ("judged on", f"{parity.backend}, {parity.frames} frames"),
        ("feature: 1 - cosine, worst", f"{1 - parity.feature_cosine:.2g}"),
        ("feature: error, worst", f"{parity.feature_max_error:.2g}"),
        ("action: error, worst, in -1..1", f"{parity.action_max_error:.2g}"),
    ]


def _settings(result: Result) -> list[tuple[str, str]]:
    settings = result.settings
    return [
        ("steps, after warm-up", f"{settings.steps}, after {settings.warmup}"),
        ("soak", f"{settings.minutes:g} minutes" if settings.minutes else "none"),
        ("deadline", f"{settings.deadline_ms:g} ms"),
        ("rate", f"{settings.rate_hz:g} Hz"),
        ("threads", str(settings.threads) if settings.threads else "all"),
        ("instruction", settings.instruction),
        ("slots of the instruction's graph", str(settings.sequence)),
        ("frames", settings.frames),
        ("frame size", f"{settings.frame_size[1]}x{settings.frame_size[0]}"),
    ]


def _bundle(result: Result) -> list[tuple[str, str]]:
    bundle = result.bundle
    jumps = ", ".join(f"{jump:+.2f} s" for jump in result.clock_jumps)
    return [
        ("bundle", bundle.name),
        ("manifest", bundle.manifest_sha256),
        ("built by", f"jetvla {bundle.jetvla}"),
        ("precision", ", ".join(f"{name} {precision}" for name, precision in bundle.stage_precision.items())),
        ("packing", bundle.packing),
        ("backend", bundle.backend),
        ("harness adds to a step", f"{result.harness_ms:.3f} ms"),
        ("wall clock jumps, or sleep", f"{jumps}; times are monotonic and do not move" if jumps else "none"),
    ]
