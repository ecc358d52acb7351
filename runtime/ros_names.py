"""What ROS 2 says of DDS, for cameras and commands alike: the domain, who is found, and names on the wire."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from bundle.errors import JetvlaError

_HIGHEST_DOMAIN = 232  # above it DDS runs out of port numbers
_PEER = re.compile(r"[A-Za-z0-9._:%\[\]-]{0,255}")
# A fixed port can be found by unicast; so many processes of ROS on one machine are looked for.
_FOUND = (
    "<CycloneDDS><Domain>{general}<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>32</MaxAutoParticipantIndex>"
    "<Peers>{peers}</Peers></Discovery></Domain></CycloneDDS>"
)
_LOOPBACK = "<CycloneDDS><Domain><General><Interfaces><NetworkInterface address='127.0.0.1'/></Interfaces></General></Domain></CycloneDDS>"


def resolve_domain(configured: int | None, error: type[JetvlaError]) -> int:
    """The DDS domain: as configured, else ROS_DOMAIN_ID, else 0.

    Args:
        error: to raise.

    Raises:
        JetvlaError: `error`: ROS_DOMAIN_ID is no domain.
    """
    if configured is not None:
        return configured
    text = os.environ.get("ROS_DOMAIN_ID", "").strip()
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or int(text) > _HIGHEST_DOMAIN:
        raise error(
            "ROS_DOMAIN_ID is no domain",
            got=repr(text),
            expected=f"a number from 0 to {_HIGHEST_DOMAIN}",
            hint="correct or unset ROS_DOMAIN_ID, or write `domain` beside the topic in the robot file.",
        )
    return int(text)


def dds_topic(topic: str) -> str:
    """ROS 2's name of a topic on the wire: `/cmd_vel` is `rt/cmd_vel`."""
    return "rt/" + topic.strip("/")


def ros_type(name: str) -> str:
    """A type by the name that ROS 2 shows: `geometry_msgs::msg::dds_::Twist_` is `geometry_msgs/msg/Twist`."""
    parts = name.split("::")
    return "/".join([*parts[:2], parts[3][:-1]]) if len(parts) == 4 and parts[2] == "dds_" else name


def obey_discovery(error: type[JetvlaError]) -> None:
    """Find others as far as ROS 2's own middleware would by its environment, beside what a CYCLONEDDS_URI of the user's says.

    ROS_AUTOMATIC_DISCOVERY_RANGE and ROS_STATIC_PEERS since Iron; before it ROS_LOCALHOST_ONLY, which goes first where it is 1. As in
    rmw_cyclonedds, without multicast others are found by unicast, on this machine, at the peers, and where we are a peer.

    To be called before every participant: cyclonedds reads its configuration once, for the first one of a domain in a process.

    Args:
        error: to raise.

    Raises:
        JetvlaError: `error`: a variable has no meaning, or forbids to find anybody.
    """
    if os.environ.get("ROS_LOCALHOST_ONLY") == "1":
        if not _names_interfaces(os.environ.get("CYCLONEDDS_URI", "")):
            _configure(_LOOPBACK)
        return
    found_by = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "") or "SUBNET"
    if found_by == "SYSTEM_DEFAULT":
        return
    if found_by not in ("SUBNET", "LOCALHOST"):
        raise error(
            "nobody is found with this ROS_AUTOMATIC_DISCOVERY_RANGE, on this machine neither"
            if found_by == "OFF"
            else "ROS_AUTOMATIC_DISCOVERY_RANGE is no range",
            got=repr(found_by),
            expected="SUBNET, LOCALHOST or SYSTEM_DEFAULT",
            hint="set it as it is set where the other nodes start, LOCALHOST if all of them are on this machine; or unset it.",
        )
    local = found_by == "LOCALHOST"
    peers = (["localhost"] if local else []) + _static_peers(error)
    if peers:
        ours = _FOUND.format(
            general="<General><AllowMulticast>false</AllowMulticast></General>" if local else "",
            peers="".join(f"<Peer address='{peer}'/>" for peer in peers),
        )
        _configure(ours)


def _configure(ours: str) -> None:
    """In front of the user's own settings, which go on from there."""
    others = os.environ.get("CYCLONEDDS_URI", "")
    if not others.startswith(ours):
        os.environ["CYCLONEDDS_URI"] = f"{ours},{others}" if others else ours


def _names_interfaces(uri: str) -> bool:
    """Whether settings choose network interfaces themselves; cyclonedds would add ours to them."""
    texts = [uri]
    for path in re.findall(r"file://([^,]+)", uri):
        with suppress(OSError):
            texts.append(Path(path).read_text(errors="replace"))
    return any("NetworkInterface" in text for text in texts)


def _static_peers(error: type[JetvlaError]) -> list[str]:
    peers = [peer.strip() for peer in os.environ.get("ROS_STATIC_PEERS", "").split(";")]
    for peer in peers:
        if not _PEER.fullmatch(peer):
            raise error(
                "ROS_STATIC_PEERS holds something that is no address",
                got=repr(peer)[:80],
                expected="names or addresses with `;` between them",
                hint="correct or unset ROS_STATIC_PEERS.",
            )
    return [peer for peer in peers if peer]
