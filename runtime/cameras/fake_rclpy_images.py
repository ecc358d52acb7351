"""A stand-in for the part of rclpy that cameras use, for machines without ROS: topics and services inside one process.

It has the names and the manners that runtime/cameras/ros2.py relies on, as rclpy's documentation gives them for ROS 2 Humble. It proves
that the code hangs together; it proves nothing about the real rclpy, about discovery, or about a network.

    ros = FakeRos()
    sys.modules.update(ros.modules())
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class FakeRos:
    """The whole of ROS. Publish and serve from any thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.subscriptions: list[_Subscription] = []
        self.services: dict[str, Callable[[Any], Any]] = {}
        self.publishers: dict[str, list[str]] = {}  # types by topic
        self.domains: list[int | None] = []
        self.contexts_open = 0

    def publish(self, topic: str, message: Any) -> None:
        """Hand a message to all subscriptions of a topic; each keeps the newest."""
        with self.changed:
            for subscription in self.subscriptions:
                if subscription.topic == topic and isinstance(message, subscription.type):
                    subscription.waiting = message
            self.changed.notify_all()

    def serve(self, name: str, answer: Callable[[Any], Any]) -> None:
        """Offer a service. `answer` gets the request; it may raise, and None means that no answer comes."""
        with self.changed:
            self.services[name] = answer
            self.changed.notify_all()

    def modules(self) -> dict[str, ModuleType]:
        """What to put into sys.modules."""
        modules = {
            "rclpy": _module(
                "rclpy", init=self._init, shutdown=self._shutdown, create_node=lambda name, *, context: _Node(self)
            ),
            "rclpy.context": _module("rclpy.context", Context=_Context),
            "rclpy.executors": _module(
                "rclpy.executors", SingleThreadedExecutor=lambda *, context: _Executor(self, context)
            ),
            "rclpy.qos": _module(
                "rclpy.qos",
                QoSProfile=lambda **settings: SimpleNamespace(**settings),
                HistoryPolicy=SimpleNamespace(KEEP_LAST=1),
                ReliabilityPolicy=SimpleNamespace(BEST_EFFORT=2),
                DurabilityPolicy=SimpleNamespace(VOLATILE=2),
            ),
            "sensor_msgs": _module("sensor_msgs"),
            "sensor_msgs.msg": _module("sensor_msgs.msg", Image=Image, CompressedImage=CompressedImage),
            "camera_interfaces": _module("camera_interfaces"),
            "camera_interfaces.srv": _module("camera_interfaces.srv", GetImage=GetImage),
        }
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        return modules

    def _init(self, *, context: _Context, domain_id: int | None = None) -> None:
        if context.valid:
            raise RuntimeError("Context.init() must only be called once")
        context.valid = True
        self.contexts_open += 1
        self.domains.append(domain_id)

    def _shutdown(self, *, context: _Context) -> None:
        if not context.valid:
            raise RuntimeError("Context must be initialized before it can be shutdown")
        context.valid = False
        self.contexts_open -= 1


def header(stamp_s: float = 0.0) -> SimpleNamespace:
    """std_msgs/Header."""
    seconds = int(stamp_s)
    return SimpleNamespace(
        stamp=SimpleNamespace(sec=seconds, nanosec=round((stamp_s - seconds) * 1e9)), frame_id="camera"
    )


class Image:
    """sensor_msgs/Image, its data as rclpy has it."""

    def __init__(self, *, height: int, width: int, encoding: str, step: int, data: bytes, stamp_s: float = 0.0) -> None:
        self.header = header(stamp_s)
        self.height, self.width, self.encoding, self.step = height, width, encoding, step
        self.is_bigendian = 0
        self.data = array.array("B", data)


class CompressedImage:
    """sensor_msgs/CompressedImage."""

    def __init__(self, *, format: str, data: bytes, stamp_s: float = 0.0) -> None:
        self.header = header(stamp_s)
        self.format = format
        self.data = array.array("B", data)


class GetImage:
    """camera_interfaces/srv/GetImage."""

    class Request:
        """Empty."""

    class Response:
        """Has the picture."""

        def __init__(self, image: Any) -> None:
            self.image = image


class _Context:
    def __init__(self) -> None:
        self.valid = False


class _Subscription:
    def __init__(self, message_type: type, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        self.type, self.topic, self.callback, self.qos = message_type, topic, callback, qos
        self.waiting: Any = None


class _Node:
    def __init__(self, ros: FakeRos) -> None:
        self._ros = ros
        self.subscriptions: list[_Subscription] = []

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], qos: Any) -> _Subscription:
        subscription = _Subscription(kind, topic, callback, qos)
        with self._ros.changed:
            self.subscriptions.append(subscription)
            self._ros.subscriptions.append(subscription)
        return subscription

    def get_publishers_info_by_topic(self, topic: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(topic_type=kind) for kind in self._ros.publishers.get(topic, [])]

    def create_client(self, kind: type, name: str) -> _Client:
        return _Client(self._ros, name)

    def destroy_node(self) -> None:
        with self._ros.changed:
            self._ros.subscriptions = [other for other in self._ros.subscriptions if other not in self.subscriptions]


class _Client:
    def __init__(self, ros: FakeRos, name: str) -> None:
        self._ros, self._name = ros, name

    def wait_for_service(self, timeout_sec: float) -> bool:
        with self._ros.changed:
            return self._ros.changed.wait_for(lambda: self._name in self._ros.services, timeout_sec)

    def call_async(self, request: Any) -> _Future:
        future = _Future(self._ros)
        threading.Thread(target=future.run, args=(self._ros.services[self._name], request), daemon=True).start()
        return future


class _Future:
    def __init__(self, ros: FakeRos) -> None:
        self._ros = ros
        self._result: Any = None
        self._error: Exception | None = None

    def run(self, answer: Callable[[Any], Any], request: Any) -> None:
        result, error = None, None
        try:
            result = answer(request)
        except Exception as raised:  # what the far side raises arrives as the future's exception
            error = raised
        with self._ros.changed:
            self._result, self._error = result, error
            self._ros.changed.notify_all()

    def done(self) -> bool:
        return self._result is not None or self._error is not None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> Any:
        return self._result


class _Executor:
    def __init__(self, ros: FakeRos, context: _Context) -> None:
        self._ros, self._context = ros, context
        self._nodes: list[_Node] = []

    def add_node(self, node: _Node) -> None:
        self._nodes.append(node)

    def spin_once(self, timeout_sec: float) -> None:
        if not self._context.valid:
            raise RuntimeError("the context is not valid")
        with self._ros.changed:
            self._ros.changed.wait_for(lambda: self._ready() is not None, timeout_sec)
            subscription = self._ready()
            if subscription is None:
                return
            message, subscription.waiting = subscription.waiting, None
        subscription.callback(message)

    def spin_until_future_complete(self, future: _Future, timeout_sec: float) -> None:
        deadline = time.monotonic() + timeout_sec
        with self._ros.changed:
            self._ros.changed.wait_for(future.done, max(0.0, deadline - time.monotonic()))

    def shutdown(self, timeout_sec: float) -> bool:
        self._nodes.clear()
        return True

    def _ready(self) -> _Subscription | None:
        waiting = (entry for node in self._nodes for entry in node.subscriptions if entry.waiting is not None)
        return next(waiting, None)


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # a package: its parts are imported by their own names
    vars(module).update(content)
    return module
