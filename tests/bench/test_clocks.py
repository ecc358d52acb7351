"""The monotonic clock is trusted, and the others are watched."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench.clocks import JumpWatch, SystemClock, process_age_s
from tests.bench.hand_clock import HandClock


def test_a_wall_clock_that_jumps_is_noticed_and_moves_no_duration() -> None:
    clock = HandClock()
    watch = JumpWatch(clock)
    clock.pass_(1.0)
    watch.look()
    assert watch.jumps == []
    clock.wall_offset -= 3600  # somebody set the clock back
    clock.pass_(1.0)
    watch.look()
    assert watch.jumps == [pytest.approx(-3600)]
    watch.look()
    assert len(watch.jumps) == 1


def test_a_machine_that_slept_is_noticed() -> None:
    clock = HandClock()
    watch = JumpWatch(clock)
    clock.asleep += 12.0
    watch.look()
    assert watch.jumps == [pytest.approx(12.0)]


def test_slewing_is_no_jump() -> None:
    """NTP corrects by at most 500 ppm."""
    clock = HandClock()
    watch = JumpWatch(clock)
    for _ in range(1000):
        clock.pass_(0.1)
        clock.wall_offset += 0.1 * 500e-6
        watch.look()
    assert watch.jumps == []


def test_the_system_clock_does_not_jump_by_itself() -> None:
    clock = SystemClock()
    watch = JumpWatch(clock)
    start = clock.now()
    clock.sleep_until(start + 0.02)
    watch.look()
    assert clock.now() - start >= 0.02
    assert watch.jumps == []
    clock.sleep_until(start)  # over: returns


def test_the_age_of_a_process_includes_its_imports() -> None:
    code = "import time; time.sleep(0.3); from bench.clocks import process_age_s; print(process_age_s())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - start + 0.02  # it is told in hundredths
    assert process_age_s() > 0
