"""Engines and what happens around their builds: signals, full disks, other builds, the command lines, and the proof on a fake GPU.

That the cache is hit and missed when it should be is tested in test_engine_building.py.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bundle import engine_cache
from bundle import manifest as manifest_module
from bundle.atomic import exclusive
from bundle.engine_cache import ENGINE_PARITY, ENGINE_PARITY_INT8, TIMING_CACHE, Found
from bundle.errors import (
    BundleError,
    BundleLockedError,
    ConfigError,
    EngineBuildError,
    EngineError,
    ParityError,
    StorageError,
)
from bundle.manifest import Manifest
from export import engine_builder, engine_plan, parity
from export.config import BuildConfig, EnginesConfig
from export.console import Reporter
from export.engine_builder import Outcome
from export.engine_options import EngineOptions
from export.engine_plan import Machines, choose_machines
from export.engine_process import build_in_process
from export.pipeline import build, build_engines
from export.to_tensorrt import EngineBuilt, EngineRequest, build_engine
from runtime.backends.fake_gpu import DESKTOP, ORIN, FakeCuda
from runtime.backends.trt import TrtBackend
from tests.bundles import add_int8
from tests.checkpoints import file_size_limit
from tests.engines import fake_tensorrt, go_on, request
from tests.export.builds import QUICK, ROOT, SCRIPT, command_line, contents
from tests.export.conftest import Built
from train.synthetic import SyntheticFiles, SyntheticOptions

SM86 = EngineOptions(tensorrt="rtx", target=("sm86",))
LABELS = {"vision", "language.s88", "language.s128", "action_head"}


@pytest.fixture
def tensorrt_rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(built: Built, tmp_path: Path) -> Path:
    """A tiny fp16 bundle of this test's own."""
    made = built(SyntheticOptions(), precision="fp16", promote=False, verify_frames=QUICK)
    return Path(shutil.copytree(made, tmp_path / "policy.bundle"))


def engines(bundle: Path, options: EngineOptions = SM86, **how: Any) -> Outcome:
    return engine_builder.build_engines(bundle, options, Reporter(1, quiet=True), **how)


def labels(names: tuple[str, ...]) -> set[str]:
    return {name.split("/")[1] for name in names}


def survey(bundle: Path) -> list[Found]:
    return engine_cache.survey(bundle, Manifest.load(bundle))


def usable(bundle: Path) -> list[str]:
    """Names of the engines that would be loaded; each must be intact."""
    names = []
    for found in survey(bundle):
        if found.state == "current":
            assert found.record is not None
            engine_cache.verify(bundle, found.record)
            names.append(found.record.label)
    return names


def nothing_is_built(*_: object) -> EngineBuilt:
    raise AssertionError("an engine was built")


# --- processes and signals ----------------------------------------------------------------------------------------------------

# Where tests run in the background of a shell, Ctrl-C is ignored from the start, and Python leaves it so.
WITH_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Run:
    """The command line on a bundle, observed from outside."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        command = [sys.executable, "-c", WITH_CTRL_C, str(SCRIPT), "--engines-only", str(bundle), "--target", "sm86"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )

    def worker(self, *, after: int = 0) -> int:
        """Wait until at least so many engines are finished and the next one is being built; the worker's process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = children.read_text().split()
            if found and len(list((self.bundle / "engines").rglob("*.json"))) >= after:
                return int(found[0])
            time.sleep(0.001)
        raise AssertionError("no worker was seen")

    def end(self) -> tuple[int, str]:
        """Exit status and what was said."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


def lives(pid: int) -> bool:
    """A process that is not gone, nor a zombie that nobody has waited for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.usefixtures("tensorrt_rtx")
