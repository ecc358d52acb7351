"""The watchdog against real processes, real signals and a robot that coasts."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bundle.errors import CommandError, WatchdogError
from runtime import watchdog as watchdog_module
from runtime.commands.base import Twist
from runtime.commands.fake_plant import FakePlant
from runtime.commands.udp import UdpSink
from runtime.robot_file import ConsoleCommands, DdsCommands, UdpCommands
from runtime.watchdog import Watchdog
from runtime.watchdog_process import PAGE_BYTES, Page, Setup, _Guard

TIMEOUT_S = 0.6  # where the loop is meant to miss it
LONG_S = 30.0  # where it is not, however slow the machine
PATIENCE_S = 60.0  # of these tests, on a slow machine
FORWARD = Twist(linear_x=0.5)

# A control loop in a process of its own: drives forward and says how it fares. argv: port, timeout, what to do after ten ticks.
LOOP = """
import ctypes, os, sys, threading, time
from runtime.commands.base import Twist
from runtime.commands.udp import UdpSink
from runtime.robot_file import UdpCommands
from runtime.watchdog import Watchdog
port, timeout_s, then = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
commands = UdpCommands(host="127.0.0.1", port=port)
sink, watchdog = UdpSink(commands), Watchdog.start(commands, timeout_s)
print("watchdog", watchdog.pid, flush=True)
tick = 0
while True:
    watchdog.beat()
    try:
        watchdog.check()
    except Exception as error:
        print("fault", type(error).__name__, str(error).replace(chr(10), " "), flush=True)
        sys.exit(3)
    sink.send(Twist(linear_x=0.5))
    time.sleep(0.02)
    tick += 1
    if tick == 10:
        print("driving", flush=True)
    if tick >= 10 and then == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if tick >= 10 and then == "fork":
        if os.fork() == 0:
            watchdog.beat()
            watchdog.close()
            time.sleep(600)
        os.kill(os.getpid(), 9)
    if tick >= 10 and then == "fork of a library":  # none of Python's hooks run
        if ctypes.CDLL(None).fork() == 0:
            ctypes.CDLL(None).pause()
        os.kill(os.getpid(), 9)
    if tick >= 10 and then == "close":
        watchdog.close()
        print("closed", flush=True)
        sys.exit(0)
"""


@pytest.fixture
def plant() -> Iterator[FakePlant]:
    with FakePlant() as plant:
        yield plant


def commands(plant: FakePlant) -> UdpCommands:
    return UdpCommands(host="127.0.0.1", port=plant.port)


class Loop:
    """The control loop's process and its watchdog's."""

    def __init__(self, plant: FakePlant, timeout_s: float, then: str = "") -> None:
        # A session of its own, so that a test can end all that it leaves behind; the watchdog has left it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(plant.port), str(timeout_s), then],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.watchdog_pid = int(self.line().split()[1])
        assert self.line() == "driving"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        for victim in (self.watchdog_pid, -self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    running: list[Loop] = []
    yield running
    for loop in running:
        loop.kill()


def is_running(pid: int) -> bool:
    """Not ended, not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} does not end"
        time.sleep(0.02)


def drive(plant: FakePlant, watchdog: Watchdog) -> None:
    """A few ticks of a loop in this process."""
    sink = UdpSink(commands(plant))
    for _ in range(5):
        watchdog.beat()
        watchdog.check()
        sink.send(FORWARD)
        time.sleep(0.02)
    sink.close()
    assert plant.wait_for(lambda twist: twist == FORWARD, PATIENCE_S)


