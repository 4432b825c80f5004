"""Flow: datagrams from one client socket to one destination: what is prepared for them, and those of this batch."""

import socket

from workers.socks.wire import write_datagram_header
from workers.udp.association import Association
from workers.wire.udp import split_key


class Flow:
    """One client socket and one destination."""

    __slots__ = ("address", "association", "header", "key", "pieces", "size")

    def __init__(self, association: Association, key: bytes, direct: bool) -> None:
        """Prepare what stands in front of each payload, or, for direct://, where it is sent if nobody knows yet."""
        _, _, destination, port = split_key(key)
        self.association = association
        self.key = key  #: see workers.wire.udp
        self.header = b""  #: SOCKS header in front of the payload; b"" for direct://
        self.address: tuple[str, int] | None = None  #: for direct://, if the socket is not connected
        if not direct:
            self.header = write_datagram_header(destination, port)
        elif not association.is_connected:
            family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
            self.address = (socket.inet_ntop(family, destination), port)
        self.pieces: list[memoryview] = []  #: datagrams with their header, in RX frames of this batch
        self.size = 0  #: octets of each piece
