"""Old or new, never half: with full disks, with errors, and with kill -9 at every line of the code."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle import atomic
from bundle.atomic import disk_errors, exclusive, staged_directory, write_bytes
from bundle.errors import BundleError, BundleLockedError, StorageError
from tests.bundles import signed_manifest

ROOT = Path(__file__).resolve().parents[2]

# Started in a process of its own. `killed` runs some work in a child that gets SIGKILL - before its n-th line inside
# bundle/atomic.py or this program if `line` is given, else some time after it has called `started` - and tells whether it
# was in time.
DRIVER = '''
import json, os, random, signal, sys, time
from pathlib import Path
from bundle import atomic
from tests.bundles import signed_manifest

def killed(work, *, line=None, seconds=0.0):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        if line is None:
            work(lambda: os.write(writing, b"."))
        else:
            sys.settrace(killer(line))
            work()
        os._exit(0)
    if line is None:
        os.read(reading, 1)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    os.close(reading), os.close(writing)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

def killer(last):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in (atomic.__file__, "<string>"):
            return None
        count += event == "line"
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

def build(target, content):
    with atomic.exclusive(target), atomic.staged_directory(target) as staging:
        (staging / "manifest.json").write_bytes(signed_manifest(content))
        (staging / "weights").write_text(content)
        (staging / "reports").mkdir()
        (staging / "reports" / "log").write_text(content)

def state(target):
    """What each file was written with; None if there is no directory."""
    if not target.exists():
        return None
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    return found | {"manifest.json": json.loads(found["manifest.json"])["jetvla"]}

os.fsync = lambda descriptor: None  # the system outlives the process, and a hundred builds go faster
folder = Path(sys.argv[1])
'''
OLD, NEW = (dict.fromkeys(("manifest.json", "weights", "reports/log"), content) for content in ("old", "new"))


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def drive(program: str, folder: Path) -> list[list[object]]:
    """What the program printed, one JSON value a line."""
    done = run(DRIVER + program, folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit of the kernel that makes the write itself fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def record_order(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Let the real system calls write down in which order they come, and for which names."""
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def recorded(name: str) -> None:
        real = getattr(os, name)

        def call(source: Path, target: Path) -> None:
            calls.append(f"{name} {source.name} {target.name}")
            real(source, target)

        monkeypatch.setattr(os, name, call)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    recorded("replace")
    recorded("rename")


def make(target: Path, label: str) -> None:
    """A bundle of two files."""
    target.mkdir(exist_ok=True)
    (target / "manifest.json").write_bytes(signed_manifest(label))
    (target / "weights").write_text(label)


def labels(target: Path) -> dict[str, str]:
    """What each file of a bundle was made with."""
    found = {path.name: path.read_text() for path in target.iterdir()}
    return found | {"manifest.json": json.loads(found["manifest.json"])["jetvla"]}


OLD_BUNDLE, NEW_BUNDLE = ({"manifest.json": label, "weights": label} for label in ("old", "new"))


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(3_000_000)], ids=len)
def test_a_file_is_written_and_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    for expected in (data, b"other", data):
        write_bytes(path, expected)
        assert path.read_bytes() == expected
    assert names(tmp_path) == ["file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves the new name with the content of neither."""
    calls: list[str] = []
    record_order(monkeypatch, calls)

    write_bytes(tmp_path / "file", b"content")

    assert calls == [
        f"fsync .file.{threading.get_native_id()}.{os.getpid()}.tmp",
        f"replace .file.{threading.get_native_id()}.{os.getpid()}.tmp file",
        f"fsync {tmp_path.name}",
    ]


def test_write_killed_at_every_line(tmp_path: Path) -> None:
    states = drive(
        """
path = folder / "file"
line = 1
while True:
    path.write_bytes(b"old")
    dead = killed(lambda: atomic.write_bytes(path, b"new"), line=line)
    print(json.dumps([dead, path.read_text()]))
    if not dead:
        break
    line += 1
""",
        tmp_path,
    )
    contents = [content for _, content in states]
    assert len(contents) > 10
    assert contents == sorted(contents, reverse=True)  # old up to some line, new from there on
    assert (contents[0], states[-1]) == ("old", [False, "new"])


def test_write_killed_at_any_time(tmp_path: Path) -> None:
    states = drive(
        """
path = folder / "file"
def work(started):
    for count in range(1_000_000):
        atomic.write_bytes(path, b"12345"[count % 5 :][:1] * 1_000_000)
        started()
for _ in range(30):
    dead = killed(work, seconds=random.uniform(0, 0.03))
    content = path.read_bytes()
    print(json.dumps([dead, len(content), len(set(content))]))
""",
        tmp_path,
    )
    assert states == [[True, 1_000_000, 1]] * 30


@pytest.mark.parametrize("limit", [0, 1, 9_999])
def test_a_file_larger_than_the_disk_allows(tmp_path: Path, limit: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(StorageError, match="File too large") as caught, largest_file(limit):
        write_bytes(tmp_path / "file", bytes(10_000))
    assert str(tmp_path / "file") in caught.value.what
    assert "hint: free some space or choose another folder" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "absent" / "file", b"")
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("no disk's fault")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_errors_of_the_disk_get_a_hint(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError) as caught, disk_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'x'}\n  got:      {os.strerror(number)}\n  expected: room for the whole output\n\n"
        "hint: free some space or choose another folder; nothing was replaced."
    )


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    drive('assert killed(lambda: atomic.write_bytes(folder / "file", b"new"), line=10)', tmp_path)
    assert len(names(tmp_path)) == 1  # so the test tests something
    write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


