"""The robot's doctor: looks at camera, bundle and robot file together, moves nothing, and says what would go wrong on a run.

`run_robot.py BUNDLE --robot ROBOT --doctor`. It prints one block that can be pasted into a bug report as it is, and draws doctor.png, the
picture that a person has to look at. Commands are only described: a command sink is opened for its listeners, and only where that is asked
for. The policy is not loaded.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from bundle.atomic import write_bytes
from bundle.errors import CameraError, CommandError, JetvlaError
from bundle.manifest import MANIFEST_NAME, Manifest
from runtime import doctor_machine
from runtime.commands.select import competitors, misfits, open_sink
from runtime.doctor_camera import CameraFindings, watch
from runtime.doctor_picture import draw_doctor
from runtime.drive import make_plan
from runtime.preprocess import resize
from runtime.robot_file import CameraConfig, RobotFile, kind_of
from runtime.robot_view import plan_lines

PICTURE = Path("doctor.png")
_LISTEN_S = 2.0  # how long DDS may take to find who listens
_SLOW = 0.95
_WHITE = 0.5  # of the values
_DULL = 10.0  # sharpness below which a picture has hardly an edge


@dataclass
class _Report:
    """Collects lines under headings, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, heading: str, *lines: str) -> None:
        self.lines += [heading, *(f"  {line}" for line in lines)]

    def problem(self, error: object) -> None:
        """One line; a JetvlaError's own words, with its hint."""
        if isinstance(error, JetvlaError):
            got = "" if error.got is None else f" (got {error.got})"
            error = f"{error.what}{got}; {error.hint}"
        self.problems.append(" ".join(str(error).split()))

    def text(self) -> str:
        problems = [f"  - {problem}" for problem in self.problems] or ["  none found; look at the picture"]
        return doctor_machine.without_home("\n".join(["problems", *problems, *self.lines]))


def examine(
    bundle: Path,
    robot: RobotFile,
    console: Console,
    *,
    out: Path = PICTURE,
    seconds: float = 5.0,
    listeners: bool = False,
    quiet: bool = False,
) -> dict[str, object]:
    """Examine, print the report on stdout, and write the picture.

    Args:
        out: where the picture goes.
        seconds: how long the camera is watched.
        listeners: open the command sink and see who listens; nothing is sent.
        quiet: do not print the report.

    Returns:
        The JSON result: `problems` (empty if nothing was found wrong), `report` (the text), `picture` (its path, or None), `camera`.

    Raises:
        BundleError: the bundle's manifest cannot be read.
        StorageError: the picture cannot be written.
    """
    manifest = Manifest.load(bundle)
    report = _Report()
    with console.status(f"watching the camera for {seconds:g} s"):
        findings = _camera(robot, seconds, report)
        if "hand" in manifest.preprocessing.cameras and robot.hand_camera is not None:
            _camera(msgspec.structs.replace(robot, camera=robot.hand_camera), seconds, report, name="hand camera")
    with console.status("looking at the bundle and at this machine"):
        _rates(manifest, robot, findings, report)
        _bundle(bundle, manifest, report)
        _robot(manifest, robot, report)
        report.add("commands", *_commands(robot, report, listeners=listeners))
        report.add("machine", *doctor_machine.machine_lines())
        report.add("libraries", doctor_machine.library_line())
        report.add("backends", *doctor_machine.backend_lines())
    picture = _picture(manifest, robot, findings, out)
    text = report.text()
    if not quiet:
        print(f"```\n{text}\n```")
    if picture is not None:
        console.print(f"look at {picture}: is it upright, and are its colours right?", markup=False, soft_wrap=True)
    return {
        "problems": report.problems,
        "report": text,
        "picture": None if picture is None else str(picture),
        "camera": {} if findings is None else _numbers(findings),
    }


