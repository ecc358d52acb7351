#!/usr/bin/env python3
"""Command line: bundle in, decisions out.

    python runtime/run_robot.py BUNDLE --replay EPISODE.h5
    python runtime/run_robot.py BUNDLE --check

Exit codes: 0 ok, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import sys
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

from bundle.errors import ConfigError, JetvlaError
from runtime.backends.select import PrecisionChoice, faster_in_int8
from runtime.policy import Policy


@dataclass(frozen=True)
class RunConfig:
    """Run a bundle.

    Attributes:
        bundle: directory made by export/build_engines.py.
        replay: H5 episode: compare the policy's velocities with the recorded ones.
        check: load, verify and replay the golden step, then stop.
        instruction: what to do, if not what the episode says.
        backend: auto, trt, ort, ort:cpu, ort:cuda, ort:tensorrt, ort:tensorrt-rtx, ort:openvino or fake.
        precision: int8 runs the bundle's INT8 variant, float what it was exported in; auto takes INT8 where it is good and fast.
        threads: CPU threads; 0 takes all.
        schema: of the episode (v1, v5, v6), if sniffing gets it wrong.
        skip_hashes: trust the files; saves seconds at the start of a full-size bundle.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    replay: Path | None = None
    check: bool = False
    instruction: str | None = None
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
        return 2 if config.replay is None and not config.check else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
        return 1
    if config.json:
        print(json.dumps(result))
    return 0


def run(config: RunConfig, console: Console) -> dict[str, object]:
    """Do what the command line says; returns the JSON result.

    Raises:
        JetvlaError: see Policy.load and runtime.replay.replay.
    """
    if config.replay is None and not config.check:
        raise ConfigError(
            "nothing to do",
            got="neither --replay nor --check",
            expected="--replay EPISODE.h5, or --check",
            hint="driving a robot (cameras, /cmd_vel, safety) is not part of this version.",
        )
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
    console.print(
        f"{config.bundle}: {manifest.precision}, packing {manifest.prompt.packing}, backend {policy.backend}, "
        f"parity {manifest.parity.verdict}, loaded in {load_s:.2f} s, {', '.join(checks)}",
        markup=False,
        soft_wrap=True,
    )
    if config.precision == "auto" and (why := why_not_int8(policy)):
        console.print(f"the INT8 variant does not run: {why}", markup=False, soft_wrap=True)
    result: dict[str, object] = {
        "bundle": str(config.bundle),
        "backend": policy.backend,
        "precision": manifest.precision,
        "load_s": load_s,
    }
    return result if config.replay is None else result | _replay(policy, config, config.replay, console)


def why_not_int8(policy: Policy) -> str:
    """Why `auto` runs floating point though the bundle has an INT8 variant that may be run; empty if it does not, or has none."""
    quantized = policy.manifest.quantized
    if policy.manifest.precision == "int8" or quantized is None or not quantized.trusted:
        return ""
    on_cpu = policy.backend in ("ort:cpu", "ort:openvino")
    kind = "ort:" if on_cpu else "trt "
    failed = [reason for reason in policy.passed_over if reason.startswith(kind) and " in int8: " in reason]
    if failed:
        return "; ".join(failed)
    if on_cpu and faster_in_int8(policy.backend, quantized) is None:
        return f"it was not measured on {policy.backend}; --precision int8 runs it there"
    if on_cpu:
        return f"floating point was faster on {quantized.machine}"
    return f"{policy.backend} gains nothing from it"


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