# --- directories ----------------------------------------------------------------------------------------------------------


def test_a_directory_is_new(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.bundle"
    with exclusive(target), staged_directory(target) as staging:
        assert staging.parent == target.parent  # a rename across file systems is a copy
        assert list(staging.iterdir()) == []
        make(staging, "new")
        assert not target.exists()
    assert labels(target) == NEW_BUNDLE
    assert names(target.parent) in (["x.bundle"], [".x.bundle.lock", "x.bundle"])


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_a_bundle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    make(tmp_path / "x", "old")
    with staged_directory(tmp_path / "x") as staging:
        make(staging, "new")
        assert labels(tmp_path / "x") == OLD_BUNDLE
    assert labels(tmp_path / "x") == NEW_BUNDLE
    assert names(tmp_path) == ["x"]


def test_this_system_exchanges_directories(tmp_path: Path) -> None:
    """What the other tests call renameat2 is renameat2; where it is not, `_exchange` says so and changes nothing."""
    make(tmp_path / "a", "a")
    make(tmp_path / "b", "b")

    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        assert labels(tmp_path / "a")["weights"] == "a"
        pytest.skip("this file system cannot exchange two names")

    assert (labels(tmp_path / "a")["weights"], labels(tmp_path / "b")["weights"]) == ("b", "a")
    assert not atomic._exchange(tmp_path / "a", tmp_path / "absent")
    assert labels(tmp_path / "a")["weights"] == "b"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with staged_directory(tmp_path / "x") as staging:
        make(staging, "new")
    assert labels(tmp_path / "x") == NEW_BUNDLE
    assert names(tmp_path) == ["x"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    record_order(monkeypatch, calls)
    with staged_directory(tmp_path / "x") as staging:
        (staging / "reports").mkdir()
        for name in ("manifest.json", "reports/log"):
            (staging / name).write_text("new")
        calls.append("written")
    before, renamed = calls[: calls.index(f"rename {staging.name} x")], calls[-2]

    assert before[0] == "written"
    assert sorted(before[1:]) == sorted(f"fsync {name}" for name in ("manifest.json", "log", "reports", staging.name))
    assert (renamed, calls[-1]) == (f"rename {staging.name} x", f"fsync {tmp_path.name}")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, BundleError])
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    if existing:
        make(tmp_path / "x", "old")
    failure = error("no", hint="no") if error is BundleError else error()  # type: ignore[call-arg]

    def build() -> None:
        with staged_directory(tmp_path / "x") as staging:
            make(staging, "new")
            raise failure

    with pytest.raises(error):
        build()

    assert names(tmp_path) == (["x"] if existing else [])
    if existing:
        assert labels(tmp_path / "x") == OLD_BUNDLE


