"""run_robot as a user runs it, in a process of its own, on a robot that coasts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from runtime.cameras.simulated import FAULT_FILE_VARIABLE
from runtime.commands.fake_plant import FakePlant
from runtime.robot_file import Loop, Recorder, RobotFile, UdpCommands
from tests.bundles import GO_LEFT
from tests.robots import EAGER, robot_file, save_robot

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Drive:
    """A run under way.

    Attributes:
        said: what it has written to stderr so far.
    """

    process: subprocess.Popen[str]
    plant: FakePlant
    fault_file: Path
    said: list[str] = field(default_factory=list)

    def until_moving(self) -> None:
        """Wait until it drives."""
        self.until(lambda: not self.plant.velocity.is_zero)

    def until(self, reached: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait; fails at once where the process has ended."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, "".join(self.said)
            assert time.monotonic() < deadline, "".join(self.said)
            time.sleep(0.002)

    def stands_after(self, cause: Callable[[], object]) -> float:
        """Seconds from a fault to a robot that stands for good; the process may have ended."""
        self.until_moving()
        begin = time.monotonic()
        cause()
        assert self.plant.wait_for(lambda twist: twist.is_zero, 60), "".join(self.said)
        time.sleep(0.3)
        stopped = self.plant.stopped_at()
        assert stopped is not None, "it moves again"
        return stopped - begin

    def signal(self, number: signal.Signals) -> None:
        """To the process itself, and not to its watchdog."""
        os.kill(self.process.pid, number)

    def end(self, timeout_s: float = 60) -> int:
        """Its exit code."""
        code = self.process.wait(timeout_s)
        for reader in self.readers:
            reader.join(10)
        return code

    readers: list[threading.Thread] = field(default_factory=list)


def command(bundle: Path, robot: Path, *more: object) -> list[str]:
    """What a user types."""
    words = ["runtime/run_robot.py", bundle, "--robot", robot, "--instruction", GO_LEFT, "--backend", "ort:cpu", *more]
    return [sys.executable, *map(str, words)]


@contextmanager
def driving(
    bundle: Path,
    folder: Path,
    *more: object,
    recorder: Recorder | None = None,
    robot: RobotFile | None = None,
    **popen: object,
) -> Iterator[Drive]:
    """A run on a plant of its own; what is left of it is killed."""
    folder.mkdir(exist_ok=True)
    with FakePlant() as plant:
        file = robot or robot_file(axes=EAGER, loop=Loop(publish_hz=20.0, decide_hz=10.0))
        file = msgspec.structs.replace(file, commands=UdpCommands(host="127.0.0.1", port=plant.port), recorder=recorder)
        path, fault_file = save_robot(folder / "robot.toml", file), folder / "fault"
        process = subprocess.Popen(
            command(bundle, path, *more),
            cwd=ROOT,
            env=os.environ | {FAULT_FILE_VARIABLE: str(fault_file), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **popen,  # type: ignore[call-overload]
        )
        drive = Drive(process, plant, fault_file)
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: drive.said.extend(process.stderr or ()), daemon=True)
        reader.start()
        drive.readers.append(reader)
        try:
            yield drive
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            reader.join(10)
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
