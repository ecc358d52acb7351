"""A file that hangs or kills the process that reads it costs its own line of the report, and nothing else."""

from __future__ import annotations

import os
import random
import sys

import pytest

from episodes.examination import examine
from episodes.isolation import examine_all, examine_isolated

DIES = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
RAISES = (sys.executable, "-c", "raise RuntimeError('no such luck')")
DIES_AT_THE_END = (
    sys.executable,
    "-c",
    "import os, sys; from episodes.examine_one import main; main(sys.argv[1:]); sys.stdout.flush(); os.abort()",
)
SAYS_NOTHING = (sys.executable, "-c", "")
SAYS_NONSENSE = (sys.executable, "-c", "print('[1, 2]')")


def problem_of(found):
    (problem,) = found.problems
    return problem


def test_it_finds_what_an_examination_here_finds(synthetic):
    path = synthetic("v6")
    assert examine_isolated(path, timeout_s=60) == examine(path)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (DIES, "(SIGSEGV)"),
        (DIES_AT_THE_END, "(SIGABRT)"),
        (RAISES, "(exit status 1): RuntimeError: no such luck"),
        (SAYS_NOTHING, "(exit status 0)"),
        (SAYS_NONSENSE, "(exit status 0)"),
    ],
)
def test_a_child_that_dies(synthetic, command, said):
    path = synthetic("v1")
    found = examine_isolated(path, timeout_s=60, command=command)
    problem = problem_of(found)
    assert (problem.code, problem.severity) == ("crashed", "error")
    assert problem.text.endswith(said)
    assert found.bytes == path.stat().st_size


def test_a_pipe_is_not_waited_for(tmp_path):
    """Opening a named pipe that nobody writes to never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "episode.h5").symlink_to("pipe")
    problem = problem_of(examine_isolated(tmp_path / "episode.h5", timeout_s=60))
    assert (problem.code, problem.severity) == ("unreadable", "error")
    assert "is a named pipe" in problem.text


def test_the_child_that_hangs_is_ended(tmp_path):
    note = tmp_path / "pid"
    sleeper = (
        sys.executable,
        "-c",
        f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
    )
    problem = problem_of(examine_isolated(tmp_path, timeout_s=1.5, command=sleeper))
    assert (problem.code, problem.severity) == ("hung", "error")
    assert "did not end within 1.5 s" in problem.text
    assert "--timeout-s 7.5" in problem.hint
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_others_are_examined_in_order(tmp_path, synthetic):
    paths = [synthetic(schema) for schema in ("v6", "v1", "v5")]
    pipe = tmp_path / "pipe.h5"
    os.mkfifo(pipe)
    ticks = []
    found = examine_all(
        (paths[0], pipe, *paths[1:]),
        timeout_s=5,
        jobs=2,
        advance=lambda: ticks.append(1),
    )
    assert [examination.path for examination in found] == [str(path) for path in (paths[0], pipe, *paths[1:])]
    assert [len(examination.errors) for examination in found] == [0, 1, 0, 0]
    assert len(ticks) == 4


def test_flipped_bytes_never_break_the_report(tmp_path, synthetic):
    """Whatever damage does to libhdf5, each file gets an answer."""
    whole = synthetic("v5_jpeg").read_bytes()
    chance = random.Random(0)
    paths = []
    for number in range(10):
        damaged = bytearray(whole)
        for _ in range(40):
            damaged[chance.randrange(len(damaged) if number % 2 else 4096)] ^= 1 << chance.randrange(8)
        path = tmp_path / f"damaged{number}.h5"
        path.write_bytes(damaged)
        paths.append(path)
    found = examine_all(paths, timeout_s=30, jobs=2)
    assert [examination.path for examination in found] == [str(path) for path in paths]
    assert sum(bool(examination.errors) for examination in found) >= 5
