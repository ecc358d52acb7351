"""What ROS 2 calls things in DDS, for cameras and commands alike: the domain, and a topic's name on the wire."""

from __future__ import annotations

import os

from bundle.errors import JetvlaError

_HIGHEST_DOMAIN = 232  # above it DDS runs out of port numbers


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
