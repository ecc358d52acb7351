"""Search, acceptance and backends: what is chosen, what is left out, and what is taken up again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import calib.selection
import calib.trial
from bundle.errors import BackendError, CalibrationError
from calib.acceptance import Acceptance, Streamed, judge
from calib.data import Data
from calib.frames import random_sample
from calib.sample import Sample, Stretch
from calib.search import Evaluation, Outcome
from calib.selection import Selection, usable_backends
from calib.trial import Held, Trials, stage_times
from calib.workspace import Workspace
from export.console import Reporter
from runtime.backends.base import Backend
from runtime.backends.select import open_backend
from runtime.policy import Policy
from tests.calib.conftest import Own
from tests.calib.made import Prepared
from tests.calib.quantizing import config, enough, quietly, report_of

pytestmark = pytest.mark.usefixtures("driving_by_noise")
BACKENDS = ["ort:cpu", "ort:openvino"]
# Three are enough to search in.
KEPT = ("vision.0", "vision.1", "vision.2", "projection")


@dataclass(frozen=True)
class Bench:
    """A selection without what comes before it."""

    prepared: Prepared
    workspace: Workspace
    data: Data

    def select(self, **options: Any) -> tuple[Selection, Reporter]:
        """A new run over the same workspace."""
        reporter = Reporter(1, quiet=True)
        prepared = self.prepared
        wanted = config(prepared.folder, None, allow_random=True, **options)
        run = Selection(
            wanted,
            prepared.manifest,
            self.data,
            self.workspace,
            prepared.graphs,
            prepared.integers,
            usable_backends(wanted)[0],
            reporter,
        )
        return run, reporter


@pytest.fixture
def bench(fp32: Prepared, tmp_path: Path) -> Bench:
    bundle = Path(shutil.copytree(fp32.folder, tmp_path / "policy.bundle"))
    workspace = Workspace(bundle, fp32.manifest, "a" * 64)
    for integers in fp32.integers.values():
        shutil.copyfile(fp32.folder / integers.location, workspace.folder / integers.location)
    told = fp32.manifest.prompt.instructions[0].text
    pictures = np.stack(random_sample(fp32.manifest, frames=10, seed=0))
    search, test = (Held(Stretch(Path(), 0, 10, told), name, pictures[::way]) for name, way in (("a", 1), ("b", -1)))
    return Bench(fp32, workspace, Data(Sample((), (), (), ()), fp32.seen, (search,), (test,), "0" * 64))


# --- backends -----------------------------------------------------------------------------------------------------------------

Broken = Callable[..., None]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Both backends seem to be installed; the named one fails at loading, in its first step or at judging."""

    def refuse() -> BackendError:
        return BackendError("it does not work", got="an unknown operator", hint="use another")

    def break_(moment: str, *names: str) -> None:
        names = names or ("ort:openvino",)
        bad: list[Policy] = []
        real = Trials.policy
        times, judged = stage_times, Selection._judge

        def opened(name: str, *, threads: int = 0) -> Backend:
            return open_backend("ort:cpu", threads=threads)

        def policy(self: Trials, blocks: frozenset[str]) -> Policy:
            if self.backend in names and moment == "loading":
                raise refuse()
            found = real(self, blocks)
            if self.backend in names:
                bad.append(found)
            return found

        def timed(policies: Sequence[Policy], held: Held, rounds: int) -> list[dict[str, float]]:
            if moment == "first step" and any(each is policy for each in policies for policy in bad):
                raise refuse()
            return times(policies, held, rounds)

        def judged_(self: Selection, backend: str, *rest: Any) -> Acceptance:
            if backend in names and moment == "judging":
                raise refuse()
            return judged(self, backend, *rest)

        monkeypatch.setattr(calib.selection, "open_backend", opened)
        monkeypatch.setattr(calib.trial, "open_backend", opened)
        monkeypatch.setattr(Trials, "policy", policy)
        monkeypatch.setattr(calib.selection, "stage_times", timed)
        monkeypatch.setattr(Selection, "_judge", judged_)

    return break_


def outcome(trials: Trials) -> Outcome:
    """Everything in INT8."""
    found = Evaluation(trials.backend, tuple(sorted(trials.blocks)), 0.5, 1.0)
    return Outcome(found, found, {}, (found,))