def _camera(robot: RobotFile, seconds: float, report: _Report, *, name: str = "camera") -> CameraFindings | None:
    config = robot.camera
    report.add(name, described(config))
    try:
        found = watch(config, seconds)
    except CameraError as error:  # what it needs is not installed
        report.problem(error)
        return None
    if found.error is not None:
        report.problem(found.error)
    for note in found.notes:
        report.lines.append(f"  {note.kind}: {note.text}")
    if found.refused:
        report.lines.append("  refused: " + ", ".join(f"{count} {reason}" for reason, count in found.refused.items()))
    if found.frame is None:
        if found.publishers == 0:
            report.problem("nobody publishes the camera's topic: look at its name and type, and at the DDS domain")
        elif found.error is None or found.refused:
            report.problem(f"the {name} gave no good picture" + (f": {_most(found)}" if found.refused else ""))
        return found
    height, width, _ = found.frame.pixels.shape
    ages = "  ".join(f"{name} {age:.0f}" for name, age in found.age_ms.items()) or "unknown"
    report.lines += [
        f"  {width} x {height} upright; {found.fps:.2f} good pictures a second for {found.seconds:.1f} s, usually "
        f"{found.spacing_ms:.0f} ms apart, {found.missing} missing, longest gap {found.longest_gap_s * 1e3:.0f} ms",
        f"  age when handed over: {ages} ms"
        + (
            ""
            if found.frame.source_stamp_s is not None
            else "; the source stamps nothing, so delays before arrival are unknown"
        ),
        f"  brightness {found.brightness:.0f} of 255, {found.dark_share:.0%} black, {found.bright_share:.0%} white; sharpness "
        f"{found.sharpness:.0f} (compare it with a picture that you know is sharp)",
    ]
    if found.longest_gap_s > robot.safety.stale_frame_s:
        report.problem(
            f"the robot would have stopped: no good picture for {found.longest_gap_s:.2f} s, and safety.stale_frame_s is "
            f"{robot.safety.stale_frame_s:g} s"
        )
    if found.bright_share > _WHITE:
        report.problem(
            f"{found.bright_share:.0%} of the picture is white: too much light, or numbers of more than 8 bits that were cut to 8"
        )
    if found.sharpness < _DULL:
        report.problem("the picture has hardly an edge: a covered, fogged or unfocused lens, or an empty wall")
    return found


def _rates(manifest: Manifest, robot: RobotFile, found: CameraFindings | None, report: _Report) -> None:
    decide_hz = robot.loop.decide_hz or manifest.fps
    trained = "an unknown rate" if manifest.fps is None else f"{manifest.fps:g} pictures a second"
    report.lines.append(
        f"  trained on {trained}, decides {'?' if decide_hz is None else f'{decide_hz:g}'} times a second"
    )
    if found is None or found.frame is None or decide_hz is None:
        return
    if found.fps < _SLOW * decide_hz:
        report.problem(
            f"the camera gives {found.fps:.2f} good pictures a second, and the policy decides {decide_hz:g} times"
        )


def _bundle(bundle: Path, manifest: Manifest, report: _Report) -> None:
    prompt, dims, action = manifest.prompt, manifest.dimensions, manifest.action
    folder = bundle.parent if bundle.name == MANIFEST_NAME else bundle
    axes = ", ".join(f"{name} [{unit}]" for name, unit in zip(action.names, action.units, strict=True))
    scale = f"{action.minimum:g} to {action.maximum:g}" if action.normalized else "not scaled"
    report.add(
        "bundle",
        f"{folder.resolve().name}, jetvla {manifest.jetvla}, {manifest.precision}"
        + (", with an INT8 variant" if manifest.quantized is not None else "")
        + f", manifest {manifest.manifest_sha256[:12]}, parity {manifest.parity.verdict}",
        f"packing {prompt.packing} ({prompt.packing_source}), x_attn_causal {str(manifest.x_attn_causal).lower()} "
        f"({manifest.x_attn_causal_source})",
        f"picture: {manifest.preprocessing.color}, {manifest.preprocessing.how} to {dims.image_size} x {dims.image_size}, "
        f"cameras {', '.join(manifest.preprocessing.cameras)}",
        f"window {dims.window}, chunk {dims.chunk}, fps {'unknown' if manifest.fps is None else f'{manifest.fps:g}'}",
        f"action ({action.head}, {scale}): {axes}",
        "instructions: "
        + ("; ".join(repr(instruction.text) for instruction in prompt.instructions) or "none built in"),
    )
    try:
        manifest.verify_sizes(folder)
    except JetvlaError as error:
        report.problem(error)


