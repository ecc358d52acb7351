"""The faults that a run on a robot must survive, each with what is promised, and the table of them for docs/safety.md.

A case is what one or more tests cause, and what they hand to `judge`: the seconds until the robot stood still, or None where the promise
is not about time (the robot goes on, or never moved). The table's last column is what one run saw: `scripts/fault_table` writes it, and no
test compares it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.robots import SAFETY
from tests.runtime.rig import SLACK_S

PERIOD_S = 1 / 20
DECIDE_S = 1 / 10
# A stale frame is noticed in the next round, and the ramp ends with a round.
STALE_S = SAFETY.stale_frame_s + SAFETY.stop_within_s + 2 * PERIOD_S
RAMP_S = SAFETY.stop_within_s + 2 * PERIOD_S
# What was decided last may still be as fresh as its own decision period.
UNDECIDED_S = SAFETY.stale_action_s + SAFETY.stop_within_s + 2 * PERIOD_S
LATE_S = DECIDE_S * SAFETY.misses_to_stop + RAMP_S
RIVALS_S = 0.25
WATCHDOG_S = SAFETY.watchdog_s + 2 * PERIOD_S
RESULTS = "JETVLA_FAULT_RESULTS"
HEADER = ("fault", "what is promised", "bound", "seen")


@dataclass(frozen=True)
class Fault:
    """One line of the table.

    Attributes:
        name: of the fault.
        promise: what happens.
        bound_s: until the robot stands still; None where it need not, or never moves.
        bound: how the bound comes about.
    """

    name: str
    promise: str
    bound_s: float | None = None
    bound: str = ""


FAULTS: dict[str, Fault] = {}


def fault(name: str, promise: str, bound_s: float | None = None, bound: str = "") -> Fault:
    """Register a case."""
    FAULTS[name] = Fault(name, promise, bound_s, bound)
    return FAULTS[name]


def judge(case: Fault, seen_s: float | None) -> None:
    """Compare what was seen with what was promised, and leave it for the table."""
    if folder := os.environ.get(RESULTS):
        (Path(folder) / f"{case.name}.json").write_text(json.dumps(seen_s))
    assert (seen_s is None) == (case.bound_s is None)
    if seen_s is not None and case.bound_s is not None:
        assert seen_s <= case.bound_s + SLACK_S, f"{case.name}: stood still after {seen_s:.2f} s"


def table(seen: Callable[[Fault], str]) -> list[str]:
    """Lines of Markdown."""
    rows = [
        (case.name, case.promise, "-" if case.bound_s is None else f"{case.bound_s:.2f} s: {case.bound}", seen(case))
        for case in FAULTS.values()
    ]
    return [f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * len(HEADER), *rows)]