def test_ctrl_c_keeps_what_is_finished(bundle: Path) -> None:
    run = Run(bundle)
    worker = run.worker(after=1)
    run.process.send_signal(signal.SIGINT)
    status, said = run.end()
    assert status == 1
    assert "interrupted; nothing was replaced, and finished engines are kept." in said
    assert "Traceback" not in said
    assert ends_soon(worker)  # at once where its parent knows it; Ctrl-C may come while it is being started
    kept = usable(bundle)
    assert 1 <= len(kept) < len(LABELS)
    assert {found.state for found in survey(bundle)} == {"current"}  # it cleans up behind itself
    outcome = engines(bundle)
    assert labels(outcome.reused) == set(kept)
    assert labels(outcome.built) == LABELS - set(kept)


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_killed_parent_takes_its_worker_along(bundle: Path) -> None:
    run = Run(bundle)
    worker = run.worker(after=1)
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL
    assert ends_soon(worker)
    kept = usable(bundle)
    assert len(kept) < len(LABELS)
    outcome = engines(bundle)
    assert labels(outcome.reused) == set(kept)
    assert labels(outcome.built) == LABELS - set(kept)
    assert {found.state for found in survey(bundle)} == {"current"}


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_killed_worker_is_an_error_message(bundle: Path) -> None:
    """As the kernel does it when memory runs out."""
    run = Run(bundle)
    os.kill(run.worker(after=1), signal.SIGKILL)
    status, said = run.end()
    assert status == 1
    assert "error: EngineBuildError" in said
    assert "was killed" in said
    assert "hint: close other programs, add swap" in said
    assert len(usable(bundle)) >= 1
    assert {found.state for found in survey(bundle)} == {"current"}


def worker_says(tmp_path: Path, program: str) -> EngineBuilt:
    command = (sys.executable, "-c", f"import os, signal, sys\npipe = int(sys.argv[1])\n{program}")
    return build_in_process(request(tmp_path / "vision.onnx", tmp_path / "x"), lambda *_: None, command)


def test_a_crash_in_tensorrt_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"build of vision crashed(?s:.*)got: +SIGSEGV(?s:.*)are kept"):
        worker_says(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")


def test_a_worker_that_dies_in_the_middle_of_a_message(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match="build of vision was killed"):
        worker_says(tmp_path, "os.write(pipe, b'[\"built\", {'); os.kill(os.getpid(), signal.SIGKILL)")


def test_a_worker_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match="exit status 0"):
        worker_says(tmp_path, "pass")


def test_errors_of_the_worker_are_errors_here(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        worker_says(tmp_path, 'os.write(pipe, b\'["oserror", [28, "No space left on device", "x"]]\\n\')')
    assert caught.value.errno == errno.ENOSPC
    said = '{"what": "refused", "got": null, "expected": null, "hint": "wait"}'
    with pytest.raises(EngineBuildError, match="refused\n\nhint: wait"):
        worker_says(tmp_path, f"os.write(pipe, b'[\"error\", {said}]\\n')")


def test_a_worker_whose_parent_is_gone_builds_nothing(tmp_path: Path) -> None:
    """The parent may die before the worker has asked to be told."""
    reader, writer = os.pipe()
    os.close(reader)
    worker = subprocess.Popen(
        [sys.executable, "-m", "export.engine_worker", str(writer)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        cwd=ROOT,
    )
    os.close(writer)
    wanted = request(tmp_path / "vision.onnx", tmp_path / "x.engine", flavour="rtx", target="sm86")
    _, said = worker.communicate(msgspec.json.encode(wanted), timeout=60)
    assert (worker.returncode, said) == (1, b"")


# --- disks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_full_disk_keeps_what_is_finished(bundle: Path) -> None:
    """The action head's engine is the largest, and the last."""
    with file_size_limit(5_000_000), pytest.raises(StorageError, match=r"cannot write(?s:.*)File too large"):
        engines(bundle)
    assert set(usable(bundle)) == LABELS - {"action_head"}
    assert {found.state for found in survey(bundle)} == {"current"}
    assert labels(engines(bundle).built) == {"action_head"}


@pytest.mark.usefixtures("tensorrt_rtx")
def test_too_little_room_is_said_before_the_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageError, match=r"not enough room(?s:.*)got: +1\.0 MB free(?s:.*)prune"):
        engines(bundle, build=nothing_is_built)


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_read_only_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StorageError, match="Read-only file system"):
        engines(bundle, build=nothing_is_built)


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_read_only_bundle_with_engines_needs_no_writing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines(bundle)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "unlink", "rmdir", "write_bytes", "touch"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr(os, "replace", refused)
    assert labels(engines(bundle, build=nothing_is_built).reused) == LABELS


