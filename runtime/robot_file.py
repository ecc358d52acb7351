"""The robot file: everything about one robot that is not in a bundle, in one strict TOML file.

A sign, a gain or a colour order that hides in code is found when the robot has hit something. So each stands here under a name with its
unit, an unknown or missing key is an error that names its path, and nothing that moves the robot has a default. Read by
runtime/robot_toml.py. Knows nothing about how any of it is done.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from runtime.commands.base import TwistField

ColourOrder = Literal["rgb", "bgr"]
Strategy = Literal["receding_horizon", "chunk", "ensemble"]
# Nothing here is infinite, and nothing of a robot is in the ten thousands.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e4)]
# Longer than a person takes to get out of the way is no safety.
Soon = Annotated[float, msgspec.Meta(gt=0, le=5)]
Speed = Annotated[float, msgspec.Meta(gt=0, le=10)]
Count = Annotated[int, msgspec.Meta(ge=1)]
SCHEMA = 1


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every struct here: immutable, no unknown keys, fields by name."""


class _Camera(Strict, frozen=True, kw_only=True, tag_field="kind"):
    """What all cameras have.

    Attributes:
        colour_order: of the pixels as the source hands them over. Files and streams of JPEG are decoded here and give rgb.
        rotate: degrees clockwise that turn the picture upright: 0, 90, 180 or 270.
        width, height: of the picture before rotation; another size is an error. 0 takes any.
        frozen_after_s: the same pixels for so long count as a dead camera; 0 switches the check off (drawn scenes stand still, sensors do
            not).
        dark_below: a picture whose mean brightness (0 to 255) is lower counts as no picture; 0 switches the check off.
    """

    colour_order: ColourOrder
    rotate: Literal[0, 90, 180, 270] = 0
    width: Annotated[int, msgspec.Meta(ge=0)] = 0
    height: Annotated[int, msgspec.Meta(ge=0)] = 0
    frozen_after_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    dark_below: Annotated[float, msgspec.Meta(ge=0, le=255)] = 2.0


class V4l2Camera(_Camera, frozen=True, kw_only=True, tag="v4l2"):
    """A USB camera through OpenCV. `device` is a path or a number; `fourcc` e.g. MJPG or YUYV, empty leaves it to the driver."""

    device: str
    fps: Positive = 30.0
    fourcc: str = ""


class CsiCamera(_Camera, frozen=True, kw_only=True, tag="csi"):
    """A Jetson's CSI camera through nvarguscamerasrc and a GStreamer appsink (an OpenCV with GStreamer: JetPack's, not PyPI's).

    `pipeline` replaces the whole built pipeline; it must end in an appsink that gives BGR.
    """

    sensor: Annotated[int, msgspec.Meta(ge=0)] = 0
    fps: Positive = 30.0
    pipeline: str = ""


class Ros2TopicCamera(_Camera, frozen=True, kw_only=True, tag="ros2_topic"):
    """sensor_msgs/Image or CompressedImage on a topic, through rclpy where it is installed, else through cyclonedds (`via`)."""

    topic: str
    message: Literal["image", "compressed"]
    via: Literal["auto", "rclpy", "dds"] = "auto"
    domain: Annotated[int, msgspec.Meta(ge=0, le=232)] | None = None


class Ros2ServiceCamera(_Camera, frozen=True, kw_only=True, tag="ros2_service"):
    """A service that answers each call with one picture (camera_interfaces/srv/GetImage); rclpy only. `type` is package/srv/Name."""

    service: str = "get_image_service"
    type: str = "camera_interfaces/srv/GetImage"
    domain: Annotated[int, msgspec.Meta(ge=0, le=232)] | None = None


class HttpCamera(_Camera, frozen=True, kw_only=True, tag="http"):
    """A stream of JPEG pictures (multipart/x-mixed-replace, "MJPEG"), or one JPEG per GET with `snapshot`."""

    url: str
    snapshot: bool = False


class VideoCamera(_Camera, frozen=True, kw_only=True, tag="video"):
    """A video file, played at its own pace."""

    path: str
    loop: bool = False


class EpisodeCamera(_Camera, frozen=True, kw_only=True, tag="episode"):
    """A recorded episode (HDF5, or a flight recording), played at `fps`; by default at its own, or 6 a second where it has none.

    `view` is of an episode with two cameras the one that is played.
    """

    path: str
    view: Literal["static", "hand"] = "static"
    fps: Positive | None = None
    loop: bool = False


class SimulatedCamera(_Camera, frozen=True, kw_only=True, tag="simulated"):
    """A drawn scene that moves (runtime/cameras/simulated.py): for tests, soaks and a first try."""

    fps: Positive = 30.0


CameraConfig = (
    V4l2Camera
    | CsiCamera
    | Ros2TopicCamera
    | Ros2ServiceCamera
    | HttpCamera
    | VideoCamera
    | EpisodeCamera
    | SimulatedCamera
)


class _Commands(Strict, frozen=True, kw_only=True, tag_field="kind"):
    """What all ways to a robot have."""


class DdsCommands(_Commands, frozen=True, kw_only=True, tag="dds"):
    """A ROS 2 topic through cyclonedds, no ROS needed. `domain` is by default ROS_DOMAIN_ID, else 0; stamped sends TwistStamped."""

    topic: str = "/cmd_vel"
    stamped: bool = False
    frame_id: str = "base_link"
    reliable: bool = True
    domain: Annotated[int, msgspec.Meta(ge=0, le=232)] | None = None


