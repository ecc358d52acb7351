"""The lock against real processes, kill -9, other users and traps in a shared folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bundle.errors import RobotLockedError
from runtime import robot_lock
from runtime.robot_lock import lock_file, lock_robot

PATIENCE_S = 60.0

# argv: folder, key; then: how to end.
HOLDER = """
import os, sys, time
from pathlib import Path
import runtime.robot_lock as robot_lock
robot_lock._RUN_LOCK = Path(sys.argv[1])
if sys.argv[3] == "nobody":
    os.setuid(65534)
os.umask(0o077)
with robot_lock.lock_robot(sys.argv[2]):
    print("held", flush=True)
    if sys.argv[3] == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared folder as /run/lock is one: all may write, none may remove what is another's."""
    folder = tmp_path / "lock"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(robot_lock, "_RUN_LOCK", folder)
    return folder


@contextmanager
def holder(folder: Path, key: str, how: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), key, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def refusal(key: str) -> RobotLockedError:
    with pytest.raises(RobotLockedError) as caught, lock_robot(key):
        pass
    return caught.value


def test_a_second_driver_is_refused_and_told_who_drives(folder: Path) -> None:
    with holder(folder, "udp robot:1") as first:
        error = refusal("udp robot:1")
        assert "somebody else is driving this robot (udp robot:1)" in str(error)
        assert f"process {first.pid}: " in str(error)
        assert ", since 20" in str(error)
        assert str(lock_file("udp robot:1")) in error.hint
        with lock_robot("udp robot:2"):
            pass


def test_the_lock_ends_with_a_holder_that_is_killed(folder: Path) -> None:
    with holder(folder, "a"):
        pass
    assert lock_file("a").exists(), "a file that is left over"
    with lock_robot("a"):
        assert str(os.getpid()) in str(refusal("a"))


def test_the_lock_does_not_live_on_in_a_fork_of_the_holder(folder: Path) -> None:
    with holder(folder, "a", "fork") as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        first.kill()
        first.wait()
        deadline = time.monotonic() + PATIENCE_S
        while True:  # the fork may not have come to its first step yet
            try:
                with lock_robot("a"):
                    break
            except RobotLockedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.kill(child, 0)


def test_a_fork_that_ends_does_not_end_the_lock(folder: Path) -> None:
    child = 0
    with lock_robot("a"):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert "somebody else" in str(refusal("a"))
    if not child:
        os._exit(0)
    with lock_robot("a"):
        pass


def test_one_process_cannot_drive_twice_and_leaves_nothing_behind(folder: Path) -> None:
    with lock_robot("a"):
        assert "pytest" in str(refusal("a"))
        assert "pytest" in str(refusal("a")), "being refused changes nothing"
    assert list(folder.iterdir()) == []
    with lock_robot("a"), lock_robot("b"):
        assert len(list(folder.iterdir())) == 2


def test_an_exception_lets_go(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_robot("a"):
        _ = 1 / 0
    with lock_robot("a"):
        pass


def test_what_moves_nothing_needs_no_lock(folder: Path) -> None:
    with lock_robot(""), lock_robot(""):
        assert list(folder.iterdir()) == []


def test_names_are_readable_and_distinct(folder: Path) -> None:
    names = {lock_file(key).name for key in ("topic /cmd_vel domain 42", "topic /cmd/vel domain 42", "x" * 500)}
    assert len(names) == 3
    assert all(len(name) < 120 and "/" not in name for name in names)
    assert any(name.startswith("jetvla-topic-cmd-vel-domain-42-") for name in names)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_users_exclude_each_other(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(f"/tmp/jetvla-lock-test-{os.getpid()}")  # a folder that others can reach
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(robot_lock, "_RUN_LOCK", folder)
    try:
        with holder(folder, "a", "nobody") as first:
            assert f"process {first.pid}" in str(refusal("a"))
            assert lock_file("a").stat().st_uid == 65534
        with lock_robot("a"):
            pass
        with lock_robot("a"):
            assert lock_file("a").stat().st_uid == 0
            denied = subprocess.run(
                [sys.executable, "-c", HOLDER, str(folder), "a", "nobody"], capture_output=True, text=True
            )
            assert "RobotLockedError: somebody else is driving" in denied.stderr
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def test_links_and_pipes_in_its_place_are_refused_and_unharmed(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = lock_file("a")

    path.symlink_to(victim)
    assert "symbolic link" in str(refusal("a"))
    path.unlink()
    path.symlink_to(tmp_path / "new")
    assert "cannot lock the robot" in str(refusal("a"))
    path.unlink()
    path.hardlink_to(victim)
    assert "something else than a plain file" in str(refusal("a"))
    path.unlink()
    os.mkfifo(path)
    assert "something else than a plain file" in str(refusal("a"))
    path.unlink()
    path.mkdir()
    assert "cannot lock the robot" in str(refusal("a"))
    path.rmdir()

    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    with lock_robot("a"):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b'{"pid": "x"}', b'{"pid": 1, "command": "a\\u001b[2J", "since": ""}']
)
def test_a_label_that_lies_changes_nothing(folder: Path, content: bytes) -> None:
    with lock_robot("a"):
        lock_file("a").write_bytes(content)
        error = str(refusal("a"))
        assert "somebody else is driving" in error
        assert "\x1b" not in error


def test_without_run_lock_it_is_tmp_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for missing in (tmp_path / "absent", tmp_path):
        missing.chmod(0o755) if missing.exists() else None
        monkeypatch.setattr(robot_lock, "_RUN_LOCK", missing)
        assert lock_file("a").parent == Path("/tmp"), "TMPDIR differs between users"


def test_a_lock_on_a_file_that_its_last_holder_has_removed_does_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, then removed by its holder, then made anew by a third: what we have then is a lock on nothing."""
    lock = robot_lock._lock
    with ExitStack() as third:
        first = lock_robot("a")
        first.__enter__()

        def late(number: int, path: Path, key: str) -> None:
            monkeypatch.setattr(robot_lock, "_lock", lock)
            first.__exit__(None, None, None)
            third.enter_context(holder(folder, "a"))
            lock(number, path, key)

        monkeypatch.setattr(robot_lock, "_lock", late)
        assert "somebody else is driving" in str(refusal("a"))


RACER = """
import os, sys, time
from pathlib import Path
import runtime.robot_lock as robot_lock
from bundle.errors import RobotLockedError
robot_lock._RUN_LOCK = Path(sys.argv[1])
marker = Path(sys.argv[1]) / "marker"
taken = 0
while taken < 40:
    try:
        with robot_lock.lock_robot("a"):
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            taken += 1
            marker.unlink()
    except RobotLockedError:
        time.sleep(0.0005)
"""


def test_of_many_one_drives_at_a_time(folder: Path) -> None:
    begin = time.monotonic()
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(folder)], stderr=subprocess.PIPE) for _ in range(4)]
    for racer in racers:
        _, error = racer.communicate(timeout=PATIENCE_S)
        assert racer.returncode == 0, error.decode()
    assert time.monotonic() - begin < PATIENCE_S
