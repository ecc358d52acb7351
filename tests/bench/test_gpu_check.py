"""The comparison for a GPU machine: on one without, everything that cannot run is left out with its reason, and the rest is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("onnxruntime")

from bench import gpu_check
from bench.gpu_check import CheckConfig, check
from bundle.engine_cache import ENGINES
from tests.bundles import Tiny, make_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny())


def config(bundle: Path, **options: Any) -> CheckConfig:
    return CheckConfig(
        bundle, bundle / "no.ckpt", **{"backends": ("trt", "ort:cpu"), "rounds": 3, "block": 4, **options}
    )


def test_what_cannot_run_is_left_out_with_its_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_why_no_pytorch", lambda: "PyTorch sees no GPU")
    result: Any = check(config(bundle), Console(quiet=True))
    assert set(result["candidates"]) == {"ort:cpu"}
    assert set(result["skipped"]) == {"trt", "pytorch eager fp16", "pytorch eager bf16", "torch.compile fp16"}
    row = result["candidates"]["ort:cpu"]
    assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["p99.9_ms"] <= row["max_ms"]
    assert {"vision_p50_ms", "language_p50_ms", "action_head_p50_ms"} <= set(row)
    assert result["steps"] == 9  # the first of each block is not counted
    json.dumps(result)


def test_pytorch_takes_turns_and_gives_the_ratio(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    monkeypatch.setattr(gpu_check, "_why_no_pytorch", lambda: "")

    def eager_step(*arguments: Any, **options: Any) -> Any:
        if options.get("compiled"):
            raise RuntimeError("no compiler\nand a long story")
        return lambda: order.append(str(options["dtype"]))

    monkeypatch.setitem(sys.modules, "bench.eager_baseline", type(sys)("bench.eager_baseline"))
    sys.modules["bench.eager_baseline"].eager_step = eager_step  # type: ignore[attr-defined]
    result: Any = check(config(bundle, rounds=2, block=3), Console(stderr=True, width=120))
    assert result["skipped"]["torch.compile fp16"] == "RuntimeError: no compiler"
    assert order[6:] == (["float16"] * 3 + ["bfloat16"] * 3) * 2  # after three warm-ups each
    assert "1.00" in capsys.readouterr().err


def test_a_failed_parity_is_exit_code_three(bundle: Path) -> None:
    report = bundle / ENGINES / "orin-sm87x8-trt10.3.0-cuda12" / "parity.json"
    report.parent.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), str(bundle), "no.ckpt", "--no-compile"]
    command += ["--backends", "ort:cpu", "--rounds", "1", "--block", "2"]
    for verdict, code in (("PASS", 0), ("FAIL", 3)):
        report.write_text(json.dumps({"verdict": verdict}))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == code, done.stderr
        last = json.loads(done.stdout.splitlines()[-1])
        assert last["engine_parity"]["orin-sm87x8-trt10.3.0-cuda12"]["verdict"] == verdict