@pytest.mark.usefixtures("tensorrt_rtx")
def test_damaged_weights_change_nothing(bundle: Path) -> None:
    path = next(bundle.glob("vision*.data"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = contents(bundle)
    with pytest.raises(BundleError, match="is corrupt"):
        engines(bundle, build=nothing_is_built)
    path.unlink()
    with pytest.raises(BundleError):
        build_engines(EnginesConfig(engines_only=bundle, engines=SM86))
    before.pop(path.name)
    assert contents(bundle) == before


# --- the command lines --------------------------------------------------------------------------------------------------------


def test_one_build_at_a_time(bundle: Path) -> None:
    with exclusive(bundle), pytest.raises(BundleLockedError, match="another command is writing"):
        build_engines(EnginesConfig(engines_only=bundle, engines=SM86))
    assert not (bundle / "engines").exists()


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_dry_run_shows_the_plan(bundle: Path) -> None:
    done = command_line("--engines-only", bundle, "--target", "sm86", "--target", "portable", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert "dry run: nothing was built." in done.stderr
    for label in LABELS:
        assert sum(line.split()[:1] == [label] and "build" in line for line in done.stderr.splitlines()) == 2
    assert not (bundle / "engines").exists()


def test_engines_that_are_off(bundle: Path) -> None:
    done = command_line("--engines-only", bundle, "--tensorrt", "off")
    assert (done.returncode, done.stdout) == (0, f"{bundle}\n")
    assert "no engines: off" in done.stderr
    assert not (bundle / "engines").exists()


@pytest.mark.usefixtures("tensorrt_rtx")
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tensorrt": "rtx", "target": ("sm87",)}, ConfigError, "Jetson Orin"),
        ({"target": ("sm1",)}, ConfigError, "does not build for this GPU"),
        ({"tensorrt": "off", "target": ("sm86",)}, ConfigError, "engines are off"),
        ({"tensorrt": "trt"}, EngineError, "tensorrt cannot be imported"),
    ],
)
def test_engines_that_cannot_be_built_are_refused_before_the_bundle(
    upstream: SyntheticFiles, tmp_path: Path, options: Any, error: type[Exception], text: str
) -> None:
    """A checkpoint takes minutes; a wrong --target must not be found after them."""
    if options.get("tensorrt") == "trt" and shutil.which("trtexec"):
        pytest.skip("TensorRT is here")
    config = BuildConfig(
        checkpoint=upstream.checkpoint, out=tmp_path / "policy.bundle", engines=EngineOptions(**options)
    )
    with pytest.raises(error, match=text):
        build(config)
    assert not config.target.exists()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("flavours", [(), ("trt",), ("rtx",), ("trt", "rtx")])
def test_auto_precision_is_fp16_exactly_if_engines_are_built(
    monkeypatch: pytest.MonkeyPatch, flavours: tuple[str, ...], gpu: bool
) -> None:
    device = (DESKTOP, "") if gpu else (None, "no driver")
    for module in ("export.engine_options", "export.engine_plan"):
        monkeypatch.setattr(f"{module}.installed", lambda: iter(flavours))
        monkeypatch.setattr(f"{module}.find_device", lambda: device)
    monkeypatch.setattr(
        engine_plan, "open_flavour", lambda name: fake_tensorrt({"trt": "10.3.0", "rtx": "rtx-1.7.1"}[name])
    )
    chosen = choose_machines(EngineOptions()).tensorrt
    config = BuildConfig(checkpoint=Path("policy.ckpt"), engines=EngineOptions())
    assert config.graph_precision == ("fp32" if chosen is None else "fp16")
    assert (chosen is not None) == (flavours != () and (gpu or "rtx" in flavours))
    if chosen is not None:
        assert chosen.name == ("trt" if gpu and "trt" in flavours else "rtx")


def tidy(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "export" / "engines.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def shelf(bundle: Path) -> Path:
    """A bundle with engines of two machines, a stale one and a leftover among them (made on no GPU in particular)."""
    tensorrt = fake_tensorrt("rtx-1.7.1")

    def make(request: EngineRequest, progress: Any) -> EngineBuilt:
        return build_engine(tensorrt, request, go_on)

    for target in ("sm86", "sm120"):
        machines = Machines(tensorrt, None, (target,), "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_builder, "choose_machines", lambda options, machines=machines: machines)
            engines(bundle, EngineOptions(), build=make)
    path = next((bundle / "engines").glob("sm120*/vision.*.json"))
    record = msgspec.json.decode(path.read_bytes(), type=engine_cache.EngineRecord)
    content = "0" * 64
    key = engine_cache.engine_key(content, record.fingerprint, record.settings)
    stale = msgspec.structs.replace(record, content=content, key=key)
    path.with_suffix(".engine").rename(bundle / stale.file)
    path.unlink()
    (bundle / stale.file).with_suffix(".json").write_bytes(msgspec.json.encode(stale))
    next((bundle / "engines").glob("sm86*/action_head.*.json")).unlink()
    return bundle


def test_engines_are_listed(shelf: Path) -> None:
    done = tidy("list", shelf)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("current") == 6
    assert "stale: made of other graphs or weights" in done.stdout
    assert "broken: no record" in done.stdout
    assert " of no use" in done.stdout

    listed = json.loads(tidy("list", shelf, "--json").stdout)
    assert sorted(item["state"] for item in listed) == ["broken", *["current"] * 6, "stale"]
    assert {item["fingerprint"] for item in listed} == {"sm86-rtx1.7.1", "sm120-rtx1.7.1"}
    for item in listed:
        assert (shelf / item["file"]).stat().st_size == item["bytes"]
        assert (item["engine"] is None) == (item["state"] == "broken")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), 6),
        (("--dry-run",), 8),
        (("--fingerprint", "sm86-rtx1.7.1"), 7),
        (("--fingerprint", "sm86-rtx1.7.1", "--all"), 4),
        (("--fingerprint", "sm99-rtx1.7.1", "--all"), 8),
        (("--all",), 0),
        (("--all", "--dry-run"), 8),
    ],
)
def test_engines_are_pruned(shelf: Path, options: tuple[str, ...], left: int) -> None:
    done = tidy("prune", shelf, *options)
    assert done.returncode == 0, done.stderr
    assert len(survey(shelf)) == left
    word = "would remove " if "--dry-run" in options else "removed "
    named = [line for line in done.stdout.splitlines() if line.startswith(word)]
    assert len(named) == {(): 2, ("--dry-run",): 2, ("--all", "--dry-run"): 8}.get(options, 8 - left)
    if options == ("--all",):
        assert {Path(name).name for name in contents(shelf / "engines")} <= {TIMING_CACHE}  # the next build is quicker


