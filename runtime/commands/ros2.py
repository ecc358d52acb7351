"""Commands to a ROS 2 topic through rclpy, where ROS 2 is installed: with the middleware, security and discovery that it is set up with.

A context and a node of its own, which take no arguments of this program and install no signal handlers; publishing needs no executor.
Quality of service as in runtime/commands/dds.py, and for the same reasons. Tested against runtime/commands/fake_rclpy.py only.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist, why_not
from runtime.commands.cdr import encode_frame_id
from runtime.robot_file import Ros2Commands

_LOOK_S = 0.05


class Ros2Sink:
    """A publisher on one topic.

    Attributes:
        identity: name of its node, unique in the network.

    Raises:
        CommandError: rclpy is missing, or ROS 2 refuses the topic or the domain.
    """

    def __init__(self, config: Ros2Commands, domain: int) -> None:
        self._where = f"ROS 2 topic {config.topic} in domain {domain}"
        self._config = config
        encode_frame_id(config.frame_id)
        try:
            import rclpy
            from geometry_msgs import msg
            from rclpy.context import Context
            from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
        except ImportError as error:
            raise CommandError(
                "rclpy is not installed",
                got=error,
                hint="source ROS 2 first (source /opt/ros/humble/setup.bash), with the Python that it was built for; "
                'or set kind = "dds" under [commands].',
            ) from None
        self._messages = msg
        self._reliable = ReliabilityPolicy.RELIABLE
        self.identity = f"jetvla_commands_{os.getpid()}_{os.urandom(4).hex()}"
        self._closed = False
        self._context = Context()
        try:
            rclpy.init(args=[], context=self._context, domain_id=domain)
            self._node = rclpy.create_node(
                self.identity,
                context=self._context,
                use_global_arguments=False,
                start_parameter_services=False,
                enable_rosout=False,
            )
            self._publisher = self._node.create_publisher(
                msg.TwistStamped if config.stamped else msg.Twist,
                config.topic,
                QoSProfile(
                    history=HistoryPolicy.KEEP_LAST,
                    depth=1,
                    reliability=ReliabilityPolicy.RELIABLE if config.reliable else ReliabilityPolicy.BEST_EFFORT,
                    durability=DurabilityPolicy.VOLATILE,
                ),
            )
            self._message(ZERO)
        except Exception as error:  # rclpy's errors have no common base
            self._context.try_shutdown()
            raise self._error("cannot publish", error) from error
        self._opened_s = time.monotonic()

    def send(self, twist: Twist) -> None:
        """See CommandSink."""
        if self._closed:
            raise self._error("cannot publish", "the connection was closed")
        try:
            self._publisher.publish(self._message(twist))
        except Exception as error:  # rclpy's errors have no common base
            raise self._error("cannot publish", error) from error

    def listeners(self) -> int | None:
        """Matched subscriptions: see CommandSink."""
        try:
            return 0 if self._closed else int(self._publisher.get_subscription_count())
        except Exception:  # a context that somebody has shut down: nobody can tell
            return None

    def competitors(self, *, exclude: Collection[str] = (), wait_s: float = 1.0) -> list[str]:
        """Names of the nodes that publish on the topic too; see DdsSink.competitors."""
        allowed = {self.identity, *exclude}
        while True:
            try:
                infos = self._node.get_publishers_info_by_topic(self._config.topic)
            except Exception as error:  # rclpy's errors have no common base
                raise self._error("cannot tell who else publishes", error) from error
            others = {
                f"{one.node_namespace.rstrip('/')}/{one.node_name}" for one in infos if one.node_name not in allowed
            }
            if others or time.monotonic() - self._opened_s > wait_s:
                return [f"node {other}" for other in sorted(others)]
            time.sleep(_LOOK_S)

    def misfits(self) -> list[str]:
        """See DdsSink.misfits."""
        try:
            infos = [] if self._closed else self._node.get_subscriptions_info_by_topic(self._config.topic)
        except Exception:  # as in `listeners`
            return []
        wants = Counter((one.topic_type, one.qos_profile.reliability == self._reliable) for one in infos)
        sent = "geometry_msgs/msg/TwistStamped" if self._config.stamped else "geometry_msgs/msg/Twist"
        return why_not(wants, sent, reliable=self._config.reliable)

    def close(self) -> None:
        """See CommandSink."""
        if self._closed:
            return
        self._closed = True
        self._node.destroy_node()
        self._context.try_shutdown()

    def _message(self, twist: Twist) -> object:
        message = self._messages.TwistStamped() if self._config.stamped else self._messages.Twist()
        velocity = message
        if self._config.stamped:
            message.header.stamp = self._node.get_clock().now().to_msg()
            message.header.frame_id = self._config.frame_id
            velocity = message.twist
        for part, x, y, z in (
            (velocity.linear, twist.linear_x, twist.linear_y, twist.linear_z),
            (velocity.angular, twist.angular_x, twist.angular_y, twist.angular_z),
        ):
            part.x, part.y, part.z = float(x), float(y), float(z)  # rclpy takes nothing but floats
        return message

    def _error(self, what: str, got: object) -> CommandError:
        return CommandError(
            f"{what}: {self._where}",
            got=got,
            hint="check `topic` and `domain` under [commands], and that `ros2 topic pub` works in the same shell.",
        )
