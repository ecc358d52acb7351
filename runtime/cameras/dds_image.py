"""A ROS 2 image topic read without ROS, through cyclonedds.

The reader is best effort and keeps the last picture, as is usual for sensors: it matches reliable publishers too, a lost picture is not
sent again, and none queues up. ROS puts `rt` before a topic's name and a namespace of its own into a type's. Domain: the robot file's, else
ROS_DOMAIN_ID, else 0. Which network is used is said in CYCLONEDDS_URI, as with every program that uses cyclonedds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bundle.errors import CameraError
from runtime.cameras.base import Frame
from runtime.cameras.ros_cdr import CompressedImage, Image, read_compressed_image, read_image
from runtime.cameras.ros_image import check_types, frame_of
from runtime.cameras.source_clock import SourceClock
from runtime.robot_file import Ros2TopicCamera
from runtime.ros_names import dds_topic, obey_discovery, resolve_domain, ros_type

_MOST_WRITERS = 1000  # in a domain


class DdsCamera:
    """See Camera."""

    def __init__(self, config: Ros2TopicCamera) -> None:
        """Raises:
        CameraError: cyclonedds is not installed, or ROS_DOMAIN_ID is no domain.
        """
        try:
            import cyclonedds.builtin
            import cyclonedds.core
            import cyclonedds.domain
            import cyclonedds.sub
            import cyclonedds.topic
            import cyclonedds.util
        except ImportError as error:
            raise CameraError(
                "a ROS 2 topic needs rclpy or cyclonedds, and neither is here",
                got=error,
                hint="source /opt/ros/humble/setup.bash where ROS is installed, else pip install 'jetvla[dds]'",
            ) from None
        self._dds: Any = cyclonedds
        self._config = config
        self._domain = resolve_domain(config.domain, CameraError)
        self._type = image_type(config.message)
        self._reader: Any = None
        self._waitset: Any = None
        self._others: Any = None
        self._there: Any = None
        self._clock = SourceClock()

    def open(self) -> None:
        """Join the domain and subscribe; whether anybody publishes shows only later.

        Raises:
            CameraError: DDS cannot be started.
        """
        self.close()
        core = self._dds.core
        qos = core.Qos(
            core.Policy.Reliability.BestEffort, core.Policy.Durability.Volatile, core.Policy.History.KeepLast(1)
        )
        obey_discovery(CameraError)
        try:
            participant = self._dds.domain.DomainParticipant(self._domain)
            topic = self._dds.topic.Topic(participant, dds_topic(self._config.topic), self._type, qos=qos)
            self._reader = self._dds.sub.DataReader(participant, topic, qos=qos)
            self._others = self._dds.builtin.BuiltinDataReader(
                participant, self._dds.builtin.BuiltinTopicDcpsPublication
            )
            states = core.ViewState.Any | core.InstanceState.Alive | core.SampleState.Any
            self._there = core.ReadCondition(self._others, states)
            self._waitset = core.WaitSet(participant)
            states = core.ViewState.Any | core.InstanceState.Any | core.SampleState.NotRead
            self._waitset.attach(core.ReadCondition(self._reader, states))
        except core.DDSException as error:
            self.close()
            raise CameraError(
                f"cannot read the topic {self._config.topic} in DDS domain {self._domain}",
                got=error,
                hint="look at CYCLONEDDS_URI and at the network interfaces; domains of ROS are 0 to 232.",
            ) from None
        self._clock = SourceClock()

    def read(self, timeout_s: float) -> Frame | None:
        """The newest picture.

        Raises:
            FrameError: it is damaged.
            CameraError: it is not as configured, nor is what others publish on the topic, or the reader has failed.
        """
        if self._reader is None:
            raise CameraError(f"the topic {self._config.topic} is not open", hint="open it first.")
        newest = None
        try:
            self._waitset.wait(self._dds.util.duration(seconds=timeout_s))
            while samples := self._reader.take(N=8):
                valid = [sample for sample in samples if sample.sample_info.valid_data]
                newest = valid[-1] if valid else newest
            published = self._published() if newest is None and not self.publishers() else set()
        except self._dds.core.DDSException as error:
            raise CameraError(
                f"the topic {self._config.topic} is lost", got=error, hint="look at the network interfaces."
            ) from None
        if newest is None:
            check_types(published, self._config)
            return None
        return frame_of(newest, self._config, self._config.topic, self._clock, time.monotonic())

    def publishers(self) -> int:
        """How many publishers this reader is matched with."""
        return 0 if self._reader is None else len(self._reader.get_matched_publications())

    def _published(self) -> set[str]:
        """The types that others publish on the topic, as ROS names them."""
        found = self._others.read(N=_MOST_WRITERS, condition=self._there)
        return {ros_type(one.type_name) for one in found if one.topic_name == dds_topic(self._config.topic)}

    def close(self) -> None:
        """Leave the domain; what nobody refers to any more is deleted."""
        self._waitset = self._there = self._others = None
        self._reader = None


def image_type(message: str) -> Any:
    """cyclonedds' description of the message type, which decodes with ros_cdr.py. `message`: image or compressed."""
    import cyclonedds.idl
    import cyclonedds.idl.types

    make: Any = cyclonedds.idl.make_idl_struct
    kinds: Any = cyclonedds.idl.types
    octets = kinds.sequence[kinds.uint8]
    stamp = make("Time_", "builtin_interfaces::msg::dds_::Time_", {"sec": kinds.int32, "nanosec": kinds.uint32})
    header = make("Header_", "std_msgs::msg::dds_::Header_", {"stamp": stamp, "frame_id": str})
    decode: Callable[[bytes], CompressedImage | Image]
    fields: dict[str, Any]
    if message == "compressed":
        name, decode = "CompressedImage_", read_compressed_image
        fields = {"header": header, "format": str, "data": octets}
    else:
        name, decode = "Image_", read_image
        size = {"height": kinds.uint32, "width": kinds.uint32}
        rest = {"encoding": str, "is_bigendian": kinds.uint8, "step": kinds.uint32, "data": octets}
        fields = {"header": header} | size | rest
    made = make(name, f"sensor_msgs::msg::dds_::{name}", fields)
    made.deserialize = staticmethod(decode)
    return made
