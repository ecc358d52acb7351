"""From the pixels that a source hands over to RGB, upright: size check, colour order and rotation, in one pass and one place.

A swapped colour order or a camera that hangs upside down drives a robot in a way that looks almost right. So both are stated in the robot
file, done here for every kind of camera, and nowhere a second time. Knows nothing about how pixels are got.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundle.errors import CameraError
from runtime.robot_file import CameraConfig, kind_of


def upright(pixels: NDArray[np.uint8], config: CameraConfig) -> NDArray[np.uint8]:
    """A picture as a Frame holds it: uint8 [H, W, 3] RGB, contiguous, read-only, turned as the robot file says.

    Args:
        pixels: uint8 [H, W, 3] as the source hands it over, in `config.colour_order`; not changed.

    Raises:
        CameraError: it is not of that shape, or not of the configured size.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise CameraError(
            f"the {kind_of(config)} camera gives something that is no colour picture",
            got=f"{pixels.dtype} {list(pixels.shape)}",
            expected="uint8 [H, W, 3]",
            hint="set the camera to a colour format; for V4L2, `fourcc` in the robot file chooses one.",
        )
    got, expected = (pixels.shape[1], pixels.shape[0]), (config.width, config.height)
    if any(want not in (0, have) for want, have in zip(expected, got, strict=True)):
        raise CameraError(
            f"the {kind_of(config)} camera gives pictures of another size",
            got="{} x {}".format(*got),
            expected="{} x {}".format(*(want or "any" for want in expected)),
            hint="write the size that it gives into the robot file (width and height are before rotation; 0 takes any).",
        )
    turned = np.rot90(pixels, -(config.rotate // 90))  # a view; np.rot90 turns counter-clockwise
    out = np.empty(turned.shape, np.uint8)
    order = (2, 1, 0) if config.colour_order == "bgr" else (0, 1, 2)
    for channel, source in enumerate(
        order
    ):  # three strided copies take a quarter of the time of one copy of a reversed view
        out[..., channel] = turned[..., source]
    out.setflags(write=False)
    return out


def upright_size(config: CameraConfig) -> tuple[int, int]:
    """Width and height of the upright pictures; 0 where any is taken."""
    turned = config.rotate in (90, 270)
    return (config.height, config.width) if turned else (config.width, config.height)
