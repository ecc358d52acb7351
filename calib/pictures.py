"""Draws the worst frames of an INT8 variant with both commands on them: what an error looks like on the floor.

Photographs with arrows burnt in, as JPEG. Knows nothing about pages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.figures import plain

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_PHOTO_WIDTH, _PHOTO_HEIGHT = 480, 480
_REFERENCE, _CANDIDATE, _EDGE = (90, 175, 255), (255, 160, 60), (0, 0, 0)


def worst_picture(
    frame: NDArray[np.uint8], reference: Sequence[float], candidate: Sequence[float], names: Sequence[str]
) -> bytes:
    """JPEG of a frame with both commands on it, at most 480 pixels wide.

    linear_x points up, linear_y (left is positive) to the left, angular_z is an arc from straight ahead. Both commands have one scale: the
    longer one is as long as fits. The numbers stand below.

    Args:
        frame: uint8 [H, W, 3] RGB.
        reference, candidate: commands in physical units, by `names`.
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    scale = min(_PHOTO_WIDTH / picture.width, _PHOTO_HEIGHT / picture.height)
    width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    line = 22
    sheet = Image.new("RGB", (_PHOTO_WIDTH, height + line * (len(names) + 1) + 8), (20, 24, 28))
    sheet.paste(picture.resize((width, height), Image.Resampling.BILINEAR), ((_PHOTO_WIDTH - width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    # What is not finite has no arrow; it stands below.
    finite = [np.nan_to_num(values, posinf=0.0, neginf=0.0).tolist() for values in (reference, candidate)]
    both = [dict(zip(names, values, strict=True)) for values in finite]
    vectors = [(each.get("linear_x", 0.0), each.get("linear_y", 0.0)) for each in both]
    turns = [each.get("angular_z", 0.0) for each in both]
    base = (_PHOTO_WIDTH / 2, height * 0.86)
    longest = max([math.hypot(*vector) for vector in vectors] + [1e-6])
    hardest = max([abs(turn) for turn in turns] + [1e-6])
    # A command that goes backwards needs its room below.
    back = max(-min(vector[0] for vector in vectors), 0.0) / longest
    base = (base[0], base[1] - 0.45 * height * back)
    reach = 0.45 * height / longest
    # The reference is broad and below, so that it can be seen beside a candidate that does the same.
    for vector, turn, colour, broad in zip(vectors, turns, (_REFERENCE, _CANDIDATE), (9, 4), strict=True):
        if "linear_x" in names or "linear_y" in names:
            tip = (base[0] - vector[1] * reach, base[1] - vector[0] * reach)
            _arrow(draw, base, tip, colour, broad)
        if "angular_z" in names:
            _arc(draw, base, 0.3 * height, 80 * turn / hardest, colour, max(broad - 2, 3))
    font = _font(16)
    columns = (10, 200, 345)
    for column, text, colour in zip(
        columns, ("", "reference", "INT8"), ((160, 168, 176), _REFERENCE, _CANDIDATE), strict=True
    ):
        draw.text((column, height + 4), text, fill=colour, font=font)
    for row, (name, one, two) in enumerate(zip(names, reference, candidate, strict=True), start=1):
        top = height + 4 + row * line
        cells = ((plain(name, 20), (220, 226, 232)), (f"{one:+.4f}", _REFERENCE), (f"{two:+.4f}", _CANDIDATE))
        for column, (text, colour) in zip(columns, cells, strict=True):
            draw.text((column, top), text, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()


def _arrow(
    draw: ImageDraw, start: tuple[float, float], tip: tuple[float, float], colour: tuple[int, int, int], broad: int
) -> None:
    """A dot where there is no length to show."""
    length = math.dist(start, tip)
    if length < 3:
        box = (start[0] - broad, start[1] - broad, start[0] + broad, start[1] + broad)
        draw.ellipse(box, fill=colour, outline=_EDGE)
        return
    along = ((tip[0] - start[0]) / length, (tip[1] - start[1]) / length)
    head = min(3.2 * broad, length)
    neck = (tip[0] - along[0] * head, tip[1] - along[1] * head)
    for grow, fill in ((3, _EDGE), (0, colour)):
        draw.line([start, neck], fill=fill, width=broad + grow)
        _head(draw, tip, along, head, 1.3 * broad + grow / 2, fill)


def _head(
    draw: ImageDraw,
    tip: tuple[float, float],
    along: tuple[float, float],
    length: float,
    half: float,
    fill: tuple[int, int, int],
) -> None:
    neck = (tip[0] - along[0] * length, tip[1] - along[1] * length)
    sides = [(neck[0] - along[1] * half * each, neck[1] + along[0] * half * each) for each in (1, -1)]
    draw.polygon([tip, *sides], fill=fill)


def _arc(
    draw: ImageDraw,
    centre: tuple[float, float],
    radius: float,
    degrees: float,
    colour: tuple[int, int, int],
    broad: int,
) -> None:
    """From straight ahead to the left (positive) with a head at its end."""
    if abs(degrees) < 4:
        return
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    first, last = sorted((-90.0, -90.0 - degrees))  # Pillow counts clockwise from the right
    for grow, fill in ((3, _EDGE), (0, colour)):
        draw.arc(
            tuple(np.add(box, (-grow / 2, -grow / 2, grow / 2, grow / 2))), first, last, fill=fill, width=broad + grow
        )
        end = math.radians(-90 - degrees)
        at = (centre[0] + (radius - broad / 2) * math.cos(end), centre[1] + (radius - broad / 2) * math.sin(end))
        sense = math.copysign(1, -degrees)
        along = (-math.sin(end) * sense, math.cos(end) * sense)
        tip = (at[0] + along[0] * 2 * broad, at[1] + along[1] * 2 * broad)
        _head(draw, tip, along, 2.4 * broad, 1.3 * broad + grow / 2, fill)


def _font(size: int) -> Any:
    """matplotlib's, because Pillow's own has one size up to 10.0."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
