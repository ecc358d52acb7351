"""What happens on a run, as plain records: what the loop hands to whoever listens (flight recorder, live view, tests).

Listeners take these on the loop's own threads and must return at once; whatever is slow has a queue of its own and drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.cameras.base import Frame
from runtime.commands.base import Twist


@dataclass(frozen=True)
class RunInfo:
    """What a run is, told once at its start.

    Attributes:
        robot: name in the robot file.
        bundle: the bundle's path, as given.
        manifest_sha256: of the bundle's manifest.
        backend: that runs.
        precision: that runs.
        action_names, action_units: of the columns of `Decision.values`.
        decide_hz, publish_hz: the intended rates.
        strategy: of chunk execution.
        settings: the whole of robot file and limits, as JSON, so that a setting that drifted is found later.
    """

    robot: str
    bundle: str
    manifest_sha256: str
    backend: str
    precision: str
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    decide_hz: float
    publish_hz: float
    strategy: str
    settings: str


@dataclass(frozen=True, eq=False)
class Decision:
    """One step of the policy.

    Attributes:
        number: counts decisions from 0.
        instruction: what the policy was told.
        frame: what it saw.
        started_s, finished_s: time.monotonic().
        values: float32 [n, A], the chunk in the manifest's units.
        timing: milliseconds per section.
        missed: it came after its deadline.
    """

    number: int
    instruction: str
    frame: Frame
    started_s: float
    finished_s: float
    values: NDArray[np.float32]
    timing: Mapping[str, float]
    missed: bool


@dataclass(frozen=True)
class Published:
    """One command that went to the robot.

    Attributes:
        at_s: time.monotonic().
        twist: what was sent.
        wanted: what the policy wanted, before safety, by Twist field; empty where it wanted nothing.
        level: drive, hold, slow or stop.
        reasons: why it is not what was wanted; empty where it is.
        frame_age_s, action_age_s: infinite where there is none.
    """

    at_s: float
    twist: Twist
    wanted: Mapping[str, float]
    level: str
    reasons: tuple[str, ...]
    frame_age_s: float
    action_age_s: float


@dataclass(frozen=True)
class Note:
    """Something worth a line: a camera lost and found, an instruction changed, a fault. `kind` is a short word to search for."""

    at_s: float
    kind: str
    text: str


Event = Decision | Published | Note


class Listener(Protocol):
    """Takes events; never blocks, never raises."""

    def start(self, info: RunInfo) -> None:
        """The run begins."""
        ...

    def take(self, event: Event) -> None:
        """Something happened; called from several threads."""
        ...

    def close(self) -> None:
        """The run is over; may take its time."""
        ...