class Ros2Commands(_Commands, frozen=True, kw_only=True, tag="ros2"):
    """The same through rclpy."""

    topic: str = "/cmd_vel"
    stamped: bool = False
    frame_id: str = "base_link"
    reliable: bool = True
    domain: Annotated[int, msgspec.Meta(ge=0, le=232)] | None = None


class UdpCommands(_Commands, frozen=True, kw_only=True, tag="udp"):
    """Datagrams of 52 bytes, the CDR form of a Twist: for simulators, bridges and tests."""

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ConsoleCommands(_Commands, frozen=True, kw_only=True, tag="console"):
    """Shows the commands on stderr and moves nothing."""


CommandConfig = DdsCommands | Ros2Commands | UdpCommands | ConsoleCommands


class Axis(Strict, frozen=True, kw_only=True):
    """From one number of the policy's chunk to one number of the Twist: `invert` turns the sign, `gain` scales.

    Attributes:
        policy_unit: what the manifest must say of this axis; a bundle that says otherwise is refused.
        gain: output per input, in m/s or rad/s per `policy_unit`.
        max_speed: m/s or rad/s, at most.
        max_acceleration: m/s2 or rad/s2, at most, while driving; a stop may be harder.
    """

    field: TwistField
    policy_unit: str
    gain: Positive
    invert: bool
    max_speed: Speed
    max_acceleration: Positive


class Safety(Strict, frozen=True, kw_only=True):
    """When to stop, in seconds and counts.

    Attributes:
        stale_frame_s: a newest good frame older than this stops the robot.
        stale_action_s: so does an action decided from a frame older than this (for a chunk: beyond the step that is played).
        stop_within_s: a stop reaches zero within this time from any speed.
        watchdog_s: the watchdog stops the robot when the loop has been silent for so long.
        resume_within_s: a robot that was held for longer stays where it is until a new instruction or a new start.
        slow_factor: speed while degraded to `slow`.
        misses_to_hold, misses_to_slow, misses_to_stop: late decisions in a row that lead to each stage.
        hits_to_recover: punctual decisions in a row that lead back by one stage.
    """

    stale_frame_s: Soon
    stale_action_s: Soon
    stop_within_s: Soon
    watchdog_s: Soon
    resume_within_s: Positive = 10.0
    slow_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    misses_to_hold: Count = 1
    misses_to_slow: Count = 2
    misses_to_stop: Count = 4
    hits_to_recover: Count = 3


class Loop(Strict, frozen=True, kw_only=True):
    """Rates and the way chunks are executed.

    Attributes:
        publish_hz: commands per second, whatever the policy does.
        decide_hz: decisions per second; by default the bundle's training cadence, which the history window depends on.
        deadline_s: a decision that takes longer is a miss; by default one decision period.
        strategy: receding_horizon plays step 0 of the newest chunk; chunk plays its steps in time, `chunk_steps` at most; ensemble averages
            what all chunks say of now, weighted exp(-ensemble_decay * age in steps).
    """

    publish_hz: Positive = 20.0
    decide_hz: Positive | None = None
    deadline_s: Positive | None = None
    strategy: Strategy = "receding_horizon"
    chunk_steps: Count = 5
    ensemble_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.1


class Recorder(Strict, frozen=True, kw_only=True):
    """The flight recorder.

    Attributes:
        folder: where recordings go; the oldest are removed first.
        max_total_gb: of all recordings in the folder together.
        max_file_mb: a longer run goes on in a new file.
        jpeg_quality: of the recorded pictures.
    """

    folder: str
    max_total_gb: Positive = 4.0
    max_file_mb: Positive = 512.0
    jpeg_quality: Annotated[int, msgspec.Meta(ge=10, le=100)] = 90


class RobotFile(Strict, frozen=True, kw_only=True):
    """One robot. `axes` is by the policy's action names; an axis that is not in it is refused rather than ignored.

    `hand_camera` is for policies that have one; others leave it alone.
    """

    schema: int
    name: str
    camera: CameraConfig
    hand_camera: CameraConfig | None = None
    commands: CommandConfig
    axes: dict[str, Axis]
    safety: Safety
    loop: Loop = Loop()
    recorder: Recorder | None = None


class AxisLimits(Strict, frozen=True, kw_only=True):
    """Of one axis; what is absent stays as it is."""

    max_speed: Positive | None = None
    max_acceleration: Positive | None = None


class SafetyLimits(Strict, frozen=True, kw_only=True):
    """See Safety; what is absent stays as it is."""

    stale_frame_s: Positive | None = None
    stale_action_s: Positive | None = None
    stop_within_s: Positive | None = None
    watchdog_s: Positive | None = None
    resume_within_s: Positive | None = None
    slow_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None


class LimitsFile(Strict, frozen=True, kw_only=True):
    """Local limits, for a room, a visitor, a first run: they can only tighten what the robot file says."""

    schema: int
    axes: dict[str, AxisLimits] = {}
    safety: SafetyLimits = SafetyLimits()


def kind_of(config: CameraConfig | CommandConfig) -> str:
    """Its `kind` in the file."""
    return str(config.__struct_config__.tag)
