"""Counts the DDS packets that a sink puts on a network: run as root in a network namespace of its own, with nothing but loopback there.

Makes a cable (lan0, lan1) and a neighbour at its far end that does not answer. argv: what to wait for in seconds. stdin: a JSON list of
environments; stdout: for each a JSON list of how many packets reached the far end for everybody, how many for the neighbour, and how many
receivers on the same machine, with the same environment, the sink found.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

NEIGHBOUR, MAC = "10.9.9.2", "02:00:00:00:00:02"
LAY = f"""
ip link set lo up
ip link add lan0 type veth peer name lan1
ip link set lan1 address {MAC}
ip addr add 10.9.9.1/24 dev lan0
ip link set lan0 up
ip link set lan1 up
ip neigh add {NEIGHBOUR} lladdr {MAC} dev lan0
ip route add 239.0.0.0/8 dev lan0
"""
SINK = """
import sys, time
from runtime.commands.dds import DdsSink
from runtime.robot_file import DdsCommands
sink = DdsSink(DdsCommands(topic="/cmd_vel"), 78)
end = time.monotonic() + float(sys.argv[1])
while not sink.listeners() and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.3)
print(sink.listeners(), flush=True)
sink.close()
"""
BASE = """
import sys
from cyclonedds.domain import DomainParticipant
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from runtime.commands.dds_messages import TwistMessage
from runtime.ros_names import obey_discovery
obey_discovery(RuntimeError)
participant = DomainParticipant(78)
reader = DataReader(participant, Topic(participant, "rt/cmd_vel", TwistMessage))
print("there", flush=True)
sys.stdin.read()
"""


def count(settings: dict[str, str], wait_s: str) -> list[int]:
    """Run a base and a sink; the three counts."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    packets.bind(("lan1", 0))
    packets.settimeout(0.1)
    counts, over = [0, 0], threading.Event()

    def listen() -> None:
        while not over.is_set():
            try:
                packet = packets.recv(4096)
            except TimeoutError:
                continue
            if packet[12:14] == b"\x08\x00" and packet[23] == 17 and b"RTPS" in packet:
                counts[socket.inet_ntoa(packet[30:34]) == NEIGHBOUR] += 1

    thread = threading.Thread(target=listen)
    thread.start()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ROS_", "CYCLONE"))
    } | settings
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", BASE], **pipes) as base:
        base.stdout.readline()
        sink = subprocess.run(
            [sys.executable, "-c", SINK, wait_s], stdout=subprocess.PIPE, env=environment, text=True, check=True
        )
        base.stdin.close()
    time.sleep(0.2)
    over.set()
    thread.join()
    packets.close()
    return [*counts, int(sink.stdout)]


if __name__ == "__main__":
    for command in LAY.strip().splitlines():
        subprocess.run(command.split(), check=True)
    for one in json.load(sys.stdin):
        print(json.dumps(count(one, sys.argv[1])), flush=True)
