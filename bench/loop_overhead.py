#!/usr/bin/env python3
"""What the control loop costs on top of the policy: bare steps and driven ones, in turns, in one process.

    python bench/loop_overhead.py BUNDLE [--rounds 6]

A bare block calls `policy.step` at the loop's pace on pictures of the drawn camera. A driven block runs the loop on the same policy, camera
and pace, with sink and watchdog. The overhead is what a decision takes longer there, and what a round of the loop itself takes: both are
paid once per decision. Exit codes: 0 ok, 1 failed.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from rich.console import Console

from bench.drawn_robot import drawn_robot
from bundle.errors import JetvlaError
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.select import open_camera
from runtime.commands.fake_plant import FakePlant
from runtime.commands.select import open_sink
from runtime.control_loop import ControlLoop
from runtime.drive import make_plan, steady_threads
from runtime.events import Decision, Event, RunInfo
from runtime.policy import Policy
from runtime.robot_file import Safety
from runtime.watchdog import Watchdog


@dataclass(frozen=True)
class OverheadConfig:
    """Measure.

    Attributes:
        bundle: made by export/build_engines.py.
        instruction: for the policy.
        rounds: pairs of a bare and a driven block.
        seconds: of each block.
        hz: decisions and commands a second.
        backend: see run_robot.py.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    instruction: str = "Navigate to the gray basket on the left"
    rounds: int = 6
    seconds: float = 5.0
    hz: float = 10.0
    backend: str = "auto"
    json: bool = False


@dataclass
class _Taken:
    """A listener that keeps how long decisions took, in milliseconds."""

    decisions: list[float] = field(default_factory=list)

    def start(self, info: RunInfo) -> None:
        """Nothing to do."""

    def take(self, event: Event) -> None:
        """Keep a decision's time."""
        if isinstance(event, Decision):
            self.decisions.append((event.finished_s - event.started_s) * 1e3)

    def close(self) -> None:
        """Nothing to do."""


def main() -> int:
    """Parse, measure, print."""
    config = tyro.cli(OverheadConfig, description=__doc__)
    try:
        result = measure(config)
    except JetvlaError as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    if config.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:8.3f}")
    return 0


def measure(config: OverheadConfig) -> dict[str, float]:
    """Milliseconds, medians over all blocks of each kind.

    Raises:
        JetvlaError: see Policy.load and runtime.drive.make_plan.
    """
    policy = Policy.load(config.bundle, config.backend)
    bare: list[float] = []
    taken = _Taken()
    rounds: list[float] = []
    with FakePlant() as plant:
        late_s = 10 / config.hz  # nothing is stopped here
        safety = Safety(stale_frame_s=late_s, stale_action_s=late_s, stop_within_s=late_s, watchdog_s=late_s)
        robot = drawn_robot("overhead", policy.manifest.action, plant.port, gain=1.0, hz=config.hz, safety=safety)
        plan = make_plan(policy.manifest, robot, None)
        grabber = FrameGrabber(open_camera(robot.camera), robot.camera)
        grabber.start()
        try:
            for _ in range(config.rounds):
                bare += _bare(policy, grabber, config)
                sink = open_sink(robot.commands)
                with Watchdog.start(robot.commands, plan.limits.safety.watchdog_s) as guard:
                    loop = ControlLoop(
                        policy, grabber, sink, guard, plan.limits, plan.axes, robot.loop, plan.pace, [taken]
                    )
                    with steady_threads():
                        rounds.append(loop.run(config.instruction, seconds=config.seconds).overhead_ms["p50"])
                loop.close()
                sink.close()
        finally:
            grabber.close()
    step, driven, tick = float(np.median(bare)), float(np.median(taken.decisions)), float(np.median(rounds))
    return {
        "bare step p50 ms": step,
        "driven step p50 ms": driven,
        "round p50 ms": tick,
        "overhead p50 ms": driven - step + tick,
    }


def _bare(policy: Policy, grabber: FrameGrabber, config: OverheadConfig) -> list[float]:
    policy.reset(config.instruction)
    spent = []
    end = time.monotonic() + config.seconds
    due = time.monotonic()
    while time.monotonic() < end:
        frame = grabber.wait_newer(None, 5.0)
        assert frame is not None, "a drawn camera always has a picture"
        begin = time.monotonic()
        policy.step(frame.pixels)
        spent.append((time.monotonic() - begin) * 1e3)
        due += 1 / config.hz
        time.sleep(max(0.0, due - time.monotonic()))
    return spent[1:]


if __name__ == "__main__":
    sys.exit(main())
