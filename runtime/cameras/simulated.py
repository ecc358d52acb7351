"""A camera that is drawn: a scene that moves, at a rate, and with every fault that a real camera can have.

For tests, soaks, and a first try without hardware. No two of its pictures are equal, as no two of a sensor are. Faults are switched on
while it runs, `camera.fault = Fault.FREEZE`, or from outside of the process through a file that the environment variable
JETVLA_SIMULATED_FAULT_FILE names: it holds a fault's name, and no file or an empty one is no fault. Knows nothing about what
anybody makes of the faults.
"""

from __future__ import annotations

import os
import time
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CameraError
from runtime.cameras.base import EndOfFrames, Frame
from runtime.cameras.orientation import upright_size
from runtime.robot_file import SimulatedCamera as SimulatedConfig

FAULT_FILE_VARIABLE = "JETVLA_SIMULATED_FAULT_FILE"
DEFAULT_SIZE = 320, 180
LATE_S = 1.0
_LOOK_S = 0.05  # how often the file is read
_HANG_LOOK_S = 0.01
_STAMP_EPOCH_S = 1e6  # the source's clock is not ours
_JUMP_S = 3600.0


class Fault(str, Enum):
    """What can go wrong.

    freeze: the same pixels for ever, with new times.
    late: pictures are LATE_S old when they come.
    duplicate: the source repeats a picture and its stamp.
    backwards: the source's clock is an hour behind what it was.
    silent: no picture comes.
    unplugged: open and read fail until it is plugged in again.
    black: no light.
    wrong_size: pictures of half the size.
    exception: read raises what is no CameraError.
    hang: read does not return.
    end: as a recording that is over.
    """

    FREEZE = "freeze"
    LATE = "late"
    DUPLICATE = "duplicate"
    BACKWARDS = "backwards"
    SILENT = "silent"
    UNPLUGGED = "unplugged"
    BLACK = "black"
    WRONG_SIZE = "wrong_size"
    EXCEPTION = "exception"
    HANG = "hang"
    END = "end"


class SimulatedCamera:
    """See Camera. `fault` may be set from any thread; None is none."""

    def __init__(self, config: SimulatedConfig) -> None:
        width, height = upright_size(config)
        self._size = width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1]
        self._period_s = 1 / config.fps
        self.fault: Fault | None = None
        self._fault_file = Path(name) if (name := os.environ.get(FAULT_FILE_VARIABLE)) else None
        self._looked_s = -_LOOK_S
        self._fault_in_file: Fault | None = None
        self._background = draw_background(*self._size)
        self._number = 0
        self._due_s = 0.0
        self._last: Frame | None = None

    def open(self) -> None:
        """Connect.

        Raises:
            CameraError: it is unplugged.
        """
        self._check_plugged(self._current_fault())
        self._due_s = time.monotonic()

    def read(self, timeout_s: float) -> Frame | None:
        """The next picture, when it is due.

        Raises:
            CameraError: it is unplugged.
            RuntimeError: the fault `exception`.
            EndOfFrames: the fault `end`.
        """
        now = time.monotonic()
        if self._due_s > now + timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(0.0, self._due_s - now))
        now = time.monotonic()
        self._due_s = max(
            self._due_s + self._period_s, now
        )  # whoever reads late misses pictures, as with a real camera
        fault = self._current_fault()
        self._check_plugged(fault)
        if fault is Fault.EXCEPTION:
            raise RuntimeError("a fault of the driver, simulated")
        if fault is Fault.END:
            raise EndOfFrames
        if fault is Fault.SILENT:
            time.sleep(timeout_s)
            return None
        while fault is Fault.HANG:
            time.sleep(_HANG_LOOK_S)
            fault = self._current_fault()
        return self._take(fault, time.monotonic())

    def close(self) -> None:
        """Disconnect; there is nothing to release."""

    def _take(self, fault: Fault | None, now: float) -> Frame:
        self._number += 1
        last = self._last
        stamp = now + _STAMP_EPOCH_S - (_JUMP_S if fault is Fault.BACKWARDS else 0.0)
        if fault is Fault.DUPLICATE and last is not None:
            return Frame(last.pixels, now, last.source_stamp_s)
        if fault is Fault.FREEZE and last is not None:
            pixels = last.pixels
        elif fault is Fault.BLACK:
            pixels = np.zeros_like(self._background)
        else:
            pixels = draw(self._background, self._number)
            if fault is Fault.WRONG_SIZE:
                pixels = np.ascontiguousarray(pixels[::2, ::2])
        pixels.setflags(write=False)
        frame = Frame(pixels, now - LATE_S if fault is Fault.LATE else now, stamp)
        if fault in (None, Fault.FREEZE, Fault.LATE):
            self._last = frame
        return frame

    def _check_plugged(self, fault: Fault | None) -> None:
        if fault is Fault.UNPLUGGED:
            raise CameraError("the simulated camera is unplugged", hint="this fault was switched on; switch it off.")

    def _current_fault(self) -> Fault | None:
        now = time.monotonic()
        if self._fault_file is not None and now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self._fault_in_file = read_fault(self._fault_file)
        return self.fault or self._fault_in_file


def read_fault(path: Path) -> Fault | None:
    """What a fault file says; None for no file or an empty one.

    Raises:
        CameraError: it names no fault.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        text = f"unreadable: {error}"
    try:
        return Fault(text) if text else None
    except ValueError:
        raise CameraError(
            f"{path} names no fault",
            got=text[:80],
            expected=", ".join(fault.value for fault in Fault),
            hint="write one of these names into it, under another name first, then rename it: half a name is no fault.",
        ) from None


def draw_background(width: int, height: int) -> NDArray[np.uint8]:
    """Sky, floor and a grid on it: uint8 [height, width, 3] RGB."""
    picture = np.empty((height, width, 3), np.uint8)
    horizon = int(height * 0.45)
    picture[:horizon] = (150, 190, 230)
    depth = np.linspace(0.7, 1.0, height - horizon)[:, None, None]
    picture[horizon:] = (depth * (150, 115, 70)).astype(np.uint8)
    for step in range(1, 9):
        row = min(height - 1, horizon + int((height - horizon) * 0.95 / step))
        picture[row] = picture[row] // 4 * 3
    return picture


def draw(background: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """Picture `number`: a red bottle that goes from side to side and comes nearer, and the number as a row of bits at the bottom."""
    picture = background.copy()
    height, width, _ = picture.shape
    swing = 0.5 + 0.35 * np.sin(number / 23)
    tall = max(2, int(height * (0.3 + 0.15 * np.sin(number / 61))))
    half, middle, foot = max(1, tall // 6), int(width * swing), int(height * 0.8)
    picture[max(0, foot - tall) : foot, max(0, middle - half) : middle + half] = (200, 60, 40)
    picture[max(0, foot - tall * 2 // 3) : foot - tall // 3, max(0, middle - half) : middle + half] = (245, 245, 240)
    bits = np.unpackbits(np.array([number & 0xFFFFFFFF], ">u4").view(np.uint8))
    across = np.arange(width) * len(bits) // width  # below 32 pixels of width, the upper bits share columns
    picture[height - max(1, height // 45) :] = np.where(bits[across, None], 255, 30)[None]
    return picture
