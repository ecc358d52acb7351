"""bench/comparison.py: the test is calibrated by simulation, as real machines behave: memory, bursts, drift from run to run."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest

from bench import comparison
from bench.comparison import Ratio, compare, judge
from bench.results import Result, Timing
from tests.bench.results_made import made_result, made_sections

THRESHOLD = 0.03
TOTAL = made_result(steps=20, layers={})


def run(seed: int, *, speed: float = 1.0, rho: float = 0.6, count: int = 300) -> Result:
    """A result with a total only: the quick part of what is compared."""
    sections = {"total": made_sections(count, seed, speed=speed, rho=rho)["total"]}
    return msgspec.structs.replace(TOTAL, sections=sections)


def outcomes(*, slower: float, drift: float, rho: float, pairs: int = 20) -> Counter[str]:
    """Verdicts over simulated pairs; `drift` is the standard deviation of the log speed of a run."""
    moods = np.exp(np.random.default_rng(5).normal(0, drift, (pairs, 2)))
    found: Counter[str] = Counter()
    for index, (a, b) in enumerate(moods):
        pair = (run(2 * index, speed=a, rho=rho), run(2 * index + 1, speed=b * slower, rho=rho))
        found[compare([pair], THRESHOLD).outcome] += 1
    return found


@pytest.mark.parametrize("rho", [0.6, 0.9])
@pytest.mark.parametrize("drift", [0.0, 0.015])
def test_the_same_twice_is_no_difference(rho: float, drift: float) -> None:
    found = outcomes(slower=1.0, drift=drift, rho=rho)
    assert found["same"] + found["unclear"] >= 19, found
    assert found["slower"] == 0, found


@pytest.mark.parametrize("rho", [0.6, 0.9])
@pytest.mark.parametrize("drift", [0.0, 0.015])
def test_a_planted_slowdown_is_found(rho: float, drift: float) -> None:
    assert outcomes(slower=1.1, drift=drift, rho=rho)["slower"] >= 19


def test_a_planted_gain_is_found() -> None:
    assert outcomes(slower=0.9, drift=0.0, rho=0.6)["faster"] >= 19


def test_a_slowdown_below_the_threshold_is_none() -> None:
    found = outcomes(slower=1.02, drift=0.0, rho=0.6)
    assert found["slower"] + found["faster"] == 0, found


def test_without_the_allowance_drift_is_taken_for_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    drifting = outcomes(slower=1.0, drift=0.02, rho=0.6, pairs=60)
    monkeypatch.setattr(comparison, "_ALLOWANCE", 0.0)
    believing = outcomes(slower=1.0, drift=0.02, rho=0.6, pairs=60)
    wrong, more = drifting["slower"] + drifting["faster"], believing["slower"] + believing["faster"]
    assert wrong <= 3, drifting
    assert more >= 6, believing


def test_a_run_on_a_busy_machine_convicts_nobody() -> None:
    """Steps that jump between one and three time slices, and a median that jumps with them: real runs on two busy cores did so."""
    rng = np.random.default_rng(0)
    calm, busy = (
        rng.choice([8.0, 12.0, 16.0, 24.0], 300, p=share) * rng.normal(1, 0.02, 300)
        for share in ([0.2, 0.3, 0.4, 0.1], [0.1, 0.2, 0.4, 0.3])
    )
    a, b = (msgspec.structs.replace(TOTAL, sections={"total": Timing.of(each.tolist())}) for each in (calm, busy))
    assert compare([(a, b)], THRESHOLD).outcome == "unclear"


def test_pairs_see_through_drift_that_both_share() -> None:
    moods = np.exp(np.random.default_rng(1).normal(0, 0.3, 7))
    same = [(run(2 * i, speed=mood), run(2 * i + 1, speed=mood)) for i, mood in enumerate(moods)]
    slower = [(run(2 * i, speed=mood), run(2 * i + 1, speed=1.1 * mood)) for i, mood in enumerate(moods)]
    assert compare(same, THRESHOLD).outcome == "same"
    found = compare(slower, THRESHOLD)
    assert found.outcome == "slower"
    assert found.pairs == 7
    assert found.rows[0].p50 is not None
    assert 1.08 < found.rows[0].p50.value < 1.12


def test_rows_are_total_first_and_only_what_both_have() -> None:
    a, b = made_result(steps=120), made_result(seed=1, steps=120)
    layers = {name: timing for name, timing in b.layers.items() if name != "engine"}
    found = compare([(a, msgspec.structs.replace(b, layers=layers))], THRESHOLD)
    assert [(row.kind, row.name) for row in found.rows] == [
        *(("section", name) for name in ("total", "preprocess", "vision", "language", "action_head", "glue")),
        *(("layer", name) for name in ("io", "step", "loop")),
    ]
    total = found.rows[0]
    assert (total.a_ms, total.b_ms) == (a.sections["total"].p50, b.sections["total"].p50)
    assert found.outcome == total.outcome


def test_a_slower_stage_shows_in_its_row_alone() -> None:
    a, b = made_result(steps=200), made_result(seed=1, steps=200)
    vision = Timing.of([1.2 * sample for sample in b.sections["vision"].samples])
    found = compare([(a, msgspec.structs.replace(b, sections={**b.sections, "vision": vision}))], THRESHOLD)
    assert [row.name for row in found.rows if row.outcome == "slower"] == ["vision"]
    assert found.outcome != "slower"


def test_few_samples_have_no_tail_and_very_few_nothing() -> None:
    row = compare([(run(0, count=99), run(1, count=300))], THRESHOLD).rows[0]
    assert row.p95 is None
    assert row.p50 is not None
    found = compare([(run(0, count=19), run(1, count=300))], THRESHOLD)
    assert (found.rows[0].p50, found.outcome) == (None, "unclear")
    assert "fewer than 20" in found.line


@pytest.mark.parametrize("bad", [0.0, -0.01])
def test_times_that_are_not_positive_have_no_ratio(bad: float) -> None:
    a = run(0)
    b = msgspec.structs.replace(a, sections={"total": Timing.of([*a.sections["total"].samples[1:], bad])})
    assert compare([(a, b)], THRESHOLD).rows[0].p50 is None
    assert compare([(a, b)] * 5, THRESHOLD).rows[0].p50 is not None  # only its median counts there
    c = msgspec.structs.replace(a, sections={"total": Timing.of([bad] * 300)})
    assert compare([(a, c)] * 5, THRESHOLD).rows[0].p50 is None


@pytest.mark.parametrize(
    ("ratio", "outcome"),
    [
        (Ratio(1.10, 1.05, 1.15), "slower"),
        (Ratio(1.10, 1.02, 1.18), "unclear"),
        (Ratio(0.90, 0.85, 0.95), "faster"),
        (Ratio(0.90, 0.85, 0.98), "unclear"),
        (Ratio(1.01, 0.99, 1.03), "same"),
        (Ratio(1.00, 0.90, 1.02), "unclear"),
        (None, "unclear"),
    ],
)
def test_judge(ratio: Ratio | None, outcome: str) -> None:
    assert judge(ratio, THRESHOLD) == outcome


def test_b_against_a_is_the_inverse_of_a_against_b() -> None:
    a, b = run(0), run(1, speed=1.1)
    there, back = (compare([pair], THRESHOLD).rows[0].p50 for pair in ((a, b), (b, a)))
    assert there is not None
    assert back is not None
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high, rel=0.01)
