"""What ROS 2 says of DDS, for cameras and commands alike: the domain, the interface, and a topic's name on the wire."""

from __future__ import annotations

import os

from bundle.errors import JetvlaError

_HIGHEST_DOMAIN = 232  # above it DDS runs out of port numbers
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


def obey_localhost_only() -> None:
    """Do what ROS 2's own middleware does for ROS_LOCALHOST_ONLY=1; a CYCLONEDDS_URI of the user's goes first.

    To be called before every participant: cyclonedds reads its configuration once, for the first one of a domain in a process.
    """
    if os.environ.get("ROS_LOCALHOST_ONLY") == "1":
        os.environ.setdefault("CYCLONEDDS_URI", _LOOPBACK)
