"""The policy in a control loop: a tick at a fixed rate, a camera that never waits, the newest frame wins.

The camera is one that delivers at its own rate whatever the policy does, as real ones do: a frame's timestamp is when it was taken, and a
decision is on the newest one at its tick. A decision that takes longer than a period makes the loop leave out ticks rather than fall
behind. Drives nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bench.clocks import Clock, JumpWatch, SystemClock
from bench.feed import Feed
from bench.measure import Samples, Steps
from bench.results import Loop, Timing

_COLUMNS = ("reaction", "decision", "command", "skipped")


def loop_samples() -> Samples:
    """An empty record of `run_loop`."""
    return Samples(_COLUMNS)


def run_loop(
    policy: Steps,
    feed: Feed,
    ticks: int,
    *,
    rate_hz: float,
    deadline_ms: float,
    camera_fps: float,
    watch: JumpWatch,
    clock: Clock | None = None,
    samples: Samples | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Loop:
    """Decide `ticks` times.

    Args:
        camera_fps: of the camera; its phase is half a frame off the ticks, the mean case.
        samples: is filled meanwhile, for who catches what stops this.

    Raises:
        BackendError: a step failed.
    """
    clock = clock or SystemClock()
    samples = loop_samples() if samples is None else samples
    period, exposure = 1 / rate_hz, 1 / camera_fps
    # The camera has been running; its frames come half a period of its own before the first tick.
    due = clock.now() + period
    first = due - exposure / 2
    skipped = 0
    for _ in range(ticks):
        clock.sleep_until(due)
        newest = math.floor((clock.now() - first) / exposure)
        chunk = policy.step(feed.frame(max(newest, 0)))
        command = [float(value) for value in chunk.values[0]]
        now = clock.now()
        del command  # a robot would send it
        samples.add(
            {
                "reaction": (now - (first + newest * exposure)) * 1e3,
                "decision": (now - due) * 1e3,
                "command": now * 1e3,
                "skipped": float(skipped),
            }
        )
        watch.look()
        advance()
        late = math.floor((now - due) / period)
        skipped += late
        due += (late + 1) * period
    return looped(samples, deadline_ms)


def looped(samples: Samples, deadline_ms: float) -> Loop:
    """Of the samples so far; at least one."""
    found = samples.arrays()
    periods = np.diff(found["command"])
    return Loop(
        ticks=len(found["decision"]),
        misses=int((found["decision"] > deadline_ms).sum()),
        skipped=int(found["skipped"][-1]),
        reaction=Timing.of(found["reaction"].tolist()),
        decision=Timing.of(found["decision"].tolist()),
        period=Timing.of(periods.tolist()) if len(periods) else None,
    )
