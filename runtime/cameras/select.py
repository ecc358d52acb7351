"""Makes the camera that a robot file describes. What a kind needs is imported here and not before: no robot has all of it."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from runtime.cameras.base import Camera
from runtime.robot_file import (
    CameraConfig,
    CsiCamera,
    EpisodeCamera,
    HttpCamera,
    Ros2ServiceCamera,
    Ros2TopicCamera,
    SimulatedCamera,
    V4l2Camera,
    VideoCamera,
)

log = logging.getLogger("jetvla")


def open_camera(config: CameraConfig) -> Camera:
    """The camera, not yet connected: its `open` does that.

    Raises:
        CameraError: a library that this kind needs is not installed.
    """
    if config.colour_order == "bgr" and _decodes(config):
        log.warning(
            "camera: red and blue are exchanged after decoding, because colour_order is bgr; pictures that are decoded here "
            "are rgb, unless whoever encoded them took one for the other"
        )
    return _make(config)


def _decodes(config: CameraConfig) -> bool:
    """Whether pictures come encoded, in a form that knows its own colours."""
    compressed = isinstance(config, Ros2TopicCamera) and config.message == "compressed"
    return compressed or isinstance(config, HttpCamera | VideoCamera | EpisodeCamera)


def _make(config: CameraConfig) -> Camera:
    if isinstance(config, SimulatedCamera):
        from runtime.cameras import simulated

        return simulated.SimulatedCamera(config)
    if isinstance(config, V4l2Camera):
        from runtime.cameras.v4l2 import open_v4l2

        return open_v4l2(config)
    if isinstance(config, CsiCamera):
        from runtime.cameras.csi import open_csi

        return open_csi(config)
    if isinstance(config, Ros2TopicCamera):
        return _open_topic(config)
    if isinstance(config, Ros2ServiceCamera):
        from runtime.cameras.ros2 import ServiceCamera

        return ServiceCamera(config)
    if isinstance(config, HttpCamera):
        from runtime.cameras.http_stream import HttpSnapshots, HttpStream

        return HttpSnapshots(config) if config.snapshot else HttpStream(config)
    from runtime.cameras import playback

    return playback.VideoCamera(config) if isinstance(config, VideoCamera) else playback.EpisodeCamera(config)


def _open_topic(config: Ros2TopicCamera) -> Camera:
    """Through rclpy where it is installed: it takes its settings from where every other node of the robot does."""
    if config.via == "rclpy" or (config.via == "auto" and find_spec("rclpy") is not None):
        from runtime.cameras.ros2 import TopicCamera

        return TopicCamera(config)
    from runtime.cameras.dds_image import DdsCamera

    return DdsCamera(config)
