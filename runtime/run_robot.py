#!/usr/bin/env python3
"""Command line: bundle in, decisions out.

    python runtime/run_robot.py BUNDLE --robot robot.toml --instruction "..." [--dry-run] [--confirm]
    python runtime/run_robot.py BUNDLE --robot robot.toml --doctor
    python runtime/run_robot.py BUNDLE --replay EPISODE.h5
    python runtime/run_robot.py BUNDLE --check

Exit codes: 0 ok, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import math
import os
import sys
import termios
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bundle.atomic import make_folder
from bundle.errors import BundleError, ConfigError, JetvlaError, ServiceError
from bundle.manifest import Manifest
from bundle.prompt_template import told
from runtime.backends.select import PrecisionChoice
from runtime.decisions import Decider
from runtime.drive import DriveOptions, Plan, drive, make_plan
from runtime.events import Listener
from runtime.notes import Notes
from runtime.policy import Policy
from runtime.precision import int8_notes, kind_of
from runtime.robot_toml import load_limits_file, load_robot_file
from runtime.robot_view import plan_lines, summary_table


@dataclass(frozen=True)
class RunConfig:
    """Drive a robot, or run a bundle without one.

    Attributes:
        bundle: directory made by export/build_engines.py.
        robot: robot file; by default $JETVLA_ROBOT, ./robot.toml or /etc/jetvla/robot.toml.
        instruction: what to do; for --replay, if not what the episode says.
        limits: file of local limits, which can only tighten the robot file's.
        dry_run: everything but sending: no way to the robot is opened, nothing is recorded.
        confirm: show the plan, and wait for Enter before the first command.
        seconds: end after so long.
        interactive: a line on stdin is a new instruction; an empty one, or one with a word like stop, stops; its end ends the run.
        record: with the flight recorder, where the robot file has one.
        live_view: port of a page on this machine that shows what the policy sees and does.
        server: URL of runtime/serve.py, which then runs the policy; BUNDLE is the same bundle on this machine.
        server_key_file: its API key; by default $JETVLA_API_KEY.
        doctor: show what camera and policy see, print a block for bug reports, and stop; sends nothing.
        replay: H5 episode or flight recording: compare the policy's velocities with the recorded ones.
        check: load, verify and replay the golden step, then stop.
        backend: auto, trt, ort, ort:cpu, ort:cuda, ort:tensorrt, ort:tensorrt-rtx, ort:openvino or fake.
        precision: int8 runs the bundle's INT8 variant, float what it was exported in; auto takes INT8 where it is good and fast.
        threads: CPU threads; 0 takes all.
        schema: of the episode (v1, v5, v6), if sniffing gets it wrong.
        skip_hashes: trust the files; saves seconds at the start of a full-size bundle.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    robot: Path | None = None
    instruction: str | None = None
    limits: Path | None = None
    dry_run: bool = False
    confirm: bool = False
    seconds: float = math.inf
    interactive: bool = False
    record: bool = True
    live_view: int | None = None
    server: str | None = None
    server_key_file: Path | None = None
    doctor: bool = False
    replay: Path | None = None
    check: bool = False
    backend: str = "auto"
    precision: PrecisionChoice = "auto"
    threads: int = 0
    schema: Literal["v1", "v5", "v6"] | None = None
    skip_hashes: bool = False
    json: bool = False


