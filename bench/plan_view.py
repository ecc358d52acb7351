"""Shows plans: tables for people, plain data for programs.

Knows nothing about how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.devices import DEVICES
from bench.plan_check import Deviation
from bench.planning import PolicyPlan
from bench.targets import Target

_COLORS = {"meets": "green", "misses": "yellow", "impossible": "red", "does not fit": "red"}


def plan_table(plans: Sequence[PolicyPlan]) -> Table:
    """A row for every choice of precision and stage, and one for each sum."""
    table = _table("precision", "stage")
    for column in ("GFLOP", "weights MB", "act. MB", "floor ms", "expected ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for plan in plans:
        for stage in plan.stages:
            table.add_row(
                stage.precision,
                stage.stage,
                f"{stage.gflop:.4g}",
                f"{stage.weights_mb:.0f}",
                f"{stage.activations_mb:.0f}",
                f"{stage.floor_ms:.2f}",
                f"{stage.expected_ms:.2f}",
                stage.bottleneck,
            )
        table.add_row(
            "",
            "tick",
            f"{sum(stage.gflop for stage in plan.stages):.4g}",
            f"{sum(stage.weights_mb for stage in plan.stages):.0f}",
            "",
            f"{plan.floor_ms:.2f}",
            f"{plan.expected_ms:.2f}",
            "",
            style="bold",
            end_section=True,
        )
    return table


def verdict(plan: PolicyPlan) -> Text:
    """One line on one choice."""
    memory = plan.memory
    usable = "" if memory.usable is None else f" of {memory.usable:.1f}"
    room = "" if memory.usable is None or memory.build <= memory.usable else ", which it lacks: build elsewhere"
    words = {
        "meets": f"meets {plan.deadline_ms:g} ms, expected {plan.expected_ms:.0f}",
        "misses": f"misses {plan.deadline_ms:g} ms: expected {plan.expected_ms:.0f}, though the floor is {plan.floor_ms:.0f}",
        "impossible": f"cannot meet {plan.deadline_ms:g} ms: the floor is {plan.floor_ms:.0f}",
        "does not fit": f"does not fit: needs {memory.run:.1f} GB",
    }
    text = Text(f"{plan.label}: ")
    text.append(words[plan.outcome], style=_COLORS[plan.outcome])
    text.append(f"; memory {memory.run:.1f}{usable} GB to run, {memory.build:.1f} GB to build{room}")
    return text


def check_table(found: Sequence[Deviation]) -> Table:
    """Expected against measured."""
    table = _table("stage")
    for column in ("expected ms", "measured ms", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        table.add_row(one.stage, f"{one.expected_ms:.2f}", f"{one.measured_ms:.2f}", f"{one.error:+.0%}")
    return table


def device_table() -> Table:
    """All devices with their modes; the first mode of a device is what is taken."""
    table = _table("--device", "--power")
    for column in ("TFLOPS fp16", "TOPS int8", "GB/s", "GB", "MHz"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("clock", no_wrap=True)
    for device in DEVICES.values():
        for index, mode in enumerate(device.modes):
            flops = device.peak(mode).flops
            table.add_row(
                device.key if index == 0 else "",
                mode.name if len(device.modes) > 1 else "",
                f"{flops['fp16'] / 1e12:.1f}",
                f"{flops['int8'] / 1e12:.1f}",
                f"{mode.gbps:g}",
                f"{device.memory_gb:g}" if index == 0 else "",
                f"{mode.mhz:.0f}",
                mode.source,
            )
    table.add_row("here", "", "", "", "", "", "", "probes")
    return table


def _table(*columns: str) -> Table:
    """Narrow enough for 80 columns, and never wrapped."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def plan_json(target: Target, plans: Sequence[PolicyPlan], sequence: int, notes: Sequence[str]) -> dict[str, Any]:
    """Everything that the tables show."""
    return {
        "device": target.name,
        "calibrated": target.calibrated,
        "basis": target.basis,
        "notes": list(notes),
        "sequence": sequence,
        "plans": [
            {
                "precision": plan.label,
                "floor_ms": plan.floor_ms,
                "expected_ms": plan.expected_ms,
                "deadline_ms": plan.deadline_ms,
                "outcome": plan.outcome,
                "memory_gb": {"run": plan.memory.run, "build": plan.memory.build, "usable": plan.memory.usable},
                "stages": [vars(stage) for stage in plan.stages],
            }
            for plan in plans
        ],
    }


def check_json(found: Sequence[Deviation]) -> list[dict[str, Any]]:
    """Everything that the table shows."""
    return [{**vars(one), "error": one.error} for one in found]


def devices_json() -> list[dict[str, Any]]:
    """The table of devices."""
    return [
        {
            "device": device.key,
            "name": device.name,
            "memory_gb": device.memory_gb,
            "note": device.note,
            "modes": [
                {**vars(mode), "flops": dict(device.peak(mode).flops), "bandwidth": mode.gbps * 1e9}
                for mode in device.modes
            ],
        }
        for device in DEVICES.values()
    ]
