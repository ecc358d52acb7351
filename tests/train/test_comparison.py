"""What counts as a difference, and when an effect may be attributed to it - above all, when not."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import ConfigError, TrainingError
from tests.ledgers import DATA, MACHINE, digest, episode, make_run
from train import ledger
from train.attribution import Comparison, best_epoch, compare
from train.comparison import RULES, find_differences, load_runs, rule_of
from train.curves import sparkline
from train.git_state import CodeFacts
from train.ledger import BaseFacts, read_run
from train.ledger_record import ResumeRecord
from train.run_config import RunConfig
from train.run_process import this_process


@pytest.fixture(autouse=True)
def _same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources may be edited while tests run."""
    code = CodeFacts(
        sources_sha256=digest("sources"),
        commit=None,
        dirty=None,
        diff_sha256=None,
        versions={"numpy": "2.0", "torch": "2.9"},
    )
    monkeypatch.setattr(ledger, "code_facts", lambda: code)


def judge(*folders: Path, metric: str = "val_loss") -> Comparison:
    return compare(load_runs(folders), metric)


def codes(comparison: Comparison) -> list[str]:
    return [refusal.code for refusal in comparison.refusals]


def texts(comparison: Comparison) -> str:
    return "\n".join(refusal.text for refusal in comparison.refusals)


def rewrite(folder: Path, **changes: Any) -> Path:
    record = msgspec.structs.replace(read_run(folder), **changes)
    (folder / "run.json").write_bytes(record.encode())
    return folder


def arm(tmp_path: Path, name: str, bests: list[float], changes: dict[str, Any], *, first_seed: int = 0) -> list[Path]:
    """Runs with these best losses that differ in the seed only."""
    return [
        make_run(
            tmp_path / f"{name}{index}", losses=(0.9, best, 0.95), changes=changes | {"loop.seed": first_seed + index}
        )
        for index, best in enumerate(bests)
    ]


RANK = {"model.lora.r": 64}


# --- what differs -------------------------------------------------------------------------------------------------------------


def test_one_setting_is_one_factor(tmp_path: Path) -> None:
    comparison = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=RANK))

    assert comparison.factors == ("model.lora.r",)
    assert [(d.key, d.values) for d in comparison.differences if d.factor] == [("model.lora.r", ("32", "64"))]
    assert comparison.refusals == ()


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"output.runs": "x", "loop.workers": 4}, ()),
        ({"base.model": "elsewhere"}, ()),
        ({"data.split_seed": 3, "data.val_share": 0.3}, ()),
        ({"loop.seed": 5}, ()),
        ({"loop.batch_size": 2, "loop.accumulate": 4}, ("batch",)),
        ({"augment.brightness": 0.2, "augment.hue": 0.1}, ("colour augmentation",)),
        ({"augment.brightness": 0.2, "augment.mirror": 0.5}, ("augment.mirror", "colour augmentation")),
        ({"model.lora.r": 8, "model.lora.alpha": 8.0}, ("model.lora.alpha", "model.lora.r")),
        ({"loop.max_steps": 3}, ("length",)),
        ({"a_new_setting": 1}, ("a_new_setting",)),
        ({"a_new_setting": None}, ()),
    ],
)
def test_settings_are_grouped_into_factors(tmp_path: Path, changes: dict[str, Any], factors: tuple[str, ...]) -> None:
    comparison = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=changes))

    assert comparison.factors == factors


def test_instructions_of_a_source_are_training_data(tmp_path: Path) -> None:
    source = {"files": ("other/*.h5",), "kind": "real", "schema": None, "instruction": "go left"}
    comparison = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes={"data.sources": (source,)}))

    assert comparison.factors == ("training data",)
    assert {d.key: d.factor for d in comparison.differences if d.key.startswith("data")} == {
        "data.sources[0].files": None,
        "data.sources[0].instruction": "training data",
    }


def test_data_are_compared_by_name_and_content(tmp_path: Path) -> None:
    moved = tuple(msgspec.structs.replace(file, path="elsewhere/" + Path(file.path).name) for file in reversed(DATA))
    more = (*DATA, *(episode(f"right_{index}") for index in range(3)))
    changed = (episode("left_0", content="x"), *DATA[1:])
    first = make_run(tmp_path / "a")

    assert judge(first, make_run(tmp_path / "moved", data=moved)).factors == ()
    found = judge(first, make_run(tmp_path / "more", data=more))
    assert found.factors == ("training data",)
    assert found.refusals == ()
    assert found.differences[0].values == (
        "4 files, 72 frames (0 not in all runs)",
        "7 files, 126 frames (3 not in all runs)",
    )
    assert judge(first, make_run(tmp_path / "changed", data=changed)).factors == ("training data",)


