"""Real engines, built for a GPU that is not there: TensorRT-RTX's own parser and builder, and the cache around them."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bundle import engine_cache
from bundle.errors import BundleError, ConfigError, EngineBuildError, EngineError, ParityError
from bundle.manifest import Manifest
from bundle.recording import RECORDING_NAME
from export import engine_builder, engine_plan
from export.config import EnginesConfig
from export.console import Reporter
from export.engine_options import EngineOptions
from export.engine_plan import Machines
from export.engine_process import build_in_process
from export.pipeline import BuildConfig, build, build_engines
from export.to_tensorrt import EngineBuilt, EngineRequest, build_engine
from runtime import tensorrt_flavour
from runtime.backends.fake_gpu import DESKTOP, ORIN, FakeCuda
from runtime.backends.trt import TrtBackend
from runtime.tensorrt_flavour import TensorRT
from tests.engines import fake_tensorrt, go_on, request
from tests.export.builds import QUICK, ROOT, SCRIPT
from tests.export.conftest import Built
from train.synthetic import SyntheticOptions

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


def engines(bundle: Path, options: EngineOptions = SM86, **how: Any) -> engine_builder.Outcome:
    return engine_builder.build_engines(bundle, options, Reporter(1, quiet=True), **how)


def labels(names: tuple[str, ...]) -> set[str]:
    return {name.split("/")[1] for name in names}


def files(bundle: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every engine."""
    paths = (bundle / engine_cache.ENGINES).rglob("*.engine")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def nothing_is_built(*_: object) -> EngineBuilt:
    raise AssertionError("an engine was built that the cache has")


# --- for real -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tensorrt_rtx")
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_all_stages_twice(built: Built, tmp_path: Path, size: Any) -> None:
    made = built(SyntheticOptions(size=size), precision="fp16", promote=False, verify_frames=QUICK)
    bundle = Path(shutil.copytree(made, tmp_path / "policy.bundle"))
    assert labels(engines(bundle).built) == LABELS
    records = engine_cache.newest(bundle, Manifest.load(bundle), next((bundle / "engines").iterdir()).name)
    assert {record.fingerprint.split("-rtx")[0] for record in records.values()} == {"sm86"}
    assert all(record.layers > 100 for record in records.values())
    before = files(bundle)
    start = time.monotonic()
    again = engines(bundle, build=nothing_is_built)
    assert time.monotonic() - start < 2  # a promise of the cache, not a measurement: building takes longer
    assert labels(again.reused) == LABELS
    assert files(bundle) == before


@pytest.mark.usefixtures("tensorrt_rtx")
def test_what_misses_the_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines(bundle)
    engine = next((bundle / "engines").glob("*/vision.*.engine"))
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    assert labels(engines(bundle).built) == {"vision"}  # a flipped byte

    next((bundle / "engines").glob("*/action_head.*.json")).unlink()
    assert labels(engines(bundle).built) == {"action_head"}  # a lost record

    level = EngineOptions(tensorrt="rtx", target=("sm86",), optimization_level=1)
    assert labels(engines(bundle, level).built) == LABELS
    assert labels(engines(bundle, EngineOptions(tensorrt="rtx", target=("sm89",))).built) == LABELS

    monkeypatch.setattr(TensorRT, "fingerprint", lambda self, device, target=None: "sm86-rtx9.9.9")
    assert labels(engines(bundle).built) == LABELS  # another version
    assert labels(engines(bundle).reused) == LABELS


@pytest.mark.usefixtures("tensorrt_rtx")
def test_another_checkpoint_and_another_precision(upstream: Any, tmp_path: Path) -> None:
    """A rebuilt bundle keeps the engines of unchanged stages, byte for byte, and only those."""
    from tests.export.builds import edit_weight

    shutil.copyfile(upstream.checkpoint, tmp_path / "policy.ckpt")
    (tmp_path / "base").symlink_to(upstream.base)
    config = BuildConfig(
        checkpoint=tmp_path / "policy.ckpt",
        out=tmp_path / "policy.bundle",
        precision="fp16",
        promote=False,
        verify_frames=QUICK,
        engines=SM86,
    )
    bundle = build(config)
    first = files(bundle)
    assert len(first) == len(LABELS)

    edit_weight(config.checkpoint, "act_head.gripper.mlp.6.weight", by=1.01)
    build(config)
    second = files(bundle)
    assert {name for name in first if name in second} == {name for name in first if not name.startswith("action_head")}
    assert {name: second[name] for name in first.keys() & second.keys()}.items() <= first.items()
    assert len(second) == len(LABELS)  # the stale one is gone

    build(BuildConfig(**{**vars(config), "precision": "fp32"}))
    third = files(bundle)
    assert third.keys() & second.keys() == {name for name in second if name.startswith("action_head")}


