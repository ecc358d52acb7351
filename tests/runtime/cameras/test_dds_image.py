"""Real DDS: a publisher in another process, on the loopback interface only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.errors import CameraError
from runtime.cameras.base import Frame
from runtime.cameras.dds_image import DdsCamera
from runtime.cameras.select import open_camera
from runtime.robot_file import Ros2TopicCamera
from runtime.ros_names import dds_topic, resolve_domain
from tests.runtime.cameras.scripted import LIMIT_S, wait_until

pytest.importorskip("cyclonedds")

LOOPBACK = (
    '<CycloneDDS><Domain><General><Interfaces><NetworkInterface name="lo" multicast="false"/></Interfaces></General>'
    '<Discovery><ParticipantIndex>auto</ParticipantIndex><Peers><Peer address="127.0.0.1"/></Peers></Discovery>'
    "</Domain></CycloneDDS>"
)
# A domain for each process: others may test DDS on this machine too.
DOMAIN = 100 + os.getpid() % 100


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYCLONEDDS_URI", LOOPBACK)


class Publisher:
    def __init__(self, kind: str, reliability: str) -> None:
        command = [sys.executable, Path(__file__).with_name("dds_publisher.py"), "rt/camera/pictures"]
        self._process = subprocess.Popen(
            [*command, kind, str(DOMAIN), reliability], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> str:
        """Ask it to end; what it says then."""
        return self._process.communicate(timeout=LIMIT_S)[0]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def config(message: str = "image", **settings: object) -> Ros2TopicCamera:
    fields: dict[str, object] = {"colour_order": "bgr" if message == "image" else "rgb", "domain": DOMAIN, "via": "dds"}
    return Ros2TopicCamera(**{"topic": "/camera/pictures", "message": message} | fields | settings)  # type: ignore[arg-type]


@pytest.fixture
def camera(request: pytest.FixtureRequest) -> Iterator[DdsCamera]:
    made = open_camera(request.param)
    assert isinstance(made, DdsCamera)
    made.open()
    yield made
    made.close()
    made.close()


def next_frame(camera: DdsCamera, publisher: Publisher) -> Frame:
    deadline = time.monotonic() + LIMIT_S
    while publisher.runs and time.monotonic() < deadline:
        if (frame := camera.read(0.25)) is not None:
            return frame
    raise AssertionError("no frame came")


@pytest.mark.parametrize(
    ("camera", "kind", "reliability"),
    [
        (config(), "image", "best_effort"),
        (config(), "image", "reliable"),
        (config("compressed"), "compressed", "reliable"),
    ],
    indirect=["camera"],
)
def test_pictures_of_another_process(camera: DdsCamera, kind: str, reliability: str) -> None:
    publisher = Publisher(kind, reliability)
    try:
        first, second = next_frame(camera, publisher), next_frame(camera, publisher)
        assert camera.publishers() == 1
        said = publisher.end()
    except BaseException:
        publisher.kill()
        raise

    assert first.pixels.shape == (6, 8, 3)
    stamp = first.source_stamp_s
    assert stamp is not None
    assert first.pixels[0, 0].tolist() == first.pixels[5, 7].tolist() == [200, 100, int(stamp - 0.5) % 50]
    assert second.source_stamp_s is not None
    assert second.source_stamp_s > stamp
    assert second.captured_s <= time.monotonic()
    assert said == "1\n"


@pytest.mark.parametrize("camera", [config()], indirect=True)
def test_only_the_newest_waits_and_a_publisher_that_dies_is_silence(camera: DdsCamera) -> None:
    publisher = Publisher("image", "best_effort")
    try:
        first = next_frame(camera, publisher)
        time.sleep(0.5)
        newest = next_frame(camera, publisher)
    finally:
        publisher.kill()
    assert first.source_stamp_s is not None
    assert newest.source_stamp_s is not None
    assert newest.source_stamp_s >= first.source_stamp_s + 3  # those between are gone, not queued

    wait_until(lambda: camera.read(0.1) is None, "silence")  # one may have been on its way


@pytest.mark.parametrize("camera", [config(colour_order="rgb")], indirect=True)
def test_a_contradicting_encoding_is_an_error(camera: DdsCamera) -> None:
    publisher = Publisher("image", "best_effort")
    try:
        with pytest.raises(CameraError, match=r"(?s)/camera/pictures has another colour order.*bgr8.*expected: rgb8"):
            next_frame(camera, publisher)
    finally:
        publisher.kill()


@pytest.mark.parametrize("camera", [config("compressed")], indirect=True)
def test_a_topic_of_another_type_is_named(camera: DdsCamera) -> None:
    publisher = Publisher("image", "reliable")
    try:
        with pytest.raises(
            CameraError, match=r'(?s)carries something else.*got: +sensor_msgs/msg/Image\n.*message = "image"'
        ):
            next_frame(camera, publisher)
    finally:
        publisher.kill()


@pytest.mark.parametrize("camera", [config()], indirect=True)
def test_nobody_publishes_and_opening_again(camera: DdsCamera) -> None:
    assert camera.read(0.05) is None
    assert camera.publishers() == 0
    camera.open()
    assert camera.read(0.05) is None
    camera.close()
    with pytest.raises(CameraError, match="not open"):
        camera.read(0.05)


def test_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    assert (resolve_domain(None, CameraError), resolve_domain(7, CameraError)) == (0, 7)
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    assert (resolve_domain(None, CameraError), resolve_domain(7, CameraError)) == (42, 7)
    for wrong in ("233", "x", "-1", "4.2"):
        monkeypatch.setenv("ROS_DOMAIN_ID", wrong)
        with pytest.raises(CameraError, match="ROS_DOMAIN_ID is no domain"):
            resolve_domain(None, CameraError)


def test_a_network_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYCLONEDDS_URI", LOOPBACK.replace('"lo"', '"no-such-interface"'))
    camera = DdsCamera(config(domain=DOMAIN - 100 if DOMAIN >= 100 else 99))
    with pytest.raises(CameraError, match=r"(?s)cannot read the topic /camera/pictures in DDS domain.*CYCLONEDDS_URI"):
        camera.open()


def test_topic_names() -> None:
    assert dds_topic("/camera/image_raw") == dds_topic("camera/image_raw") == "rt/camera/image_raw"


def test_without_cyclonedds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedds.core", None)
    with pytest.raises(CameraError, match=r"(?s)needs rclpy or cyclonedds.*jetvla\[dds\]"):
        open_camera(config())


def test_ros_localhost_only_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera joins the domain first, and what it joined with holds for the commands too."""
    monkeypatch.setenv("ROS_LOCALHOST_ONLY", "1")
    monkeypatch.setenv("CYCLONEDDS_URI", "to be put back")
    monkeypatch.delenv("CYCLONEDDS_URI")
    camera = DdsCamera(config(domain=DOMAIN - 101 if DOMAIN >= 101 else 98))
    camera.open()
    try:
        assert "127.0.0.1" in os.environ["CYCLONEDDS_URI"]
    finally:
        camera.close()