def test_base_is_compared_by_hash(tmp_path: Path) -> None:
    other = BaseFacts(path="base", sha256=digest("another"))
    moved = BaseFacts(path="elsewhere", sha256=digest("base"))
    first = make_run(tmp_path / "a")

    assert judge(first, make_run(tmp_path / "b", base=other)).factors == ("base",)
    assert judge(first, make_run(tmp_path / "c", base=moved)).factors == ()


def with_code(folder: Path, **changes: Any) -> Path:
    return rewrite(folder, code=msgspec.structs.replace(read_run(folder).code, **changes))


def test_code_is_sources_and_versions_not_the_commit(tmp_path: Path) -> None:
    first = with_code(make_run(tmp_path / "a"), commit="1" * 40)
    versions = read_run(first).code.versions

    assert judge(first, with_code(make_run(tmp_path / "commit"), commit="2" * 40)).factors == ()
    other = judge(first, with_code(make_run(tmp_path / "sources"), sources_sha256=digest("x"), commit="2" * 40))
    assert other.factors == ("code",)
    assert "commit 222222222" in other.differences[0].values[1]
    newer = judge(first, with_code(make_run(tmp_path / "torch"), versions=versions | {"torch": "99"}))
    assert newer.factors == ("code",)
    assert "torch 99" in newer.differences[0].values[1]
    assert "numpy" not in newer.differences[0].values[1]


def test_code_that_changed_in_a_later_sitting_counts(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b")
    record = read_run(second)
    code = msgspec.structs.replace(record.code, sources_sha256=digest("x"))
    rewrite(second, resumes=(ResumeRecord(time=record.started, from_step=20, code=code),))

    found = judge(make_run(tmp_path / "a"), second)

    assert found.factors == ("code",)
    assert " then " in found.differences[0].values[1]


def test_another_machine_is_shown_and_no_factor(tmp_path: Path) -> None:
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", machine=MACHINE | {"gpus": ["H200"]}))

    assert found.factors == ()
    assert "machine" in [d.key for d in found.differences]


def test_every_rule_names_a_setting_that_exists() -> None:
    keys = set(_keys(RunConfig, ""))
    for rule in RULES:
        pattern = rule.pattern.replace("data.sources*", "data.sources[0]")
        section = pattern.removesuffix(".*").removesuffix("[0]")
        assert any(key == pattern or key.startswith((pattern, section)) for key in keys), rule.pattern
        assert rule.reason


def _keys(kind: Any, path: str) -> list[str]:
    found = []
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += _keys(field.type, f"{path}{field.name}.")
        elif field.name == "sources":
            found += [f"{path}sources[0].{name}" for name in ("files", "kind", "schema", "instruction")]
        else:
            found.append(path + field.name)
    return found


def test_a_setting_that_no_rule_knows_is_a_factor() -> None:
    assert rule_of("optimizer.learning_rate").factor == "optimizer.learning_rate"
    assert rule_of("names").factor == "names"


# --- refusals -----------------------------------------------------------------------------------------------------------------


def test_two_factors(tmp_path: Path) -> None:
    found = judge(
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", changes={"model.lora.r": 64, "optimizer.learning_rate": 1e-3}),
    )

    assert codes(found) == ["several_factors"]
    assert "2 factors differ (model.lora.r and optimizer.learning_rate)" in texts(found)
    assert found.pairs == ()


def test_a_square_of_two_factors(tmp_path: Path) -> None:
    """Each pair differs in one or two: together they differ in two."""
    runs = [
        make_run(tmp_path / f"{rank}-{rate}", changes={"model.lora.r": rank, "optimizer.learning_rate": rate})
        for rank in (8, 16)
        for rate in (1e-3, 1e-4)
    ]
    assert codes(judge(*runs)) == ["several_factors"]


def test_nothing_differs(tmp_path: Path) -> None:
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", losses=(0.5, 0.01)))

    assert codes(found) == ["same_settings"]
    assert "Same settings, same seed" in texts(found)


def test_only_the_seed_differs(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1, 0.2, 0.3], {}))

    assert codes(found) == ["same_settings"]
    assert "other seeds: what lies between these runs is noise" in texts(found)
    (only,) = found.arms
    assert (only.mean, only.low, only.high) == (pytest.approx(0.2), 0.1, 0.3)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (None, "is running"),
        (lambda ledger: ledger.stop("SIGTERM"), r"was stopped (SIGTERM)"),
        (
            lambda ledger: ledger.fail(TrainingError("no base", hint="x")),
            "failed (bundle.errors.TrainingError: no base)",
        ),
    ],
)
def test_a_run_that_is_not_finished(tmp_path: Path, end: Any, words: str) -> None:
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=RANK, end=end))

    assert codes(found) == ["not_finished"]
    assert words in texts(found)


