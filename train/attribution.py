"""Whether what lies between runs may be put down to the factor that differs - and if not, why not.

An effect is attributed only if exactly one factor differs, every run is finished, the checkpoints behind the numbers lie there with the
bytes that were recorded, and the numbers mean the same: same validation episodes, same definition of the metric. Runs that differ in
nothing but the seed form an arm; two arms are told apart only if the ranges over their seeds do not overlap. Each run is judged at the
epoch with the lowest validation loss, whatever the metric: that is the checkpoint one would drive with, and no other epoch is picked to
flatter a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from bundle.errors import ConfigError
from train.comparison import (
    MEANINGS,
    RESOLVED,
    SEED,
    TRAIN_FILES,
    VAL_FILES,
    Difference,
    Run,
    factors_of,
    find_differences,
    settings_of,
)
from train.ledger_record import CheckpointRecord, EpochRecord, RunRecord

SELECTION = "val_loss"
_KINDS = ("best", "last", "lightning")  # the file that stands for an epoch: the first of these


@dataclass(frozen=True)
class Score:
    """A run at its best epoch; None where there is none.

    Attributes:
        status: as RunRecord.effective_status gives it.
        value: of the metric; finite.
        file: the checkpoint of that epoch.
        fault: what is wrong with the checkpoint; None if it exists and has its recorded bytes.
    """

    label: str
    seed: object
    status: str
    value: float | None
    epoch: int | None
    step: int | None
    file: str | None
    fault: str | None


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed, and their values where they have one."""

    label: str
    runs: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


RefusalCode = Literal[
    "not_finished",
    "no_metric",
    "checkpoint",
    "validation_set",
    "metric",
    "same_settings",
    "several_factors",
    "same_seed",
]


@dataclass(frozen=True)
class Refusal:
    """Why no effect is attributed."""

    code: RefusalCode
    text: str


@dataclass(frozen=True)
class Pair:
    """What can be said about two arms. `one_run`: an arm has no range, so it is an observation and no effect."""

    outcome: Literal["effect", "not_distinguishable", "one_run"]
    text: str


@dataclass(frozen=True)
class Comparison:
    """Everything that is found. With refusals there are no pairs."""

    metric: str
    differences: tuple[Difference, ...]
    factors: tuple[str, ...]
    scores: tuple[Score, ...]
    arms: tuple[Arm, ...]
    refusals: tuple[Refusal, ...]
    pairs: tuple[Pair, ...]


def compare(runs: Sequence[Run], metric: str = SELECTION) -> Comparison:
    """Judge runs by a metric at their best epochs.

    Raises:
        ConfigError: no run has the metric, or it has no better end.
    """
    lower = _lower_is_better(metric, runs)
    differences = find_differences(runs)
    factors = factors_of(differences)
    scores = tuple(_score(run, metric) for run in runs)
    changed = [difference for difference in differences if difference.factor in factors]
    groups = _groups(runs, [difference.key for difference in changed])
    arms = tuple(_arm(members, scores, changed) for members in groups)
    refusals = (
        *_refuse_runs(runs, scores, metric),
        *_refuse_metric(runs, differences, metric),
        *_refuse_factors(differences, factors),
        *_refuse_seeds(groups, scores, factors),
    )
    pairs: list[Pair] = []
    if not refusals:
        for index, first in enumerate(arms):
            pairs += [_pair(first, second, metric, lower=lower) for second in arms[index + 1 :]]
    return Comparison(metric, differences, factors, scores, arms, refusals, tuple(pairs))


def best_epoch(record: RunRecord) -> EpochRecord | None:
    """The epoch with the lowest finite validation loss, the earliest of equals."""
    losses = [(entry.value(SELECTION), entry) for entry in record.epochs]
    finite = [(loss, entry) for loss, entry in losses if loss is not None and math.isfinite(loss)]
    return min(finite, key=lambda pair: (pair[0], pair[1].epoch))[1] if finite else None