def _robot(manifest: Manifest, robot: RobotFile, report: _Report) -> None:
    try:
        plan = make_plan(manifest, robot, None)
    except JetvlaError as error:
        report.problem(error)
        report.add("robot", f"{robot.name} does not fit this bundle")
        return
    lines = plan_lines(plan, dry_run=False)
    report.add("robot", *lines)
    for line in lines:
        if line.startswith("warning: "):
            report.problem(line.removeprefix("warning: "))


def _commands(robot: RobotFile, report: _Report, *, listeners: bool) -> list[str]:
    settings = msgspec.to_builtins(robot.commands)
    line = " ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    if not listeners:
        return [line, "who listens was not looked for: the doctor opens no way to the robot unless asked to"]
    try:
        sink = open_sink(robot.commands)
    except CommandError as error:
        report.problem(error)
        return [line]
    try:
        deadline = time.monotonic() + _LISTEN_S
        while not (count := sink.listeners()) and count is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        others, wrong = competitors(sink, wait_s=0.5), misfits(sink)
    finally:
        sink.close()
    for why in wrong:
        report.problem(f"on the topic of the commands, {why}")
    if count == 0 and not wrong:
        report.problem(
            "nobody listens to the commands: is the base's driver running, in the same domain, with the same topic and type?"
        )
    if others:
        report.problem(f"somebody else sends commands to this robot: {'; '.join(others)}")
    return [line, f"listeners: {'cannot be told' if count is None else count}; nothing was sent"]


def described(config: CameraConfig) -> str:
    """A camera's settings in a line, without what may be secret in an address."""
    settings = msgspec.to_builtins(config)
    if "url" in settings:
        try:
            parts = urlsplit(settings["url"])
            settings["url"] = (
                f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?...' if parts.query else ''}"
            )
        except ValueError:
            settings["url"] = "?"
    return " ".join(f"{key}={value}" for key, value in settings.items() if value not in (None, ""))


def _picture(manifest: Manifest, robot: RobotFile, found: CameraFindings | None, out: Path) -> Path | None:
    if found is None or found.frame is None:
        return None
    size, config = manifest.dimensions.image_size, robot.camera
    pixels = found.frame.pixels
    facts = (
        f"{robot.name}: {kind_of(config)}, {pixels.shape[1]} x {pixels.shape[0]} upright, colour_order {config.colour_order}, "
        f"rotate {config.rotate}, {found.fps:.1f} pictures a second, brightness {found.brightness:.0f}"
    )
    how = f"{size} x {size}, {manifest.preprocessing.how}"
    write_bytes(out, draw_doctor(pixels, resize(pixels, manifest.preprocessing, size), facts, how))
    return out


def _most(found: CameraFindings) -> str:
    reason, count = max(found.refused.items(), key=lambda item: item[1])
    return f"{count} times {reason}"


def _numbers(found: CameraFindings) -> dict[str, object]:
    """The findings as JSON; what is not finite is null."""
    plain = {
        name: getattr(found, name)
        for name in (
            "seconds",
            "fps",
            "spacing_ms",
            "longest_gap_s",
            "missing",
            "brightness",
            "sharpness",
            "reconnects",
        )
    }
    finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    shape = None if found.frame is None else list(found.frame.pixels.shape)
    return {**finite, "age_ms": dict(found.age_ms), "refused": dict(found.refused), "shape": shape}
