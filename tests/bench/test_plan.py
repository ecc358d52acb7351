"""bench/plan.py as people call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.plan_check import golden_bucket, kept_deviations
from bench.results import Plan, Result, StageFloor, Timing
from bench.workload import FULL
from bundle.errors import ConfigError
from bundle.manifest import Manifest
from runtime.golden import Golden
from tests.bench.plans import manifest_of, save_manifest
from tests.bench.results_made import made_result
from tests.bundles import Tiny, make_bundle

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    """bench/plan.py in a process of its own."""
    command = [sys.executable, "bench/plan.py", *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT, env=environment)


def as_json(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_without_a_device_it_lists_them(tmp_path: Path) -> None:
    done = call(cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("orin-nx-16gb-super", "MAXN_SUPER", "rtx-5090", "raspberry-pi-5", "here", "datasheet"):
        assert word in done.stdout
    assert "…" not in done.stdout
    listed = as_json(call("--json", cache=tmp_path))
    robot = next(one for one in listed if one["device"] == "orin-nx-16gb")
    assert [mode["name"] for mode in robot["modes"]] == ["MAXN", "25W", "15W", "10W"]


def test_one_row_for_every_precision_and_stage(tmp_path: Path) -> None:
    done = call("--device", "orin-nx-16gb", "--power", "25W", "--precision", "fp16,int8", cache=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "Jetson Orin NX 16 GB, 25W: full, 88 slots"
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["fp16", "vision"],
        ["fp16", "language"],
        ["fp32", "action_head"],
    ]
    assert lines[5].split()[0] == "tick"
    assert "fp16: meets 200 ms, expected" in done.stdout
    assert "int8: meets 200 ms, expected" in done.stdout
    assert "…" not in done.stdout


def test_json_holds_what_the_tables_show(tmp_path: Path) -> None:
    found = as_json(call("--device", "orin-nx-16gb-super", "--precision", "fp16", "--json", cache=tmp_path))
    (plan,) = found["plans"]
    assert plan["floor_ms"] == pytest.approx(33, abs=1)
    assert plan["outcome"] == "meets"
    assert [stage["stage"] for stage in plan["stages"]] == ["vision", "language", "action_head"]
    assert found["calibrated"] is False
    assert found["sequence"] == 88


@pytest.mark.parametrize(
    ("deadline", "code", "words"), [(100, 3, "misses 100 ms: expected"), (50, 3, "cannot meet 50 ms")]
)
def test_exit_code_3_if_every_precision_misses(deadline: int, code: int, words: str, tmp_path: Path) -> None:
    arguments = ["--device", "orin-nx-16gb", "--power", "15W", "--deadline-ms", deadline, "--precision"]
    done = call(*arguments, "fp16", cache=tmp_path)
    assert done.returncode == code
    assert words in done.stdout
    assert call(*arguments, "fp16,int8", "--deadline-ms", 130, cache=tmp_path).returncode == 0


def test_a_bundle_is_planned_as_it_is(tmp_path: Path) -> None:
    bundle = save_manifest(manifest_of(FULL, "fp16"), tmp_path / "lab.bundle")
    found = as_json(call(bundle, "--device", "rtx-4090", "--json", cache=tmp_path))
    assert [plan["precision"] for plan in found["plans"]] == ["fp16"]
    assert found["notes"] == []
    done = call(bundle, "--device", "rtx-4090", "--sequence", 128, cache=tmp_path)
    assert "GeForce RTX 4090: lab.bundle, 128 slots" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "orin-xn-16gb"], 2, "did you mean orin-nx-16gb?"),
        (["--device", "l4", "--power", "15W"], 2, "unknown power mode of l4"),
        (["--device", "l4", "--precision", "fp8"], 2, "unknown precision"),
        (["--device", "l4", "--size", "small"], 2, "--size is not understood"),
        (["--device", "l4", "--sequence", "0"], 2, "--sequence is no length"),
        (["--device", "l4", "--calibrate"], 2, "--calibrate measures this machine"),
        (["--device", "here", "--power", "15W"], 2, "power mode"),
        (["--device", "here", "--backend", "ort:gpu", "--calibrate"], 2, "unknown backend"),
        (["--size", "full"], 2, "name the machine with --device"),
        (["NOTHING", "--device", "l4"], 1, "NOTHING is not a bundle"),
        (["NOTHING", "--device", "l4", "--size", "full"], 2, "both a bundle and --size"),
        (["--check", "NOTHING"], 1, "NOTHING is not a bundle"),
        (["--check", "pyproject.toml"], 2, "is no latency result"),
        (["--device", "here", "--threads", "-1"], 2, "--threads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_answered(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = call(*arguments, cache=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_result_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text('{"schema": 99}')
    done = call("--check", tmp_path / "latency.json", cache=tmp_path)
    assert done.returncode == 2
    assert "another schema" in done.stderr


def test_calibrating_and_checking_a_bundle(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny(buckets=(12, 24)))
    done = call(bundle, "--device", "here", "--calibrate", "--json", "--threads", 1, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert as_json(done)["calibrated"] is True
    (kept,) = (tmp_path / "cache" / "jetvla").glob("probes-*.json")
    assert str(kept) in done.stderr.replace("\n", "")
    checked = call("--check", bundle, "--threads", 1, "--steps", 2, "--json", cache=tmp_path / "cache")
    assert checked.returncode == 0, checked.stderr
    errors = as_json(checked)["errors"]
    assert [one["stage"] for one in errors] == ["vision", "language", "action_head"]
    assert all(one["error"] == pytest.approx(one["expected_ms"] / one["measured_ms"] - 1) for one in errors)
    assert "probes of" in as_json(checked)["basis"]


def test_the_golden_step_decides_which_graph_is_checked(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny(buckets=(12, 24)))
    manifest, golden = Manifest.load(bundle), Golden.load(bundle)
    assert golden_bucket(manifest, golden) == 12


def result(plan: Plan | None, sections: dict[str, float]) -> Result:
    """The parts of a result that a check reads."""
    timings = {name: Timing.of([value]) for name, value in sections.items()}
    return made_result(steps=2, plan=plan, sections=timings)


def test_a_latency_result_is_compared_with_the_plan_that_it_kept() -> None:
    floor = StageFloor(gflop=1, mbytes=1, floor_ms=1, expected_ms=12, bottleneck="memory")
    plan = Plan(device="x", calibrated=True, stages={"vision": floor, "language": floor})
    (one,) = kept_deviations(result(plan, {"vision": 10.0, "total": 30.0}), Path("latency.json"))
    assert (one.stage, one.error) == ("vision", pytest.approx(0.2))


@pytest.mark.parametrize(
    ("plan", "got"),
    [(None, "no plan"), (Plan(device="x", calibrated=False, stages={}, note="why not"), "no plan: why not")],
)
def test_a_result_without_a_plan_is_refused(plan: Plan | None, got: str) -> None:
    with pytest.raises(ConfigError, match="nothing to compare") as caught:
        kept_deviations(result(plan, {"vision": 1.0}), Path("latency.json"))
    assert caught.value.got == got