def _lower_is_better(metric: str, runs: Sequence[Run]) -> bool:
    known = sorted({name for run in runs for entry in run.record.epochs for name in entry.metrics})
    end = _end(metric)
    if end is None or (known and metric not in known):
        raise ConfigError(
            f"runs cannot be judged by {metric!r}",
            got="neither more nor less of it is better" if metric in known else "no run measured it",
            expected=", ".join(name for name in known if _end(name) is not None) or SELECTION,
            hint="choose one of these with --metric.",
        )
    return end == "low"


def _end(metric: str) -> Literal["low", "high"] | None:
    """Which end of a metric is better. That of always naming the commonest direction is a fact of the data."""
    if "loss" in metric or "rmse" in metric:
        return "low"
    return "high" if metric.endswith("accuracy") and "majority" not in metric else None


def _score(run: Run, metric: str) -> Score:
    record = run.record
    best = best_epoch(record)
    value = None if best is None else best.value(metric)
    behind = None if best is None else _behind(record, best)
    return Score(
        label=run.label,
        seed=settings_of(record).get("loop.seed"),
        status=record.effective_status(),
        value=value if value is not None and math.isfinite(value) else None,
        epoch=None if best is None else best.epoch,
        step=None if best is None else best.step,
        file=None if behind is None else behind.file,
        fault=_fault(run, best, behind),
    )


def _behind(record: RunRecord, best: EpochRecord) -> CheckpointRecord | None:
    found = [entry for entry in record.checkpoints if (entry.epoch, entry.step) == (best.epoch, best.step)]
    return min(found, key=lambda entry: (entry.removed, _KINDS.index(entry.kind)), default=None)


def _fault(run: Run, best: EpochRecord | None, behind: CheckpointRecord | None) -> str | None:
    if not run.record.checkpoints:
        return "the run never wrote one"
    if best is not None and best.step == 0:
        return "no epoch was better than the untrained policy"
    if behind is None or best is None:
        return "the run wrote none at its best epoch"
    if behind.removed:
        return f"the run removed {behind.file}"
    recorded = None if behind.val_loss is None else float(behind.val_loss)
    if recorded != best.value(SELECTION):
        return f"{behind.file} was written with {SELECTION} {recorded}, its epoch says {best.value(SELECTION)}"
    return next((str(problem) for problem in run.problems if problem.file == behind.file), None)


def _groups(runs: Sequence[Run], keys: Sequence[str]) -> list[list[int]]:
    """Indices of runs that agree in these settings."""
    groups: list[tuple[list[Any], list[int]]] = []
    for index, run in enumerate(runs):
        settings = settings_of(run.record)
        values = [settings.get(key) for key in keys]
        members = next((members for known, members in groups if known == values), None)
        if members is None:
            groups.append((values, [index]))
        else:
            members.append(index)
    return [members for _, members in groups]


def _arm(members: Sequence[int], scores: Sequence[Score], changed: Sequence[Difference]) -> Arm:
    label = ", ".join(f"{difference.key} = {difference.values[members[0]]}" for difference in changed)
    values = (scores[index].value for index in members)
    return Arm(
        label or "all runs",
        tuple(scores[index].label for index in members),
        tuple(value for value in values if value is not None),
    )


def _refuse_runs(runs: Sequence[Run], scores: Sequence[Score], metric: str) -> list[Refusal]:
    found = []
    for run, score in zip(runs, scores, strict=True):
        if score.status != "finished":
            found.append(Refusal("not_finished", f"{score.label} is not finished: it {_fate(run.record)}."))
        if score.epoch is None:
            found.append(Refusal("no_metric", f"{score.label} has no epoch with a finite {SELECTION}."))
        elif score.value is None:
            found.append(Refusal("no_metric", f"{score.label} has no finite {metric} at its best epoch."))
        if score.fault is not None:
            found.append(Refusal("checkpoint", f"{score.label} has no checkpoint behind its number: {score.fault}."))
    return found


