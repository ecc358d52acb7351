"""Our DDS sink against ROS 2 Humble's own middleware: what arrives there, byte by byte."""

from __future__ import annotations

import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from runtime.commands.base import ZERO, Twist
from runtime.commands.cdr import decode_twist_stamped, encode_twist, encode_twist_stamped
from runtime.commands.dds import DdsSink
from runtime.robot_file import DdsCommands

pytest.importorskip("cyclonedds")

SOURCE = Path(__file__).with_name("fastdds_listener.cpp")
PATIENCE_S = 60
COUNT = 100  # messages until the listener ends by itself
TWISTS = [Twist(0.1, -0.2, 0.3, -0.4, 0.5, -0.6), ZERO, Twist(linear_x=1e-300, angular_z=-12345.678)]


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build a Fast DDS subscriber with")
    header = "#include <fastdds/dds/domain/DomainParticipant.hpp>\n"
    probe = subprocess.run([compiler, "-E", "-x", "c++", "-"], input=header, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip("no headers of Fast DDS (Debian: libfastrtps-dev)")
    built = tmp_path_factory.mktemp("fastdds") / "listener"
    subprocess.run(
        [compiler, "-std=c++14", "-O0", SOURCE, "-o", built, "-lfastrtps", "-lfastcdr"], check=True, timeout=280
    )
    return built


@contextmanager
def listening(listener: Path, domain: int, kind: str) -> Iterator[Robot]:
    arguments = [str(domain), "rt/cmd_vel", f"geometry_msgs::msg::dds_::{kind}_", str(COUNT), str(PATIENCE_S)]
    process = subprocess.Popen([listener, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    robot = None
    try:
        assert process.stdout.readline().startswith("fastdds 2.")
        robot = Robot(process)
        yield robot
    finally:
        process.kill()
        process.wait()
        if robot is not None:
            robot.reader.join()
        process.stdout.close()


class Robot:
    """A running listener, and what has come so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def hears(self, sink: DdsSink, twist: Twist, expected: bytes) -> bool:
        """Send until that arrives: right after two sides of DDS have found each other, commands can get lost."""
        deadline = time.monotonic() + PATIENCE_S
        heard = []
        while time.monotonic() < deadline:
            sink.send(twist)
            with suppress(queue.Empty):
                length, text = self._lines.get(timeout=0.05).split()
                heard.append(bytes.fromhex(text))
                assert len(heard[-1]) == int(length)
                if heard[-1] == expected:
                    return True
        raise AssertionError(f"expected {expected.hex()}, heard {sorted({one.hex() for one in heard})}")


def wait_for_listeners(sink: DdsSink, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while sink.listeners() != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_twist_arrives_as_the_bytes_of_our_cdr(listener: Path, domain: int) -> None:
    sink = DdsSink(DdsCommands(), domain)
    with listening(listener, domain, "Twist") as robot:
        wait_for_listeners(sink, 1)
        for twist in TWISTS:
            data = encode_twist(twist)
            assert len(data) == 52
            assert robot.hears(sink, twist, data)
        while robot.process.poll() is None:  # until it has heard enough
            sink.send(ZERO)
            time.sleep(0.01)
        assert robot.process.returncode == 0
        wait_for_listeners(sink, 0)
    sink.send(ZERO)
    sink.close()


def test_so_does_a_twist_stamped(listener: Path, domain: int) -> None:
    sink = DdsSink(DdsCommands(stamped=True, frame_id="base_footprint"), domain, clock=lambda: 1234567890.25)
    with listening(listener, domain, "TwistStamped") as robot:
        wait_for_listeners(sink, 1)
        for twist in TWISTS:
            data = encode_twist_stamped(twist, "base_footprint", 1234567890.25)
            assert decode_twist_stamped(data) == (twist, "base_footprint", 1234567890, 250_000_000)
            assert robot.hears(sink, twist, data)
    sink.close()