def test_a_run_that_died(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b", changes=RANK, end=None)
    own = this_process()
    rewrite(second, process=msgspec.structs.replace(own, start_ticks=(own.start_ticks or 1) - 1))

    found = judge(make_run(tmp_path / "a"), second)

    assert codes(found) == ["not_finished"]
    assert "died" in texts(found)
    assert found.scores[1].status == "died"


def test_a_run_that_never_wrote_a_checkpoint(tmp_path: Path) -> None:
    second = rewrite(make_run(tmp_path / "b", changes=RANK), checkpoints=())
    found = judge(make_run(tmp_path / "a"), second)

    assert codes(found) == ["checkpoint"]
    assert "b has no checkpoint behind its number: the run never wrote one" in texts(found)


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ("weights after step 31", "has other bytes")])
def test_a_checkpoint_that_was_deleted_or_changed(tmp_path: Path, content: str | None, words: str) -> None:
    second = make_run(tmp_path / "b", changes=RANK)
    path = second / "checkpoints" / "epoch=003-step=0000030.safetensors"
    assert path.exists()
    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    found = judge(make_run(tmp_path / "a"), second)

    assert codes(found) == ["checkpoint"]
    assert words in texts(found)


def test_another_checkpoint_that_is_gone_is_beside_the_point(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b", changes=RANK)
    (second / "checkpoints" / "last.safetensors").unlink()

    runs = load_runs([make_run(tmp_path / "a"), second])

    assert compare(runs).refusals == ()
    assert [problem.file for problem in runs[1].problems] == ["checkpoints/last.safetensors"]


def test_a_checkpoint_of_the_best_epoch_that_the_run_removed(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b", losses=(0.5, 0.1, 0.2), changes=RANK)
    entries = tuple(
        msgspec.structs.replace(entry, removed=entry.kind == "best") for entry in read_run(second).checkpoints
    )
    found = judge(make_run(tmp_path / "a"), rewrite(second, checkpoints=entries))

    assert codes(found) == ["checkpoint"]
    assert "the run removed checkpoints/epoch=002" in texts(found)


def test_a_run_that_training_made_only_worse(tmp_path: Path) -> None:
    found = judge(make_run(tmp_path / "a", untrained=0.9), make_run(tmp_path / "b", changes=RANK, untrained=0.05))

    assert codes(found) == ["checkpoint"]
    assert "b has no checkpoint behind its number: no epoch was better than the untrained policy" in texts(found)


def test_a_checkpoint_of_another_loss_than_its_epoch(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b", losses=(0.5, 0.1), changes=RANK)
    entries = tuple(msgspec.structs.replace(entry, val_loss=0.3) for entry in read_run(second).checkpoints)
    found = judge(make_run(tmp_path / "a"), rewrite(second, checkpoints=entries))

    assert codes(found) == ["checkpoint"]
    assert "was written with val_loss 0.3, its epoch says 0.1" in texts(found)


def test_other_validation_episodes(tmp_path: Path) -> None:
    data = (*DATA[1:-1], episode("left_4"), episode("left_0", "val"))
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", data=data))

    assert codes(found) == ["validation_set"]


def test_a_validation_episode_of_the_same_name_with_other_bytes(tmp_path: Path) -> None:
    data = (*DATA[:-1], episode("left_4", "val", content="recorded again"))
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=RANK, data=data))

    assert codes(found) == ["validation_set"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.huber_delta": 0.1},
        {"data.action_range": (-1.0, 1.0)},
        {"data.chunk": 5},
        {"data.window": 4},
        {"model.head": "classes"},
    ],
)
def test_a_loss_that_means_something_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=changes)

    assert codes(judge(*runs)) == ["metric"]
    assert codes(judge(*runs, metric="val_rmse_linear_x")) == []


