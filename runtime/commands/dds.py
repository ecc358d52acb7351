"""Commands to a ROS 2 topic through cyclonedds: a robot that runs ROS 2 understands them, and no ROS is needed here.

Plain publish and subscribe needs the mangled names of topic and type, a compatible quality of service, the right domain, and nothing else:
the user data and the graph topic with which ROS 2 nodes find each other's names are left out, so `ros2 node list` does not show this
publisher, and `ros2 topic info -v` shows it without a node name.

Quality of service is ROS 2's default for publishers (reliable, volatile, keep last), with a depth of one instead of ten: of velocities only
the newest counts, and a queue of old ones to a slow receiver would be driven late. A depth of one also means that a write waits for no
receiver: the command that was not acknowledged yet is replaced. What remains of waiting is bounded by a millisecond.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist, why_not
from runtime.commands.cdr import encode_frame_id, stamp
from runtime.robot_file import DdsCommands
from runtime.ros_names import dds_topic, obey_discovery, ros_type

_MAX_BLOCKING_MS = 1
_LAST_ACKS_S = 1
_MOST_WRITERS = 1000  # in a domain
_LOOK_S = 0.05


class DdsSink:
    """A writer on one topic, with a participant of its own.

    Attributes:
        identity: GUID of its participant, unique in the network.

    Args:
        config: what to write to.
        domain: DDS domain, resolved.
        clock: seconds since 1970, for the header of TwistStamped.

    Raises:
        CommandError: cyclonedds is missing, or cannot use the network or the domain.
    """

    def __init__(self, config: DdsCommands, domain: int, *, clock: Callable[[], float] = time.time) -> None:
        self._where = f"DDS topic {config.topic} in domain {domain}"
        self._config = config
        self._clock = clock
        encode_frame_id(config.frame_id)  # raises here rather than at the first command
        try:
            from cyclonedds.builtin import (
                BuiltinDataReader,
                BuiltinTopicDcpsPublication,
                BuiltinTopicDcpsSubscription,
            )
            from cyclonedds.core import DDSException, InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState
            from cyclonedds.domain import DomainParticipant
            from cyclonedds.pub import DataWriter
            from cyclonedds.topic import Topic

            from runtime.commands import dds_messages
        except ImportError as error:
            raise CommandError(
                "cyclonedds is not installed",
                got=error,
                hint="pip install 'jetvla[dds]', or set kind = \"ros2\" under [commands] where rclpy is there (docs/robot.md).",
            ) from None
        self._messages = dds_messages
        self._exception = DDSException
        obey_discovery(CommandError)
        name = f"jetvla, process {os.getpid()} on {socket.gethostname()}"
        waiting = Policy.Reliability.Reliable(max_blocking_time=_MAX_BLOCKING_MS * 1_000_000)
        qos = Qos(
            waiting if config.reliable else Policy.Reliability.BestEffort,
            Policy.Durability.Volatile,
            Policy.History.KeepLast(1),
            Policy.DataRepresentation(
                use_cdrv0_representation=True, use_xcdrv2_representation=False
            ),  # all that ROS 2 reads
        )
        try:
            self._participant = DomainParticipant(domain, qos=Qos(Policy.Userdata(name.encode())))
            message = dds_messages.TwistStampedMessage if config.stamped else dds_messages.TwistMessage
            self._topic_name = dds_topic(config.topic)
            self._writer = DataWriter(self._participant, Topic(self._participant, self._topic_name, message), qos=qos)
            self._writers = BuiltinDataReader(self._participant, BuiltinTopicDcpsPublication)
            # Of writers also those that are gone: what came and went between two looks is there to be taken.
            self._changed = ReadCondition(self._writers, ViewState.Any | SampleState.Any | InstanceState.Any)
            self._readers = BuiltinDataReader(self._participant, BuiltinTopicDcpsSubscription)
            self._reading = ReadCondition(self._readers, ViewState.Any | SampleState.Any | InstanceState.Alive)
            self._type_name = message.__idl_typename__
            self.identity = str(self._participant.guid)
        except DDSException as error:
            raise self._error("cannot publish", error) from None
        self._writing: dict[str, str] = {}  # writers on the topic: participant by key
        self._instance_alive = int(InstanceState.Alive)
        self._opened_s = time.monotonic()
        self._closed = False
        self._message(ZERO).serialize()  # builds the serializer now rather than at the first command

    def send(self, twist: Twist) -> None:
        """See CommandSink. Goes on without listeners."""
        if self._closed:
            raise self._error("cannot publish", "the connection was closed")
        try:
            self._writer.write(self._message(twist))
        except self._exception as error:
            raise self._error("cannot publish", error) from None

    def listeners(self) -> int | None:
        """Matched subscriptions: see CommandSink.

        The first commands after a match may still be lost; a receiver that died without a word is missed when its lease ends, 10 s later.
        """
        try:
            return 0 if self._closed else len(self._writer.get_matched_subscriptions())
        except self._exception:
            return None

    def competitors(self, *, exclude: Collection[str] = (), wait_s: float = 1.0) -> list[str]:
        """Other writers on the topic, in this process, on this machine or another; who came and went since the last call is told of once.

        Args:
            exclude: `identity` of those that may be there.
            wait_s: counted from when this sink was opened, because others are found from then on; ends with the first one found.
        """
        allowed = {self.identity, *exclude}
        while True:
            try:
                gone = self._follow() - allowed
            except self._exception as error:
                raise self._error("cannot tell who else publishes", error) from None
            others = set(self._writing.values()) - allowed
            if others or gone or time.monotonic() - self._opened_s > wait_s:
                left = [f"participant {other}, which is gone again" for other in sorted(gone - others)]
                return [self._describe(other) for other in sorted(others)] + left
            time.sleep(_LOOK_S)

    def misfits(self) -> list[str]:
        """Who subscribes to the topic and gets nothing of this writer, and why; as far as they are found by now."""
        from cyclonedds.core import Policy

        wants = Counter[tuple[str, bool]]()
        with suppress(self._exception, AttributeError):  # closed
            for one in self._readers.read(N=_MOST_WRITERS, condition=self._reading):
                if one.topic_name == self._topic_name:
                    reliable = (
                        Policy.Reliability in one.qos and one.qos[Policy.Reliability] != Policy.Reliability.BestEffort
                    )
                    wants[ros_type(one.type_name), reliable] += 1
        return why_not(wants, ros_type(self._type_name), reliable=self._config.reliable)

    def confirm(self, wait_s: float) -> bool:
        """Whether all receivers have the last command, as far as they confirm (`reliable`); waits up to `wait_s` for it."""
        if self._closed or not self._config.reliable:
            return True
        try:
            return bool(self._writer.wait_for_acks(int(wait_s * 1e9)))
        # cyclonedds 11.0.1 raises AttributeError where it means to say that the time is over.
        except (self._exception, AttributeError):
            return False

    def close(self) -> None:
        """See CommandSink. Waits up to two seconds for receivers to have the last command: one here, one within cyclonedds."""
        if self._closed:
            return
        self.confirm(_LAST_ACKS_S)
        self._closed = True
        for name in ("_changed", "_writers", "_reading", "_readers", "_writer", "_participant"):
            delattr(self, name)  # cyclonedds deletes an entity with its last reference

    def _follow(self) -> set[str]:
        """Take what changed among the writers; participants whose writers on the topic came and went meanwhile. 30 us where nothing did."""
        gone = set()
        while True:
            samples = self._writers.take(N=_MOST_WRITERS, condition=self._changed)
            for one in samples:
                key = str(one.key)
                if one.sample_info.instance_state == self._instance_alive:
                    if one.topic_name == self._topic_name:
                        self._writing[key] = str(one.participant_key)
                # A writer that had not been seen yet carries its topic all the same.
                elif (
                    self._writing.pop(key, None) is None
                    and one.sample_info.valid_data
                    and one.topic_name == self._topic_name
                ):
                    gone.add(str(one.participant_key))
            if len(samples) < _MOST_WRITERS:
                return gone

    def _message(self, twist: Twist) -> Any:
        messages = self._messages
        values = tuple(map(float, twist.values))
        message = messages.TwistMessage(messages.Vector3(*values[:3]), messages.Vector3(*values[3:]))
        if not self._config.stamped:
            return message
        header = messages.Header(messages.Time(*stamp(self._clock())), self._config.frame_id)
        return messages.TwistStampedMessage(header, message)

    def _describe(self, participant: str) -> str:
        """What a participant says of itself, where it is one of ours."""
        from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsParticipant
        from cyclonedds.core import Policy

        with suppress(self._exception):
            for one in BuiltinDataReader(self._participant, BuiltinTopicDcpsParticipant).read(N=_MOST_WRITERS):
                if str(one.key) == participant and Policy.Userdata in one.qos:
                    text = bytes(one.qos[Policy.Userdata].data).decode(errors="replace")
                    return (
                        f"{text} (participant {participant})"
                        if text.startswith("jetvla")
                        else f"participant {participant}"
                    )
        return f"participant {participant}"

    def _error(self, what: str, got: object) -> CommandError:
        return CommandError(
            f"{what}: {self._where}",
            got=got,
            hint="check `topic` and `domain` under [commands], CYCLONEDDS_URI, and this machine's network interfaces.",
        )