@pytest.mark.usefixtures("tensorrt_rtx")
def test_a_graph_that_tensorrt_does_not_take(bundle: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(next(bundle.glob("vision*.onnx")), load_external_data=False)
    node = next(item for item in model.graph.node if item.op_type == "Sigmoid")
    node.op_type = "NoSuchOperator"
    broken = bundle / "broken.onnx"
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(EngineBuildError, match=r"does not take the graph of vision(?s:.*)NoSuchOperator") as caught:
        build_in_process(
            request(broken, tmp_path / "x.engine", flavour="rtx", label="vision", target="sm86"), lambda *_: None
        )
    assert node.name in str(caught.value)
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.usefixtures("tensorrt_rtx")
def test_damaged_weights_are_found_before_anything_is_built(bundle: Path) -> None:
    path = next(bundle.glob("language*.data"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is corrupt"):
        engines(bundle, build=nothing_is_built)


@pytest.mark.usefixtures("tensorrt_rtx")
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tensorrt": "rtx", "target": ("sm87",)}, ConfigError, "--engines-only BUNDLE"),
        ({"tensorrt": "rtx", "target": ("sm1",)}, ConfigError, "expected: sm75"),
        ({"tensorrt": "off", "target": ("sm86",)}, ConfigError, "engines are off"),
        ({"tensorrt": "rtx", "bucket": (7,)}, ConfigError, "expected: 88, 128"),
        ({"tensorrt": "rtx", "refit": True}, ConfigError, "--refit without a GPU"),
        ({"tensorrt": "rtx", "target": ("sm75",)}, EngineBuildError, "fp16 only on Turing"),
        ({"tensorrt": "trt"}, EngineError, "tensorrt cannot be imported"),
    ],
)
def test_what_cannot_be_built_here(bundle: Path, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        engines(bundle, EngineOptions(**options))


# --- processes ----------------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"blocked by the test: {name}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.usefixtures("tensorrt_rtx")
def test_engines_only_needs_no_torch(bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(SCRIPT), "--engines-only", str(bundle), "--target", "sm86"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{bundle}\n"
    assert len(files(bundle)) == len(LABELS)

    listed = subprocess.run(
        [sys.executable, str(ROOT / "export" / "engines.py"), "list", str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert listed.stdout.count("current") == len(LABELS)
    (bundle / "engines" / "sm86-rtx0" / "old.engine").parent.mkdir()
    (bundle / "engines" / "sm86-rtx0" / "old.engine").write_bytes(b"x")
    pruned = subprocess.run(
        [sys.executable, str(ROOT / "export" / "engines.py"), "prune", str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "old.engine" in pruned.stdout
    assert not (bundle / "engines" / "sm86-rtx0").exists()
    assert len(files(bundle)) == len(LABELS)


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineBuildError, match=r"build of vision was killed(?s:.*)add swap"):
        build_in_process(request(tmp_path / "vision.onnx", tmp_path / "x"), lambda *_: None, program)


def test_a_worker_that_crashes(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "import os, signal; print('assertion in layer 3', flush=True); os.abort()")
    with pytest.raises(EngineBuildError, match=r"build of vision crashed(?s:.*)SIGABRT: assertion in layer 3"):
        build_in_process(request(tmp_path / "vision.onnx", tmp_path / "x"), lambda *_: None, program)


def test_ctrl_c_ends_the_worker(tmp_path: Path) -> None:
    program = (
        sys.executable,
        "-c",
        'import os, sys, time; os.write(int(sys.argv[1]), b\'["progress", ["a", null, %d, 1]]\\n\' % os.getpid()); time.sleep(60)',
    )
    seen: list[int] = []

    def interrupted(phase: str, parent: str | None, done: int, steps: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_in_process(request(tmp_path / "vision.onnx", tmp_path / "x"), interrupted, program)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


@pytest.mark.usefixtures("tensorrt_rtx")
def test_killed_at_any_moment(bundle: Path) -> None:
    """SIGKILL of the whole command: no worker is left, no half engine is taken for one, and the next run completes the rest."""
    command = [sys.executable, str(SCRIPT), "--engines-only", str(bundle), "--target", "sm86"]
    for delay in (0.4, 0.8, 1.2, 1.6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for found in engine_cache.survey(bundle, Manifest.load(bundle)):
            if found.state == "current":
                assert found.record is not None
                engine_cache.verify(bundle, found.record)
    assert labels((outcome := engines(bundle)).built + outcome.reused) == LABELS
    states = {found.state for found in engine_cache.survey(bundle, Manifest.load(bundle))}
    assert states == {"current"}  # leftovers are tidied


# --- a machine with a GPU, faked ----------------------------------------------------------------------------------------------


class Robot:
    """An Orin with TensorRT 10.3: what choose_machines finds, a builder in this process, and a backend for the proof."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "10.3.0") -> None:
        self.gpu = FakeCuda(ORIN)
        self.tensorrt = fake_tensorrt(version, self.gpu)
        self.requests: list[EngineRequest] = []
        self.fingerprint = self.tensorrt.fingerprint(ORIN)
        machines = Machines(self.tensorrt, ORIN, (None,), "TensorRT for Orin")
        monkeypatch.setattr(engine_builder, "choose_machines", lambda options: machines)
        monkeypatch.setattr("export.to_tensorrt.open_cuda", lambda: self.gpu)
        monkeypatch.setattr(
            engine_builder,
            "TrtBackend",
            lambda flavour, fingerprint: TrtBackend(cuda=self.gpu, tensorrt=self.tensorrt, fingerprint=fingerprint),
        )

    def build(self, request: EngineRequest, progress: Any) -> EngineBuilt:
        self.requests.append(request)
        return build_engine(self.tensorrt, request, go_on)


@pytest.mark.fake_gpu
def test_engines_are_proved_where_they_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot(monkeypatch)
    outcome = engines(bundle, EngineOptions(), build=robot.build)
    assert outcome.verified == (robot.fingerprint,)
    report = (bundle / "engines" / robot.fingerprint / engine_cache.ENGINE_PARITY).read_text()
    assert '"backend": "trt"' in report
    assert '"verdict": "PASS"' in report or '"verdict": "WARN"' in report
    assert next((bundle / "engines" / robot.fingerprint).glob("vision.*.layers")).exists()
    # Every build knew what the one before had measured.
    assert (bundle / "engines" / robot.fingerprint / engine_cache.TIMING_CACHE).read_bytes() == b"timed;" * len(LABELS)
    again = engines(bundle, EngineOptions(), build=nothing_is_built)
    assert (labels(again.reused), again.verified) == (LABELS, ())


@pytest.mark.fake_gpu
def test_an_engine_of_narrower_integers_is_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain copies int64 indices as they are; an engine that took int32 would read every second one as zero."""
    robot = Robot(monkeypatch)

    def narrow(request: EngineRequest, progress: Any) -> EngineBuilt:
        built = robot.build(request, progress)
        inputs = [msgspec.structs.replace(item, dtype=item.dtype.replace("int64", "int32")) for item in built.inputs]
        return msgspec.structs.replace(built, inputs=tuple(inputs))

    with pytest.raises(EngineBuildError, match="read other inputs from the graph of language"):
        engines(bundle, EngineOptions(), build=narrow)
    records = engine_cache.newest(bundle, Manifest.load(bundle), robot.fingerprint)
    assert {stage for stage, _ in records} == {"vision"}


@pytest.mark.fake_gpu
def test_engines_that_compute_something_else_are_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot(monkeypatch)

    def wrong(request: EngineRequest, progress: Any) -> EngineBuilt:
        built = robot.build(request, progress)
        if request.label == "language.s88":  # runs, and gives the features of another length's padding
            other = next(bundle.glob("language*.s88.onnx"))
            model = pytest.importorskip("onnx").load(other)
            for weight in model.graph.initializer:
                if weight.name.endswith("final_norm.weight"):
                    weight.raw_data = bytes(len(weight.raw_data))
            changed = bundle.parent / "changed.onnx"
            pytest.importorskip("onnx").save(model, changed)
            Path(request.output).write_bytes(
                Path(request.output).read_bytes().replace(str(other).encode(), str(changed).encode())
            )
        return built

    with pytest.raises(ParityError, match="the TensorRT engines do not do what the checkpoint does"):
        engines(bundle, EngineOptions(), build=wrong)
    assert engine_cache.newest(bundle, Manifest.load(bundle), robot.fingerprint) == {}


@pytest.mark.fake_gpu
def test_new_adapters_are_refitted_and_proved(bundle: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot(monkeypatch)
    options = EngineOptions(refit=True)
    assert labels(engines(bundle, options, build=robot.build).built) == LABELS
    other = built(SyntheticOptions(seed=1), precision="fp16", promote=False, verify_frames=QUICK)
    swapped = Path(shutil.copytree(other, bundle.parent / "swapped.bundle"))
    engine_cache.carry_over(bundle, swapped, Manifest.load(swapped))
    outcome = engines(swapped, options, build=robot.build)
    assert labels(outcome.refitted) == LABELS
    assert outcome.verified == (robot.fingerprint,)
    records = engine_cache.newest(swapped, Manifest.load(swapped), robot.fingerprint)
    assert {record.origin for record in records.values()} == {"refitted"}


@pytest.mark.fake_gpu
def test_a_failed_proof_leaves_no_older_engine_to_step_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot(monkeypatch)
    engines(bundle, EngineOptions(optimization_level=1), build=robot.build)
    engines(bundle, EngineOptions(optimization_level=5), build=robot.build)
    monkeypatch.setattr(engine_builder.parity, "judge", lambda *_, **__: ("FAIL", ("wrong",)))
    with pytest.raises(ParityError):
        engines(bundle, EngineOptions(), build=robot.build)
    assert engine_cache.newest(bundle, Manifest.load(bundle), robot.fingerprint) == {}


def test_a_tensorrt_that_is_too_old_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensorrt_flavour.importlib.import_module
    old = SimpleNamespace(__version__="8.6.2", ILogger=object)
    monkeypatch.setattr(
        tensorrt_flavour.importlib, "import_module", lambda name: old if name == "tensorrt" else real(name)
    )
    monkeypatch.setattr(engine_plan, "installed", lambda: iter(("trt",)))
    monkeypatch.setattr(engine_plan, "find_device", lambda: (ORIN, ""))
    with pytest.raises(EngineError, match="too old for exact engines"):
        engine_plan.choose_machines(EngineOptions(tensorrt="trt"))
    machines = engine_plan.choose_machines(EngineOptions())
    assert machines.tensorrt is None
    assert all(word in machines.reason for word in ("too old", "TensorRT 8.6.2", "JetPack 6.1 or newer"))


def test_free_memory_of_a_jetson_counts_what_the_kernel_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plan, "open_cuda", lambda: FakeCuda(ORIN))
    available = engine_plan.free_device_bytes()
    assert available is not None
    assert available != FakeCuda(ORIN).free_bytes()
    monkeypatch.setattr(engine_plan, "open_cuda", lambda: FakeCuda(DESKTOP))
    assert engine_plan.free_device_bytes() == DESKTOP.memory_bytes


@pytest.mark.parametrize(
    ("free", "weights", "expected"),
    [(None, 0, 4096), (64 << 30, 1 << 30, 4096), (8 << 30, 2 << 30, 1024), (4 << 30, 2 << 30, 256), (0, 9 << 30, 256)],
)
def test_the_workspace_leaves_room_for_the_weights(free: int | None, weights: int, expected: int) -> None:
    assert engine_plan.workspace_bytes(EngineOptions(), free, weights) == expected << 20
    assert engine_plan.workspace_bytes(EngineOptions(workspace_mb=7), free, weights) == 7 << 20


@pytest.mark.fake_gpu
def test_a_bundle_without_a_recording_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot(monkeypatch)
    manifest = Manifest.load(bundle)
    kept = {name: record for name, record in manifest.files.items() if name != RECORDING_NAME}
    msgspec.structs.replace(manifest, files=kept).save(bundle)
    reporter = Reporter(1, quiet=True)
    engine_builder.build_engines(bundle, EngineOptions(), reporter, build=robot.build)
    assert "no recorded reference" in reporter.log


def test_what_the_builder_is_told_is_part_of_an_engines_key() -> None:
    """A flag more makes another engine: an old one must not be taken for it."""
    told = {inspect.getsourcefile(each) for each in (TensorRT.set_flags, TensorRT.network, build_engine)}
    assert told == {str(ROOT / name) for name in engine_plan._BUILD_CODE}


def test_a_dry_run_builds_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Robot(monkeypatch)
    reporter = Reporter(1, quiet=True)
    build_engines(EnginesConfig(engines_only=bundle, dry_run=True), reporter)
    assert "nothing was built" in reporter.log
    assert not (bundle / "engines").exists()
