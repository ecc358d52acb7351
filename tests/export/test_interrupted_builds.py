"""Builds that meet another build, SIGKILL, or a full disk: under the bundle's name lies the old one, a new one, or nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bundle.errors import BundleLockedError, StorageError
from bundle.manifest import Manifest
from export.pipeline import BuildConfig, build
from tests.checkpoints import file_size_limit
from tests.export.builds import QUICK, ROOT, assert_complete, change, command_line, contents, left_over, quietly
from tests.export.conftest import MakeSynthetic
from train.synthetic import SyntheticFiles, SyntheticOptions

# --- one build at a time, and builds that are killed --------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from bundle.atomic import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_rebuild_keeps_what_others_put_into_the_folder(bundle: BuildConfig) -> None:
    theirs = bundle.target / "recordings" / "episode.h5"
    theirs.parent.mkdir()
    theirs.write_bytes(b"theirs")
    quietly(change(bundle, force=True))
    assert theirs.read_bytes() == b"theirs"
    Manifest.load(bundle.target).verify(bundle.target)


def test_a_second_build_of_the_same_target_is_refused(bundle: BuildConfig) -> None:
    before = contents(bundle.target)
    command = [sys.executable, "-c", HOLD, str(bundle.target)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        forced = change(bundle, force=True)
        with pytest.raises(BundleLockedError, match="another command is writing") as caught:
            build(forced)
        assert "hint: wait for it to end, or work on another bundle." in str(caught.value)
        assert contents(bundle.target) == before
        # What needs no writing is not refused.
        assert "up to date" in quietly(bundle)
        other.communicate("")
    quietly(forced)
    assert left_over(bundle.target.parent) == ["base", "policy.bundle", "policy.ckpt"]


# Imports once, then starts for every number on stdin a child that builds two checkpoints in turn over one target, and that
# kills itself with SIGKILL at that many calls of functions: a moment of the work and not of a clock. 0 builds once, and says the number.
# A number below 0 kills that many calls after the child began to write, whenever that is: moments that a number from the start may miss.
KILLER = """
import os, signal, sys
from pathlib import Path

import torch, transformers, peft, onnx, onnxruntime
from export import builder
from export.engine_options import EngineOptions
from export.pipeline import BuildConfig, build

torch.set_num_threads(1)
target, *checkpoints = map(Path, sys.argv[1:])

def build_all(once):
    while True:
        for checkpoint in checkpoints:
            build(BuildConfig(checkpoint=checkpoint, out=target, verify_frames=1, engines=EngineOptions(tensorrt='off'), force=once))
            if once:
                return

def count_to(last):
    def count(*_):
        nonlocal last
        last -= 1
        if last == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return count

def count_from_writing(last):
    before = set(target.parent.glob("*.building-*"))
    calls = 0
    def count(*_):
        nonlocal calls
        calls += 1
        if calls % 200 == 0 and set(target.parent.glob("*.building-*")) - before:
            sys.setprofile(count_to(last))
    return count

for line in sys.stdin:
    if last := int(line):
        pid = os.fork()
        if pid == 0:
            sys.setprofile(count_to(last) if last > 0 else count_from_writing(-last))
            build_all(once=False)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        print("killed", flush=True)
    else:
        calls = [0]
        sys.setprofile(lambda *_: calls.__setitem__(0, calls[0] + 1))
        build_all(once=True)
        sys.setprofile(None)
        print(calls[0], flush=True)
