"""A USB camera, by the name of its device. A device that is not there is answered with the list of those that are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bundle.errors import CameraError
from runtime.cameras.opencv import OpenCvCamera, load_cv2
from runtime.robot_file import V4l2Camera

_DEV, _SYS = Path("/dev"), Path("/sys/class/video4linux")
_BUFFERED = 4  # OpenCV's default; with a single buffer the camera would wait for us


def open_v4l2(config: V4l2Camera) -> OpenCvCamera:
    """The camera, not yet connected.

    Raises:
        CameraError: OpenCV is not installed.
    """
    cv2 = load_cv2("v4l2")
    return OpenCvCamera(config, cv2, lambda: _connect(cv2, config), buffered=_BUFFERED)


def device_path(device: str) -> Path:
    """`/dev/video0` for "0", and any path as it is."""
    return _DEV / f"video{int(device)}" if device.isdecimal() else Path(device)


def devices(dev: Path = _DEV, sys: Path = _SYS) -> list[str]:
    """The video devices of this machine, each with the name that its driver gives it."""
    found = []
    for path in sorted(dev.glob("video*")):
        try:
            name = (sys / path.name / "name").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            name = "?"
        found.append(f"{path} ({name})")
    return found


def _connect(cv2: Any, config: V4l2Camera) -> Any:
    path = device_path(config.device)
    if not path.exists():
        raise CameraError(
            f"there is no camera {path}",
            got=", ".join(devices()) or "no video device at all",
            expected=str(path),
            hint="plug it in, or write another device into the robot file; names under /dev/v4l/by-id stay the same.",
        )
    if not os.access(path, os.R_OK | os.W_OK):
        raise CameraError(
            f"{path} may not be opened", got="no permission", hint="sudo usermod -aG video $USER, then log in again."
        )
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_V4L2)
    if not capture.isOpened():
        raise CameraError(
            f"{path} cannot be opened",
            hint=f"another program may hold it (fuser -v {path} tells), or it gives no pictures, as each second device of a camera.",
        )
    if config.fourcc:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*config.fourcc.ljust(4)[:4]))
    for prop, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, config.width),
        (cv2.CAP_PROP_FRAME_HEIGHT, config.height),
        (cv2.CAP_PROP_FPS, config.fps),
    ):
        if value:
            capture.set(prop, value)
    given = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace")
    if config.fourcc and given.strip("\0 ") and given.strip() != config.fourcc.strip():
        capture.release()
        raise CameraError(
            f"{path} has no pixel format {config.fourcc}",
            got=given,
            expected=config.fourcc,
            hint=f"v4l2-ctl -d {path} --list-formats-ext lists what it has, by size and rate.",
        )
    return capture
