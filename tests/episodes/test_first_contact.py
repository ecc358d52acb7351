"""A file that hangs or kills the HDF5 library does so in a process that can be ended, before anything else opens it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest

from bundle.errors import EpisodeError
from episodes import first_contact
from episodes.reader import open_episode
from episodes.storage import LINKS_SWITCH
from episodes.synthetic import SyntheticSchema
from tests.hanging_episodes import write_hanging

Synthetic = Callable[[SyntheticSchema], Path]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A child of the test's own, and nothing known of any file."""
    monkeypatch.setattr(first_contact, "_child", None)
    monkeypatch.setattr(first_contact, "_known", {})
    yield
    first_contact._end_child()


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(first_contact, "CHILD", (sys.executable, "-c", text))


def refusal(path: Path) -> str:
    with pytest.raises(EpisodeError) as caught:
        open_episode(path)
    return str(caught.value)


@pytest.mark.parametrize("where", ["language_instruction", "observations/images"])
def test_a_file_that_hangs_the_library_is_refused(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "CPU_S", 1.0)
    path = write_hanging(tmp_path, where=where)
    said = refusal(path)
    assert f"{path} is damaged: reading it does not end" in said
    assert "the HDF5 library computed for 1 s" in said
    program(monkeypatch, "raise SystemExit('asked again')")
    assert refusal(path) == said


def test_a_child_that_waits_is_ended(synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a disk that is gone: without computing, and without a signal that reaches it."""
    note = tmp_path / "pid"
    program(monkeypatch, f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    monkeypatch.setattr(first_contact, "PATIENCE_S", 2.0)
    said = refusal(synthetic("v1"))
    assert "reading it does not end" in said
    assert "no answer within 2 s" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("input(); raise RuntimeError('no such luck')", "exit status 1: RuntimeError: no such luck"),
        ("pass", "exit status 0"),
    ],
)
def test_a_child_that_dies(synthetic: Synthetic, text: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, text)
    said = refusal(synthetic("v1"))
    assert "reading it crashes the HDF5 library" in said
    assert seen in said


def test_no_process_can_be_started(synthetic: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "CHILD", ("/nonexistent",))
    assert "no process can be started" in refusal(synthetic("v1"))


def test_one_child_for_all_files_and_after_a_bad_one_another(tmp_path: Path, synthetic: Synthetic) -> None:
    schemas: tuple[SyntheticSchema, ...] = ("v1", "v5", "v5_jpeg")
    children = set()
    for path in map(synthetic, schemas):
        open_episode(path).close()
        assert first_contact._child is not None
        children.add(first_contact._child)
    assert len(children) == 1
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    assert "is not an HDF5 file" in refusal(text)  # said here, as if there were no child
    assert first_contact._child in children


def test_a_file_is_asked_for_once_and_again_when_it_has_changed(
    synthetic: Synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = first_contact._ask
    monkeypatch.setattr(first_contact, "_ask", lambda request, size: (asked.append(request), ask(request, size))[1])
    path = synthetic("v1")
    for _ in range(3):
        open_episode(path).close()
    assert len(asked) == 1
    os.utime(path, ns=(0, 12345))
    open_episode(path).close()
    open_episode(path, schema="v1").close()
    assert len(asked) == 3


def test_what_may_be_linked_is_what_is_allowed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has the switch of the request, not of its start: else it would never look at what is read here."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    target = write_hanging(there)
    with h5py.File(here / "linked.h5", "w") as file:
        for name in ("observations", "actions", "language_instruction"):
            file[name] = h5py.ExternalLink(str(target), name)
    monkeypatch.delenv(LINKS_SWITCH, raising=False)
    assert f"{LINKS_SWITCH}=anywhere" in refusal(here / "linked.h5")
    monkeypatch.setenv(LINKS_SWITCH, "anywhere")
    monkeypatch.setattr(first_contact, "CPU_S", 1.0)
    assert "does not end" in refusal(here / "linked.h5")


def test_a_forked_process_has_a_child_of_its_own(synthetic: Synthetic) -> None:
    """Data loaders fork: two processes at one child would take each other's answers."""
    open_episode(synthetic("v1")).close()
    before, other = first_contact._child, synthetic("v5")
    process = os.fork()
    if process == 0:
        try:
            open_episode(other).close()
            own = first_contact._child
            first_contact._end_child()
            os._exit(0 if own is not None and own is not before else 1)
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0
    open_episode(other).close()
    assert first_contact._child is before


def test_the_child_goes_with_its_parent(synthetic: Synthetic) -> None:
    path = synthetic("v1")
    script = (
        "import sys; from episodes import first_contact; from episodes.reader import open_episode; "
        "open_episode(sys.argv[1]); print(first_contact._child._process.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