def test_pruning_waits_for_no_build_and_wants_a_bundle(shelf: Path, tmp_path: Path) -> None:
    with exclusive(shelf):
        done = tidy("prune", shelf, "--all")
    assert done.returncode == 1
    assert "error: BundleLockedError" in done.stderr
    assert len(survey(shelf)) == 8
    for command in ("list", "prune"):
        done = tidy(command, tmp_path / "absent")
        assert (done.returncode, done.stdout) == (1, "")
        assert "error: BundleError" in done.stderr


# --- the proof, on a fake GPU -------------------------------------------------------------------------------------------------

Build = Callable[[EngineRequest, Any], EngineBuilt]


class Robot:
    """A machine with a GPU and TensorRT: what choose_machines finds, a builder in this process, and a backend for the proof."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = FakeCuda(ORIN)
        self.tensorrt = fake_tensorrt("10.3.0", self.gpu)
        self.fingerprint = self.tensorrt.fingerprint(ORIN)
        machines = Machines(self.tensorrt, ORIN, (None,), "TensorRT for Orin")
        backend = functools.partial(TrtBackend, cuda=self.gpu, tensorrt=self.tensorrt)
        monkeypatch.setattr(engine_builder, "choose_machines", lambda options: machines)
        monkeypatch.setattr("export.to_tensorrt.open_cuda", lambda: self.gpu)
        monkeypatch.setattr(engine_builder, "TrtBackend", backend)

    def build(self, request: EngineRequest, progress: Any) -> EngineBuilt:
        return build_engine(self.tensorrt, request, go_on)

    def report(self, bundle: Path) -> Path:
        return bundle / "engines" / self.fingerprint / ENGINE_PARITY


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch) -> Robot:
    return Robot(monkeypatch)


def mixed_up(robot: Robot, bundle: Path, built: Built) -> Build:
    """A builder whose action head is another checkpoint's."""
    other = built(SyntheticOptions(seed=1), precision="fp16", promote=False, verify_frames=QUICK)

    def wrong(request: EngineRequest, progress: Any) -> EngineBuilt:
        if request.label == "action_head":
            graph = str(next(other.glob("action_head*.onnx")))
            request = msgspec.structs.replace(request, graph=graph)
        return robot.build(request, progress)

    return wrong