def _fate(record: RunRecord) -> str:
    process = f"process {record.process.pid} on {record.process.host}"
    error = "" if record.error is None else f" ({record.error.type}: {record.error.message.partition(chr(10))[0]})"
    return {
        "running": f"is running ({process})",
        "died": f"died without a word ({process} is gone)",
        "stopped": f"was stopped ({record.stop_reason})",
        "failed": f"failed{error}",
    }[record.effective_status()]


def _refuse_metric(runs: Sequence[Run], differences: Sequence[Difference], metric: str) -> list[Refusal]:
    changed = [difference.key for difference in differences]
    found = []
    if VAL_FILES in changed:
        found.append(
            Refusal("validation_set", f"The validation sets differ: {metric} of one run says nothing beside another's.")
        )
    for pattern, metrics, reason in MEANINGS:
        keys = [key for key in changed if fnmatchcase(key, pattern)] if fnmatchcase(metric, metrics) else []
        if keys:
            found.append(
                Refusal("metric", f"{metric} is another quantity in each run: {', '.join(keys)} differs, and {reason}.")
            )
    settings = [settings_of(run.record) for run in runs]
    for key, word, metrics, head in RESOLVED:
        used = any(one.get(key) == word and head in (None, one.get("model.head")) for one in settings)
        if used and TRAIN_FILES in changed and key not in changed and fnmatchcase(metric, metrics):
            text = f"{metric} may be another quantity in each run: {key} = {word} depends on the training files, which differ."
            found.append(Refusal("metric", text))
    return found


def _refuse_factors(differences: Sequence[Difference], factors: Sequence[str]) -> list[Refusal]:
    if len(factors) == 1:
        return []
    if factors:
        names = f"{', '.join(factors[:-1])} and {factors[-1]}"
        text = f"{len(factors)} factors differ ({names}): the effect of one cannot be told from that of another."
        return [Refusal("several_factors", text)]
    seeds = any(difference.factor == SEED for difference in differences)
    what = "Same settings, other seeds" if seeds else "Same settings, same seed"
    return [Refusal("same_settings", f"{what}: what lies between these runs is noise.")]


def _refuse_seeds(groups: Sequence[list[int]], scores: Sequence[Score], factors: Sequence[str]) -> list[Refusal]:
    if not factors:
        return []  # said already
    found = []
    for members in groups:
        for seed, count in Counter(repr(scores[index].seed) for index in members).items():
            if count > 1:
                same = " and ".join(scores[index].label for index in members if repr(scores[index].seed) == seed)
                text = f"{same} have the same settings and the same seed: that is one sample; leave out all but one."
                found.append(Refusal("same_seed", text))
    return found


def _pair(first: Arm, second: Arm, metric: str, *, lower: bool) -> Pair:
    low, high = sorted((first, second), key=lambda arm: arm.mean)
    better, worse = (low, high) if lower else (high, low)
    counts = len(better.values), len(worse.values)
    values = (
        f"{metric} {better.mean:.5g} with {better.label} (n={counts[0]}), "
        f"{worse.mean:.5g} with {worse.label} (n={counts[1]})"
    )
    single = "one run each" if counts == (1, 1) else "an arm of one run"
    if low.high >= high.low:
        unknown = f" With {single}, the effect of the seed is unknown." if min(counts) == 1 else ""
        return Pair("not_distinguishable", f"Not distinguishable with these seeds: {values}; ranges overlap.{unknown}")
    if min(counts) == 1:
        return Pair(
            "one_run", f"{values}. {single.capitalize()}: the effect of the seed is unknown, so this shows no effect."
        )
    # Of all ways to deal the values to two arms of these sizes, two put the smallest into one arm.
    chance = math.comb(sum(counts), counts[0]) / 2
    text = f"{better.label} is better: {values}; the ranges over seeds do not overlap."
    return Pair("effect", f"{text} If it made no difference, that would happen once in {chance:g} comparisons.")