def fault_of(watchdog: Watchdog) -> WatchdogError:
    """What check() raises, within bounded time."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        watchdog.beat()
        try:
            watchdog.check()
        except WatchdogError as error:
            return error
        time.sleep(0.02)
    raise AssertionError("check() raises nothing")


def zeros_at_the_end(plant: FakePlant) -> list[float]:
    """When the zeros after the last command that was not one came."""
    log = plant.log
    last = max(i for i, (_, twist) in enumerate(log) if not twist.is_zero)
    return [moment for moment, _ in log[last + 1 :]]


def test_a_loop_that_is_killed_is_followed_by_zeros_for_two_seconds(plant: FakePlant, loops: list[Loop]) -> None:
    loop = Loop(plant, LONG_S)
    loops.append(loop)
    loop.process.kill()
    killed = time.monotonic()

    assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
    assert plant.wait_for_commands(9, PATIENCE_S)
    wait_until_gone(loop.watchdog_pid)
    zeros = zeros_at_the_end(plant)
    assert len(zeros) >= 10
    assert zeros[-1] - zeros[0] > 1.5, "a command that is still on its way would win"
    assert plant.stopped_at() is not None
    assert not plant.moving_after(killed + 5), "a killed loop is known at once, not after a timeout"


def test_a_stopped_loop_is_stopped_within_its_time_and_learns_it_when_it_goes_on(
    plant: FakePlant, loops: list[Loop]
) -> None:
    loop = Loop(plant, TIMEOUT_S)
    loops.append(loop)
    os.kill(loop.process.pid, signal.SIGSTOP)

    assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
    log = plant.log
    first_zero = next(i for i, (_, twist) in enumerate(log) if twist.is_zero)
    silence = log[first_zero][0] - log[first_zero - 1][0]
    assert TIMEOUT_S - 0.1 < silence < TIMEOUT_S + 2, "neither before its time nor much later"
    assert plant.wait_for_commands(5, PATIENCE_S), "it repeats itself"

    os.kill(loop.process.pid, signal.SIGCONT)
    fault = loop.line()
    assert fault.startswith("fault WatchdogError the watchdog has stopped the robot"), fault
    assert f"no sign of life from the control loop for {TIMEOUT_S} s" in fault
    assert loop.process.wait(PATIENCE_S) == 3
    assert plant.wait_for_commands(5, PATIENCE_S)
    assert plant.velocity.is_zero, "also a last command of the loop's is overruled"


def test_a_deadlocked_loop_is_stopped(plant: FakePlant, loops: list[Loop]) -> None:
    loop = Loop(plant, TIMEOUT_S, "deadlock")
    loops.append(loop)
    assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
    assert plant.wait_for_commands(5, PATIENCE_S)
    assert plant.velocity.is_zero
    assert is_running(loop.process.pid), "the deadlock holds"
    assert is_running(loop.watchdog_pid), "and so does the stop"


@pytest.mark.parametrize("fork", ["fork", "fork of a library"])
def test_a_fork_of_a_killed_loop_neither_feigns_life_nor_says_goodbye(
    plant: FakePlant, loops: list[Loop], fork: str
) -> None:
    loop = Loop(plant, LONG_S, fork)
    loops.append(loop)
    assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
    wait_until_gone(loop.watchdog_pid)
    zeros = zeros_at_the_end(plant)
    assert len(zeros) >= 10
    assert zeros[-1] - zeros[0] > 1.5, "not the short form of a goodbye"


def test_an_orderly_end_says_a_last_zero_and_leaves_nothing_behind(plant: FakePlant, loops: list[Loop]) -> None:
    loop = Loop(plant, LONG_S, "close")
    loops.append(loop)
    assert loop.line() == "closed"
    assert not is_running(loop.watchdog_pid)
    assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
    assert plant.velocity.is_zero
    assert len(zeros_at_the_end(plant)) < 10, "a goodbye needs no two seconds"
    assert loop.process.wait(PATIENCE_S) == 0


def test_ctrl_c_and_a_polite_end_do_not_reach_it(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), LONG_S) as watchdog:
        assert os.getsid(watchdog.pid) != os.getsid(0)
        for polite in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(watchdog.pid, polite)
        drive(plant, watchdog)
        assert is_running(watchdog.pid)


def test_it_waits_for_the_first_beat_and_then_for_no_more(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), 0.1) as watchdog:
        time.sleep(0.5)
        watchdog.check()
        assert plant.log == [], "loading a policy takes longer than any timeout"
        watchdog.beat()
        assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
        assert plant.wait_for_commands(3, PATIENCE_S)


def test_a_trip_is_for_good(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), TIMEOUT_S) as watchdog:
        drive(plant, watchdog)
        assert plant.wait_for_commands(1, PATIENCE_S)
        first = fault_of(watchdog)
        sink = UdpSink(commands(plant))
        for _ in range(20):
            watchdog.beat()
            time.sleep(0.02)
        before = len(plant.log)
        sink.send(FORWARD)
        sink.close()
        deadline = time.monotonic() + PATIENCE_S
        while FORWARD not in [twist for _, twist in plant.log[before:]]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S), "a command that slips out is overruled"
        assert fault_of(watchdog) is first
    with pytest.raises(WatchdogError):
        watchdog.check()


def test_a_killed_watchdog_is_noticed(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), LONG_S) as watchdog:
        drive(plant, watchdog)
        os.kill(watchdog.pid, signal.SIGKILL)
        error = fault_of(watchdog)
    assert "the watchdog does not run any more" in str(error)
    assert "killed by signal 9" in str(error)
    assert "nothing may move" in error.hint


def test_a_watchdog_that_hangs_is_noticed_and_does_not_hang_the_end(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), 1.0) as watchdog:
        drive(plant, watchdog)
        os.kill(watchdog.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        error = fault_of(watchdog)
        assert time.monotonic() - stopped < 10
        assert "no sign of life for 1" in str(error)
        assert is_running(watchdog.pid)
    assert not is_running(watchdog.pid)


def test_closing_a_frozen_one_waits_once(plant: FakePlant, monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits share one limit: counted by what was asked for, so a slow machine changes nothing."""
    asked_s: list[float] = []
    watchdog = Watchdog.start(commands(plant), LONG_S)
    select_now, wait_now = select.select, watchdog._process.wait

    def selecting(*args: object) -> object:
        asked_s.append(float(str(args[3])))
        return select_now(*args)  # type: ignore[call-overload]

    def waiting(timeout: float | None = None) -> int:
        asked_s.append(0.0 if timeout is None else timeout)
        return wait_now(timeout)

    drive(plant, watchdog)
    os.kill(watchdog.pid, signal.SIGSTOP)
    monkeypatch.setattr(watchdog_module.select, "select", selecting)
    monkeypatch.setattr(watchdog._process, "wait", waiting)
    watchdog.close()
    assert asked_s[0] == 5.0
    assert sum(asked_s) <= 5.0
    assert not is_running(watchdog.pid)


