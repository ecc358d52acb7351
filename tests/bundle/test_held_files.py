"""Files in use: every way to change one is seen, and what changes nothing is not taken for a change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bundle.errors import BundleError, CheckpointError
from bundle.held_files import HeldFiles, unchanged

CONTENT = bytes(range(200))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


@pytest.fixture
def held(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldFiles]:
    """Without leases, as on a network's disk: writers do not wait."""
    monkeypatch.setattr("bundle.held_files._LEASES", False)
    held = HeldFiles([path], hint="copy it.")
    yield held
    held.close()


def _overwrite(path: Path) -> None:
    path.write_bytes(bytes(200))


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _patch(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(7)
        file.write(b"x")


def _patch_and_hide(path: Path) -> None:
    before = path.stat()
    _patch(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_overwrite, _cut, _patch, _patch_and_hide])
def test_a_change_in_place_is_seen(path: Path, held: HeldFiles, change: Callable[[Path], None]) -> None:
    held.check(names=True)
    change(path)
    with pytest.raises(BundleError, match="weights was changed while it was in use") as caught:
        held.check()
    assert caught.value.hint == "copy it."


def test_another_file_under_the_name_matters_to_those_who_open_it_again(path: Path, held: HeldFiles) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(200))
    other.replace(path)
    held.check()
    with pytest.raises(BundleError, match="weights was replaced while it was in use"):
        held.check(names=True)


def test_a_deleted_file_stays_what_it_was(path: Path, held: HeldFiles) -> None:
    path.unlink()
    held.check()
    with pytest.raises(BundleError, match="was replaced"):
        held.check(names=True)


def test_links_come_and_go(path: Path, held: HeldFiles) -> None:
    os.link(path, path.with_name("again"))
    held.check(names=True)
    path.with_name("again").unlink()
    held.check(names=True)


def test_reading_is_no_change(path: Path, held: HeldFiles) -> None:
    assert path.read_bytes() == CONTENT
    held.check(names=True)


def test_the_error_is_the_callers(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone cannot be read"):
        HeldFiles([path, path.with_name("gone")], error=CheckpointError, hint="correct the path.")


def _check_until_seen(held: HeldFiles, writer: subprocess.Popen[bytes]) -> None:
    while writer.poll() is None:
        held.check()
        time.sleep(0.01)


def test_a_writer_waits_and_is_seen_before_it_writes(path: Path) -> None:
    held = HeldFiles([path], hint="copy it.")
    if not held.leased:
        pytest.skip("no leases on this file system")
    held.check()
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'wb').write(b'new')"])
    try:
        with pytest.raises(BundleError, match="another process is about to write into it"):
            _check_until_seen(held, writer)
        assert path.read_bytes() == CONTENT
        held.close()
        assert writer.wait(60) == 0
        assert path.read_bytes() == b"new"
    finally:
        writer.kill()
        writer.wait()


def test_what_is_closed_or_collected_lets_writers_go_on(path: Path) -> None:
    held = HeldFiles([path], hint="copy it.")
    del held
    path.write_bytes(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("ctrl_c", ["heard", "ignored"])
@pytest.mark.parametrize("leases", [True, False])
def test_long_work_ends_when_its_file_is_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch, leases: bool, ctrl_c: str
) -> None:
    if not leases:
        monkeypatch.setattr("bundle.held_files._LEASES", False)
    writers = []
    # As it is in what a shell started in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ctrl_c == "ignored" else signal.default_int_handler)
    try:
        with pytest.raises(CheckpointError, match="weights was changed while it was in use"):
            _work_and_write(path, writers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert writers[0].wait(60) == 0
    assert path.read_bytes() == b"new"


def _work_and_write(path: Path, writers: list[subprocess.Popen[bytes]]) -> None:
    with unchanged([path], error=CheckpointError, hint="later."):
        writers.append(subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'wb').write(b'new')"]))
        time.sleep(60)  # is interrupted


def test_ctrl_c_in_long_work_stays_what_it_is(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, unchanged([path], error=CheckpointError, hint="later."):
        raise KeyboardInterrupt
    assert caught.type is KeyboardInterrupt


def test_work_in_a_thread_hears_of_it_at_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bundle.held_files._LEASES", False)
    errors: list[CheckpointError] = []

    def work() -> None:
        try:
            with unchanged([path], error=CheckpointError, hint="later."):
                _patch(path)
        except CheckpointError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1
