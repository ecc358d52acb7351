"""Cameras that OpenCV reads: what V4L2 and CSI have in common, and what to say where OpenCV is missing.

A driver keeps a few pictures for whoever reads slowly, the oldest first. A grab that had to wait was of a picture that was just taken; so
what came without waiting is dropped until one did not. Knows nothing about how a device is opened (v4l2.py, csi.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bundle.errors import CameraError
from runtime.cameras.base import Frame
from runtime.cameras.orientation import upright
from runtime.robot_file import CameraConfig, kind_of

_WAITED_S = 0.002  # what a driver had at hand is grabbed in far less
_OLDEST_STAMP_S = 1.0


def load_cv2(kind: str) -> Any:
    """The OpenCV module.

    Raises:
        CameraError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise CameraError(
            f"a camera of kind {kind} needs OpenCV",
            got=error,
            hint="pip install 'jetvla[opencv]'; on a Jetson use the OpenCV of JetPack (python3-opencv), which has GStreamer.",
        ) from None
    return cv2


class OpenCvCamera:
    """A camera behind a cv2.VideoCapture; see Camera. A read waits as long as the driver does (OpenCV: 10 s and more), not `timeout_s`.

    Args:
        connect: gives an open VideoCapture, or raises CameraError.
        buffered: how many pictures the driver may hold back.
    """

    def __init__(self, config: CameraConfig, cv2: Any, connect: Callable[[], Any], *, buffered: int) -> None:
        self._config = config
        self._cv2 = cv2
        self._connect = connect
        self._buffered = buffered
        self._capture: Any = None

    def open(self) -> None:
        """Connect.

        Raises:
            CameraError: see Camera.
        """
        self.close()
        self._capture = self._connect()

    def read(self, timeout_s: float) -> Frame | None:
        """The next picture that is taken.

        Raises:
            CameraError: the connection is lost, or the picture has another size.
        """
        if self._capture is None:
            raise self._lost("it is not open")
        for _ in range(self._buffered + 1):
            begun = time.monotonic()
            if not self._capture.grab():
                raise self._lost("no picture")
            arrived = time.monotonic()
            if arrived - begun > _WAITED_S:
                break
        # V4L2 stamps pictures by the clock that time.monotonic() reads; other stamps are no help, and far from it.
        stamp = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1e3
        stamped = 0 <= arrived - stamp < _OLDEST_STAMP_S
        good, pixels = self._capture.retrieve()
        if not good or pixels is None:
            raise self._lost("a picture that cannot be decoded")
        return Frame(upright(pixels, self._config), stamp if stamped else arrived, stamp if stamped else None)

    def close(self) -> None:
        """Let the device go."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _lost(self, got: str) -> CameraError:
        return CameraError(
            f"the {kind_of(self._config)} camera is lost",
            got=got,
            expected="a picture",
            hint="look at its cable and its power, and at the end of `dmesg`.",
        )