@pytest.mark.parametrize("moment", ["loading", "first step"])
def test_a_backend_that_fails_is_left_out(bench: Bench, breaks: Broken, moment: str) -> None:
    """A person who named none gets what works, and is told."""
    breaks(moment)
    run, reporter = bench.select(backend="auto")
    assert run.backends == BACKENDS
    trials = run.fastest_backend()
    assert trials.backend == "ort:cpu"
    assert run.backends == ["ort:cpu"]
    assert "warning: ort:openvino is left out: it does not work (an unknown operator)" in reporter.log
    chosen, acceptances, tries = run.accept(trials, outcome(trials), run.references())
    assert (list(acceptances), tries) == (["ort:cpu"], 1)
    assert {row.backend for row in run.measure(chosen, acceptances)} == {"ort:cpu"}


def test_a_run_that_goes_on_searches_where_it_did(
    bench: Bench, breaks: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near ties: another measurement would choose another backend, and begin another search."""
    breaks("never")
    first = 1.0

    def times(policies: Sequence[Policy], *_: object) -> list[dict[str, float]]:
        return [dict.fromkeys(("vision", "language", "action_head"), ms) for ms in (first, 1.5)][: len(policies)]

    monkeypatch.setattr(calib.selection, "stage_times", times)
    assert bench.select(backend="auto")[0].fastest_backend().backend == "ort:cpu"
    first = 2.0
    run, reporter = bench.select(backend="auto")
    assert run.fastest_backend().backend == "ort:cpu"
    assert "searching on ort:cpu, as before" in reporter.log
    assert bench.select(backend="ort:openvino")[0].fastest_backend().backend == "ort:openvino"  # another wish


@pytest.mark.parametrize("moment", ["loading", "first step"])
@pytest.mark.parametrize(("asked", "broken"), [("ort:openvino", BACKENDS[1:]), ("auto", BACKENDS)])
def test_a_backend_that_was_named_or_is_the_last_is_not_left_out(
    bench: Bench, breaks: Broken, moment: str, asked: str, broken: list[str]
) -> None:
    breaks(moment, *broken)
    run, _ = bench.select(backend=asked)
    with pytest.raises(BackendError, match="it does not work"):
        run.fastest_backend()


def test_a_backend_that_fails_at_the_test_frames_is_left_out(bench: Bench, breaks: Broken) -> None:
    breaks("judging")
    run, reporter = bench.select(backend="auto")
    trials = run._trials("ort:cpu")
    _, acceptances, tries = run.accept(trials, outcome(trials), run.references())
    assert (list(acceptances), tries) == (["ort:cpu"], 1)
    assert run.backends == ["ort:cpu"]
    assert "ort:openvino is left out" in reporter.log

    for asked in ("auto", "ort:openvino"):  # searched on it, or named
        run, _ = bench.select(backend=asked)
        trials = run._trials("ort:openvino")
        with pytest.raises(BackendError, match="it does not work"):
            run.accept(trials, outcome(trials), run.references())


# --- the search ---------------------------------------------------------------------------------------------------------------


def test_a_resumed_journal_is_on_one_scale(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is ten times slower on the next day; what is tried then is told in milliseconds of the day before."""
    slower = 1.0

    def times(policies: Sequence[Policy], *_: object) -> list[dict[str, float]]:
        return [{"vision": 3 * slower, "language": 2 * slower, "action_head": slower} for _ in policies]

    monkeypatch.setattr(calib.selection, "stage_times", times)
    run, _ = bench.select(keep_float=KEPT)
    first = run.search(run._trials("ort:cpu"), run.references())
    assert {each.latency_ms for each in first.tried} == {6.0}
    assert bench.workspace.load_times("ort:cpu") == {"vision": 3.0, "language": 2.0, "action_head": 1.0}
    assert bench.workspace.load_times("ort:openvino") is None

    journal = bench.workspace.folder / "evaluations.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))
    slower = 10.0
    run, _ = bench.select(keep_float=KEPT)
    again = run.search(run._trials("ort:cpu"), run.references())
    assert again == first
    assert len(journal.read_bytes().splitlines()) == len(lines)


def test_floating_point_does_not_win_by_a_glance(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbed machine times one assignment too fast; timed at length it is not, and the journal keeps that."""
    asked: list[int] = []

    def times(policies: Sequence[Policy], held: Held, rounds: int) -> list[dict[str, float]]:
        asked.append(rounds)
        # In turn: the base, everything in INT8, and then what is without the first block.
        factors = [0.5 if len(asked) == 3 else 1.3, 1.0] if len(policies) == 2 else [1.0]
        return [dict.fromkeys(("vision", "language", "action_head"), factor) for factor in factors]

    monkeypatch.setattr(calib.selection, "stage_times", times)
    run, reporter = bench.select(keep_float=KEPT)
    found = run.search(run._trials("ort:cpu"), run.references())
    assert found.chosen == found.all_int8
    assert asked == [9, 9, 9, 9, 9, 25]
    assert "when timed again" in reporter.log
    again = found.tried[1]
    assert again.latency_ms > found.all_int8.latency_ms
    first, *_, last = (each for each in bench.workspace.journal(Evaluation) if each.int8 == again.int8)
    assert last == again
    assert first.latency_ms < found.all_int8.latency_ms


def test_what_is_not_a_number_is_remembered_and_never_chosen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN: a journal with one would be tried again for ever."""

    def judged(streams: Sequence[Streamed], *rest: Any, **options: Any) -> Acceptance:
        return msgspec.structs.replace(judge(streams, *rest, **options), action_error=float("nan"))

    monkeypatch.setattr(calib.selection, "judge", judged)
    run, _ = bench.select(keep_float=KEPT)
    with pytest.raises(CalibrationError, match="no INT8 variant stays within the budget") as refused:
        run.search(run._trials("ort:cpu"), run.references())
    assert "--max-action-error" not in refused.value.hint  # no budget would do
    written = bench.workspace.journal(Evaluation)
    assert len(written) > len(run._trials("ort:cpu").blocks) - len(KEPT)
    assert {each.action_error for each in written} == {1e9}

    monkeypatch.setattr(Selection, "_evaluate", enough)
    with pytest.raises(CalibrationError):
        run.search(run._trials("ort:cpu"), run.references())


def test_one_that_is_not_a_number_is_passed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in INT8 is the fastest, and overflows."""
    evaluate = Selection._evaluate

    def evaluated(self: Selection, trials: Trials, chosen: frozenset[str], *rest: Any) -> Evaluation:
        with monkeypatch.context() as patch:
            if len(chosen) == len(trials.blocks) - len(KEPT):
                patch.setattr(
                    calib.selection,
                    "judge",
                    lambda *a, **k: msgspec.structs.replace(judge(*a, **k), action_error=float("inf")),
                )
            found = evaluate(self, trials, chosen, *rest)
        return msgspec.structs.replace(found, latency_ms=10.0 - len(chosen))

    monkeypatch.setattr(Selection, "_evaluate", evaluated)
    run, _ = bench.select(keep_float=KEPT)
    found = run.search(run._trials("ort:cpu"), run.references())
    assert found.all_int8.action_error == 1e9
    assert found.chosen is not None
    assert len(found.chosen.int8) == len(found.all_int8.int8) - 1


# --- acceptance ---------------------------------------------------------------------------------------------------------------


def test_the_reasons_are_those_of_the_backend_that_failed(
    bench: Bench, breaks: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the assignment that was chosen, though safer ones fail for others; the first backend passed all of them."""
    breaks("never")
    real, judged = Selection._judge, []

    def one_fails(self: Selection, backend: str, *rest: Any) -> Acceptance:
        found = real(self, backend, *rest)
        judged.append(backend)
        reasons = (f"too large {len(judged)}",) if backend == "ort:openvino" else ()
        return msgspec.structs.replace(found, verdict="FAIL" if reasons else "PASS", reasons=reasons)

    monkeypatch.setattr(Selection, "_judge", one_fails)
    run, reporter = bench.select(backend="auto")
    trials = run._trials("ort:cpu")
    whole = outcome(trials).all_int8
    safer = [Evaluation("ort:cpu", whole.int8[:n], 0.8 * 0.3 ** (6 - n), 10.0 - n) for n in range(1, 6)]
    with pytest.raises(CalibrationError, match="on test frames") as refused:
        run.accept(trials, Outcome(whole, whole, {}, (whole, *safer)), run.references())
    assert refused.value.got == "too large 2"
    assert judged == BACKENDS * 4  # the chosen one, and three chances
    assert "warning: too large 8" in reporter.log


def test_every_backend_has_to_pass(bench: Bench, breaks: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assignment that fails on the second is not the one; the next is judged on both again."""
    breaks("never")
    real = Selection._judge
    judged: list[tuple[str, frozenset[str]]] = []

    def one_fails(self: Selection, backend: str, chosen: frozenset[str], *rest: Any) -> Acceptance:
        judged.append((backend, chosen))
        verdict = "FAIL" if len(judged) == 2 else "PASS"
        return msgspec.structs.replace(real(self, backend, chosen, *rest), verdict=verdict, reasons=())

    monkeypatch.setattr(Selection, "_judge", one_fails)
    run, _ = bench.select(backend="auto")
    trials = run._trials("ort:openvino")
    whole = outcome(trials).all_int8
    safer = Evaluation("ort:openvino", whole.int8[:2], 0.1, 5.0)
    chosen, acceptances, tries = run.accept(trials, Outcome(whole, whole, {}, (whole, safer)), run.references())
    assert (chosen, tries) == (safer, 2)
    assert list(acceptances) == BACKENDS[::-1]
    assert judged == [(name, frozenset(each.int8)) for each in (whole, safer) for name in BACKENDS[::-1]]


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_it_is_told_how_many_were_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """Each try is another chance to pass by luck."""
    real, judged = Selection._judge, []

    def some_fail(self: Selection, *rest: Any) -> Acceptance:
        judged.append(rest)
        verdict = "FAIL" if len(judged) <= fails else "PASS"
        return msgspec.structs.replace(real(self, *rest), verdict=verdict, reasons=())

    monkeypatch.setattr(Selection, "_judge", some_fail)
    run, _ = bench.select()
    trials = run._trials("ort:cpu")
    whole = outcome(trials).all_int8
    safer = [Evaluation("ort:cpu", whole.int8[:n], 0.8 * 0.3 ** (4 - n), 10.0 - n) for n in range(1, 4)]
    chosen, _, tries = run.accept(trials, Outcome(whole, whole, {}, (whole, *safer)), run.references())
    assert tries == fails + 1 == len(judged)
    assert chosen == (whole, *safer[::-1])[fails]


@pytest.mark.parametrize("int8_ms", [0.5, 1.0, 2.0])
def test_int8_that_is_not_faster_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch, int8_ms: float) -> None:
    def times(policies: Sequence[Policy], held: Held, rounds: int) -> list[dict[str, float]]:
        return [{"vision": int8_ms if each.manifest.precision == "int8" else 1.0} for each in policies]

    monkeypatch.setattr(calib.selection, "stage_times", times)
    run, reporter = bench.select()
    whole = Evaluation("ort:cpu", run._trials("ort:cpu").blocks, 0.1, 1.0)
    rows = run.measure(whole, dict.fromkeys(["ort:cpu"]))  # type: ignore[arg-type]
    assert next(row.precision for row in rows if row.step_ms == int8_ms) == "int8"
    assert ("INT8 is not faster than floating point on this machine" in reporter.log) == (int8_ms > 1)


# --- from end to end ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def the_more_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in INT8 saves a millisecond and costs an error, whatever the clock says and noise does."""
    evaluate = Selection._evaluate

    def evaluated(*args: Any) -> Evaluation:
        found = evaluate(*args)
        return msgspec.structs.replace(found, latency_ms=10.0 - len(found.int8), action_error=0.1 * len(found.int8))

    monkeypatch.setattr(Selection, "_evaluate", evaluated)


@pytest.mark.usefixtures("the_more_the_faster")
def test_a_failed_test_lets_a_safer_assignment_try(own: Own, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen fails on the frames that judge; the next safer one is judged, and published."""
    bundle = own()
    judged: list[frozenset[str]] = []
    real = Selection._judge

    def strict(self: Any, backend: str, chosen: frozenset[str], references: Any) -> Acceptance:
        found = real(self, backend, chosen, references)
        judged.append(chosen)
        if len(judged) == 1:
            return msgspec.structs.replace(found, verdict="FAIL", reasons=("too large",))
        return found

    monkeypatch.setattr(Selection, "_judge", strict)
    quietly(config(bundle, recorded))
    report = report_of(bundle)
    assert report.tries == 2
    by_int8 = {frozenset(each.int8): each for each in report.tried}
    assert len(judged) == 2
    assert frozenset(report.chosen.int8) == judged[1] != judged[0]
    assert by_int8[judged[1]].action_error < by_int8[judged[0]].action_error
    assert report.acceptances["ort:cpu"].verdict == "PASS"
