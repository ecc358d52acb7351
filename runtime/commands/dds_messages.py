"""ROS 2's velocity messages as cyclonedds types. Imports cyclonedds, so it is imported only by what has found it.

The names are those that ROS 2 gives its types on the wire; fields and order are those of geometry_msgs, std_msgs and builtin_interfaces.
Annotations are evaluated here, not postponed as elsewhere: cyclonedds looks up postponed ones in this module alone, and finds no `str`.
"""

from dataclasses import dataclass

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.types import float64, int32, uint32


@dataclass
class Vector3(IdlStruct, typename="geometry_msgs::msg::dds_::Vector3_"):
    """geometry_msgs/Vector3."""

    x: float64
    y: float64
    z: float64


@dataclass
class TwistMessage(IdlStruct, typename="geometry_msgs::msg::dds_::Twist_"):
    """geometry_msgs/Twist."""

    linear: Vector3
    angular: Vector3


@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    """builtin_interfaces/Time."""

    sec: int32
    nanosec: uint32


@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    """std_msgs/Header."""

    stamp: Time
    frame_id: str


@dataclass
class TwistStampedMessage(IdlStruct, typename="geometry_msgs::msg::dds_::TwistStamped_"):
    """geometry_msgs/TwistStamped."""

    header: Header
    twist: TwistMessage
