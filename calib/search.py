"""Which blocks become INT8: the fastest assignment whose actions stay within the budget.

Everything in INT8 is where the search starts and mostly where it ends. Each block alone is then returned to floating point, which tells
what it costs in action error and what in time. If the budget is not met, blocks return one after the other, the most error for the least
time first, until it is; blocks that turn out not to be needed go back. An assignment with less INT8 than another good one has to prove
that it is faster: its first timing was a glance on a machine that may be shared. Knows nothing about models: `try_` does, and remembers
what it tried, so that a search that was interrupted, or is repeated with another budget, is quick.

Source of the idea: sensitivity of blocks instead of nodes, as nodes of one block share their error (docs/decisions/0011-int8.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

# The search aims below the budget: held-out frames are others, and the largest of their errors is not the same.
MARGIN = 0.8
# Latencies of which one is larger by less are the same: so much two measurements in turns differ on a shared machine.
_SAME = 0.02


class Evaluation(msgspec.Struct, frozen=True):
    """One assignment on one backend: the blocks in INT8, its action error on the search frames, its milliseconds a step."""

    backend: str
    int8: tuple[str, ...]
    action_error: float
    latency_ms: float


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        chosen: None if no assignment with any INT8 stays within the budget.
        all_int8: everything in INT8.
        without: by block, everything but it.
        tried: all of these and what was tried between, in that order.
    """

    chosen: Evaluation | None
    all_int8: Evaluation
    without: dict[str, Evaluation]
    tried: tuple[Evaluation, ...]

    @property
    def best(self) -> Evaluation:
        """The most exact assignment that was tried."""
        return min(self.tried, key=lambda each: (math.isnan(each.action_error), each.action_error))


def search(
    blocks: Sequence[str],
    budget: float,
    try_: Callable[[frozenset[str]], Evaluation],
    retime: Callable[[Evaluation], Evaluation] = lambda each: each,
) -> Outcome:
    """Find an assignment.

    Args:
        blocks: everything that can be INT8.
        budget: of the action error; the search aims at MARGIN of it.
        try_: evaluates an assignment.
        retime: takes an assignment's time again, at greater length.
    """
    target = budget * MARGIN
    everything = frozenset(blocks)
    tried: dict[frozenset[str], Evaluation] = {}

    def attempt(chosen: frozenset[str]) -> Evaluation:
        if chosen not in tried:
            tried[chosen] = try_(chosen)
        return tried[chosen]

    start = attempt(everything)
    without = {block: attempt(everything - {block}) for block in blocks if len(blocks) > 1}
    if not start.action_error <= target:
        rest = everything
        for block in sorted(without, key=lambda name: -_worth(start, without[name])):
            rest -= {block}
            if not rest or attempt(rest).action_error <= target:
                break
        for block in _longest_first(everything - rest, start, without):
            if attempt(rest | {block}).action_error <= target:
                rest |= {block}
    chosen = _proven(tried, target, retime)
    return Outcome(
        chosen, tried[everything], {block: tried[everything - {block}] for block in without}, tuple(tried.values())
    )


def _proven(
    tried: dict[frozenset[str], Evaluation], target: float, retime: Callable[[Evaluation], Evaluation]
) -> Evaluation | None:
    """The fastest within the target, timed again if something with more INT8 is within it too; `tried` gets the new times."""
    again: set[tuple[str, ...]] = set()
    while True:
        good = [each for each in tried.values() if each.action_error <= target]
        chosen = _fastest(good)
        if chosen is None or len(chosen.int8) == max(len(each.int8) for each in good) or chosen.int8 in again:
            return chosen
        again.add(chosen.int8)
        tried[frozenset(chosen.int8)] = retime(chosen)


def _fastest(good: Sequence[Evaluation]) -> Evaluation | None:
    """The fastest; of those that a measurement cannot tell apart, the one with the most INT8, then the most exact."""
    if not good:
        return None
    least = min(each.latency_ms for each in good)
    equal = [each for each in good if each.latency_ms <= least * (1 + _SAME)]
    return min(equal, key=lambda each: (-len(each.int8), each.action_error))


def front(tried: Iterable[Evaluation]) -> set[tuple[str, ...]]:
    """Assignments that no other beats in both error and time."""
    kept: set[tuple[str, ...]] = set()
    best = float("inf")
    for each in sorted(tried, key=lambda item: (item.latency_ms, item.action_error)):
        if each.action_error < best:
            best = each.action_error
            kept.add(each.int8)
    return kept


def _worth(start: Evaluation, without: Evaluation) -> float:
    """Action error that a block's return to floating point takes away, for each millisecond."""
    gain = start.action_error - without.action_error
    cost = max(without.latency_ms - start.latency_ms, 0.01 * start.latency_ms)
    return gain / cost if gain > 0 else gain


def _longest_first(blocks: Iterable[str], start: Evaluation, without: dict[str, Evaluation]) -> list[str]:
    return sorted(blocks, key=lambda name: start.latency_ms - without[name].latency_ms)