def test_a_watchdog_that_was_held_up_does_not_blame_the_loop(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), 1.0) as watchdog:
        drive(plant, watchdog)
        os.kill(watchdog.pid, signal.SIGSTOP)
        for _ in range(60):
            watchdog.beat()
            time.sleep(0.02)
        os.kill(watchdog.pid, signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() - watchdog._page.alive_s > 0.5:
            assert time.monotonic() < deadline
            watchdog.beat()
            time.sleep(0.02)
        drive(plant, watchdog)
        assert not plant.velocity.is_zero


def test_closing_twice_is_closing_once(plant: FakePlant) -> None:
    watchdog = Watchdog.start(commands(plant), LONG_S)
    watchdog.close()
    watchdog.close()
    watchdog.beat()
    with pytest.raises(WatchdogError, match="it was closed"):
        watchdog.check()


def test_beats_and_checks_cost_microseconds(plant: FakePlant) -> None:
    with Watchdog.start(commands(plant), 30.0) as watchdog:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            watchdog.beat()
            watchdog.check()
            times.append(time.perf_counter() - begin)
    assert sorted(times)[100] < 0.001


def test_a_host_without_address_is_an_error_before_anything_moves() -> None:
    with pytest.raises(
        CommandError,
        match="the watchdog cannot reach the robot: the host of the commands has no address",
    ) as caught:
        Watchdog.start(UdpCommands(host="nowhere.invalid", port=9), TIMEOUT_S)
    assert "[commands]" in caught.value.hint


def test_a_missing_library_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cyclonedds.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'cyclonedds'\", name='cyclonedds')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        CommandError, match="the watchdog cannot reach the robot: cyclonedds is not installed"
    ) as caught:
        Watchdog.start(DdsCommands(), TIMEOUT_S)
    assert "jetvla[dds]" in caught.value.hint


@pytest.mark.parametrize("already_dead", [False, True])
def test_a_process_that_dies_at_its_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already_dead: bool
) -> None:
    if already_dead:  # before it is told anything

        def spawn(*arguments: int) -> subprocess.Popen[bytes]:
            process = _spawn(*arguments)
            process.wait()
            return process

        _spawn = watchdog_module._spawn
        monkeypatch.setattr(watchdog_module, "_spawn", spawn)
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WatchdogError, match="the watchdog did not start") as caught:
        Watchdog.start(ConsoleCommands(), TIMEOUT_S)
    assert "code 7" in str(caught.value)


def test_it_works_with_closed_standard_streams(plant: FakePlant, tmp_path: Path) -> None:
    result = tmp_path / "result"
    script = f"""
import os, time
from runtime.robot_file import UdpCommands
from runtime.watchdog import Watchdog
watchdog = Watchdog.start(UdpCommands(host="127.0.0.1", port={plant.port}), 0.2)
watchdog.beat()
watchdog.check()
with open({str(result)!r}, "w") as file:
    file.write(str(watchdog.pid))
os.kill(os.getpid(), 9)
"""
    subprocess.run(["sh", "-c", '"$0" -c "$1" 0<&- 1>&- 2>&-', sys.executable, script], check=False)
    assert plant.wait_for_commands(5, PATIENCE_S)
    wait_until_gone(int(result.read_text()))


