"""Changes of what a policy sees that should not (colours, blur, crop) or should predictably (a mirror) change what it does.

A mirror is exact: image, lateral actions and words change together. Colours, blur and crop are one draw for all frames of a view, since
a camera does not change its white balance between two frames, and overlapping windows share frames. Pillow does the pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from train.draws import draw_uniform
from train.run_config import AugmentConfig

_LATERAL = frozenset({"linear_y", "angular_z"})
_PAIRS = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("왼쪽", "오른쪽"), ("좌측", "우측"))
_OTHER = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
# English words stand alone (also before a Korean particle: "left로"); Korean ones carry their particles ("왼쪽으로").
_ENGLISH = "|".join(word for word in _OTHER if word.isascii())
_KOREAN = "|".join(word for word in _OTHER if not word.isascii())
_SIDE = re.compile(rf"(?<![A-Za-z0-9])(?:{_ENGLISH})(?![A-Za-z0-9])|{_KOREAN}")


def mirror_text(text: str) -> str:
    """Left and right exchanged, in English (whole words, three spellings) and Korean; twice is the original."""
    return _SIDE.sub(lambda match: _OTHER[match[0]], text)


def other_words(instruction: str) -> str:
    """The instruction with left and right swapped, or backwards where it names neither."""
    mirrored = mirror_text(instruction)
    return mirrored if mirrored != instruction else " ".join(reversed(instruction.split()))


def mirror_actions(actions: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
    """A copy of [..., A] with `linear_y` and `angular_z` negated.

    Args:
        names: of the A columns.
    """
    mirrored = actions.copy()
    for column, name in enumerate(names):
        if name in _LATERAL:
            mirrored[..., column] = 0 - actions[..., column]  # not -x, which makes -0.0 of a stop
    return mirrored


def mirror_frame(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., H, W, 3] with left and right exchanged."""
    return np.ascontiguousarray(frame[..., ::-1, :])


class Augmenter:
    """Draws and applies colours, blur and crop.

    Args:
        config: strengths; `mirror` and `share` are decided elsewhere (train/sampling.py).
    """

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config

    def apply(self, frame: NDArray[np.uint8], draw: int) -> NDArray[np.uint8]:
        """The frame [s, s, 3], or those of several cameras [C, s, s, 3], as view `draw` has it.

        Equal draws change all frames alike. Strengths of 0 change no bit.
        """
        if frame.ndim > 3:
            return np.stack([self.apply(each, draw) for each in frame])
        config = self._config
        image = Image.fromarray(frame)
        image = _crop(image, config.crop, draw)
        for name, enhance in (
            ("brightness", ImageEnhance.Brightness),
            ("contrast", ImageEnhance.Contrast),
            ("saturation", ImageEnhance.Color),
        ):
            strength: float = getattr(config, name)
            if strength > 0:
                image = enhance(image).enhance(1 + strength * _signed(draw, name))
        if config.hue > 0:
            image = _shift_hue(image, config.hue * _signed(draw, "hue"))
        if config.blur > 0:
            image = image.filter(ImageFilter.GaussianBlur(config.blur * draw_uniform(draw, "blur")))
        return np.array(image)


def _signed(draw: int, what: str) -> float:
    """In [-1, 1)."""
    return 2 * draw_uniform(draw, what) - 1


def _crop(image: Image.Image, largest: float, draw: int) -> Image.Image:
    """Cut one share of width and height, at a random place, and scale back: a zoom that keeps shapes."""
    if largest == 0:
        return image
    cut = largest * draw_uniform(draw, "crop")
    left = image.width * cut * draw_uniform(draw, "crop x")
    top = image.height * cut * draw_uniform(draw, "crop y")
    box = (left, top, left + image.width * (1 - cut), top + image.height * (1 - cut))
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the colour circle by a share of it."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(round(shift * 256) % 256, np.uint8)  # wraps around, as the circle does
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