def main() -> int:
    """Parse, run, print."""
    config = tyro.cli(RunConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        result = run(config, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    if config.json:
        print(json.dumps(result))
    return 1 if result.get("problems") or result.get("zero_sent") is False else 0


class UsageError(ConfigError):
    """A command line that asks for nothing, or for two things."""


def run(config: RunConfig, console: Console) -> dict[str, object]:
    """Do what the command line says; returns the JSON result.

    Raises:
        UsageError: it says nothing to do, or too much.
        JetvlaError: see Policy.load, runtime.replay.replay and runtime.drive.drive.
    """
    if not config.seconds > 0:
        raise UsageError(
            "--seconds is no time",
            got=config.seconds,
            expected="more than 0",
            hint="leave it out to drive until Ctrl-C.",
        )
    modes = {"--check": config.check, "--doctor": config.doctor, "--replay": config.replay is not None}
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise UsageError("one thing at a time", got=" and ".join(chosen), expected="one of them", hint="run it twice.")
    if config.doctor:
        return _doctor(config, console)
    if chosen:
        policy, result = _load(config, console)
        return result if config.replay is None else result | _replay(policy, config, config.replay, console)
    return _drive(config, console)


def _load(config: RunConfig, console: Console) -> tuple[Policy, dict[str, object]]:
    start = time.perf_counter()
    with console.status(escape(f"loading {config.bundle}")):
        policy = Policy.load(
            config.bundle,
            config.backend,
            precision=config.precision,
            verify=not config.skip_hashes,
            threads=config.threads,
        )
    manifest = policy.manifest
    load_s = time.perf_counter() - start
    checks = ["hashes not checked" if config.skip_hashes else "hashes ok"]
    if policy.backend != "fake":
        checks.append("golden step ok")
    float_ = "float " if manifest.precision == "int8" else ""
    console.print(
        f"{config.bundle}: {kind_of(manifest)}, packing {manifest.prompt.packing}, backend {policy.backend}, "
        f"{float_}parity {manifest.parity.verdict}, loaded in {load_s:.2f} s, {', '.join(checks)}",
        markup=False,
        soft_wrap=True,
    )
    notes = int8_notes(policy, config.precision)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    return policy, {
        "bundle": str(config.bundle),
        "backend": policy.backend,
        "precision": manifest.precision,
        "load_s": load_s,
        "notes": notes,
    }


def _drive(config: RunConfig, console: Console) -> dict[str, object]:
    manifest = Manifest.load(config.bundle)
    instruction = told(manifest.prompt.template, config.instruction, None)
    if instruction is None:
        known = [repr(each.text) for each in manifest.prompt.instructions]
        raise UsageError(
            "no instruction to drive by",
            got="no --instruction, and neither of --replay, --check, --doctor",
            expected=f"--instruction '...'; this bundle was built with {', '.join(known)}"
            if known
            else "--instruction '...'",
            hint="add --dry-run to see what the policy would do without moving anything.",
        )
    path = robot_file_path(config.robot)
    plan = make_plan(
        manifest, load_robot_file(path), None if config.limits is None else load_limits_file(config.limits)
    )
    listeners = listeners_of(config, plan, console)
    notes = Notes(console)

    def show(policy: Decider) -> None:
        limits = "none" if config.limits is None else config.limits
        console.print(f"robot file {path}, limits file {limits}", markup=False, soft_wrap=True)
        if config.server is not None:
            console.print(f"policy at {config.server}, {config.bundle}", markup=False, soft_wrap=True)
        for line in plan_lines(plan, dry_run=config.dry_run):
            console.print(line, markup=False, soft_wrap=True)
        if config.interactive:
            console.print("a line is a new instruction; Enter alone, or stop, stops", markup=False, soft_wrap=True)

    options = DriveOptions(instruction, config.dry_run, config.confirm, config.interactive, config.seconds)
    result: dict[str, object] = {"bundle": str(config.bundle), "robot": plan.robot.name}

    def load() -> Decider:
        if config.server is not None:
            return _remote(config, plan, notes)
        policy, loaded = _load(config, console)
        if policy.manifest.manifest_sha256 != manifest.manifest_sha256:
            raise BundleError(
                f"{config.bundle} was replaced while it was loaded",
                got=policy.manifest.manifest_sha256[:12],
                expected=f"{manifest.manifest_sha256[:12]}, by which limits and axes were planned",
                hint="start again.",
            )
        result.update(loaded)
        return policy

    summary = drive(
        plan, load, options, listeners, notes, bundle=str(config.bundle), show=show, confirm=lambda: _ask(console)
    )
    Console(highlight=False, quiet=config.json).print(summary_table(summary))
    return result | summary.as_json()


def robot_file_path(given: Path | None) -> Path:
    """The robot file to read.

    Raises:
        UsageError: none was named, and none lies where one is looked for.
    """
    if given is not None:
        return given
    if named := os.environ.get("JETVLA_ROBOT"):
        return Path(named)
    places = (Path("robot.toml"), Path("/etc/jetvla/robot.toml"))
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        "no robot file",
        got="no --robot, no $JETVLA_ROBOT",
        expected=f"or one of {', '.join(map(str, places))}",
        hint="copy runtime/deploy/reference-robot.toml and fit it to the robot; docs/robot.md explains every key.",
    )


def listeners_of(config: RunConfig, plan: Plan, console: Console) -> list[Listener]:
    """Who is told what happens: flight recorder and live view, as far as wanted."""
    listeners: list[Listener] = []
    # Each needs libraries that a robot without it does not.
    if plan.robot.recorder is not None and config.record and not config.dry_run:
        from runtime.recorder.flight_recorder import FlightRecorder

        folder = Path(plan.robot.recorder.folder).expanduser()
        make_folder(
            folder
        )  # a wrong path is found here; a disk that fills up later stops the recording and not the robot
        if not os.access(folder, os.W_OK):
            raise ConfigError(
                f"cannot record into {folder}",
                got="no right to write there",
                hint="give it to this user, or pass --no-record.",
            )

        def report(text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        listeners.append(FlightRecorder(plan.robot.recorder, on_problem=report))
    if config.live_view is not None:
        from runtime.service.live_view import LiveView

        listeners.append(LiveView(config.live_view))
    return listeners


def _remote(config: RunConfig, plan: Plan, notes: Notes) -> Decider:
    from runtime.service.client import RemotePolicy  # needs httpx, which a robot that runs its own policy does not
    from runtime.service.security import read_key

    assert config.server is not None
    policy = RemotePolicy(
        config.server, key=read_key(config.server_key_file), timeout_s=plan.pace.deadline_s, on_note=notes
    )
    if policy.manifest.manifest_sha256 != plan.manifest.manifest_sha256:
        raise ServiceError(
            f"{config.server} runs another bundle",
            got=policy.manifest.manifest_sha256[:12],
            expected=f"{plan.manifest.manifest_sha256[:12]}, that of {config.bundle}",
            hint="start the server on the same bundle, or copy its bundle here.",
        )
    return policy


def _ask(console: Console) -> None:
    if sys.stdin.isatty():
        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed while the model was loading agreed to nothing
    console.print("Press Enter to start the robot, Ctrl-C to leave: ", end="")
    if not sys.stdin.readline():
        console.print()
        raise UsageError(
            "nobody confirmed",
            got="end of input",
            expected="Enter",
            hint="run it from a terminal, or without --confirm.",
        )


def _doctor(config: RunConfig, console: Console) -> dict[str, object]:
    from runtime.robot_doctor import examine

    robot = load_robot_file(robot_file_path(config.robot))
    return examine(config.bundle, robot, console, quiet=config.json)


def _replay(policy: Policy, config: RunConfig, path: Path, console: Console) -> dict[str, object]:
    try:
        from episodes.reader import open_episode  # needs h5py, which a robot that only drives does not
        from runtime.replay import replay
    except ImportError as error:
        raise ConfigError("reading episodes needs h5py", got=error, hint="pip install 'jetvla[data]'") from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        episode = open_episode(path, schema=config.schema)
    for warning in caught:
        console.print(f"[yellow]warning:[/] {escape(str(warning.message))}", soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with episode, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("replay", total=len(episode))
        outcome = replay(policy, episode, instruction=config.instruction, advance=lambda: progress.advance(task))
    console.print(
        f"{path.name}: {len(outcome.predicted)} frames, {episode.schema}, {outcome.instruction!r}",
        markup=False,
        soft_wrap=True,
    )
    shown = Table("axis", "recorded mean", "predicted mean", "RMSE", box=None, padding=(0, 2), header_style="dim")
    for index, (name, unit) in enumerate(zip(outcome.axes, outcome.units, strict=True)):
        recorded, predicted = outcome.recorded[:, index].mean(), outcome.predicted[:, index].mean()
        shown.add_row(name, f"{recorded:+.3f}", f"{predicted:+.3f}", f"{outcome.rmse[index]:.3f} {unit}")
    times = Table("section", "p50 ms", "p95 ms", "max ms", box=None, padding=(0, 2), header_style="dim")
    for section, values in outcome.timing.items():
        p50, p95, top = np.percentile(values, [50, 95, 100])
        times.add_row(section, f"{p50:.2f}", f"{p95:.2f}", f"{top:.2f}")
    # Tables are the result of this command; with --json the JSON is.
    out = Console(highlight=False, quiet=config.json)
    out.print(shown)
    out.print(times)
    return outcome.as_json()


if __name__ == "__main__":
    sys.exit(main())
