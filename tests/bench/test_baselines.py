"""Turns are taken, pairs are compared, and whatever goes wrong in a baseline's process costs one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.baselines import NAMES, Kind, Limits, measure_baselines, paired_ratio
from bench.results import Baseline
from bundle.manifest import Manifest
from tests.bundles import Tiny, make_bundle

ROOT = Path(__file__).resolve().parents[2]
# A worker that takes as long as it says; what it is told stands in `task`.
WORKER = """
import json, sys, time
task = json.loads(sys.argv[1])
{before}
print(json.dumps({{"ready": True}}), flush=True)
for number, _ in enumerate(sys.stdin):
    {step}
"""
ANSWER = 'time.sleep(0.02); print(json.dumps({"ms": 20.0}), flush=True)'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("baselines") / "tiny.bundle", Tiny())


def measured(
    bundle: Path, *, before: str = "", step: str = ANSWER, rounds: int = 5, limits: Limits | None = None, **options: Any
) -> Baseline:
    command = (sys.executable, "-c", WORKER.format(before=before, step=step))
    found = measure_baselines(
        ("eager-fp32",),
        options.pop("ours", lambda: time.sleep(0.01)),
        Manifest.load(bundle),
        folder=bundle,
        checkpoint=None,
        tokens=20,
        threads=1,
        limits=limits or Limits(rounds=rounds),
        command=command,
        **options,
    )
    assert [each.name for each in found] == ["eager-fp32"]
    return found[0]


def test_pairs(bundle: Path) -> None:
    begun: list[tuple[Kind, int]] = []
    advanced: list[int] = []
    found = measured(bundle, on_start=lambda *start: begun.append(start), advance=lambda: advanced.append(1))
    assert found.skipped is None
    assert found.ours is not None
    assert found.theirs is not None
    assert found.ratio is not None
    assert found.ours.count == found.theirs.count == 5
    assert found.theirs.p50 == 20.0
    assert 0.4 < found.ratio[0] < 1.5
    assert found.ratio[1] <= found.ratio[0] <= found.ratio[2]
    assert len(begun) == 1
    assert len(advanced) == 6  # the first pair only warms up


def test_turns_are_taken(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write('B'); print(json.dumps({{'ms': 1.0}}), flush=True)"

    def ours() -> None:
        with log.open("a") as file:
            file.write("A")

    measured(bundle, step=note, rounds=3, ours=ours)
    assert log.read_text() == "ABABABAB"


@pytest.mark.parametrize(
    ("before", "step", "reason"),
    [
        ('print(json.dumps({"skip": "torch is not installed"})); sys.exit()', ANSWER, "torch is not installed"),
        ("raise RuntimeError('no such kernel')", ANSWER, "it failed: RuntimeError: no such kernel"),
        ("", "sys.exit(7)", "it failed: exit status 7"),
        ("", "import os; os.kill(os.getpid(), 9)", "killed, probably for want of memory"),
        ("time.sleep(60)", ANSWER, "getting ready took longer than 1 s"),
        ("", "time.sleep(60)", "computing took longer than 0.5 s"),
        ("", "print('libraries like to talk', flush=True)", "it answered otherwise than agreed"),
    ],
)
def test_whatever_goes_wrong_costs_one_line(bundle: Path, before: str, step: str, reason: str) -> None:
    start = time.monotonic()
    found = measured(bundle, before=before, step=step, limits=Limits(rounds=2, start_s=1.0, step_s=0.5))
    assert found.skipped is not None
    assert reason in found.skipped
    assert found.ratio is None
    assert time.monotonic() - start < 10


def test_no_process_stays(bundle: Path, tmp_path: Path) -> None:
    """Not even when we are interrupted."""
    pid = tmp_path / "pid"
    before = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))"

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(bundle, before=before, ours=interrupted)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_what_the_process_is_told(bundle: Path, tmp_path: Path) -> None:
    told = tmp_path / "task.json"
    measured(bundle, before=f"open({str(told)!r}, 'w').write(sys.argv[1])", rounds=1)
    task = json.loads(told.read_text())
    dims = Manifest.load(bundle).dimensions
    assert (task["tokens"], task["window_frames"], task["hidden"]) == (20, dims.window, dims.lstm_hidden)
    assert task["dtype"] == "float32"


def test_the_ratio_of_pairs_forgives_what_hits_both() -> None:
    """A machine that is three times slower for a while slows neighbours alike."""
    noise = [1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 1.1, 2.9]
    ratio, low, high = paired_ratio([50 * factor for factor in noise], [100 * factor for factor in noise])
    assert ratio == low == high == pytest.approx(0.5)


def test_the_worker_without_torch() -> None:
    """In an interpreter that has none of the packages, it says which one is missing."""
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "sys.argv = ['worker', '{}']\n"
        f"runpy.run_path({str(ROOT / 'bench' / 'baseline_worker.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skip"] == "torch is not installed: pip install 'jetvla[export]'"


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
