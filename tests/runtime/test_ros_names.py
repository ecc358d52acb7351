"""What ROS 2's environment says of discovery: as configuration, and as packets on a wire."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bundle.errors import CommandError
from runtime.ros_names import obey_discovery, ros_type

PATIENCE_S = 30
TRACED = "<CycloneDDS><Domain><Tracing><Verbosity>none</Verbosity></Tracing></Domain></CycloneDDS>"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CYCLONEDDS_URI", "ROS_LOCALHOST_ONLY", "ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_STATIC_PEERS"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)


def configured(monkeypatch: pytest.MonkeyPatch, **settings: str) -> str | None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    obey_discovery(CommandError)
    obey_discovery(CommandError)  # the camera's, then the commands'
    return os.environ.get("CYCLONEDDS_URI")


def peers_of(text: str) -> list[str]:
    return [peer.attrib["address"] for peer in ElementTree.fromstring(text).iter("Peer")]


@pytest.mark.parametrize("found_by", ["", "SUBNET", "SYSTEM_DEFAULT"])
def test_the_middleware_is_left_alone(found_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(monkeypatch, ROS_AUTOMATIC_DISCOVERY_RANGE=found_by) is None


def test_localhost_sends_nothing_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    text = configured(monkeypatch, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    assert text is not None
    assert peers_of(text) == ["localhost"]
    assert ElementTree.fromstring(text).findtext("Domain/General/AllowMulticast") == "false"


def test_peers_are_asked_beside_everybody_and_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = "192.168.0.7; robot.local;;"
    text = configured(monkeypatch, ROS_STATIC_PEERS=peers)
    assert text is not None
    assert peers_of(text) == ["192.168.0.7", "robot.local"]
    assert "AllowMulticast" not in text
    monkeypatch.delenv("CYCLONEDDS_URI")
    text = configured(monkeypatch, ROS_STATIC_PEERS=peers, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    assert text is not None
    assert peers_of(text) == ["localhost", "192.168.0.7", "robot.local"]
    monkeypatch.delenv("CYCLONEDDS_URI")
    assert configured(monkeypatch, ROS_STATIC_PEERS=peers, ROS_AUTOMATIC_DISCOVERY_RANGE="SYSTEM_DEFAULT") is None


def test_the_older_variable_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text = configured(
        monkeypatch, ROS_LOCALHOST_ONLY="1", ROS_STATIC_PEERS="10.0.0.1", ROS_AUTOMATIC_DISCOVERY_RANGE="SUBNET"
    )
    assert text is not None
    assert "127.0.0.1" in text
    assert peers_of(text) == []


def test_what_the_user_configured_comes_later_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = "file:///etc/dds.xml"
    text = configured(monkeypatch, CYCLONEDDS_URI=theirs, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    assert text is not None
    assert text.endswith(f"</CycloneDDS>,{theirs}")
    assert text.count("<CycloneDDS>") == 1


@pytest.mark.parametrize("inline", [True, False])
def test_interfaces_of_the_users_replace_loopback_and_other_settings_do_not(
    inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_user(text: str) -> str:
        (tmp_path / "dds.xml").write_text(text)
        return text if inline else f"file://{tmp_path / 'dds.xml'}"

    chosen = of_user(
        "<CycloneDDS><Domain><General><Interfaces><NetworkInterface name='lo'/></Interfaces></General></Domain></CycloneDDS>"
    )
    assert configured(monkeypatch, CYCLONEDDS_URI=chosen, ROS_LOCALHOST_ONLY="1") == chosen
    traced = of_user(TRACED)
    text = configured(monkeypatch, CYCLONEDDS_URI=traced, ROS_LOCALHOST_ONLY="1")
    assert text is not None
    assert "127.0.0.1" in text
    assert text.endswith(f",{traced}")
    assert text.count("127.0.0.1") == 1, "once for the camera and the commands"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF", "nobody is found"),
        ("ROS_AUTOMATIC_DISCOVERY_RANGE", "localhost", "is no range"),
        ("ROS_STATIC_PEERS", "1.2.3.4'/><Peer address='5.6.7.8", "no address"),
        ("ROS_STATIC_PEERS", "1.2.3.4, 5.6.7.8", "no address"),
    ],
)
def test_what_finds_nobody_or_means_nothing_is_refused(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CommandError, match=f"(?s){words}.*hint:"):
        configured(monkeypatch, **{name: value})
    assert "CYCLONEDDS_URI" not in os.environ


def test_types_have_the_names_that_ros_shows() -> None:
    assert ros_type("geometry_msgs::msg::dds_::TwistStamped_") == "geometry_msgs/msg/TwistStamped"
    assert ros_type("Something") == "Something"


def test_packets_stay_where_the_environment_says() -> None:
    """Counted at the far end of a cable in a network of its own; a base on the same machine is found each time."""
    pytest.importorskip("cyclonedds")
    if shutil.which("ip") is None or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("needs root and ip")
    local = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    traced = {"CYCLONEDDS_URI": TRACED}
    environments = [{}, local | traced, local | {"ROS_STATIC_PEERS": "10.9.9.2"}, {"ROS_LOCALHOST_ONLY": "1"} | traced]
    script = Path(__file__).with_name("dds_on_a_wire.py")
    ran = subprocess.run(
        ["unshare", "-n", sys.executable, script, str(PATIENCE_S)],
        input=json.dumps(environments),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=len(environments) * 2 * PATIENCE_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    everybody, nobody, neighbour, older = (json.loads(line) for line in ran.stdout.splitlines())
    assert everybody[0] > 0, "or the wire proves nothing"
    assert nobody[:2] == older[:2] == [0, 0]
    assert (neighbour[0], neighbour[1] > 0) == (0, True)
    assert [case[2] for case in (everybody, nobody, neighbour, older)] == [1, 1, 1, 1]
