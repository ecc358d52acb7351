"""ROS 2 cameras through rclpy: a topic, or a service that is called for each picture.

Each camera has a ROS context of its own and is spun by the thread that reads it, so that it neither needs nor disturbs anything else of
ROS in this process. Topics are read best effort, the last picture only, as is usual for sensors. rclpy comes with ROS and not from PyPI.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from bundle.errors import CameraError
from runtime.cameras.base import Frame
from runtime.cameras.ros_image import check_types, frame_of
from runtime.cameras.source_clock import SourceClock
from runtime.robot_file import Ros2ServiceCamera, Ros2TopicCamera

_NODE = "jetvla_camera"
_ANSWER_S = 3.0  # a service that takes longer is taken for dead


def import_ros(module: str, what: str) -> Any:
    """A module of ROS.

    Raises:
        CameraError: it is not there.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise CameraError(
            f"{what} needs the ROS package {module.partition('.')[0]}",
            got=error,
            hint="source /opt/ros/humble/setup.bash and your workspace's install/setup.bash, with the Python that ROS uses.",
        ) from None


class _Node:
    """A context, a node and an executor, made and unmade together."""

    def __init__(self, domain: int | None) -> None:
        rclpy, executors = import_ros("rclpy", "ROS"), import_ros("rclpy.executors", "ROS")
        self._rclpy = rclpy
        self.context = import_ros("rclpy.context", "ROS").Context()
        rclpy.init(context=self.context, domain_id=domain)
        try:
            self.node = rclpy.create_node(_NODE, context=self.context)
            self.executor = executors.SingleThreadedExecutor(context=self.context)
            self.executor.add_node(self.node)
        except BaseException:
            rclpy.shutdown(context=self.context)
            raise

    def close(self) -> None:
        try:
            self.executor.shutdown(timeout_sec=1.0)
            self.node.destroy_node()
        finally:
            self._rclpy.shutdown(context=self.context)


class TopicCamera:
    """A topic; see Camera."""

    def __init__(self, config: Ros2TopicCamera) -> None:
        """Raises:
        CameraError: ROS is not installed.
        """
        what = "a camera of kind ros2_topic with via = rclpy"
        messages = import_ros("sensor_msgs.msg", what)
        import_ros("rclpy", what)
        self._type = messages.CompressedImage if config.message == "compressed" else messages.Image
        self._qos = import_ros("rclpy.qos", what)
        self._config = config
        self._ros: _Node | None = None
        self._clock = SourceClock()
        self._arrived: tuple[Any, float] | None = None

    def open(self) -> None:
        """Subscribe; whether anybody publishes shows only later."""
        self.close()
        self._ros = _Node(self._config.domain)
        qos = self._qos.QoSProfile(
            history=self._qos.HistoryPolicy.KEEP_LAST,
            depth=1,
            reliability=self._qos.ReliabilityPolicy.BEST_EFFORT,
            durability=self._qos.DurabilityPolicy.VOLATILE,
        )
        self._clock, self._arrived = SourceClock(), None
        self._ros.node.create_subscription(self._type, self._config.topic, self._take, qos)

    def read(self, timeout_s: float) -> Frame | None:
        """The newest picture.

        Raises:
            FrameError: it is damaged.
            CameraError: it is not as configured.
        """
        if self._ros is None:
            raise CameraError(f"the topic {self._config.topic} is not open", hint="open it first.")
        deadline = time.monotonic() + timeout_s
        while self._arrived is None and (left := deadline - time.monotonic()) > 0:
            self._ros.executor.spin_once(timeout_sec=left)
        if self._arrived is None:
            infos = self._ros.node.get_publishers_info_by_topic(self._config.topic)
            check_types({one.topic_type for one in infos}, self._config)
            return None
        (message, arrival_s), self._arrived = self._arrived, None
        return frame_of(message, self._config, self._config.topic, self._clock, arrival_s)

    def close(self) -> None:
        """Unsubscribe."""
        if self._ros is not None:
            ros, self._ros = self._ros, None
            ros.close()

    def _take(self, message: Any) -> None:
        self._arrived = message, time.monotonic()


class ServiceCamera:
    """A service with an answer that has the picture in its field `image`; see Camera. One call is under way at a time."""

    def __init__(self, config: Ros2ServiceCamera) -> None:
        """Raises:
        CameraError: ROS, or the package with the service's type, is not installed.
        """
        what = "a camera of kind ros2_service"
        import_ros("rclpy", what)
        package, _, name = config.type.partition("/srv/")
        if not (package.isidentifier() and name.isidentifier()):
            raise CameraError(
                "the type of the camera's service is not the name of one",
                got=config.type,
                expected="PACKAGE/srv/NAME",
                hint="`ros2 service type` with the service's name tells it.",
            )
        services = import_ros(f"{package}.srv", what)
        if not hasattr(services, name):
            raise CameraError(
                f"the ROS package {package} has no service {name}",
                expected=", ".join(entry for entry in dir(services) if entry[:1].isupper())[:200],
                hint="`ros2 service type` with the service's name tells its type.",
            )
        self._type = getattr(services, name)
        self._config = config
        self._ros: _Node | None = None
        self._client: Any = None
        self._clock = SourceClock()
        self._pending: tuple[Any, float] | None = None  # the call under way, and since when

    def open(self) -> None:
        """Look for the service.

        Raises:
            CameraError: nobody offers it.
        """
        self.close()
        self._ros = _Node(self._config.domain)
        self._clock = SourceClock()
        self._client = self._ros.node.create_client(self._type, self._config.service)
        if not self._client.wait_for_service(timeout_sec=_ANSWER_S):
            self.close()
            raise CameraError(
                f"nobody offers the service {self._config.service}",
                got=f"none within {_ANSWER_S:g} s",
                hint="start the camera node; `ros2 service list` shows what is there, in the domain of ROS_DOMAIN_ID.",
            )

    def read(self, timeout_s: float) -> Frame | None:
        """Call the service, or go on waiting for its answer. The picture counts as taken when it was asked for.

        Raises:
            FrameError: the picture is damaged.
            CameraError: it takes too long, fails, or gives a picture that is not as configured.
        """
        if self._ros is None:
            raise CameraError(f"the service {self._config.service} is not open", hint="open it first.")
        if self._pending is None:
            asked_s = time.monotonic()
            self._pending = self._client.call_async(self._type.Request()), asked_s
        future, asked_s = self._pending
        self._ros.executor.spin_until_future_complete(future, timeout_sec=timeout_s)
        if not future.done():
            if time.monotonic() - asked_s > _ANSWER_S:
                raise self._failed(f"no answer for {_ANSWER_S:g} s")
            return None
        self._pending = None
        if future.exception() is not None:
            raise self._failed(future.exception())
        image = getattr(future.result(), "image", None)
        if image is None:
            raise self._failed("an answer without a field `image`")
        return frame_of(image, self._config, self._config.service, self._clock, asked_s)

    def close(self) -> None:
        """Forget the call under way, and leave."""
        self._client = self._pending = None
        if self._ros is not None:
            ros, self._ros = self._ros, None
            ros.close()

    def _failed(self, got: object) -> CameraError:
        return CameraError(
            f"the service {self._config.service} failed",
            got=got,
            expected="an answer with a picture",
            hint="look at the camera node's own log.",
        )