@pytest.mark.parametrize("kind", ["file", "directory", "nested"])
def test_what_is_not_ours_is_not_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    if kind == "file":
        target.write_text("precious")
    else:
        precious = target / ("deep/thesis.tex" if kind == "nested" else "thesis.tex")
        precious.parent.mkdir(parents=True)
        precious.write_text("precious")
    with (
        pytest.raises(BundleError, match=r"exists and is not a bundle(?s:.*)does not overwrite"),
        staged_directory(target),
    ):
        pytest.fail("the block must not run: a build takes minutes")
    assert names(tmp_path) == ["x"]
    assert (target if kind == "file" else precious).read_text() == "precious"


@pytest.mark.parametrize("manifest", ['{"name": "my web app", "icons": []}', '{"schema": 1}', "[]"])
def test_the_manifest_of_another_program_is_not_ours(tmp_path: Path, manifest: str) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "manifest.json").write_text(manifest)
    (target / "index.html").write_text("precious")
    with pytest.raises(BundleError, match="is not a bundle"), staged_directory(target) as staging:
        make(staging, "new")
    assert (target / "index.html").read_text() == "precious"


def test_through_a_link(tmp_path: Path) -> None:
    """`current` -> the bundle that the robot runs."""
    make(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    with staged_directory(tmp_path / "current") as staging:
        make(staging, "new")
    assert labels(tmp_path / "current") == NEW_BUNDLE
    assert names(tmp_path) == ["current", "v1"]


def test_two_renames_of_which_the_second_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", "old")
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError), staged_directory(tmp_path / "x") as staging:
        make(staging, "new")
    assert labels(tmp_path / "x") == OLD_BUNDLE
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "epoch=0-step=2.bundle",
        "v[1].bundle",
    ],
)
def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, name: str) -> None:
    for leftover in (f".{name}.building-1", f".{name}.building-22-old"):
        make(tmp_path / leftover, "half")
    others = ["other", f".other-{name}.building-1", f"{name}.building-1", f".{name}2.building-1", f".{name}.lock"]
    for other in others:
        make(tmp_path / other, "kept")
    with staged_directory(tmp_path / name) as staging:
        make(staging, "new")
    assert names(tmp_path) == sorted([*others, name])


KILLED_BUILDS = """
import shutil
{prepare}
target = folder / "x"
line = 1
while True:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if {existing}:
        build(target, "old")
    dead = killed(lambda: build(target, "new"), line=line)
    found = state(target)
    build(target, "next")
    after = sorted(path.name for path in folder.iterdir())
    print(json.dumps([dead, found, state(target)["weights"], after]))
    if not dead:
        break
    line += 1
"""


@pytest.mark.parametrize("existing", [True, False])
def test_build_killed_at_every_line(tmp_path: Path, existing: bool) -> None:
    states = drive(KILLED_BUILDS.format(prepare="", existing=existing), tmp_path / "work")
    before = OLD if existing else None
    found = [state for _, state, _, _ in states]
    change = found.index(NEW)
    assert len(found) > 60
    assert found == [before] * change + [NEW] * (len(found) - change)
    assert change > 40
    assert {next_state for _, _, next_state, _ in states} == {"next"}
    for _, _, _, after in states:
        assert [name for name in after if name != ".x.lock"] == ["x"]


def test_build_killed_at_every_line_where_names_cannot_be_exchanged(tmp_path: Path) -> None:
    """Between the two renames there is no bundle; at no line is there half of one."""
    prepare = "atomic._exchange = lambda first, second: False"
    states = drive(KILLED_BUILDS.format(prepare=prepare, existing=True), tmp_path / "work")
    found = [state for _, state, _, _ in states]
    assert 0 < found.count(None) < 5
    assert found == [OLD] * found.count(OLD) + [None] * found.count(None) + [NEW] * found.count(NEW)
    assert {tuple(name for name in after if name != ".x.lock") for _, _, _, after in states} == {("x",)}


def test_build_killed_at_any_time(tmp_path: Path) -> None:
    states = drive(
        """
target = folder / "x"
def work(started):
    for count in range(1_000_000):
        build(target, "12345"[count % 5] * 100_000)
        started()
for _ in range(15):
    dead = killed(work, seconds=random.uniform(0, 0.05))
    found = state(target)
    left = len(list(folder.glob(".x.building-*")))
    build(target, found["weights"])
    print(json.dumps([dead, sorted(found), len({*found.values()}), len(found["weights"]), left]))
print(json.dumps(sorted(path.name for path in folder.iterdir())))
""",
        tmp_path,
    )
    *kills, after = states
    for dead, files, contents, length, left in kills:
        assert (dead, files, contents, length) == (True, sorted(OLD), 1, 100_000)
        assert left <= 1  # the one before was removed by the build before
    assert [name for name in after if name != ".x.lock"] == ["x"]


