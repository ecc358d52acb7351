"""Commands as UDP datagrams, one CDR Twist each: for simulators, bridges and tests.

A lost datagram is mended by the next one a few hundredths of a second later, which is all the delivery that a velocity needs. Knows nothing
about who receives.
"""

from __future__ import annotations

import errno
import os
import socket

from bundle.errors import CommandError
from runtime.commands.base import ZERO, Twist
from runtime.commands.cdr import encode_twist
from runtime.robot_file import UdpCommands


class UdpSink:
    """Sends to one address, without ever waiting.

    Raises:
        CommandError: the host has no address, or none that this machine can send to.
    """

    def __init__(self, config: UdpCommands) -> None:
        self._where = f"{config.host}:{config.port}"
        self._refused = False
        self._closed = False
        try:
            found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            raise self._error("the host of the commands has no address", error) from None
        # IPv4 first: `localhost` is often both, and bridges mostly listen on 127.0.0.1.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setblocking(False)
        try:
            self._socket.connect(address)  # connected, so that "nobody listens" comes back
        except OSError as error:
            self._socket.close()
            raise self._error("cannot reach the host of the commands", os.strerror(error.errno or 0)) from None
        encode_twist(ZERO)

    def send(self, twist: Twist) -> None:
        """See CommandSink."""
        if self._closed:
            raise self._error("cannot send a command", "the connection was closed")
        data = encode_twist(twist)
        self._refused = False
        try:
            self._socket.send(data)
        except ConnectionRefusedError:
            # This is the answer to an earlier datagram, told instead of sending this one: so send this one.
            self._send_again(data)
        except OSError as error:
            raise self._error("cannot send a command", os.strerror(error.errno or 0)) from None

    def _send_again(self, data: bytes) -> None:
        self._refused = True
        try:
            self._socket.send(data)
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise self._error("cannot send a command", os.strerror(error.errno or 0)) from None

    def listeners(self) -> int | None:
        """0 where the last command was refused, else unknown: see CommandSink."""
        return 0 if self._refused else None

    def close(self) -> None:
        """See CommandSink."""
        self._closed = True
        self._socket.close()

    def _error(self, what: str, got: object) -> CommandError:
        return CommandError(
            f"{what}: {self._where}",
            got=got,
            hint="check `host` and `port` under [commands], and this machine's network.",
        )
