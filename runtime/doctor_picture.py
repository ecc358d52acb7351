"""Draws doctor.png: what the camera gives, what the policy makes of it, and how it would look with red and blue exchanged.

Whether colours are right, the picture is upright, and the target still there after the squash is seen at a glance, and by nobody but a
person. So the picture is the test, and no heuristic pretends to know.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_HEIGHT = 400  # of the pictures in it
_WIDEST = 720
_MARGIN, _HEAD, _FOOT = 24, 66, 46
_PAPER, _INK, _FAINT, _WARNING = (250, 250, 248), (32, 33, 36), (110, 112, 118), (176, 42, 30)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_doctor(camera: NDArray[np.uint8], policy: NDArray[np.uint8], facts: str, seen_by_policy: str) -> bytes:
    """The picture as PNG.

    Args:
        camera: uint8 [H, W, 3] RGB, as the control loop gets it.
        policy: uint8 [size, size, 3] RGB, as the vision stage gets it.
        facts: a line on the camera.
        seen_by_policy: a line on how the second was made of the first.
    """
    shown, swapped = (_fit(pixels, Image.Resampling.LANCZOS) for pixels in (camera, camera[..., ::-1]))
    panels = (
        (shown, "What the camera gives", "Upright? Colours as in the room?", _INK),
        (_fit(policy, Image.Resampling.NEAREST), "What the policy sees", seen_by_policy, _INK),
        (swapped, "Red and blue exchanged", "If this one looks right, colour_order is wrong.", _WARNING),
    )
    title, small = _font(21), _font(15)
    columns = [max(picture.width, _width(heading, title), _width(line, small)) for picture, heading, line, _ in panels]
    width = max(sum(columns) + _MARGIN * (len(panels) + 1), _width(facts, small) + 2 * _MARGIN)
    sheet = Image.new("RGB", (width, _HEAD + _HEIGHT + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    left = _MARGIN
    for (picture, heading, line, colour), column in zip(panels, columns, strict=True):
        pen.text((left, 12), heading, fill=colour, font=title)
        pen.text((left, 39), line, fill=colour if colour != _INK else _FAINT, font=small)
        top = _HEAD + (_HEIGHT - picture.height) // 2
        sheet.paste(picture, (left, top))
        pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FAINT)
        left += column + _MARGIN
    pen.text((_MARGIN, _HEAD + _HEIGHT + 14), facts, fill=_FAINT, font=small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fit(pixels: NDArray[np.uint8], how: Image.Resampling) -> Image.Image:
    """As high as the sheet allows, in its own proportions."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(_HEIGHT / image.height, _WIDEST / image.width)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)


def _width(text: str, font: Font) -> int:
    return math.ceil(font.getbbox(text)[2])


def _font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # Pillow before 10.1, or without FreeType: one small font
        return ImageFont.load_default()
