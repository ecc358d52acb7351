"""The command as a user or a script runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("jinja2")

from bench import latency
from bench.comparable import bundle_differences
from bench.results import RESULT_NAME, read_result
from episodes.synthetic import write_synthetic
from runtime.policy import Policy
from tests.bundles import Tiny, add_int8, make_bundle

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "latency.py"
QUICK = ("--backend", "ort:cpu", "--threads", "1", "--warmup", "1", "--frame-size", "48", "64", "--no-plan")
FEW = (*QUICK, "--steps", "30", "--ticks", "3", "--rate", "20")
# As on a robot: packages of the training side cannot be imported.
WITHOUT_TORCH = f"""
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "onnx"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = [{str(SCRIPT)!r}, *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("latency") / "tiny.bundle", Tiny())


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "tiny.bundle")
    return tmp_path / "tiny.bundle"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return latency.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_torch_the_last_line_is_json(bundle: Path, tmp_path: Path) -> None:
    episode = write_synthetic(tmp_path, "v1", side="left", seed=0, height=48, width=64, length=6)
    done = command(str(bundle), *FEW, "--episode", str(episode), "--baselines", "eager-fp32")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["outcome"] == "pass"
    assert summary["steps"] == 30
    assert 0 < summary["total_ms"]["p50"] <= summary["total_ms"]["p99"]
    result = read_result(bundle / "reports" / RESULT_NAME)
    assert result.bundle.manifest_sha256 == Policy.load(bundle, "ort:cpu").manifest.manifest_sha256
    assert "pass --checkpoint" in (
        result.baselines[0].skipped or ""
    )  # it has a process, and an interpreter, of its own
    page = (bundle / "reports" / latency.REPORT_NAME).read_text()
    assert "Under 200 ms" in page
    assert "Under 200 ms" in done.stdout
    # Reports are not part of what the manifest vouches for.
    assert command(str(bundle), *FEW).returncode == 0


def test_a_precision_is_measured_as_what_it_is(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """INT8 and floating point of one bundle are two things to compare."""
    add_int8(bundle)
    results = {}
    for precision, ran in (("auto", "int8"), ("int8", "int8"), ("float", "fp32")):
        assert (
            in_process(monkeypatch, str(bundle), *FEW, "--no-plan", "--deadline-ms", "9999", "--precision", precision)
            == 0
        )
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["precision"] == ran
        results[precision] = read_result(bundle / "reports" / RESULT_NAME)
        assert results[precision].bundle.precision == ran
        assert results[precision].bundle.stage_precision == {"vision": ran, "language": ran, "action_head": "fp32"}
    assert bundle_differences(results["auto"], results["int8"]) == []
    assert bundle_differences(results["float"], results["int8"]) == [
        "precision: fp32, int8",
        "stage_precision.vision: fp32, int8",
        "stage_precision.language: fp32, int8",
    ]


def test_a_deadline_that_is_missed(bundle: Path, tmp_path: Path) -> None:
    done = command(str(bundle), *FEW, "--deadline-ms", "0.001", "--out", str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["outcome"] == "miss"
    assert "Not under 0.001 ms" in (tmp_path / "out" / latency.REPORT_NAME).read_text()


def test_a_bundle_that_fails_its_golden_step_gives_no_number(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with np.load(bundle / "golden.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files} | {"action": arrays["action"] + 0.5}
    np.savez(bundle / "golden.npz", **changed)
    for options in ((), ("--skip-hashes",)):
        assert in_process(monkeypatch, str(bundle), *FEW, *options) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "p50" not in said.err
    assert not (bundle / "reports").exists() or not list((bundle / "reports").glob("latency*"))


def test_a_backend_that_fell_back_is_exit_code_three(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    load = Policy.load

    def fallen(*arguments: Any, **options: Any) -> Policy:
        policy = load(*arguments, **options)
        policy.failed_backends = ("trt: the engines are for another GPU",)
        return policy

    monkeypatch.setattr(Policy, "load", fallen)
    assert in_process(monkeypatch, str(bundle), *FEW) == 3
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["outcome"] == "invalid"
    assert "Not valid: ort:cpu runs because another backend failed: trt" in said.out


# The 100th step leaves a file: warming up is over by then, and there is something to report.
_SAYS_WHEN = """
import pathlib, sys
sys.path.insert(0, {root!r})
import runtime.policy
step, steps = runtime.policy.Policy.step, []
def counted(self, *frames, **more):
    steps.append(1)
    if len(steps) == 100:
        pathlib.Path({marker!r}).touch()
    return step(self, *frames, **more)
runtime.policy.Policy.step = counted
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_reports_what_it_has(bundle: Path, tmp_path: Path, how: signal.Signals) -> None:
    arguments = [str(bundle), *QUICK, "--steps", "100000000", "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = _SAYS_WHEN.format(root=str(SCRIPT.parents[1]), marker=str(tmp_path / "measuring")) + WITHOUT_TORCH
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # A suite that a shell runs in the background has SIGINT ignored, and so would have what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 250
            while not (tmp_path / "measuring").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(how)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 1, err
    assert json.loads(out.splitlines()[-1])["partial"]
    result = read_result(tmp_path / "out" / RESULT_NAME)
    assert result.partial
    assert result.stopped == "interrupted"
    assert result.sections["total"].count > 0
    assert "PARTIAL" in err
    assert "PARTIAL" in (tmp_path / "out" / latency.REPORT_NAME).read_text().upper()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--baselines", "eager-fp23"), 2, "there is no baseline eager-fp23"),
        (("--steps", "-3"), 2, "--steps is too small"),
        (("--frame-size", "0", "64"), 2, "frames without pixels"),
        (("--backend", "ort:gpu"), 1, "unknown backend"),
        (("--episode", "none.h5"), 1, "none.h5"),
    ],
)
def test_bad_arguments(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert in_process(monkeypatch, str(bundle), *FEW, *arguments) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert in_process(monkeypatch, str(tmp_path)) == 1
    assert "is not a bundle" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_measuring(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(latency, "run", lambda *_, **__: pytest.fail("measured"))
    assert in_process(monkeypatch, str(bundle), *FEW, "--out", str(tmp_path / "file" / "out")) == 1
    assert "file" in capsys.readouterr().err