def test_a_full_pipe_for_stderr_does_not_hold_it_up(plant: FakePlant) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while os.write(writing, b"x" * size):
                pass
    os.set_blocking(writing, True)
    script = f"""
from runtime.robot_file import UdpCommands
from runtime.watchdog import Watchdog
import time
watchdog = Watchdog.start(UdpCommands(host="127.0.0.1", port={plant.port}), 0.2)
watchdog.beat()
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=writing)
    try:
        assert plant.wait_for_commands(10, PATIENCE_S)
    finally:
        parent.kill()
        parent.wait()
        os.close(reading)
        os.close(writing)


def test_it_says_on_stderr_what_it_did(plant: FakePlant, capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog.start(commands(plant), 0.1) as watchdog:
        watchdog.beat()
        assert plant.wait_for(lambda twist: twist.is_zero, PATIENCE_S)
        assert plant.wait_for_commands(2, PATIENCE_S)
    assert "jetvla watchdog: no sign of life for 0.1 s; stopping the robot" in capfd.readouterr().err


class Unreachable:
    """A way to a robot on which nothing gets out until it is mended."""

    def __init__(self) -> None:
        self.broken, self.listening, self.confirms = True, 1, True
        self.sent: list[Twist] = []

    def send(self, twist: Twist) -> None:
        if self.broken:
            raise CommandError("Network is unreachable", hint="this is a test.")
        self.sent.append(twist)

    def listeners(self) -> int | None:
        return self.listening

    def confirm(self, wait_s: float) -> bool:
        return self.confirms

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture
def guarded() -> Iterator[tuple[Unreachable, Page, socket.socket, threading.Thread]]:
    """The process's part, on a thread, armed; with the loop's end of the connection."""
    link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    memory = os.memfd_create("test")
    os.truncate(memory, PAGE_BYTES)
    page, sink = Page(memory), Unreachable()
    os.close(memory)
    setup = Setup(commands=ConsoleCommands(), timeout_s=LONG_S, parent=os.getppid())
    thread = threading.Thread(target=_Guard(theirs, page, sink, setup).run, daemon=True)
    page.beat_s = time.monotonic()
    thread.start()
    time.sleep(0.2)  # it has looked at its listeners
    yield sink, page, link, thread
    sink.broken, sink.listening, sink.confirms = False, 1, True
    link.close()
    thread.join(PATIENCE_S)
    theirs.close()
    page.close()


@pytest.mark.parametrize(
    ("fault", "mended"),
    [
        ({"broken": True}, {"broken": False}),
        ({"listening": 0}, {"listening": 1}),
        ({"confirms": False}, {"confirms": True}),
    ],
)
def test_an_end_that_does_not_reach_the_robot_is_not_the_end(guarded, fault, mended) -> None:
    sink, _, link, thread = guarded
    sink.broken = False
    vars(sink).update(fault)
    link.send(b"q")
    link.settimeout(PATIENCE_S)
    assert link.recv(8) == b"k"  # it stays
    time.sleep(0.3)
    assert thread.is_alive()
    before = len(sink.sent)
    vars(sink).update(mended)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert len(sink.sent) - before >= 3
    assert all(twist.is_zero for twist in sink.sent)


def test_a_parent_lets_it_stay(plant: FakePlant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither killed nor waited for."""
    stays = tmp_path / "stays.py"
    stays.write_text(
        "import socket, sys, time\n"
        "link = socket.socket(fileno=int(sys.argv[1]))\n"
        "link.recv(65536); link.send(b'r'); link.recv(8); link.send(b'k')\n"
        "time.sleep(1.0)\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        watchdog_module.subprocess, "Popen", lambda words, **more: real([words[0], str(stays), *words[2:]], **more)
    )
    guard = Watchdog.start(commands(plant), LONG_S)
    begin = time.monotonic()
    guard.close()
    assert time.monotonic() - begin < 1.0 or (tmp_path / "done").exists()
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_that_was_never_armed_says_nothing(plant: FakePlant) -> None:
    """Whoever drives this robot, it was not us."""
    Watchdog.start(commands(plant), LONG_S).close()
    assert plant.log == []
