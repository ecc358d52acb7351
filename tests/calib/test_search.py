"""The search over assignments, on made-up tables of errors and latencies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from calib.search import MARGIN, Evaluation, Outcome, front, search

Blocks = frozenset[str]
Number = Callable[[Blocks], float]
NAMES = tuple("abcdefgh")


def made_up(error: Number, latency: Number) -> tuple[Callable[[Blocks], Evaluation], Counter[Blocks]]:
    """An evaluator, and how often it was asked for what."""
    asked: Counter[Blocks] = Counter()

    def try_(blocks: Blocks) -> Evaluation:
        asked[blocks] += 1
        return Evaluation("made up", tuple(sorted(blocks)), error(blocks), latency(blocks))

    return try_, asked


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[str, ...], Number, Number]:
    """Blocks, and error and latency of every assignment: a sum over blocks, or that with noise of any size."""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    costs = {name: draw(st.floats(0, 1)) for name in names}
    gains = {name: draw(st.floats(0, 10)) for name in names}
    noise, seed = draw(st.sampled_from([0.0, 0.1, 3.0])), draw(st.integers(0, 99))

    def error(blocks: Blocks) -> float:
        drawn = hash((seed, tuple(sorted(ord(name) for name in blocks)))) % 1000 / 1000
        return sum(costs[name] for name in blocks) * (1 + noise * drawn)

    def latency(blocks: Blocks) -> float:
        drawn = hash((seed + 1, tuple(sorted(ord(name) for name in blocks)))) % 1000 / 1000
        return 1 + sum(gains.values()) + noise * drawn - 0.9 * sum(gains[name] for name in blocks)

    return names, error, latency


@given(table=tables(), budget=st.floats(1e-3, 20))
def test_the_fastest_that_was_tried_within_the_budget(
    table: tuple[tuple[str, ...], Number, Number], budget: float
) -> None:
    names, error, latency = table
    try_, asked = made_up(error, latency)

    outcome = search(names, budget, try_)

    assert set(asked.values()) == {1}
    assert {Blocks(each.int8) for each in outcome.tried} == set(asked)
    assert len(outcome.tried) == len(asked)
    good = [each for each in outcome.tried if each.action_error <= MARGIN * budget]
    assert all(each.int8 for each in outcome.tried)  # nothing in INT8 is not an INT8 variant
    if outcome.chosen is None:
        assert good == []
    else:
        assert outcome.chosen in good
        same = [each for each in good if each.latency_ms <= 1.02 * min(each.latency_ms for each in good)]
        assert outcome.chosen in same
        assert len(outcome.chosen.int8) == max(len(each.int8) for each in same)
        equal = [each for each in same if len(each.int8) == len(outcome.chosen.int8)]
        assert outcome.chosen.action_error == min(each.action_error for each in equal)
    assert outcome.best.action_error == min(each.action_error for each in outcome.tried)
    assert len(asked) <= 3 * len(names) + 1


@given(table=tables())
def test_every_block_is_left_out_once(table: tuple[tuple[str, ...], Number, Number]) -> None:
    names, error, latency = table
    outcome = search(names, 1.0, made_up(error, latency)[0])
    assert outcome.all_int8.int8 == names
    if len(names) > 1:
        assert {name: Blocks(each.int8) for name, each in outcome.without.items()} == {
            name: Blocks(names) - {name} for name in names
        }
    else:
        assert outcome.without == {}


@given(
    costs=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    gains=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    share=st.floats(0.05, 1.2),
)
def test_something_is_found_wherever_one_block_alone_is_good(
    costs: list[float], gains: list[float], share: float
) -> None:
    """With errors that add up, taking blocks away one by one always ends within a budget that the last one left meets."""
    names = NAMES[: len(costs)]
    cost, gain = dict(zip(names, costs, strict=True)), dict(zip(names, gains, strict=False))
    budget = share * sum(costs) / MARGIN

    def error(blocks: Blocks) -> float:
        return sum(cost[name] for name in sorted(blocks))

    outcome = search(names, budget, made_up(error, lambda blocks: 100 - sum(gain[name] for name in blocks))[0])
    if max(costs) <= budget * MARGIN * 0.999:
        assert outcome.chosen is not None
    if share > 1.001:
        assert outcome.chosen == outcome.all_int8


def outcome_of(cost: dict[str, float], gain: dict[str, float], budget: float) -> Outcome:
    return search(
        tuple(cost),
        budget,
        made_up(
            lambda blocks: sum(cost[name] for name in blocks), lambda blocks: 10 - sum(gain[name] for name in blocks)
        )[0],
    )


def test_the_block_that_costs_the_most_error_for_the_least_time_goes_first() -> None:
    found = outcome_of({"a": 0.5, "b": 0.6, "c": 0.1}, {"a": 0.1, "b": 5.0, "c": 1.0}, budget=1.0)
    assert found.chosen is not None
    assert found.chosen.int8 == ("b", "c")


def test_a_block_that_need_not_have_gone_comes_back() -> None:
    """`a` goes first as it costs no time, but only without `b` and `c` is the budget met, and then `a` may stay."""
    cost = {"a": 0.3, "b": 1.0, "c": 1.0, "d": 0.1}
    found = outcome_of(cost, {"a": 0.001, "b": 1.0, "c": 1.0, "d": 1.0}, budget=0.625)
    assert found.chosen is not None
    assert found.chosen.int8 == ("a", "d")


def looked_up(errors: dict[str, float], latencies: dict[str, float], budget: float = 1.0) -> Outcome:
    """A search over the letters of the first assignment; assignments are written as words."""
    try_, _ = made_up(
        lambda blocks: errors["".join(sorted(blocks))], lambda blocks: latencies.get("".join(sorted(blocks)), 10.0)
    )
    return search(tuple(next(iter(errors))), budget, try_)


@pytest.mark.parametrize(("all_int8", "chosen"), [(10.19, ("a", "b")), (10.21, ("a",))])
def test_of_latencies_that_are_the_same_the_most_int8(all_int8: float, chosen: tuple[str, ...]) -> None:
    """Two percent are what two measurements differ by; floating point must not win by noise, nor by a little less error."""
    found = looked_up({"ab": 0.5, "a": 0.1, "b": 0.1}, {"ab": all_int8, "a": 10.0, "b": 10.3})
    assert found.chosen is not None
    assert found.chosen.int8 == chosen


@pytest.mark.parametrize(
    ("again", "chosen", "timed"),
    [
        ({"a": 10.3}, ("a", "b"), ["a"]),  # it was noise
        ({"a": 9.1}, ("a",), ["a"]),
        ({"a": 10.3, "b": 9.5}, ("b",), ["a", "b"]),
        ({"a": 10.3, "b": 11.0}, ("a", "b"), ["a", "b"]),
    ],
)
def test_less_int8_must_be_proved_faster(again: dict[str, float], chosen: tuple[str, ...], timed: list[str]) -> None:
    errors, glances = {"ab": 0.5, "a": 0.1, "b": 0.1}, {"ab": 10.0, "a": 9.0, "b": 9.5 if "b" in again else 11.0}
    try_, _ = made_up(lambda blocks: errors["".join(sorted(blocks))], lambda blocks: glances["".join(sorted(blocks))])
    asked: list[str] = []

    def retime(each: Evaluation) -> Evaluation:
        asked.append("".join(each.int8))
        return structs.replace(each, latency_ms=again[asked[-1]])

    found = search("ab", 1.0, try_, retime)
    assert found.chosen is not None
    assert found.chosen.int8 == chosen
    assert asked == timed
    told = {"".join(each.int8): each.latency_ms for each in found.tried}
    assert told == glances | {name: again[name] for name in timed}
    assert found.without["b"].latency_ms == told["a"]


@given(table=tables(), budget=st.floats(1e-3, 20), seed=st.integers(0, 99))
def test_what_is_chosen_has_the_most_int8_or_was_timed_twice(
    table: tuple[tuple[str, ...], Number, Number], budget: float, seed: int
) -> None:
    names, error, latency = table
    timed: Counter[tuple[str, ...]] = Counter()

    def retime(each: Evaluation) -> Evaluation:
        timed[each.int8] += 1
        return structs.replace(each, latency_ms=each.latency_ms * (0.5 + hash((seed, each.int8)) % 100 / 100))

    outcome = search(names, budget, made_up(error, latency)[0], retime)
    assert max(timed.values(), default=1) == 1
    if outcome.chosen is not None:
        most = max(len(each.int8) for each in outcome.tried if each.action_error <= MARGIN * budget)
        assert len(outcome.chosen.int8) == most or outcome.chosen.int8 in timed
        assert outcome.chosen in outcome.tried


def test_of_as_much_int8_at_the_same_latency_the_most_exact() -> None:
    found = looked_up({"ab": 0.9, "a": 0.4, "b": 0.5}, {"ab": 9.0, "a": 10.1, "b": 10.0})
    assert found.chosen is not None
    assert found.chosen.int8 == ("a",)


def test_single_blocks_are_tried_when_everything_was_returned() -> None:
    """Errors need not add up: what the last step returned hid the one block that is good alone."""
    alone = {"a": 0.02, "b": 0.009, "c": 0.001}
    found = looked_up({"abc": 0.4, "bc": 0.1, "ac": 0.3, "ab": 0.2, **alone}, {}, budget=0.01)
    assert found.chosen is not None
    assert found.chosen.int8 == ("c",)


def test_nothing_fits() -> None:
    found = outcome_of({"a": 0.5, "b": 0.6, "c": 0.7}, dict.fromkeys("abc", 1.0), budget=0.1)
    assert found.chosen is None
    assert found.best.action_error == pytest.approx(0.5)


def test_the_budget_keeps_a_margin() -> None:
    assert outcome_of({"a": 0.79}, {"a": 1.0}, budget=1.0).chosen is not None
    assert outcome_of({"a": 0.81}, {"a": 1.0}, budget=1.0).chosen is None


def test_what_is_not_a_number_is_never_chosen() -> None:
    """Everything in INT8 overflows; without `b` it does not."""

    def error(blocks: Blocks) -> float:
        return math.nan if "b" in blocks else 0.1 * len(blocks)

    found = search(tuple("abc"), 1.0, made_up(error, lambda blocks: 10.0 - len(blocks))[0])
    assert found.chosen is not None
    assert found.chosen.int8 == ("a", "c")
    assert not math.isnan(found.best.action_error)


@given(
    points=st.lists(
        st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=12, unique=True
    )
)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    tried = [Evaluation("made up", (str(index),), *point) for index, point in enumerate(points)]
    expected = {
        each.int8
        for each in tried
        if not any(
            other is not each and other.action_error <= each.action_error and other.latency_ms <= each.latency_ms
            for other in tried
        )
    }
    assert front(tried) == expected
