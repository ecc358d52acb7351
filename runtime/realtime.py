"""Real-time priority for the few threads that must not wait for a CPU: the control loop's and the watchdog's.

Both compute for a fraction of a millisecond per round, so they take nothing from the policy; without the priority they wait for their turn
behind whatever else is busy. It needs a right that a robot's service is given (docs/robot.md) and a shell mostly lacks: then all goes on
without it. Knows nothing about rounds.
"""

from __future__ import annotations

import os

LOOP_PRIORITY, WATCHDOG_PRIORITY = 10, 20


def take_priority(priority: int) -> bool:
    """Put the calling thread before all ordinary ones; threads and processes that it starts stay ordinary. False where not allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError:
        return False
    return True


def give_back_priority() -> None:
    """Make the calling thread an ordinary one again."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
