"""As much of rclpy and geometry_msgs as runtime/commands/ros2.py uses, for tests on machines without ROS 2.

It proves that the sink calls what rclpy's documentation names, in a sensible order and with the right types; it proves nothing about a real
rclpy, its middleware or its timing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass
class FakeRos:
    """The network of this process. Tests change it and look at it.

    Attributes:
        published: (topic, message), in order.
        profiles: QoSProfile by topic.
        subscriptions: what publishers count as their receivers.
        others: (node name, namespace) of foreign publishers on every topic.
        wants: (type, reliability) of foreign subscriptions to every topic.
        broken: error text of whatever is tried from now on; empty where all is well.
        calls: init and shutdown calls with what they were given.
    """

    published: list[tuple[str, Any]] = field(default_factory=list)
    profiles: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, Any] = field(default_factory=dict)
    subscriptions: int = 1
    others: list[tuple[str, str]] = field(default_factory=list)
    wants: list[tuple[str, ReliabilityPolicy]] = field(default_factory=list)
    broken: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def modules(self) -> dict[str, ModuleType]:
        """To put into sys.modules."""
        ros = self

        class Context(_Context):
            def __init__(self) -> None:
                super().__init__(ros)

        def init(*, args: list[str] | None = None, context: Any = None, domain_id: int | None = None) -> None:
            ros.check()
            ros.calls.append(("init", {"args": args, "domain_id": domain_id}))
            context.is_up = True

        def create_node(name: str, *, context: Any, **options: bool) -> _Node:
            ros.check()
            ros.nodes[name] = options
            return _Node(ros, name, context)

        return {
            "rclpy": _module("rclpy", init=init, create_node=create_node),
            "rclpy.context": _module("rclpy.context", Context=Context),
            "rclpy.qos": _module(
                "rclpy.qos",
                DurabilityPolicy=DurabilityPolicy,
                HistoryPolicy=HistoryPolicy,
                QoSProfile=QoSProfile,
                ReliabilityPolicy=ReliabilityPolicy,
            ),
            "geometry_msgs": _module(
                "geometry_msgs", msg=_module("geometry_msgs.msg", Twist=Twist, TwistStamped=TwistStamped)
            ),
            "geometry_msgs.msg": _module("geometry_msgs.msg", Twist=Twist, TwistStamped=TwistStamped),
        }

    def install(self) -> None:
        """For processes of tests: everything that imports rclpy from now on gets this one."""
        sys.modules.update(self.modules())

    def check(self) -> None:
        """Fail where told to."""
        if self.broken:
            raise RuntimeError(self.broken)


class DurabilityPolicy(Enum):
    """rclpy.qos.DurabilityPolicy."""

    VOLATILE = 2


class HistoryPolicy(Enum):
    """rclpy.qos.HistoryPolicy."""

    KEEP_LAST = 1


class ReliabilityPolicy(Enum):
    """rclpy.qos.ReliabilityPolicy."""

    RELIABLE = 1
    BEST_EFFORT = 2


@dataclass(frozen=True, kw_only=True)
class QoSProfile:
    """rclpy.qos.QoSProfile."""

    history: HistoryPolicy
    depth: int
    reliability: ReliabilityPolicy
    durability: DurabilityPolicy


class Vector3:
    """geometry_msgs.msg.Vector3, which takes nothing but floats."""

    def __init__(self) -> None:
        self.x = self.y = self.z = 0.0

    def __setattr__(self, name: str, value: object) -> None:
        assert type(value) is float, f"the {name!r} field must be of type 'float'"
        object.__setattr__(self, name, value)


class Twist:
    """geometry_msgs.msg.Twist."""

    def __init__(self) -> None:
        self.linear, self.angular = Vector3(), Vector3()


class TwistStamped:
    """geometry_msgs.msg.TwistStamped."""

    def __init__(self) -> None:
        self.header = SimpleNamespace(stamp=None, frame_id="")
        self.twist = Twist()


class _Context:
    def __init__(self, ros: FakeRos) -> None:
        self._ros = ros
        self.is_up = False

    def try_shutdown(self) -> None:
        if self.is_up:
            self._ros.calls.append(("shutdown", {}))
        self.is_up = False


class _Node:
    def __init__(self, ros: FakeRos, name: str, context: _Context) -> None:
        self._ros, self._name, self._context = ros, name, context

    def create_publisher(
        self, message: type[Twist] | type[TwistStamped], topic: str, profile: QoSProfile
    ) -> _Publisher:
        self._ros.check()
        self._ros.profiles[topic] = profile
        return _Publisher(self._ros, message, topic, self._context)

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        self._ros.check()
        names = [(name, "/") for name in self._ros.nodes] + self._ros.others
        return [SimpleNamespace(node_name=name, node_namespace=space, topic=topic) for name, space in names]

    def get_subscriptions_info_by_topic(self, topic: str) -> list[Any]:
        self._ros.check()
        wants = ((kind, SimpleNamespace(reliability=reliability)) for kind, reliability in self._ros.wants)
        return [SimpleNamespace(topic_type=kind, qos_profile=profile) for kind, profile in wants]

    def get_clock(self) -> Any:
        moment = SimpleNamespace(to_msg=lambda: SimpleNamespace(sec=1, nanosec=2))
        return SimpleNamespace(now=lambda: moment)

    def destroy_node(self) -> None:
        del self._ros.nodes[self._name]


class _Publisher:
    def __init__(self, ros: FakeRos, message: type[object], topic: str, context: _Context) -> None:
        self._ros, self._message, self._topic, self._context = ros, message, topic, context

    def publish(self, message: object) -> None:
        self._ros.check()
        assert type(message) is self._message, "another message than the publisher's"
        assert self._context.is_up, "publishing after shutdown"
        self._ros.published.append((self._topic, message))

    def get_subscription_count(self) -> int:
        self._ros.check()
        return self._ros.subscriptions


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module