def test_a_loss_in_units_of_the_training_set(tmp_path: Path) -> None:
    changes = {"data.action_range": "auto"}
    runs = [
        make_run(tmp_path / "a", changes=changes),
        make_run(tmp_path / "b", changes=changes, data=(*DATA, episode("right"))),
    ]
    assert codes(judge(*runs)) == ["metric"]
    assert "data.action_range = auto depends on the training files" in texts(judge(*runs))
    assert codes(judge(*runs, metric="val_rmse_linear_x")) == []


def test_training_loss_is_of_augmented_views_and_training_files(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    mirrored = make_run(tmp_path / "b", changes={"augment.mirror": 0.5})
    more = make_run(tmp_path / "c", data=(*DATA, episode("right")))

    assert codes(judge(first, mirrored, metric="train_loss")) == ["metric"]
    assert codes(judge(first, more, metric="train_loss")) == ["metric"]
    assert codes(judge(first, mirrored)) == codes(judge(first, more)) == []


@pytest.mark.parametrize("losses", [(math.nan, math.nan), ()])
def test_a_run_without_a_finite_loss(tmp_path: Path, losses: tuple[float, ...]) -> None:
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", losses=losses, changes=RANK))

    assert "no_metric" in codes(found)
    assert found.scores[1].value is None


def test_a_metric_that_one_run_did_not_measure(tmp_path: Path) -> None:
    second = make_run(tmp_path / "b", changes=RANK, extra=lambda epoch, loss: {})
    found = judge(make_run(tmp_path / "a"), second, metric="val_rmse_linear_x")

    assert codes(found) == ["no_metric"]


@pytest.mark.parametrize(
    ("metric", "words"), [("val_los", "no run measured it"), ("feature_drift", "neither more nor less of it is better")]
)
def test_a_metric_that_cannot_judge(tmp_path: Path, metric: str, words: str) -> None:
    def extra(epoch: int, loss: float) -> dict[str, float]:
        return {"feature_drift": 0.1}

    runs = make_run(tmp_path / "a", extra=extra), make_run(tmp_path / "b", changes=RANK, extra=extra)
    with pytest.raises(ConfigError, match=f"{words}(.|\n)*train_loss, val_loss"):
        judge(*runs, metric=metric)


def test_one_sample_counted_twice(tmp_path: Path) -> None:
    runs = [*arm(tmp_path, "a", [0.1, 0.11], {}), *arm(tmp_path, "b", [0.2, 0.21], RANK)]
    copied = rewrite(make_run(tmp_path / "c", losses=(0.9, 0.1, 0.95), changes={"loop.seed": 0}))

    found = judge(*runs, copied)

    assert codes(found) == ["same_seed"]
    assert "a0 and c have the same settings and the same seed" in texts(found)


def test_all_reasons_are_given_at_once(tmp_path: Path) -> None:
    data = (*DATA[1:-1], episode("left_4"), episode("left_0", "val"))
    changes = {"data.window": 4, "model.lora.r": 64}
    found = judge(make_run(tmp_path / "a"), make_run(tmp_path / "b", changes=changes, data=data, end=None))

    assert codes(found) == ["not_finished", "validation_set", "metric", "several_factors"]


# --- what may be said -----------------------------------------------------------------------------------------------------------


def test_one_run_each_shows_no_effect(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.2], {}), *arm(tmp_path, "b", [0.1], RANK))

    (pair,) = found.pairs
    assert pair.outcome == "one_run"
    assert "val_loss 0.1 with model.lora.r = 64 (n=1), 0.2 with model.lora.r = 32 (n=1)" in pair.text
    assert "One run each: the effect of the seed is unknown" in pair.text


def test_ranges_that_do_not_overlap(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1, 0.12, 0.11], {}), *arm(tmp_path, "b", [0.2, 0.13], RANK))

    (pair,) = found.pairs
    assert pair.outcome == "effect"
    assert pair.text.startswith("model.lora.r = 32 is better")
    assert "once in 5 comparisons" in pair.text  # ten ways to choose two of five; two of them part the arms


def test_ranges_that_overlap(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1, 0.14], {}), *arm(tmp_path, "b", [0.2, 0.13], RANK))

    (pair,) = found.pairs
    assert pair.outcome == "not_distinguishable"
    assert "Not distinguishable with these seeds" in pair.text


