"""Against the stand-in of rclpy that is shipped: real rclpy cannot be installed here."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow

from bundle.errors import CameraError
from runtime.cameras import ros2
from runtime.cameras.base import Frame
from runtime.cameras.dds_image import DdsCamera
from runtime.cameras.fake_rclpy_images import CompressedImage, FakeRos, GetImage, Image
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.ros2 import ServiceCamera, TopicCamera
from runtime.cameras.select import open_camera
from runtime.robot_file import Ros2ServiceCamera, Ros2TopicCamera
from tests.runtime.cameras.scripted import LIMIT_S, Notes, wait_until

PICTURE = np.random.default_rng(0).integers(50, 200, (6, 8, 3), dtype=np.uint8)
TOPIC = Ros2TopicCamera(topic="/image_raw", message="image", colour_order="bgr", domain=42)
SERVICE = Ros2ServiceCamera(colour_order="bgr", rotate=180)


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> FakeRos:
    fake = FakeRos()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def image(number: int = 0, stamp_s: float = 0.0) -> Image:
    data = (PICTURE + np.uint8(number))[..., ::-1]
    return Image(height=6, width=8, encoding="bgr8", step=24, data=data.tobytes(), stamp_s=stamp_s)


@pytest.fixture
def topic(ros: FakeRos) -> Iterator[TopicCamera]:
    camera = TopicCamera(TOPIC)
    camera.open()
    yield camera
    camera.close()
    camera.close()
    assert ros.contexts_open == 0


@pytest.fixture
def service(ros: FakeRos) -> Iterator[ServiceCamera]:
    ros.serve("get_image_service", lambda request: GetImage.Response(image(stamp_s=7.5)))
    camera = ServiceCamera(SERVICE)
    camera.open()
    yield camera
    camera.close()
    camera.close()
    assert ros.contexts_open == 0


def next_frame(camera: TopicCamera | ServiceCamera) -> Frame:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (frame := camera.read(0.25)) is not None:
            return frame
    raise AssertionError("no frame came")


def test_a_topic(ros: FakeRos, topic: TopicCamera) -> None:
    assert topic.read(0.01) is None
    for number in range(3):
        ros.publish("/image_raw", image(number, stamp_s=3.25 + number))
    ros.publish("/other", image(9))

    frame = topic.read(1.0)

    assert frame is not None
    assert np.array_equal(frame.pixels, PICTURE + 2)
    assert frame.source_stamp_s == 5.25
    assert topic.read(0.01) is None
    assert ros.domains == [42]
    qos = ros.subscriptions[0].qos
    assert (qos.depth, qos.history, qos.reliability) == (1, 1, 2)


def test_a_topic_of_another_type_is_named(ros: FakeRos, topic: TopicCamera) -> None:
    ros.publishers = {"/image_raw": ["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"]}
    assert topic.read(0.01) is None
    ros.publishers = {"/image_raw": ["sensor_msgs/msg/CompressedImage"], "/other": ["sensor_msgs/msg/Image"]}
    with pytest.raises(
        CameraError, match=r'(?s)/image_raw carries something else.*CompressedImage.*message = "compressed"'
    ):
        topic.read(0.01)
    ros.publishers = {"/image_raw": ["std_msgs/msg/String"]}
    with pytest.raises(CameraError, match=r"(?s)got: +std_msgs/msg/String.*another one"):
        topic.read(0.01)


def test_a_topic_that_is_waited_for(ros: FakeRos, topic: TopicCamera) -> None:
    threading.Timer(0.05, ros.publish, ["/image_raw", image()]).start()
    assert topic.read(LIMIT_S) is not None


def test_compressed_pictures(ros: FakeRos) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(PICTURE).save(buffer, "PNG")
    camera = TopicCamera(Ros2TopicCamera(topic="/c", message="compressed", colour_order="rgb"))
    camera.open()
    ros.publish("/c", CompressedImage(format="png", data=buffer.getvalue()))

    assert np.array_equal(next_frame(camera).pixels, PICTURE)
    assert ros.domains == [None]  # ROS_DOMAIN_ID is for rclpy to look at
    camera.close()


def test_a_service(service: ServiceCamera) -> None:
    begun = time.monotonic()

    frame = next_frame(service)

    assert np.array_equal(frame.pixels, PICTURE[::-1, ::-1])
    assert frame.source_stamp_s == 7.5
    assert begun <= frame.captured_s <= time.monotonic()


def test_a_service_with_compressed_pictures(ros: FakeRos, service: ServiceCamera) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(PICTURE[..., ::-1]).save(buffer, "PNG")  # whoever encoded it took BGR for RGB
    ros.serve(
        "get_image_service", lambda request: GetImage.Response(CompressedImage(format="png", data=buffer.getvalue()))
    )

    assert np.array_equal(next_frame(service).pixels, PICTURE[::-1, ::-1])


def test_a_slow_service_is_asked_once_and_its_picture_is_as_old_as_the_question(
    ros: FakeRos, service: ServiceCamera
) -> None:
    asked: list[float] = []

    def answer(request: object) -> object:
        asked.append(time.monotonic())
        time.sleep(0.3)
        return GetImage.Response(image())

    ros.serve("get_image_service", answer)
    begun = time.monotonic()
    assert service.read(0.05) is None
    assert service.read(0.05) is None

    frame = next_frame(service)

    assert len(asked) == 1
    assert begun <= frame.captured_s <= asked[0]
    assert time.monotonic() - frame.captured_s >= 0.3


def test_a_service_that_does_not_answer_fails_or_is_not_there(
    ros: FakeRos, service: ServiceCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ros2, "_ANSWER_S", 0.1)
    ros.serve("get_image_service", lambda request: None)
    assert service.read(0.05) is None
    with pytest.raises(CameraError, match=r"(?s)get_image_service failed.*no answer for 0.1 s"):
        next_frame(service)

    service.open()
    ros.serve("get_image_service", lambda request: 1 / 0)
    with pytest.raises(CameraError, match=r"(?s)failed.*division by zero"):
        next_frame(service)

    ros.serve("get_image_service", lambda request: SimpleNamespace(picture=1))
    with pytest.raises(CameraError, match="without a field `image`"):
        next_frame(service)

    ros.services.clear()
    with pytest.raises(CameraError, match=r"(?s)nobody offers the service get_image_service.*ros2 service list"):
        service.open()
    with pytest.raises(CameraError, match="not open"):
        service.read(0)


def test_a_contradicting_encoding_is_an_error(ros: FakeRos, topic: TopicCamera) -> None:
    rgb = image()
    rgb.encoding = "rgb8"
    ros.publish("/image_raw", rgb)
    with pytest.raises(CameraError, match="another colour order"):
        next_frame(topic)


def test_a_grabber_gets_over_a_service_that_restarts(ros: FakeRos) -> None:
    count = iter(range(10**6))
    ros.serve("get_image_service", lambda request: GetImage.Response(image(next(count) % 50)))
    notes = Notes()
    grabber = FrameGrabber(open_camera(SERVICE), SERVICE, on_note=notes.append)
    grabber.start()
    assert grabber.wait_newer(None, LIMIT_S) is not None
    working = ros.services["get_image_service"]
    ros.serve("get_image_service", lambda request: 1 / 0)
    wait_until(lambda: notes.kinds == ["camera lost"], "it is lost")
    newest = grabber.latest()
    ros.serve("get_image_service", working)

    assert grabber.wait_newer(newest, LIMIT_S) is not None
    wait_until(lambda: notes.kinds == ["camera lost", "camera back"], "it is back")
    grabber.close()
    wait_until(lambda: ros.contexts_open == 0, "ROS is shut down")


def test_which_way_a_topic_is_read(ros: FakeRos, monkeypatch: pytest.MonkeyPatch) -> None:
    def via(name: str) -> object:
        return open_camera(Ros2TopicCamera(topic="/x", message="image", colour_order="rgb", via=name))  # type: ignore[arg-type]

    assert isinstance(via("rclpy"), TopicCamera)
    assert isinstance(via("dds"), DdsCamera)
    monkeypatch.setattr("runtime.cameras.select.find_spec", lambda name: object())
    assert isinstance(via("auto"), TopicCamera)
    monkeypatch.setattr("runtime.cameras.select.find_spec", lambda name: None)
    assert isinstance(via("auto"), DdsCamera)


@pytest.mark.parametrize("config", [TOPIC, SERVICE])
def test_without_ros(config: Ros2TopicCamera | Ros2ServiceCamera, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    monkeypatch.setitem(sys.modules, "sensor_msgs.msg", None)
    with pytest.raises(CameraError, match=r"(?s)needs the ROS package.*setup.bash"):
        TopicCamera(config) if isinstance(config, Ros2TopicCamera) else ServiceCamera(config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("camera_interfaces/srv/Other", r"(?s)camera_interfaces has no service Other.*GetImage"),
        ("other_interfaces/srv/GetImage", "needs the ROS package other_interfaces"),
        ("GetImage", "not the name of one"),
        ("os.path/srv/join", "not the name of one"),
    ],
)
def test_types_of_services_that_are_not_there(ros: FakeRos, kind: str, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        ServiceCamera(Ros2ServiceCamera(colour_order="bgr", type=kind))