@pytest.mark.fake_gpu
def test_a_failed_proof_is_not_remembered_as_one(bundle: Path, robot: Robot, built: Built) -> None:
    engines(bundle, EngineOptions(), build=robot.build)
    assert robot.report(bundle).exists()
    with pytest.raises(ParityError, match="do not do what the checkpoint does"):
        engines(bundle, EngineOptions(), build=mixed_up(robot, bundle, built), force=True)
    assert not robot.report(bundle).exists()
    assert usable(bundle) == []
    assert robot.gpu.live == dict.fromkeys(robot.gpu.live, 0)  # the proof gave everything back
    outcome = engines(bundle, EngineOptions(), build=robot.build)
    assert labels(outcome.built) == LABELS
    assert outcome.verified == (robot.fingerprint,)


@pytest.mark.fake_gpu
def test_engines_that_were_brought_along_are_proved(bundle: Path, robot: Robot, tmp_path: Path) -> None:
    """A report says which bundle's reference the engines were proved with, so it does not travel."""
    engines(bundle, EngineOptions(), build=robot.build)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy.bundle", ignore=shutil.ignore_patterns("engines")))
    assert engine_cache.carry_over(bundle, copy, Manifest.load(copy)) == len(LABELS)
    assert not robot.report(copy).exists()
    outcome = engines(copy, EngineOptions(), build=nothing_is_built)
    assert (labels(outcome.reused), outcome.verified) == (LABELS, (robot.fingerprint,))
    assert robot.report(copy).exists()


@pytest.mark.fake_gpu
def test_a_length_that_comes_later_is_proved_too(bundle: Path, robot: Robot) -> None:
    """With engines for short prompts only, the recorded long one is left out of the proof."""
    first = engines(bundle, EngineOptions(bucket=(88,)), build=robot.build)
    assert labels(first.built) == LABELS - {"language.s128"}
    assert first.verified == (robot.fingerprint,)
    assert json.loads(robot.report(bundle).read_text())["episodes"] == 2
    second = engines(bundle, EngineOptions(), build=robot.build)
    assert labels(second.built) == {"language.s128"}
    assert second.verified == (robot.fingerprint,)
    assert json.loads(robot.report(bundle).read_text())["episodes"] == 3


