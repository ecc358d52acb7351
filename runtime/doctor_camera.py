"""What a camera really gives: rate, age, gaps, brightness and sharpness, measured by watching it for some seconds.

It is watched through the very grabber that the control loop uses, so what is refused here is refused there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.cameras.base import Frame
from runtime.cameras.checks import brightness
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.select import open_camera
from runtime.events import Note
from runtime.robot_file import CameraConfig

_FIRST_FRAME_S = 10.0  # a CSI camera or a ROS topic may take some seconds
_GAP = 1.5  # of the usual distance: then a picture is missing between two


@runtime_checkable
class _Matched(Protocol):
    """A camera that knows how many publish what it reads."""

    def publishers(self) -> int: ...


@dataclass(frozen=True, eq=False)
class CameraFindings:
    """What was seen.

    Attributes:
        frame: the last good one, or None if there was none; the rest then says little.
        seconds: from the first good frame to the last look.
        fps: good frames per second.
        spacing_ms: usual (median) distance between two, by capture time; NaN for fewer than two.
        longest_gap_s: longest time without a newer frame, from the first good one on.
        missing: frames that seem to be missing, at the usual distance.
        age_ms: age of frames when they were handed over: p50, p95 and max.
        brightness: mean, 0 to 255.
        dark_share, bright_share: of the values, those below 8 and above 247: nothing is to be seen in them.
        sharpness: see `sharpness`.
        refused: frames that did not count, by reason.
        reconnects: how often the camera was opened again.
        publishers: of the camera's topic, where that can be told.
        notes: what the grabber had to say.
        error: why there is no frame, or why the camera was lost; None if it was not.
    """

    frame: Frame | None
    seconds: float
    fps: float
    spacing_ms: float
    longest_gap_s: float
    missing: int
    age_ms: Mapping[str, float]
    brightness: float
    dark_share: float
    bright_share: float
    sharpness: float
    refused: Mapping[str, int]
    reconnects: int
    publishers: int | None
    notes: tuple[Note, ...]
    error: Exception | None


def watch(config: CameraConfig, seconds: float, first_frame_s: float = _FIRST_FRAME_S) -> CameraFindings:
    """Watch a camera for `seconds`, after waiting for its first good frame for `first_frame_s` at most.

    Raises:
        CameraError: a library that this kind needs is not installed. A camera that does not work is a finding.
    """
    notes: list[Note] = []
    camera = open_camera(config)
    grabber = FrameGrabber(camera, config, on_note=notes.append)
    grabber.start()
    try:
        frame = grabber.wait_newer(None, first_frame_s)
        begun = time.monotonic()
        taken, ages = ([] if frame is None else [frame.captured_s]), []
        seen, longest = begun, 0.0
        while frame is not None and not grabber.ended and (left := begun + seconds - time.monotonic()) > 0:
            newer = grabber.wait_newer(frame, left)
            now = time.monotonic()
            longest = max(longest, now - seen)
            if newer is not None:
                frame, seen = newer, now
                taken.append(newer.captured_s)
                ages.append(now - newer.captured_s)
        ended = time.monotonic()
        statistics, error = grabber.statistics, grabber.error
        publishers = camera.publishers() if isinstance(camera, _Matched) else None
    finally:
        grabber.close()
    spacing = np.diff(taken)
    usual = float(np.median(spacing)) if len(spacing) else np.nan
    pixels = np.zeros((1, 1, 3), np.uint8) if frame is None else frame.pixels
    return CameraFindings(
        frame=frame,
        seconds=ended - begun,
        # Of the time in which no further one was due yet; a camera that stopped half-way must not look fast.
        fps=len(spacing) / max(taken[-1] - taken[0], ended - begun - usual) if len(spacing) else 0.0,
        spacing_ms=usual * 1e3,
        longest_gap_s=longest,
        missing=int(sum(round(gap / usual) - 1 for gap in spacing if gap > _GAP * usual)),
        age_ms=dict(zip(("p50", "p95", "max"), np.percentile(ages, (50, 95, 100)) * 1e3, strict=True)) if ages else {},
        brightness=brightness(pixels),
        dark_share=float((pixels < 8).mean()),
        bright_share=float((pixels > 247).mean()),
        sharpness=sharpness(pixels),
        refused=statistics.refused,
        reconnects=statistics.reconnects,
        publishers=publishers,
        notes=tuple(notes),
        error=error,
    )


def sharpness(pixels: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the green channel: edges make it large.

    A number to compare with: pictures of one scene with a clean and a smeared lens differ by a factor. Alone it says little; an empty
    wall has none either.
    """
    if min(pixels.shape[:2]) < 3:
        return 0.0
    green = pixels[..., 1].astype(np.int16)
    middle, across = green[1:-1, 1:-1], green[1:-1, :-2] + green[1:-1, 2:]
    return float((across + green[:-2, 1:-1] + green[2:, 1:-1] - 4 * middle).var())
