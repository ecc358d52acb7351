"""A long run of run_robot on a drawn camera and a base that coasts, with a camera fault every minute: does it leak, drift, or miss a stop?

The run is the command that a user types, in a process of its own: bundle, robot file, watchdog, flight recorder and all. From outside are
watched its memory and its watchdog's, every command that reaches the base, and how soon a zero follows each fault. What the loop says of
its own regularity is its summary. Knows nothing about what the policy decides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.drawn_robot import drawn_robot
from bundle.errors import ConfigError
from bundle.manifest import Manifest
from runtime.cameras.simulated import FAULT_FILE_VARIABLE, Fault
from runtime.commands.fake_plant import FakePlant
from runtime.robot_file import Recorder, Safety
from runtime.robot_toml import to_toml

_ROOT = Path(__file__).resolve().parents[1]
_FAULTS = (Fault.FREEZE, Fault.UNPLUGGED, Fault.BLACK, Fault.SILENT, Fault.LATE, Fault.WRONG_SIZE, Fault.DUPLICATE)
_FAULT_S = 2.0
# Allocators and caches take their share first.
_WARM_UP_SHARE = 0.1
# Gains are high, so that it always drives.
_GAIN = 100.0
_SAFETY = Safety(stale_frame_s=0.5, stale_action_s=0.5, stop_within_s=0.3, watchdog_s=0.5)


@dataclass(frozen=True)
class Soak:
    """What came of it.

    Attributes:
        minutes: that it ran.
        rss_mb: of run_robot, at the start (after the warm-up tenth) and at the end, each the median of a tenth of the samples.
        watchdog_rss_mb: likewise.
        faults: that were caused.
        stops: of them, followed by a zero within the bound.
        slowest_stop_s: after a fault.
        bound_s: what is promised.
        commands: that reached the base.
        longest_silence_s: between two of them.
        ended_with_zero: the last one.
        summary: run_robot's own.
    """

    minutes: float
    rss_mb: tuple[float, float]
    watchdog_rss_mb: tuple[float, float]
    faults: int
    stops: int
    slowest_stop_s: float
    bound_s: float
    commands: int
    longest_silence_s: float
    ended_with_zero: bool
    summary: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def soak(
    bundle: Path,
    folder: Path,
    *,
    instruction: str,
    minutes: float,
    hz: float,
    every_s: float = 60.0,
    backend: str = "auto",
    advance: Callable[[float], None] = lambda _: None,
) -> Soak:
    """Run for so long.

    Args:
        folder: for the robot file, the recordings and what run_robot says.
        hz: decisions and commands a second.
        every_s: between faults.
        advance: called with the seconds run so far.

    Raises:
        ConfigError: run_robot ended early.
    """
    manifest = Manifest.load(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    fault_file = folder / "fault"
    fault_file.unlink(missing_ok=True)
    with FakePlant() as plant:
        recorder = Recorder(folder=str(folder / "recordings"), max_total_gb=0.2, max_file_mb=40.0)
        robot = drawn_robot("soak", manifest.action, plant.port, gain=_GAIN, hz=hz, safety=_SAFETY, recorder=recorder)
        (folder / "robot.toml").write_text(to_toml(robot), encoding="utf-8")
        command = [
            *(
                sys.executable,
                str(_ROOT / "runtime" / "run_robot.py"),
                str(bundle),
                "--robot",
                str(folder / "robot.toml"),
            ),
            *(
                "--instruction",
                instruction,
                "--seconds",
                str(minutes * 60),
                "--backend",
                backend,
            ),
            "--json",
        ]
        with (folder / "stderr.txt").open("w") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {FAULT_FILE_VARIABLE: str(fault_file), "NO_COLOR": "1"},
                preexec_fn=_as_its_service_does,
            )
            try:
                rss, watchdog_rss, stops = _watch(process, plant, fault_file, every_s, advance)
            finally:
                process.terminate()
            out, _ = process.communicate(timeout=60)
        if process.returncode != 0:
            raise ConfigError(
                f"run_robot ended with code {process.returncode}",
                got=(folder / "stderr.txt").read_text(encoding="utf-8")[-500:],
                hint=f"the whole of it is in {folder / 'stderr.txt'}.",
            )
        summary = json.loads(out)
        log = plant.log
    bound_s = _SAFETY.stale_frame_s + _SAFETY.stop_within_s + 2 / hz
    times = np.array([at for at, _ in log])
    return Soak(
        minutes=summary["seconds"] / 60,
        rss_mb=_ends(rss),
        watchdog_rss_mb=_ends(watchdog_rss),
        faults=len(stops),
        stops=sum(stop <= bound_s for stop in stops),
        slowest_stop_s=max(stops, default=0.0),
        bound_s=bound_s,
        commands=len(log),
        longest_silence_s=float(np.diff(times).max()),
        ended_with_zero=log[-1][1].is_zero,
        summary=summary,
    )


def _as_its_service_does() -> None:
    """Before the machine's other work, as runtime/deploy/jetvla-robot.service has it; where that is not allowed, beside it."""
    with suppress(PermissionError):
        os.nice(-10)


def _watch(
    process: subprocess.Popen[str], plant: FakePlant, fault_file: Path, every_s: float, advance: Callable[[float], None]
) -> tuple[list[float], list[float], list[float]]:
    """Resident megabytes of both processes, and seconds to a zero after each fault, until the process ends."""
    while not plant.log and process.poll() is None:
        time.sleep(0.1)
    rss: list[float] = []
    watchdog: list[float] = []
    stops: list[float] = []
    begin = time.monotonic()
    next_fault = begin + every_s
    while process.poll() is None:
        now = time.monotonic()
        advance(now - begin)
        try:
            seen = psutil.Process(process.pid)
            rss.append(seen.memory_info().rss / 1e6)
            watchdog.extend(child.memory_info().rss / 1e6 for child in seen.children())
        except psutil.NoSuchProcess:
            break
        if now >= next_fault:
            next_fault += every_s
            stops.append(_cause(_FAULTS[len(stops) % len(_FAULTS)], plant, fault_file))
        time.sleep(1.0)
    return rss, watchdog, stops


def _cause(fault: Fault, plant: FakePlant, fault_file: Path) -> float:
    """One fault, for a while; seconds until a zero (infinite if none came, or if it moved again before the fault was over)."""
    begin = time.monotonic()
    fault_file.write_text(fault.value)
    time.sleep(_FAULT_S)
    stopped = plant.stopped_at()
    fault_file.unlink()
    return float("inf") if stopped is None else max(stopped - begin, 0.0)


def _ends(samples: list[float]) -> tuple[float, float]:
    kept = samples[int(len(samples) * _WARM_UP_SHARE) :]
    part = max(1, len(kept) // 10)
    return (float(np.median(kept[:part])), float(np.median(kept[-part:]))) if kept else (0.0, 0.0)
