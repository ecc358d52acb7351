"""Flight recordings for tests, made by the real recorder from events whose times are made up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.cameras.base import Frame
from runtime.commands.base import ZERO, Twist
from runtime.events import Decision, Event, Published, RunInfo
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.robots import AXES

GO_LEFT = "go to the basket on the left"
GO_RIGHT = "go to the basket on the right"
PERIOD_S = 0.16
PATIENCE_S = 60.0
NAMES = ("linear_x", "linear_y")


def run_info(**changes: object) -> RunInfo:
    """A run of the test base (tests/robots.py)."""
    info = RunInfo(
        robot="test-base",
        bundle="tiny.bundle",
        manifest_sha256="ab" * 32,
        backend="fake",
        precision="fp32",
        action_names=NAMES,
        action_units=("m/s", "m/s"),
        decide_hz=1 / PERIOD_S,
        publish_hz=20.0,
        strategy="receding_horizon",
        settings=json.dumps({"robot": {"axes": msgspec.to_builtins(AXES)}, "limits_file": None}),
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def pictures(count: int, *, height: int = 24, width: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth scenes that differ and survive JPEG well, uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    phases, speeds = rng.uniform(0, 6, (count, 3)), rng.uniform(0.05, 0.2, (count, 3))
    waves = [
        [127 + 100 * np.sin(rows * s + columns * s / 2 + p) for p, s in zip(phase, speed, strict=True)]
        for phase, speed in zip(phases, speeds, strict=True)
    ]
    return np.moveaxis(np.array(waves), 1, -1).astype(np.uint8)


def decision(
    number: int, frame: Frame, values: Sequence[Sequence[float]], instruction: str = GO_LEFT, took_s: float = 0.02
) -> Decision:
    """Begun when its frame was taken."""
    return Decision(
        number,
        instruction,
        frame,
        frame.captured_s,
        frame.captured_s + took_s,
        np.array(values, dtype=np.float32),
        {"vision": 1.25, "total": 2.5},
        False,
    )


def published(at_s: float, x: float, y: float, **changes: object) -> Published:
    """A command as safety let it through; `x` and `y` in m/s."""
    facts: dict[str, object] = {"level": "drive", "reasons": (), "frame_age_s": 0.01, "action_age_s": 0.02}
    facts |= {"wanted": {"linear_x": x, "linear_y": y}} | changes
    return Published(at_s, Twist(linear_x=x, linear_y=y), **facts)  # type: ignore[arg-type]


def drive(
    count: int,
    start_s: float,
    *,
    instruction: str = GO_LEFT,
    first: int = 0,
    seed: int = 0,
    height: int = 24,
    width: int = 32,
) -> list[Event]:
    """`count` decisions, each with three commands after it: the first two still of a ramp, the last what was decided."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    for index, pixels in enumerate(pictures(count, seed=seed, height=height, width=width)):
        at_s = start_s + index * PERIOD_S
        chunk = rng.uniform(-0.8, 0.8, (2, 2))
        events.append(decision(first + index, Frame(pixels, at_s), chunk.tolist(), instruction))
        x, y = 0.5 * chunk[0, 0], -0.5 * chunk[0, 1]
        events += [published(at_s + 0.03 + 0.05 * k, x * (k + 1) / 3, y * (k + 1) / 3) for k in range(3)]
    return events


def end_of_run(at_s: float) -> Published:
    """The zero that every run ends with."""
    return Published(at_s, ZERO, {}, "stop", ("end of the run",), math.inf, math.inf)


def record(folder: Path, events: Sequence[Event], *, info: RunInfo | None = None, quality: int = 90) -> Path:
    """Record events, finish, and return the file."""
    before = set(folder.glob("*.mcap"))
    recorder = FlightRecorder(Recorder(folder=str(folder), jpeg_quality=quality))
    recorder.start(info or run_info())
    for event in events:
        recorder.take(event)
        if isinstance(event, Decision):  # as slow as pictures may come
            until(lambda: len(recorder._queue) < 8)
    recorder.close()
    assert not recorder.status.lost
    (path,) = set(folder.glob("*.mcap")) - before
    return path


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait until it is so."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def cut_off(path: Path) -> Path:
    """As a crash leaves it: without its end."""
    data = path.read_bytes()
    footer = data[-28:]
    start = int.from_bytes(footer[:8], "little")  # of the summary, which the end of data precedes
    path.write_bytes(data[: start - 13])
    return path
