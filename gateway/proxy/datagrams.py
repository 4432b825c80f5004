"""Datagrams on their way between a client and the outside: what the two sides of an association know of each other.

    Client                                        Out
    UdpClient     SOCKS datagrams (udp.py)        Egress       sockets of this machine (egress.py)
    FramedClient  frames on a stream (framed.py)  FramedOut    frames on a stream to another server (framed.py)
                                                  RelayedOut   SOCKS datagrams to another server (relayed.py)

Any client goes with any way out. Between them a datagram is a header as RFC 1928, 7 has it and a payload.
"""

from typing import Protocol


class Client(Protocol):
    """The side of an association that asked for it."""

    def answer(self, datagrams: memoryview, length: int) -> None:
        """Take datagrams, headers in front, back to back and each `length` long; the memory is used again."""

    def close(self) -> None:
        """End the association: the way out is no more."""


class Out(Protocol):
    """The side of an association that was found for it."""

    client: Client | None

    def pass_on(self, header: bytes, run: list[memoryview]) -> None:
        """Send payloads of equal length, all with the same header, to where it says."""

    def close(self) -> None:
        """End; the client hears nothing of it."""
