"""Channel: control messages between the supervisor and one of its processes.

A message is one msgpack map in one packet of a SOCK_SEQPACKET pair: packets keep their borders, arrive in order, and
the end of the other process is an end of file.
"""

import socket
from typing import Any

import msgpack

MAX_MESSAGE = 64 * 1024  #: octets; control messages are small, a larger one is a bug
Message = dict[str, Any]


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class Channel:
    """One end of a pair; non-blocking for reading, so that it can stand in any event loop."""

    __slots__ = ("_socket",)

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        """Make both ends; each process closes the one that is not its own."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        """Return the descriptor; readable means a message, or the end of the other process."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message. ChannelClosed when the other end is gone, BlockingIOError when it does not read."""
        data = msgpack.packb(message)
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"control message of {len(data)} octets, the limit is {MAX_MESSAGE}")
        try:
            self._socket.send(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none yet. ChannelClosed at the end."""
        try:
            data = self._socket.recv(MAX_MESSAGE)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        message: Message = msgpack.unpackb(data)
        return message

    def order(self) -> Message | None:
        """Return the supervisor's next order, or None when there is none yet; when it is gone, that is to stop."""
        try:
            return self.receive()
        except ChannelClosed:
            return {"do": "stop"}

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
