"""A Jetson's CSI camera: a GStreamer pipeline from nvarguscamerasrc to an appsink that keeps one picture and drops older ones."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from bundle.errors import CameraError
from runtime.cameras.opencv import OpenCvCamera, load_cv2
from runtime.robot_file import CsiCamera

_DEFAULT_SIZE = 1280, 720


def open_csi(config: CsiCamera) -> OpenCvCamera:
    """The camera, not yet connected.

    Raises:
        CameraError: OpenCV is not installed, or has no GStreamer.
    """
    cv2 = load_cv2("csi")
    if not has_gstreamer(cv2.getBuildInformation()):
        raise CameraError(
            "this OpenCV was built without GStreamer, which a CSI camera needs",
            got=f"OpenCV {cv2.__version__} in {cv2.__name__}, GStreamer: NO",
            expected="an OpenCV with GStreamer",
            hint="pip uninstall opencv-python opencv-python-headless, and use JetPack's: apt-get install python3-opencv.",
        )
    return OpenCvCamera(config, cv2, lambda: _connect(cv2, config), buffered=0)


def has_gstreamer(build_information: str) -> bool:
    """What cv2.getBuildInformation() says about GStreamer."""
    return re.search(r"^\s*GStreamer:\s*YES", build_information, re.MULTILINE) is not None


def pipeline(config: CsiCamera) -> str:
    """The GStreamer pipeline: the robot file's own, or one built of sensor, size (1280 x 720 where it leaves it open) and rate.

    The sensor's picture comes in the Jetson's own memory as NV12; nvvidconv copies it out as BGRx, and videoconvert drops the x.
    `sync=false`: pictures are handed over when they come, not when a clock says.
    """
    if config.pipeline:
        return config.pipeline
    width, height = config.width or _DEFAULT_SIZE[0], config.height or _DEFAULT_SIZE[1]
    rate = Fraction(config.fps).limit_denominator(1001)
    return " ! ".join(
        (
            f"nvarguscamerasrc sensor-id={config.sensor}",
            f"video/x-raw(memory:NVMM), width=(int){width}, height=(int){height}, format=(string)NV12, "
            f"framerate=(fraction){rate.numerator}/{rate.denominator}",
            "nvvidconv",
            "video/x-raw, format=(string)BGRx",
            "videoconvert",
            "video/x-raw, format=(string)BGR",
            "appsink drop=true max-buffers=1 sync=false",
        )
    )


def _connect(cv2: Any, config: CsiCamera) -> Any:
    text = pipeline(config)
    capture = cv2.VideoCapture(text, cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        raise CameraError(
            f"CSI camera {config.sensor} cannot be opened",
            got=text,
            expected="a pipeline that runs",
            hint="sudo systemctl restart nvargus-daemon helps after a crash; gst-launch-1.0 with this pipeline tells more.",
        )
    return capture
