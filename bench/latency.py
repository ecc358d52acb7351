#!/usr/bin/env python3
"""Command line: is a bundle under the deadline on this machine, and why (not)?

    python bench/latency.py BUNDLE --episode EPISODE.h5
    python bench/latency.py BUNDLE --baselines eager-bf16 ort-plain-fp32 --minutes 10

Loads the bundle as the robot does (hashes, golden step), times its steps by section, runs it in a control loop at a fixed rate, and writes
latency.json and report.html. The last line of stdout is JSON. Exit codes: 0 under the deadline, 1 failed or interrupted, 2 usage, 3 over
the deadline, or not what was asked for.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.ask import Ask
from bench.feed import drawn_feed, episode_feed
from bench.latency_view import show
from bench.planning import plan_here
from bench.report_writer import check_report, write_report
from bench.results import RESULT_NAME, Plan, Result, write_result
from bench.session import run
from bundle.atomic import make_folder
from bundle.errors import ConfigError, JetvlaError
from bundle.manifest import MANIFEST_NAME
from runtime.backends.select import PrecisionChoice
from runtime.policy import Policy

REPORT_NAME = "report.html"
_SHOWN_S = 0.5


@dataclass(frozen=True)
class LatencyConfig:
    """Measure the latency of a bundle.

    Attributes:
        bundle: directory made by export/build_engines.py.
        episode: whose frames to feed; without one they are drawn.
        frame_size: height and width of drawn frames.
        instruction: what to do, if not what the episode says.
        backend: auto, trt, ort, ort:cpu, ort:cuda, ort:tensorrt, ort:tensorrt-rtx, ort:openvino or fake.
        precision: int8 measures the bundle's INT8 variant, float what it was exported in; auto takes INT8 where it is good and fast.
        ask: what to measure.
        plan: compare with what the planner expects of this machine.
        out: folder of latency.json and report.html; by default BUNDLE/reports.
        skip_hashes: trust the files; saves seconds at the start of a full-size bundle.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    episode: Path | None = None
    frame_size: tuple[int, int] = (720, 1280)
    instruction: str | None = None
    backend: str = "auto"
    precision: PrecisionChoice = "auto"
    ask: Annotated[Ask, tyro.conf.arg(name="")] = field(default_factory=Ask)
    plan: bool = True
    out: Path | None = None
    skip_hashes: bool = False


def main() -> int:
    """Parse, measure, write, print."""
    config = tyro.cli(LatencyConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_time=False, show_path=False)])
    # A container that is stopped wants its partial report as much as a person who presses Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result, folder = measure(config, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted before the first step: there is nothing to report.")
        return 1
    show(result, console)
    console.print(f"{folder / RESULT_NAME}\n{folder / REPORT_NAME}", markup=False, soft_wrap=True)
    print(result.verdict.line)
    print(json.dumps(_summary(result, folder)))
    if result.partial:
        return 1
    return 0 if result.verdict.outcome == "pass" else 3


def measure(config: LatencyConfig, console: Console) -> tuple[Result, Path]:
    """Measure and write both files; the result, and their folder.

    Raises:
        JetvlaError: see Policy.load, bench/session.py, bench/feed.py; or the folder cannot be written.
    """
    config.ask.check()
    check_report()
    if min(config.frame_size) < 1:
        raise ConfigError(
            "frames without pixels", got=config.frame_size, expected="height and width", hint="see --help."
        )
    bundle = config.bundle.parent if config.bundle.name == MANIFEST_NAME else config.bundle
    folder, threads = config.out or bundle / "reports", config.ask.threads
    with console.status("loading the bundle"):
        policy = Policy.load(
            bundle, config.backend, precision=config.precision, verify=not config.skip_hashes, threads=threads
        )
    if config.episode is not None:
        feed = episode_feed(config.episode, instruction=config.instruction, template=policy.manifest.prompt.template)
    else:
        height, width = config.frame_size
        feed = drawn_feed(policy.manifest, height=height, width=width, instruction=config.instruction)
    make_folder(folder)

    def plan(policy: Policy, sequence: int) -> Plan | None:
        if not config.plan:
            return None
        return plan_here(policy.manifest, sequence, threads=threads, backend=policy.backend)

    with _Bars(console) as bars:
        result = run(config.ask, bundle, policy, feed, bars, backend=config.backend, plan=plan)
    policy.close()
    write_result(folder / RESULT_NAME, result)
    write_report(result, folder / REPORT_NAME)
    return result, folder


def _summary(result: Result, folder: Path) -> dict[str, Any]:
    """What a script wants to know; everything else stands in the file."""
    total = result.sections["total"]
    return {
        "outcome": result.verdict.outcome,
        "partial": result.partial,
        "backend": result.bundle.backend,
        "precision": result.bundle.precision,
        "steps": total.count,
        "total_ms": {name: getattr(total, name) for name in ("p50", "p90", "p95", "p99", "p99_9", "max")},
        "sections_ms": {name: timing.p50 for name, timing in result.sections.items()},
        "miss_rate": None if result.loop is None else result.loop.miss_rate,
        "reaction_p99_ms": None if result.loop is None else result.loop.reaction.p99,
        "first_action_s": result.start.first_action_s,
        "ratios": {each.name: each.ratio[0] for each in result.baselines if each.ratio},
        "result": str(folder / RESULT_NAME),
        "report": str(folder / REPORT_NAME),
    }


class _Bars:
    """Progress bars, one a phase."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        # Few redraws: they take time from what is measured.
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=2
        )

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self._progress.stop()
        return False

    def phase(self, label: str, total: float) -> Callable[[float], None]:
        """See bench.session.Screen."""
        task = self._progress.add_task(label, total=total)
        done, shown = [0.0], [time.monotonic()]

        def advance(more: float) -> None:
            done[0] += more
            # Seldom: every update takes time and memory, and both are being measured.
            if time.monotonic() - shown[0] > _SHOWN_S or done[0] >= total:
                shown[0] = time.monotonic()
                self._progress.update(task, completed=done[0])

        return advance


if __name__ == "__main__":
    sys.exit(main())
