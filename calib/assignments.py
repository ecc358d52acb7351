"""What is known about assignments without running one: which blocks there are to assign, which to judge next after one failed, their names.

Pure functions of evaluations and judgements; nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from bundle.errors import ConfigError
from calib.acceptance import Acceptance
from calib.search import MARGIN, Evaluation

# Stands for an error that is not a number: JSON has none, and nothing is worse.
HOPELESS = 1e9


def searchable(blocks: Sequence[str], keep_float: Collection[str]) -> tuple[str, ...]:
    """The blocks that may become INT8.

    Raises:
        ConfigError: a block to keep does not exist, or none is left.
    """
    unknown = sorted(set(keep_float) - set(blocks))
    if unknown:
        raise ConfigError(
            "--keep-float names no block",
            got=", ".join(unknown),
            expected=", ".join(blocks),
            hint="--layers-per-block decides how transformer layers are grouped.",
        )
    left = tuple(block for block in blocks if block not in keep_float)
    if not left:
        raise ConfigError(
            "nothing is left to be INT8",
            got="every block in --keep-float",
            expected="at least one other",
            hint="the bundle runs in floating point as it is.",
        )
    return left


def safer(
    tried: Sequence[Evaluation], judged: Sequence[tuple[Evaluation, Acceptance]], chances: int
) -> Evaluation | None:
    """The next to judge after some have failed; None when there is nothing more exact, or no chance left.

    The fastest of those that should pass, going by how far the last one was off. The last chance is the most exact one's.

    Args:
        judged: with the judgement that failed, in order; at least one.
        chances: how many may be judged after the first.
    """
    if len(judged) > chances:
        return None
    last, acceptance = judged[-1]
    left = [
        each for each in tried if each.action_error < last.action_error
    ]  # each that was judged is more exact than the one before
    if not left:
        return None
    over = number(acceptance.action_error) / acceptance.budget
    # What failed by its decisions alone has no measure of how far: half the error is another policy.
    target = last.action_error * MARGIN / over if over > 1 else last.action_error / 2
    likely = [each for each in left if each.action_error <= target]
    if likely and len(judged) < chances:
        return min(likely, key=lambda each: each.latency_ms)
    return min(left, key=lambda each: each.action_error)


def number(error: float) -> float:
    """An error that can be compared: one that is not finite is worse than any."""
    return error if math.isfinite(error) else HOPELESS


def describe(blocks: Sequence[str], found: Evaluation) -> str:
    """An assignment in words."""
    rest = [block for block in blocks if block not in found.int8]
    return "all INT8" if not rest else f"{', '.join(rest)} in floating point"