# --- full disks -----------------------------------------------------------------------------------------------------------


def test_build_of_a_file_larger_than_the_disk_allows(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    with (
        pytest.raises(StorageError, match="File too large"),
        largest_file(10_000),
        staged_directory(tmp_path / "x") as staging,
    ):
        (staging / "weights").write_bytes(bytes(20_000))
    assert labels(tmp_path / "x") == OLD_BUNDLE
    assert names(tmp_path) == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and mount(8)")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    write_bytes(small_disk / "file", b"old" * 10_000)
    for _ in range(3):  # what failed must not have used up the room
        with pytest.raises(StorageError, match="No space left on device"):
            write_bytes(small_disk / "file", b"new" * 100_000)
    assert (small_disk / "file").read_bytes() == b"old" * 10_000
    write_bytes(small_disk / "file", b"new" * 10_000)
    assert (small_disk / "file").read_bytes() == b"new" * 10_000
    assert names(small_disk) == ["file"]


def test_a_full_disk_during_a_build(small_disk: Path) -> None:
    target = small_disk / "x"
    make(target, "old")

    def build(size: int) -> None:
        with exclusive(target), staged_directory(target) as staging:
            make(staging, "new")
            for index in range(4):
                (staging / f"weights.{index}").write_bytes(bytes(size // 4))

    for _ in range(3):
        with pytest.raises(StorageError, match="No space left on device"):
            build(400_000)
        assert labels(target) == OLD_BUNDLE
    build(100_000)
    assert labels(target)["weights"] == "new"
    assert [name for name in names(small_disk) if name != ".x.lock"] == ["x"]


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    make(small_disk / "x", "old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"), staged_directory(small_disk / "x"):
        pytest.fail("there is no place to build in")
    assert labels(small_disk / "x") == OLD_BUNDLE


def test_a_file_on_a_disk_that_became_read_only(small_disk: Path) -> None:
    (small_disk / "file").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        write_bytes(small_disk / "file", b"new")
    assert (small_disk / "file").read_text() == "old"


# --- locks ----------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from bundle.atomic import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A target whose lock another process holds until it is told or killed."""
    target = tmp_path / "x.bundle"
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield target, process
        finally:
            process.kill()


def assert_free(target: Path) -> None:
    with exclusive(target):
        pass


def test_a_second_process_does_not_wait(held: tuple[Path, subprocess.Popen[str]]) -> None:
    target, _ = held
    with pytest.raises(BundleLockedError) as caught:
        assert_free(target)
    assert str(caught.value) == (
        f"another command is writing {target}\n  got:      its lock is held\n  expected: one at a time\n\n"
        "hint: wait for it to end, or work on another bundle."
    )
    assert_free(target.with_name("y.bundle"))


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_the_lock_ends_with_its_holder(held: tuple[Path, subprocess.Popen[str]], end: str) -> None:
    target, process = held
    if end == "finished":
        assert process.communicate() == ("", None)
    else:
        process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert process.returncode == (0 if end == "finished" else -signal.SIGKILL)

    assert_free(target)


def test_a_link_and_its_target_have_one_lock(tmp_path: Path) -> None:
    make(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    with exclusive(tmp_path / "v1"), pytest.raises(BundleLockedError):
        assert_free(tmp_path / "current")


def test_the_working_directory_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    with pytest.raises(BundleError, match="is the current folder"), exclusive(Path()), staged_directory(Path()):
        pytest.fail("the user's shell would stand in a removed folder")
    assert list((tmp_path / "x").iterdir()) == []


def test_no_lock_on_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        assert_free(small_disk / "x")


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    def build() -> None:
        with exclusive(tmp_path / "x"):
            with pytest.raises(BundleLockedError):
                assert_free(tmp_path / "x")
            raise Interrupted

    with pytest.raises(Interrupted):
        build()
    assert_free(tmp_path / "x")
