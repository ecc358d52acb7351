"""A recorder that is killed at any moment loses less than a second, and what it left is mended at the next start."""

from __future__ import annotations

import fcntl
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mcap")
pytest.importorskip("h5py")

from mcap.reader import make_reader

from episodes.recording_events import read_run
from episodes.recording_repair import is_finished
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.recorder.recover import recover_file, recover_folder
from runtime.robot_file import Recorder
from tests.recordings import PATIENCE_S, cut_off, drive, record, run_info, until

ROOT = Path(__file__).resolve().parents[3]
PROMISED_S = 1.0

DRIVE = """
import sys, time
from runtime.cameras.base import Frame
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.recordings import decision, pictures, published, run_info

recorder = FlightRecorder(Recorder(folder=sys.argv[1]), on_problem=lambda text: print(text, file=sys.stderr))
recorder.start(run_info())
scenes = pictures(4, height=240, width=320)
number = 0
while True:
    now = time.monotonic()
    if number % 5 == 0:
        recorder.take(decision(number // 5, Frame(scenes[number % 4], now), [[0.1, 0.2]], took_s=0.0))
    recorder.take(published(now, number / 1000, 0))
    print(number, now, flush=True)
    number += 1
    time.sleep(0.01)
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random()
    seed = rng.randrange(1 << 30)
    rng.seed(seed)
    print(f"seed {seed}")
    for trial in range(3):
        folder = tmp_path / str(trial)
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVE, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()  # it runs
        time.sleep(PROMISED_S + rng.uniform(0.2, 1.2))
        killed_s = time.monotonic()
        process.kill()
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert errors == ""
        taken = {int(number): float(at_s) for number, at_s in map(str.split, output.splitlines()[:-1])}
        due = {number for number, at_s in taken.items() if at_s < killed_s - PROMISED_S}
        assert due, "killed too early to say anything"

        (path,) = folder.glob("*.mcap")
        run = read_run(path)
        assert run.unfinished
        commands = {round(command.values["linear_x"] * 1000) for command in run.commands}
        assert due <= commands
        assert {number // 5 for number in due if number % 5 == 0} <= {one.number for one in run.decisions}
        assert all(one.picture is not None for one in run.decisions)

        recorder = FlightRecorder(Recorder(folder=str(folder)))
        recorder.start(run_info())
        until(lambda path=path: is_finished(path))
        recorder.close()
        with path.open("rb") as file:
            reader = make_reader(file, validate_crcs=True)
            assert sum(1 for _ in reader.iter_messages(topics=["/cmd_vel"])) == len(run.commands)


def test_what_a_crash_left_is_mended_and_told_at_the_next_start(tmp_path: Path) -> None:
    *paths, whole = [record(tmp_path, drive(3, time.monotonic())) for _ in range(3)]
    for path in paths:
        cut_off(path)
    before = whole.read_bytes()
    lines: list[str] = []
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)), on_problem=lines.append)
    recorder.start(run_info())
    until(lambda: len(lines) == 2)
    recorder.close()
    assert sorted(lines) == sorted(
        f"recorder: repaired {p.name}, which a crash or a power cut had left unfinished" for p in paths
    )
    assert all(map(is_finished, paths))
    assert whole.read_bytes() == before


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = cut_off(record(tmp_path, drive(3, time.monotonic())))
    before = path.read_bytes()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not recover_file(path)
    assert path.read_bytes() == before
    assert recover_folder(tmp_path) == [path]
    assert recover_folder(tmp_path) == []


def test_a_running_recorder_holds_that_lock(tmp_path: Path) -> None:
    recorder = FlightRecorder(Recorder(folder=str(tmp_path)))
    recorder.start(run_info())
    until(lambda: recorder.status.file is not None)
    (path,) = tmp_path.glob("*.mcap")
    assert not recover_file(path)
    recorder.close()
    assert is_finished(path)


def test_what_is_not_ours_is_not_repaired(tmp_path: Path) -> None:
    path = cut_off(record(tmp_path, drive(3, time.monotonic())))
    data = path.read_bytes()
    other = path.with_name("holiday.mcap")
    path.rename(other)
    assert recover_folder(tmp_path) == []
    assert other.read_bytes() == data
    (tmp_path / "000007-x-20260101-000000.mcap").write_bytes(b"\x89MCAP0\r\n")
    assert recover_folder(tmp_path) == []
    assert recover_folder(tmp_path / "missing") == []
