#!/usr/bin/env python3
"""Command line: what a policy costs on a machine, before anything is built.

    python bench/plan.py                                            the devices it knows
    python bench/plan.py BUNDLE --device orin-nx-16gb --power 15W --precision fp16,int8
    python bench/plan.py BUNDLE --device here --calibrate           probes of this machine instead of assumptions
    python bench/plan.py --check BUNDLE                             expected against measured, on this machine

Exit codes: 0 expected to meet the deadline, 1 failed, 2 usage, 3 expected to miss it in every precision asked for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.markup import escape

from bench.calibration import save_calibration
from bench.devices import HERE
from bench.plan_check import deviations, golden_bucket, kept_deviations, run_stages
from bench.plan_view import check_json, check_table, device_table, devices_json, plan_json, plan_table, verdict
from bench.planning import make_plan, parse_precisions
from bench.results import read_result
from bench.targets import here, table_target
from bench.workload import sized, workload_of
from bundle.errors import ConfigError, JetvlaError
from bundle.manifest import Manifest
from runtime.golden import Golden
from runtime.policy import Policy


@dataclass(frozen=True)
class PlanConfig:
    """Plan a policy's latency and memory.

    Attributes:
        bundle: directory made by export/build_engines.py; by default a policy of --size.
        device: a key of the list that this command prints without it, or `here`.
        power: power mode of the device; by default its fastest.
        precision: fp32, fp16, int8, several with commas; a mixture is vision=fp16,language=int8. By default the bundle's.
        size: without a bundle: `full`, or what differs from it, e.g. embed_dim=1024,text_layers=12.
        sequence: slots of the language graph; by default the bundle's shortest, or 88.
        deadline_ms: of one tick; pictures are resized beside it (5 to 10 ms on a CPU).
        calibrate: probe this machine (about a minute), and keep the outcome.
        check: a bundle to run here, or a latency.json: print the planner's error.
        steps: of --check.
        backend: that probes and checks run on: ort:cpu, ort:cuda, ort:openvino.
        threads: CPU threads; 0 takes all.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")] = None
    device: str | None = None
    power: str | None = None
    precision: str | None = None
    size: str | None = None
    sequence: int | None = None
    deadline_ms: float = 200.0
    calibrate: bool = False
    check: Path | None = None
    steps: int = 5
    backend: str = "ort:cpu"
    threads: int = 0
    json: bool = False


def main() -> int:
    """Parse, plan, print."""
    config = tyro.cli(PlanConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    # A file or a pipe has no width, and rich would take 80 columns and cut what is wider.
    out = Console(highlight=False, quiet=config.json, width=None if sys.stdout.isatty() else 110)
    try:
        if config.check is not None:
            result, code = check(config, config.check, console, out)
        elif config.device is None and not config.calibrate:
            out.print(device_table())
            result, code = devices_json(), 0 if config.bundle is None and config.size is None else 2
            if code:
                console.print("name the machine with --device.")
        else:
            result, code = plan(config, console, out)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    if config.json:
        print(json.dumps(result))
    return code


def plan(config: PlanConfig, console: Console, out: Console) -> tuple[object, int]:
    """Plan for the device that was asked for; the result as JSON, and the exit code.

    Raises:
        JetvlaError: bad input, or a backend that cannot be probed.
    """
    if config.bundle is not None and config.size is not None:
        raise ConfigError("both a bundle and --size", got=config.size, expected="one of them", hint="leave one out.")
    if config.threads < 0:
        raise ConfigError(
            "--threads is no number of threads", got=config.threads, expected="0 or more", hint="0 takes all."
        )
    if config.sequence is not None and config.sequence < 1:
        raise ConfigError("--sequence is no length", got=config.sequence, expected="1 or more", hint="88 is usual.")
    manifest = None if config.bundle is None else Manifest.load(config.bundle)
    work = (
        sized(config.size or "full")
        if config.bundle is None or manifest is None
        else workload_of(manifest, config.bundle.name)
    )
    precisions = parse_precisions(config.precision, manifest)
    sequence = config.sequence or work.buckets[0]
    device = config.device or HERE
    if device.strip().lower() != HERE:
        if config.calibrate:
            raise ConfigError(
                "--calibrate measures this machine",
                got=f"--device {device}",
                expected="--device here",
                hint="leave one out.",
            )
        target = table_target(device, config.power)
    else:
        if config.power is not None:
            raise ConfigError(
                "this machine's power mode is what it is",
                got=f"--power {config.power}",
                hint="set it with nvpmodel, then calibrate.",
            )
        with console.status("probing") as status:
            target, new = here(
                work,
                sequence,
                precisions,
                backend=config.backend,
                threads=config.threads,
                calibrate=config.calibrate,
                advance=lambda name: status.update(f"probing {escape(name)}"),
            )
        if new is not None:
            console.print(f"kept in {save_calibration(new)}", markup=False, soft_wrap=True)
    plans = [make_plan(work, sequence, mixture, target, config.deadline_ms) for mixture in precisions]
    notes = [*work.notes, *target.notes]
    out.print(f"{target.name}: {work.name}, {sequence} slots", markup=False, soft_wrap=True)
    out.print(plan_table(plans))
    for one in plans:
        out.print(verdict(one), soft_wrap=True)
    _footer(out, target.basis, notes)
    met = any(one.outcome == "meets" for one in plans)
    return plan_json(target, plans, sequence, notes), 0 if met else 3


def check(config: PlanConfig, path: Path, console: Console, out: Console) -> tuple[object, int]:
    """Expected against measured; the result as JSON, and the exit code.

    Raises:
        JetvlaError: bad input, or a bundle that does not run.
    """
    if path.is_file():
        found = kept_deviations(read_result(path), path)
        out.print(check_table(found))
        return {"errors": check_json(found)}, 0
    if config.steps < 1:
        raise ConfigError("--steps is no number of steps", got=config.steps, expected="1 or more", hint="5 are enough.")
    manifest = Manifest.load(path)
    golden = Golden.load(path)
    work, sequence = workload_of(manifest, path.name), golden_bucket(manifest, golden)
    mixtures = parse_precisions(None, manifest)
    with console.status(escape(f"running {path}")) as status:
        policy = Policy.load(path, config.backend, precision="float", verify=False, threads=config.threads)
        try:
            before = run_stages(policy, golden, config.steps)
            status.update("probing")
            target, new = here(
                work, sequence, mixtures, backend=config.backend, threads=config.threads, calibrate=config.calibrate
            )
            status.update(escape(f"running {path} again"))
            after = run_stages(policy, golden, config.steps)
        finally:
            policy.close()
    if new is not None and new.steady:
        save_calibration(new)
    measured = {stage: (before[stage] + after[stage]) / 2 for stage in before}
    notes = [*work.notes, *target.notes]
    moved = sum(after.values()) / sum(before.values()) - 1
    if abs(moved) > 0.15:
        notes.append(f"the machine is busy: a tick took {moved:+.0%} after the probes against before")
    found = deviations(make_plan(work, sequence, mixtures[0], target, config.deadline_ms), measured)
    out.print(check_table(found))
    _footer(out, target.basis, notes)
    return {"basis": target.basis, "notes": notes, "errors": check_json(found)}, 0


def _footer(out: Console, basis: str, notes: list[str]) -> None:
    """Where the expectation comes from, and what to know about it."""
    for line in (f"expected: {basis}", *(f"note: {note}" for note in notes)):
        out.print(line, style="dim", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
