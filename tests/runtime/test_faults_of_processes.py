"""Faults that take a whole process, or the disk, or a second one: with the command that a user types. See test_faults.py for the others."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runtime.cameras.simulated import Fault as CameraFault
from runtime.robot_file import Recorder
from tests.bundles import GO_RIGHT, Tiny
from tests.runtime.drives import ROOT, command, driving
from tests.runtime.faults import DECIDE_S, PERIOD_S, STALE_S, WATCHDOG_S, fault, judge
from tests.runtime.rig import fastest

DISK = fault("disk full", "the recorder gives up and says so; driving goes on")
TERM = fault(
    "SIGTERM", "a zero, then the end, exit code 0; Ctrl-C and a closed terminal likewise", 2 * PERIOD_S, "2 rounds"
)
KILL = fault(
    "SIGKILL of the loop",
    "the watchdog sees the process end, and sends zeros for 2 s",
    2 * PERIOD_S,
    "2 of the watchdog's rounds",
)
STOP = fault(
    "SIGSTOP of the loop",
    "the watchdog sends zeros for as long as it lasts; the loop ends when it wakes",
    WATCHDOG_S,
    "watchdog_s + 2 rounds",
)
OVERWRITTEN = fault(
    "bundle overwritten in place",
    "a zero and the end, with the name of the file; where the writer can be made to wait, before a byte has changed",
    2 * PERIOD_S + DECIDE_S,
    "a decision + 2 rounds",
)
REPLACED = fault(
    "bundle replaced file by file",
    "driving goes on with what was loaded; the next order is refused, which ends the run with a zero",
    2 * PERIOD_S,
    "2 rounds",
)
LOCK = fault(
    "two controllers on one robot", "the second one is refused before it moves anything, and is told who drives"
)
LOOSE = fault("out-of-range limits file", "refused before anything moves: looser, not a number, unknown axis")


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Path:
    """One that may be spoilt."""
    return shutil.copytree(tiny_bundle(Tiny()), tmp_path / "tiny.bundle")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_end(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    with driving(bundle, tmp_path, "--json") as drive:
        seen = drive.stands_after(lambda: drive.signal(number))
        assert drive.end() == 0, drive.said
        assert drive.process.stdout is not None
        summary = json.loads(drive.process.stdout.read())
        assert summary["zero_sent"]
        assert summary["decisions"] > 0
        assert fastest(drive.plant.log) <= 0.4
    if number == signal.SIGTERM:
        judge(TERM, seen)


def test_killed(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path) as drive:
        seen = drive.stands_after(lambda: drive.signal(signal.SIGKILL))
        zeros = len(drive.plant.log)
        assert drive.plant.wait_for_commands(5, 30)  # not one only: datagrams get lost
        assert drive.end() == -signal.SIGKILL
        assert all(twist.is_zero for _, twist in drive.plant.log[zeros:])
    judge(KILL, seen)


def test_frozen(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path) as drive:
        seen = drive.stands_after(lambda: drive.signal(signal.SIGSTOP))
        drive.signal(signal.SIGCONT)
        woken = time.monotonic()
        assert drive.end() == 1
        assert any("WatchdogError" in line for line in drive.said)
        # At most one word from before its sleep, and the watchdog's next zero at once after it.
        assert drive.plant.velocity.is_zero
        assert drive.plant.distance_m(after=woken) <= 0.4 * 0.2
    judge(STOP, seen)


def test_the_disk_refuses(bundle: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    recorder = Recorder(folder=str(tmp_path / "recordings"))
    with driving(bundle, tmp_path, recorder=recorder, preexec_fn=small_files_only) as drive:
        drive.until_moving()
        drive.until(lambda: any("record" in line and "hint" not in line for line in drive.said[-3:]))
        said = time.monotonic()
        assert drive.plant.wait_for_commands(20, 30)
        drive.until_moving()
        assert drive.plant.moving_after(said)
        drive.signal(signal.SIGTERM)
        assert drive.end() == 0, drive.said
    judge(DISK, None)


_IN_PLACE = {
    "copied over": ["cp", "-r", "{new}/.", "{used}"],
    "copied over with its times": ["cp", "-rp", "{new}/.", "{used}"],
    "written into": ["dd", "if=/dev/zero", "of={used}/vision.fp32.onnx", "bs=64", "seek=1", "count=1", "conv=notrunc"],
    "cut off": ["truncate", "-s", "100", "{used}/vision.fp32.onnx"],
    "emptied": ["sh", "-c", ": > {used}/token_embedding.npy"],
}


@pytest.mark.parametrize("way", _IN_PLACE)
def test_the_bundle_is_overwritten_while_it_runs(tiny_bundle, bundle: Path, tmp_path: Path, way: str) -> None:
    names = {"new": tiny_bundle(Tiny()), "used": bundle}
    writers = []
    with driving(bundle, tmp_path) as drive:
        drive.until_moving()
        words = [word.format_map(names) for word in _IN_PLACE[way]]
        seen = drive.stands_after(lambda: writers.append(subprocess.Popen(words, stderr=subprocess.DEVNULL)))
        assert drive.end() == 1
        assert any("was changed while it was in use" in line for line in drive.said), drive.said
    writers[0].wait(60)  # truncate(1) does not wait but fails, which is as good
    judge(OVERWRITTEN, seen)


def test_the_bundle_is_replaced_while_it_runs(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path, "--interactive") as drive:
        drive.until_moving()
        for path in (*bundle.glob("*.onnx"), bundle / "token_embedding.npy"):
            other = path.with_suffix(".new")
            other.write_bytes(b"\0" * path.stat().st_size)
            other.replace(path)
        commands = len(drive.plant.log)
        drive.until(lambda: any(not twist.is_zero for _, twist in drive.plant.log[commands + 10 :]))
        assert drive.process.stdin is not None

        def order() -> None:
            drive.process.stdin.write(GO_RIGHT + "\n")
            drive.process.stdin.flush()

        seen = drive.stands_after(order)
        assert drive.end() == 1
        assert any("was replaced while it was in use" in line for line in drive.said)
    judge(REPLACED, seen)


def test_two_controllers(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path) as drive:
        drive.until_moving()
        second = subprocess.run(
            command(bundle, tmp_path / "robot.toml"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 1
        assert "RobotLockedError" in second.stderr
        assert str(drive.process.pid) in second.stderr
        drive.until_moving()
    judge(LOCK, None)


@pytest.mark.parametrize(
    "text",
    [
        "[axes.linear_x]\nmax_speed = 5.0",
        "[axes.linear_x]\nmax_speed = nan",
        "[axes.angular_z]\nmax_speed = 0.1",
        "[safety]\nwatchdog_s = 4.0",
    ],
)
def test_limits_that_are_none(bundle: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "limits.toml").write_text(f"schema = 1\n{text}\n")
    with driving(bundle, tmp_path, "--limits", tmp_path / "limits.toml") as drive:
        assert drive.end() == 1
        assert any("limits" in line for line in drive.said)
        assert drive.plant.log == []
    judge(LOOSE, None)


def test_a_camera_that_dies_while_a_user_drives(bundle: Path, tmp_path: Path) -> None:
    """The same as in test_faults.py, through everything: file, plan, loop, watchdog, summary."""
    with driving(bundle, tmp_path) as drive:
        assert drive.stands_after(lambda: drive.fault_file.write_text(CameraFault.UNPLUGGED.value)) <= STALE_S + 1.5
        drive.fault_file.unlink()
        drive.until_moving()
        drive.signal(signal.SIGTERM)
        assert drive.end() == 0
        assert any("camera lost" in line for line in drive.said)
        assert any("camera back" in line for line in drive.said)


def test_a_dry_run_opens_no_way_to_the_robot(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path, "--dry-run", "--seconds", 2) as drive:
        assert drive.end() == 0, drive.said
        assert drive.plant.log == []
        assert not any("watchdog" in line and "process" in line for line in drive.said)


def test_nothing_moves_before_enter(bundle: Path, tmp_path: Path) -> None:
    with driving(bundle, tmp_path, "--confirm") as drive:
        drive.until(lambda: any("stops within" in line for line in drive.said))
        time.sleep(0.5)
        assert drive.plant.log == []
        assert drive.process.stdin is not None
        drive.process.stdin.write("\n")
        drive.process.stdin.flush()
        drive.until_moving()
    with driving(bundle, tmp_path, "--confirm") as drive:
        assert drive.process.stdin is not None
        drive.process.stdin.close()
        assert drive.end() == 2
        assert drive.plant.log == []