def test_ranges_that_touch_overlap(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1, 0.2], {}), *arm(tmp_path, "b", [0.2, 0.3], RANK))
    assert [pair.outcome for pair in found.pairs] == ["not_distinguishable"]


def test_one_run_against_several(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1], {}), *arm(tmp_path, "b", [0.2, 0.3], RANK))

    (pair,) = found.pairs
    assert pair.outcome == "one_run"
    assert "An arm of one run" in pair.text


def test_the_same_result(tmp_path: Path) -> None:
    found = judge(*arm(tmp_path, "a", [0.1], {}), *arm(tmp_path, "b", [0.1], RANK))

    (pair,) = found.pairs
    assert pair.outcome == "not_distinguishable"
    assert "the effect of the seed is unknown" in pair.text


def test_more_is_better_for_accuracy(tmp_path: Path) -> None:
    def extra(epoch: int, loss: float) -> dict[str, float]:
        return {"val_direction_accuracy": loss}

    runs = [
        make_run(tmp_path / f"{name}{seed}", (0.9, best + seed / 100), changes | {"loop.seed": seed}, extra=extra)
        for name, best, changes in (("a", 0.1, {}), ("b", 0.5, RANK))
        for seed in range(2)
    ]
    found = judge(*runs, metric="val_direction_accuracy")

    assert [pair.outcome for pair in found.pairs] == ["effect"]
    assert found.pairs[0].text.startswith("model.lora.r = 64 is better")


def test_three_levels_of_one_factor_are_three_pairs(tmp_path: Path) -> None:
    runs = [
        run
        for rank in (8, 16, 32)
        for run in arm(tmp_path, f"r{rank}-", [rank / 100, rank / 90], {"model.lora.r": rank})
    ]
    found = judge(*runs)

    assert found.factors == ("model.lora.r",)
    assert [pair.outcome for pair in found.pairs] == ["effect"] * 3
    assert [arm.label for arm in found.arms] == ["model.lora.r = 8", "model.lora.r = 16", "model.lora.r = 32"]


def test_bookkeeping_does_not_split_an_arm(tmp_path: Path) -> None:
    runs = [
        *arm(tmp_path, "a", [0.1], {"loop.workers": 1}),
        *arm(tmp_path, "b", [0.12], {"loop.workers": 3}, first_seed=1),
        *arm(tmp_path, "c", [0.2, 0.21], RANK),
    ]
    assert [arm.runs for arm in judge(*runs).arms] == [("a0", "b0"), ("c0", "c1")]


def test_each_run_is_judged_at_its_lowest_validation_loss(tmp_path: Path) -> None:
    """Not at the epoch that flatters the metric asked for."""

    def extra(epoch: int, loss: float) -> dict[str, float]:
        return {"val_rmse_linear_x": [0.9, 0.5, 0.1][epoch - 1]}

    losses = (0.5, 0.2, 0.3)
    found = judge(
        make_run(tmp_path / "a", losses, extra=extra),
        make_run(tmp_path / "b", losses, RANK, extra=extra),
        metric="val_rmse_linear_x",
    )
    assert [(score.epoch, score.step, score.value) for score in found.scores] == [(2, 20, 0.5)] * 2


def test_epochs_that_are_not_finite_are_not_the_best(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", losses=(0.5, -math.inf, 0.2, 0.2, math.nan))
    best = best_epoch(read_run(folder))
    assert best is not None
    assert best.epoch == 3


# --- loading ------------------------------------------------------------------------------------------------------------------


def test_runs_to_load(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "x" / "a")

    with pytest.raises(ConfigError, match="nothing to compare"):
        load_runs([first])
    with pytest.raises(ConfigError, match="is named twice"):
        load_runs([first, first / "run.json"])
    assert [run.label for run in load_runs([first, second])] == [str(first), str(second)]
    assert find_differences(load_runs([first, second])) == ()


@given(st.lists(st.none() | st.floats(), max_size=60))
def test_sparkline_of_anything(values: list[float | None]) -> None:
    shown = sparkline(values)
    assert len(shown) == min(len(values), 24)
    assert set(sparkline(values, ascii_only=True)) <= set("_.,-~=*#x")


def test_sparkline_follows_its_values() -> None:
    assert sparkline([1.0, 2.0, 3.0, math.nan, 4.0]) == "▁▃▆x█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    falling = sparkline([1.0, 0.1, 0.01, 0.001])
    assert all(before > after for before, after in pairwise(falling)), "logarithmic, so that no step is drowned"
