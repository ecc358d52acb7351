"""Draws what a robot's camera sees on a synthetic drive to a target, and drives it there.

The drive closes the loop: each action is computed from where the target stands in the picture, and each picture from
the actions before it. So the actions are a function of the images (a policy can learn them), and mirroring the image
mirrors linear_y. The robot goes forward and, while the target is off the centre, sideways at the same speed: values
in {-1.15, 0, 1.15}, as recorded by the lab. Sky, floor and target differ in red and blue, so that a swapped colour
order changes every pixel.

Pinhole camera, horizontal focal length 0.8 W; x is forward, y to the left, metres. Knows nothing about files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from episodes.instruction import Side

Target = Literal["bottle", "basket"]
Colour = tuple[int, int, int]

FULL_SPEED = 1.15
_FOCAL = 0.8  # of the image width
_HORIZON = 0.45  # of the image height
_CAMERA_HEIGHT_M = 0.35
_STAND_OFF_M = 0.8
_STEP_M = 0.19  # 1.15 m/s at 6 frames per second
_LONGEST_DRIVE_M = 3.2
_CENTRED = 0.12  # lateral offset / distance below which the driver stops correcting
_GRID_M = 0.5
_NEAR_M = 0.15
_SMALLEST_DETAILED_PX = 8  # below this height the details would cover the target


@dataclass(frozen=True)
class Drive:
    """A planned drive: what is commanded at each frame, and where the target then stands relative to the robot.

    Attributes:
        actions: float32 [T, 3]; the first is zero, the last `stop_frames` too.
        distance_m: float64 [T], forward distance of the target at each frame.
        offset_m: float64 [T], lateral offset of the target, positive to the left.
        decoy_m: how far to the left of the target its twin stands, or None: with a twin, only the instruction tells where to go.
    """

    actions: npt.NDArray[np.float32]
    distance_m: npt.NDArray[np.float64]
    offset_m: npt.NDArray[np.float64]
    target: Target
    target_colour: Colour
    target_height_m: float
    floor_colour: Colour
    decoy_m: float | None = None


def plan_drive(target: Target, side: Side, seed: int, length: int, stop_frames: int, *, decoy: bool = False) -> Drive:
    """Plan `length` frames: one start frame, then moves, then `stop_frames` standing still. Same arguments, same drive.

    A long drive takes smaller steps, so that the target is always near enough to be seen.

    Args:
        decoy: a second target like the first stands where the first would in the mirror.

    Raises:
        ValueError: `length` leaves no frame to move in.
    """
    moves = length - 1 - stop_frames
    if moves < 1:
        raise ValueError(
            f"length must be at least {2 + stop_frames} (start, one move, {stop_frames} stops), not {length}"
        )
    random = np.random.default_rng([seed, side == "left", target == "bottle"])
    step = min(_STEP_M, _LONGEST_DRIVE_M / moves)
    distance = _STAND_OFF_M + step * moves
    offset = distance * random.uniform(0.2, 0.3) * (1 if side == "left" else -1)
    actions = np.zeros((length, 3), dtype=np.float32)
    poses = np.zeros((length, 2))
    for index in range(length):
        poses[index] = distance, offset
        if 1 <= index <= moves:
            sideways = np.sign(offset) if abs(offset) > _CENTRED * distance else 0.0
            actions[index, :2] = FULL_SPEED, FULL_SPEED * sideways
            distance, offset = distance - step, offset - step * sideways
    shade = [int(value) for value in random.integers(-20, 21, size=6)]
    base = (200, 60, 40) if target == "bottle" else (128, 132, 150)
    return Drive(
        actions=actions,
        distance_m=poses[:, 0],
        offset_m=poses[:, 1],
        target=target,
        target_colour=(base[0] + shade[0], base[1] + shade[1], base[2] + shade[2]),
        target_height_m=float(random.uniform(0.3, 0.42)),
        floor_colour=(150 + shade[3], 115 + shade[4], 70 + shade[5]),
        decoy_m=-2 * float(poses[0, 1]) if decoy else None,
    )


def draw_frame(drive: Drive, index: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """What the camera sees at frame `index`: uint8 [height, width, 3] RGB."""
    image = Image.new("RGB", (width, height), (150, 190, 230))
    pen = ImageDraw.Draw(image)
    view = _View(height, width)
    pen.rectangle((0, view.row(0.0, 1e9), width, height), fill=drive.floor_colour)
    _draw_floor_grid(pen, view, drive, index)
    left = float(drive.offset_m[index])
    if drive.decoy_m is not None:
        _draw_target(pen, view, drive, index, left + drive.decoy_m)
    _draw_target(pen, view, drive, index, left)
    return np.array(image)


@dataclass(frozen=True)
class _View:
    height: int
    width: int

    def column(self, left_m: float, forward_m: float) -> float:
        return self.width * (0.5 - _FOCAL * left_m / forward_m)

    def row(self, up_m: float, forward_m: float) -> float:
        return self.height * _HORIZON + self.width * _FOCAL * (_CAMERA_HEIGHT_M - up_m) / forward_m


def _draw_floor_grid(pen: ImageDraw.ImageDraw, view: _View, drive: Drive, index: int) -> None:
    """Lines fixed to the floor, which is what shows the robot's own motion."""
    dark = tuple(channel * 3 // 4 for channel in drive.floor_colour)
    stroke = max(1, view.width // 320)
    travelled = float(drive.distance_m[0] - drive.distance_m[index])
    drifted = float(drive.offset_m[0] - drive.offset_m[index])
    for forward in np.arange(_GRID_M - travelled % _GRID_M, 12.0, _GRID_M):
        row = view.row(0.0, max(float(forward), _NEAR_M))
        pen.line((0, row, view.width, row), fill=dark, width=stroke)
    for left in np.arange(-6.0, 6.0 + _GRID_M, _GRID_M) - drifted % _GRID_M:
        ends = [(view.column(float(left), forward), view.row(0.0, forward)) for forward in (_NEAR_M, 12.0)]
        pen.line(ends, fill=dark, width=stroke)


def _draw_target(pen: ImageDraw.ImageDraw, view: _View, drive: Drive, index: int, left: float) -> None:
    forward = float(drive.distance_m[index])
    tall = drive.target_height_m
    half = tall * (0.16 if drive.target == "bottle" else 0.5)

    def box(low_m: float, high_m: float, half_m: float, fill: Colour) -> None:
        # At least two pixels, so that a target in a tiny test image does not vanish.
        x0, x1 = view.column(left + half_m, forward), view.column(left - half_m, forward)
        y0, y1 = view.row(high_m, forward), view.row(low_m, forward)
        pen.rectangle((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)), fill=fill)

    box(0.0, tall, half, drive.target_colour)
    if view.row(0.0, forward) - view.row(tall, forward) < _SMALLEST_DETAILED_PX:
        return
    if drive.target == "bottle":
        box(tall, tall * 1.25, half * 0.4, (230, 230, 235))
        box(tall * 0.35, tall * 0.65, half, (245, 245, 240))
    else:
        box(tall * 0.9, tall, half * 1.05, (70, 74, 95))
        for part in (0.25, 0.5, 0.75):
            box(tall * part - 0.01, tall * part + 0.01, half * 0.9, (70, 74, 95))
