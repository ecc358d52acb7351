"""bench/compare.py: what it refuses, what it prints, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.comparable import check_comparable
from bench.results import Fact, Result, Verdict, write_result
from bundle.errors import ConfigError
from tests.bench.results_made import made_result

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "compare.py"
A, B, SLOW = made_result(steps=120), made_result(seed=1, steps=120), made_result(seed=2, steps=120, speed=1.15)


def changed(result: Result, part: str, **changes: Any) -> Result:
    return msgspec.structs.replace(result, **{part: msgspec.structs.replace(getattr(result, part), **changes)})


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, result in {"a": A, "b": B, "slow": SLOW}.items():
        found[name] = tmp_path / f"{name}.json"
        write_result(found[name], result)
    return found


def test_a_slowdown_exits_with_3(files: dict[str, Path]) -> None:
    done = command(files["a"], files["slow"])
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("B is slower: p50 of total is 1.1")
    assert "gpu clocks: 0.31-0.92 GHz, not locked" in done.stdout


def test_the_other_way_round_is_a_gain(files: dict[str, Path]) -> None:
    done = command(files["slow"], files["a"], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["outcome"] == "faster"
    assert found["rows"][0]["p50"]["high"] < 1 / 1.03
    assert found["forced"] == found["bundle"] == []


def test_another_bundle_is_listed_and_allowed(tmp_path: Path, files: dict[str, Path]) -> None:
    other = changed(B, "bundle", precision="int8", stage_precision={**B.bundle.stage_precision, "vision": "int8"})
    write_result(tmp_path / "other.json", other)
    done = command(files["a"], tmp_path / "other.json")
    assert done.returncode == 0, done.stderr
    assert "bundle: precision: fp16, int8" in done.stdout
    assert "bundle: stage_precision.vision: fp16, int8" in done.stdout


def test_markup_in_foreign_text_is_text(tmp_path: Path, files: dict[str, Path]) -> None:
    write_result(tmp_path / "other.json", changed(B, "bundle", name="[bold]x[/bold]"))
    assert "[bold]x[/bold]" in command(files["a"], tmp_path / "other.json").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "missing"], "cannot be read"),
        (["a", "a"], "is named twice"),
        (["a"], "these are no pairs"),
        (["a", "b", "slow"], "these are no pairs"),
        (["a", "b", "--threshold", "3"], "--threshold is out of range"),
        (["a", "b", "--threshold", "-0.1"], "--threshold is out of range"),
    ],
)
def test_usage(files: dict[str, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    paths = [files.get(each, tmp_path / each if each == "missing" else each) for each in arguments]
    done = command(*paths)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hint:" in done.stderr
    assert done.stdout == ""


def check(*results: Result, force: bool = False) -> list[str]:
    return check_comparable([f"{index}.json" for index in range(len(results))], results, force=force)


def with_fact(result: Result, part: str, name: str, value: str | None) -> Result:
    facts = {**getattr(result.fingerprint, part), name: Fact(value=value)}
    return changed(result, "fingerprint", **{part: facts})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (with_fact(B, "machine", "power mode", "15W"), "power mode: 25W, 15W"),
        (with_fact(B, "software", "tensorrt", "10.3.0"), "tensorrt: 10.7.0, 10.3.0"),
        (with_fact(B, "machine", "gpu", "one more"), "gpu: missing, one more"),
        (changed(B, "settings", threads=1), "threads: 0, 1"),
        (changed(B, "settings", instruction="Stop"), "instruction: Navigate to the gray basket on the left, Stop"),
        (msgspec.structs.replace(B, partial=True, stopped="interrupted"), "1.json is partial: interrupted"),
    ],
)
def test_what_needs_force(other: Result, message: str) -> None:
    with pytest.raises(ConfigError, match="these results cannot be compared") as caught:
        check(A, other)
    assert message in str(caught.value)
    assert "--force" in caught.value.hint
    assert check(A, other, force=True) == [message]


def test_state_and_effort_may_differ() -> None:
    assert check(A, with_fact(B, "before", "temperature", "80 C")) == []
    assert check(A, changed(B, "settings", steps=10, minutes=0.0, deadline_ms=100.0)) == []


@pytest.mark.parametrize("force", [False, True])
def test_an_invalid_result_is_always_refused(force: bool) -> None:
    invalid = msgspec.structs.replace(B, verdict=Verdict(outcome="invalid", line="Not valid: fell back.", reasons=()))
    with pytest.raises(ConfigError, match=r"1\.json is invalid") as caught:
        check(A, invalid, force=force)
    assert "fell back" in str(caught.value)


def test_a_result_without_a_total() -> None:
    with pytest.raises(ConfigError, match=r"1\.json has no total"):
        check(A, msgspec.structs.replace(B, sections={"vision": B.sections["vision"]}))


def test_pairs_are_at_least_five_of_the_same_two() -> None:
    assert check(*[A, B] * 5) == []
    for results in ([A, B] * 4, [A, B] * 5 + [A]):
        with pytest.raises(ConfigError, match="these are no pairs"):
            check(*results)
    mixed = [A, changed(B, "bundle", name="other")] * 4 + [A, B]
    with pytest.raises(ConfigError, match=r"1\.json and 9\.json should be of one bundle"):
        check(*mixed)