@pytest.mark.fake_gpu
def test_a_refit_that_is_refused_is_said(bundle: Path, robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(refit=True)
    engines(bundle, options, build=robot.build)
    monkeypatch.setattr(robot.tensorrt.module.Refitter, "refit_cuda_engine", lambda self: False)
    reporter = Reporter(1, quiet=True)
    outcome = engine_builder.build_engines(bundle, options, reporter, force=True, build=robot.build)
    assert labels(outcome.built) == LABELS
    assert reporter.log.count("(refit was refused)") == len(LABELS)


@pytest.mark.fake_gpu
@pytest.mark.parametrize("changed", [False, True])
def test_only_engines_of_the_same_graph_take_weights(bundle: Path, robot: Robot, changed: bool) -> None:
    """Types may differ where names and shapes do not, as where fp16 leaves its range; TensorRT would not notice."""
    options = EngineOptions(refit=True)
    engines(bundle, options, build=robot.build)
    if changed:
        for path in (bundle / "engines").glob("*/*.json"):
            record = json.loads(path.read_text())
            if "settings" not in record:
                continue  # the proof
            record["settings"]["graph"] = "0" * 64
            settings = msgspec.convert(record["settings"], engine_cache.EngineSettings)
            record["key"] = engine_cache.engine_key(record["content"], record["fingerprint"], settings)
            path.write_text(json.dumps(record))
    outcome = engines(bundle, options, build=robot.build, force=True)
    assert labels(outcome.refitted) == (set() if changed else LABELS)
    assert labels(outcome.built) == (LABELS if changed else set())


@pytest.mark.fake_gpu
def test_engines_of_other_machines_are_left_alone(bundle: Path, robot: Robot) -> None:
    theirs = bundle / "engines" / "sm120-rtx1.7.1" / "vision.0123456789abcdef.engine"
    ours = bundle / "engines" / robot.fingerprint / "vision.0123456789abcdef.engine"
    for path in (theirs, ours):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of a build that was killed")
    engines(bundle, EngineOptions(), build=robot.build)
    assert theirs.exists()
    assert not ours.exists()


@pytest.mark.fake_gpu
def test_engines_that_were_asked_for_last_are_the_ones_that_run(bundle: Path, robot: Robot) -> None:
    for level in (5, 1, 5):
        engines(bundle, EngineOptions(optimization_level=level), build=robot.build)
    running = engine_cache.newest(bundle, Manifest.load(bundle), robot.fingerprint)
    assert {record.settings.optimization_level for record in running.values()} == {5}


# --- two precisions -----------------------------------------------------------------------------------------------------------

INT8_LABELS = LABELS - {"action_head"}


@pytest.mark.fake_gpu
def test_engines_of_both_precisions_live_side_by_side(bundle: Path, robot: Robot) -> None:
    add_int8(bundle)
    int8_proof = robot.report(bundle).with_name(ENGINE_PARITY_INT8)
    outcome = engines(bundle, EngineOptions(), build=robot.build)
    assert labels(outcome.built) == LABELS
    assert int8_proof.exists()
    assert not robot.report(bundle).exists()
    floats = engines(bundle, EngineOptions(precision="float"), build=robot.build)
    assert (labels(floats.built), labels(floats.reused)) == (INT8_LABELS, {"action_head"})
    assert floats.verified == (robot.fingerprint,)
    assert int8_proof.exists()
    assert robot.report(bundle).exists()
    assert sorted(usable(bundle)) == sorted([*LABELS, *INT8_LABELS])
    for precision in ("int8", "float", "auto"):
        again = engines(bundle, EngineOptions(precision=precision), build=nothing_is_built)
        assert (labels(again.reused), again.verified) == (LABELS, ())
    done = tidy("prune", bundle)
    assert (done.returncode, done.stdout) == (0, "0 B freed\n"), done.stdout
    # Other settings replace what was built of this precision, and the head that both share; nothing else.
    engines(bundle, EngineOptions(precision="int8", optimization_level=1), build=robot.build)
    manifest = Manifest.load(bundle)
    for view, level in ((manifest.int8(), {1}), (manifest, {1, 3})):
        running = engine_cache.newest(bundle, view, robot.fingerprint)
        assert {record.settings.optimization_level for record in running.values()} == level
    assert len(usable(bundle)) == len(LABELS) + len(INT8_LABELS)
    assert int8_proof.exists()
    assert not robot.report(bundle).exists()  # the head is another


@pytest.mark.fake_gpu
@pytest.mark.parametrize(
    ("changes", "precision", "planned"),
    [
        ({}, "auto", "int8"),
        ({}, "float", "fp16"),
        ({"random": True}, "auto", "fp16"),
        ({"verdict": "FAIL"}, "auto", "fp16"),
        ({"random": True}, "int8", "int8"),
    ],
)
def test_which_engines_are_planned(
    bundle: Path, robot: Robot, changes: dict[str, Any], precision: Any, planned: str
) -> None:
    add_int8(bundle, **changes)
    reporter = Reporter(1, quiet=True)
    config = EnginesConfig(bundle, precision=precision, dry_run=True)
    assert build_engines(config, reporter) == bundle
    assert f"TensorRT for Orin; {'INT8' if planned == 'int8' else 'fp16'}, " in reporter.log
    _, tasks = engine_builder.plan_engines(bundle, config.options, reporter)
    assert {task.label: f".{planned}." in task.graph.file for task in tasks} == dict.fromkeys(LABELS, True) | {
        "action_head": False
    }
    assert not (bundle / "engines").exists()


@pytest.mark.fake_gpu
def test_int8_engines_of_a_bundle_without_a_variant(bundle: Path, robot: Robot) -> None:
    for dry_run in (False, True):
        with pytest.raises(BundleError, match="no INT8 variant"):
            build_engines(EnginesConfig(bundle, precision="int8", dry_run=dry_run))
    with pytest.raises(ConfigError, match="unknown precision of engines"):
        EngineOptions(precision="fp16")  # type: ignore[arg-type]


@pytest.mark.fake_gpu
def test_only_what_engines_are_made_of_is_hashed(bundle: Path, robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = add_int8(bundle)
    hashed: list[str] = []
    real = manifest_module.sha256_file
    monkeypatch.setattr(manifest_module, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    engines(bundle, EngineOptions(), build=robot.build)
    assert manifest.int8().stage_files() <= set(hashed)
    assert not (manifest.stage_files() - manifest.int8().stage_files()) & set(hashed)


@pytest.mark.fake_gpu
def test_a_failed_proof_of_int8_leaves_proved_engines_alone(
    bundle: Path, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_int8(bundle)
    engines(bundle, EngineOptions(precision="float"), build=robot.build)
    limits = parity.Limits(2.0, 2.0, 0.0, 0.0)
    monkeypatch.setattr(parity, "limits_of", lambda manifest: limits)
    with pytest.raises(ParityError) as caught:
        engines(bundle, EngineOptions(), build=robot.build)
    assert caught.value.expected == "PASS for int8"
    assert sorted(usable(bundle)) == sorted(LABELS)
    assert robot.report(bundle).exists()
    assert not robot.report(bundle).with_name(ENGINE_PARITY_INT8).exists()


@pytest.mark.fake_gpu
def test_a_build_that_was_killed_before_its_proof_is_proved_later(bundle: Path, robot: Robot) -> None:
    """An old proof says nothing of engines that were built after it."""
    engines(bundle, EngineOptions(), build=robot.build)

    def dies(request: EngineRequest, progress: Any) -> EngineBuilt:
        if request.label == "action_head":
            raise KeyboardInterrupt
        return robot.build(request, progress)

    with pytest.raises(KeyboardInterrupt):
        engines(bundle, EngineOptions(), build=dies, force=True)
    outcome = engines(bundle, EngineOptions(), build=nothing_is_built)
    assert (labels(outcome.reused), outcome.verified) == (LABELS, (robot.fingerprint,))
