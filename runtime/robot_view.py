"""What a person reads before and after a run: the plan in words and units, and how regular it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from bundle.errors import CommandError
from runtime.cadence import Summary
from runtime.commands.base import TWIST_FIELDS
from runtime.drive import Plan
from runtime.robot_file import Axis, kind_of
from runtime.ros_names import resolve_domain

_DIRECTIONS = {
    "linear_x": ("forward", "backward"),
    "linear_y": ("left", "right"),
    "linear_z": ("up", "down"),
    "angular_x": ("rolls right", "rolls left"),
    "angular_y": ("pitches down", "pitches up"),
    "angular_z": ("turns left", "turns right"),
}


def plan_lines(plan: Plan, *, dry_run: bool) -> list[str]:
    """The plan, a line each: where commands go, what each axis does, when the robot stops."""
    robot, safety, pace = plan.robot, plan.limits.safety, plan.pace
    target = "nowhere (dry run)" if dry_run else f"{kind_of(robot.commands)} {_where(plan)}".rstrip()
    cameras = " and ".join(
        f"{'' if name == 'static' else f'{name} '}camera {kind_of(camera)}" for name, camera in plan.cameras.items()
    )
    lines = [
        f"robot {robot.name}: {cameras}, commands to {target}",
        f"{pace.decide_hz:g} decisions and {pace.publish_hz:g} commands a second, {robot.loop.strategy}",
    ]
    warnings: list[str] = []
    for name in plan.manifest.action.names:
        axis = robot.axes[name]
        index = TWIST_FIELDS.index(axis.field)
        unit = "m/s" if axis.field.startswith("linear") else "rad/s"
        speed, acceleration = plan.limits.max_speed[index], plan.limits.max_acceleration[index]
        lines.append(
            f"policy {name} +1 -> {axis.gain:g} {unit} {_DIRECTIONS[axis.field][axis.invert]}; at most {speed:.3g} {unit}, "
            f"{acceleration:.3g} {unit}\N{SUPERSCRIPT TWO}"
        )
        warnings += _warnings(name, axis, unit, speed, acceleration)
    lines.append(
        f"stops within {safety.stop_within_s:g} s when a frame is older than {safety.stale_frame_s:g} s or an action older than "
        f"{safety.stale_action_s:g} s; the watchdog after {safety.watchdog_s:g} s of silence"
    )
    if robot.recorder is not None and "hand" in plan.cameras:
        lines.append(
            "warning: the hand camera's pictures are not recorded, so the recording is no episode of this policy"
        )
    lines += warnings
    fps = plan.manifest.fps
    if fps is not None and abs(pace.decide_hz / fps - 1) > 0.1:
        lines.append(
            f"warning: trained at {fps:g} frames a second, deciding at {pace.decide_hz:g}: the history means something else"
        )
    return lines


def _warnings(name: str, axis: Axis, unit: str, speed: float, acceleration: float) -> Iterator[str]:
    """Of numbers that may be meant, and mostly are not."""
    if speed > (1.0 if unit == "m/s" else 2.0):
        yield f"warning: {name} may reach {speed:.3g} {unit}, faster than a person walks around a robot"
    if acceleration > 3.0:
        yield f"warning: {name} may change by {acceleration:.3g} {unit} in a second, which tips loads"
    if axis.gain > 4 * speed:
        yield f"warning: {name} is limited to {speed:.3g} of {axis.gain:.3g} {unit}: nearly all commands will look alike"


def summary_table(summary: Summary) -> Table:
    """The summary for people."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    jitter, overhead, spacing = summary.jitter_ms, summary.overhead_ms, summary.spacing_ms
    table.add_row(
        "commands", f"{summary.published} in {summary.seconds:.1f} s, {summary.late_ticks} rounds a period late"
    )
    table.add_row("jitter", f"p50 {jitter['p50']:.2f}  p99 {jitter['p99']:.2f}  max {jitter['max']:.2f} ms")
    table.add_row("a round took", f"p50 {overhead['p50']:.2f}  p99 {overhead['p99']:.2f}  max {overhead['max']:.2f} ms")
    table.add_row(
        "decisions",
        f"{summary.decisions} = {summary.decide_hz:.2f} Hz of {summary.wanted_decide_hz:g}, {summary.missed} deadlines missed, "
        f"{summary.failed} failed",
    )
    table.add_row(
        "frame spacing",
        f"p50 {spacing['p50']:.0f}  p95 {spacing['p95']:.0f} ms; trained with {1000 / summary.wanted_decide_hz:.0f}",
    )
    for name, share in summary.section_share.items():
        table.add_row(name, f"p50 {summary.section_ms[name]:.2f} ms, {share:.0%} of a decision")
    for reason, seconds in sorted(summary.held_back_s.items(), key=lambda item: -item[1]):
        if seconds >= 0.1:
            table.add_row("held back", f"{reason}: {seconds:.1f} s")
    table.add_row("camera", _camera(summary.camera))
    if "hand" in summary.camera:
        table.add_row("hand camera", _camera(summary.camera["hand"]))
    table.add_row("last command", "zero" if summary.zero_sent else "not a zero: it could not be sent")
    return table


def _camera(counts: Mapping[str, Any]) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in counts["refused"].items())
    lost = (
        f"; opened again {counts['reconnects']} times, last because: {counts['last_error']}"
        if counts["reconnects"]
        else ""
    )
    return f"{counts['taken']} pictures, {counts['fps']:.1f} a second lately, refused: {refused or 'none'}{lost}"


def _where(plan: Plan) -> str:
    commands = plan.robot.commands
    topic = getattr(commands, "topic", None)
    if topic is not None:
        return f"{topic} in domain {resolve_domain(getattr(commands, 'domain', None), CommandError)}"
    return f"{getattr(commands, 'host', '')}:{getattr(commands, 'port', '')}".strip(":")