"""


def test_builds_killed_at_any_moment_leave_the_old_or_the_new_bundle(
    upstream: SyntheticFiles, synthetic: MakeSynthetic, tmp_path: Path
) -> None:
    """SIGKILL during builds that replace each other: under the name there always is one of the two, whole."""
    other = synthetic(SyntheticOptions(seed=1))
    target = tmp_path / "policy.bundle"
    checkpoints = (upstream.checkpoint, other.checkpoint)
    hashes = []
    for checkpoint in checkpoints:
        quietly(BuildConfig(checkpoint=checkpoint, out=target, verify_frames=1))
        hashes.append(Manifest.load(target).source.checkpoint_sha256)
    assert len(set(hashes)) == 2

    seen, leftovers = [], 0
    command = [sys.executable, "-c", KILLER, *map(str, (target, *checkpoints))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None

        def answer(number: int) -> str:
            killer.stdin.write(f"{number}\n")
            killer.stdin.flush()
            return killer.stdout.readline()

        one_build = int(answer(0))
        anywhere = [round(part * one_build) for part in np.random.default_rng(0).uniform(0.02, 1.9, 8)]
        for moment in [*anywhere, -1, -300, -3000]:
            assert answer(moment) == "killed\n"
            manifest = assert_complete(target)
            assert manifest.source.checkpoint_sha256 in hashes
            seen.append(manifest.source.checkpoint_sha256)
            leftovers += any("building-" in name for name in left_over(tmp_path))
        killer.stdin.close()
    # Some of the kills were in the middle of writing, and builds had been replacing each other.
    assert leftovers
    assert len(set(seen)) == 2
    quietly(BuildConfig(checkpoint=upstream.checkpoint, out=target, verify_frames=1, force=True))
    assert assert_complete(target).source.checkpoint_sha256 == hashes[0]
    assert left_over(tmp_path) == ["policy.bundle"]


# --- disks that are full ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "existing"), [(3_000, False), (200_000, False), (500_000, True), (1_000_000, False)])
def test_a_file_that_does_not_fit_leaves_nothing(
    upstream: SyntheticFiles, tmp_path: Path, limit: int, existing: bool
) -> None:
    out = tmp_path / "policy.bundle"
    config = BuildConfig(checkpoint=upstream.checkpoint, out=out, verify_frames=QUICK, force=True)
    if existing:
        quietly(config)
    before = contents(tmp_path)
    with file_size_limit(limit), pytest.raises(StorageError, match=r"cannot write .*policy\.bundle") as caught:
        build(config)
    assert "got:      File too large" in str(caught.value)
    assert "hint: free some space or choose another folder; nothing was replaced." in str(caught.value)
    assert left_over(tmp_path) == (["policy.bundle"] if existing else [])
    assert contents(tmp_path) == before


LIMITED = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_a_full_disk_is_exit_code_one(upstream: SyntheticFiles, tmp_path: Path) -> None:
    out = tmp_path / "policy.bundle"
    done = command_line(upstream.checkpoint, "--out", out, program=LIMITED)
    assert done.returncode == 1
    assert "error: StorageError" in done.stderr
    assert "nothing was replaced." in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert left_over(tmp_path) == []


# The check of free space is left out: another program fills the disk right after it.
FILLED = """
import runpy, sys
from export import builder

builder.check_space = lambda *arguments: None
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A RAM disk of so many kilobytes; mounting it takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk cannot be mounted here: that takes root")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_too_little_space_is_said_before_anything_is_built(
    upstream: SyntheticFiles, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(2000)
    with pytest.raises(StorageError, match="not enough room to build") as caught:
        build(BuildConfig(checkpoint=upstream.checkpoint, out=disk / "policy.bundle"))
    assert "got:      2.0 MB free" in str(caught.value)
    assert left_over(disk) == []


# The stages of this policy take 6.9 MB; behind them come the embedding, the golden step and the reports.
@pytest.mark.parametrize("kilobytes", [7100])
def test_a_disk_that_fills_up_during_a_build(
    upstream: SyntheticFiles, small_disk: Callable[[int], Path], kilobytes: int
) -> None:
    disk = small_disk(kilobytes)
    out = disk / "policy.bundle"
    done = command_line(upstream.checkpoint, "--out", out, "--verify-frames", 1, program=FILLED)
    assert done.returncode == 1, done.stderr
    assert "error: StorageError" in done.stderr
    assert "No space left on device" in done.stderr
    assert left_over(disk) == []
