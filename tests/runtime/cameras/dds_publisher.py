"""A program of its own that publishes pictures with cyclonedds, from descriptions of the messages of its own, until stdin is closed.

python dds_publisher.py TOPIC image|compressed DOMAIN reliable|best_effort
"""

# No `from __future__ import annotations`: cyclonedds reads the annotations of its messages before they can be looked up.
import io
import sys
import threading
import time
from dataclasses import dataclass

from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.idl import IdlStruct
from cyclonedds.idl.types import int32, sequence, uint8, uint32
from cyclonedds.pub import DataWriter
from cyclonedds.topic import Topic
from cyclonedds.util import duration
from PIL import Image


@dataclass
class Time_(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    sec: int32
    nanosec: uint32


@dataclass
class Header_(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    stamp: Time_
    frame_id: str


@dataclass
class Image_(IdlStruct, typename="sensor_msgs::msg::dds_::Image_"):
    header: Header_
    height: uint32
    width: uint32
    encoding: str
    is_bigendian: uint8
    step: uint32
    data: sequence[uint8]


@dataclass
class CompressedImage_(IdlStruct, typename="sensor_msgs::msg::dds_::CompressedImage_"):
    header: Header_
    format: str
    data: sequence[uint8]


def main(topic: str, kind: str, domain: str, reliability: str) -> None:
    reliable = Policy.Reliability.Reliable(duration(seconds=1))
    qos = Qos(reliable if reliability == "reliable" else Policy.Reliability.BestEffort, Policy.History.KeepLast(1))
    participant = DomainParticipant(int(domain))
    message_type = Image_ if kind == "image" else CompressedImage_
    writer = DataWriter(participant, Topic(participant, topic, message_type, qos=qos), qos=qos)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    number = 0
    while not over.wait(0.02):
        number += 1
        header = Header_(Time_(number, 500_000_000), "camera_link")
        pixel = (200, 100, number % 50)  # red, green, blue
        if kind == "image":
            row = [*pixel[::-1]] * 8 + [0, 0]  # bgr8, padded by two bytes
            writer.write(Image_(header, 6, 8, "bgr8", 0, len(row), row * 6))
        else:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 6), pixel).save(buffer, "PNG")
            writer.write(CompressedImage_(header, "png", list(buffer.getvalue())))
    print(len(writer.get_matched_subscriptions()), flush=True)
    time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
