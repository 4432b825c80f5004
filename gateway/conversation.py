"""Conversation: a blocking connection to a proxy that ends at one moment, however slowly the other side drips."""

import ipaddress
import socket
import time

from workers.socks.handshake import Handshake
from workers.socks.wire import ProtocolError

Address = tuple[str, int]


class ProbeError(Exception):
    """A step of the probe that failed; its text says what was seen."""


class Silence(ProbeError):
    """Nothing came in time."""


class Conversation:
    """One TCP connection to a proxy."""

    def __init__(self, address: Address, timeout: float, fwmark: int = 0, interface: str = "") -> None:
        """Connect to a numeric address or a name; OSError. The whole conversation may take `timeout` seconds."""
        self.timeout = timeout
        self.ends_at = time.monotonic() + timeout
        self.socket = connect(address, timeout, fwmark, interface)

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def left(self) -> float:
        """Return the seconds that are left; TimeoutError when there are none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.socket.settimeout(self.left())
        self.socket.sendall(data)

    def some(self, what: str, so_far: bytes = b"", at_most: int = 65536) -> bytes:
        """Read what comes next of `what`, at least one byte. ProbeError: it does not come."""
        try:
            self.socket.settimeout(self.left())
            more = self.socket.recv(at_most)
        except TimeoutError:
            raise Silence(f"{what} did not come in {self.timeout:g} s{_so_far(so_far)}") from None
        if not more:
            raise ProbeError(f"the proxy closed the connection instead of {what}{_so_far(so_far)}")
        return more

    def receive(self, count: int, what: str) -> bytes:
        """Read exactly `count` bytes of `what`."""
        data = b""
        while len(data) < count:
            data += self.some(what, data, count - len(data))
        return data

    def receive_address(self, kind: int) -> Address:
        """Read the rest of a SOCKS address of type `kind`."""
        if kind == 3:
            host = self.receive(self.receive(1, "an address")[0], "an address").decode("ascii", "replace")
        elif kind in (1, 4):
            host = str(ipaddress.ip_address(self.receive(4 if kind == 1 else 16, "an address")))
        else:
            raise ProbeError(f"answered an address of type {kind:02x}")
        return host, int.from_bytes(self.receive(2, "a port"), "big")

    def ask(self, handshake: Handshake, what: str) -> None:
        """Go through a handshake until it is done. ProbeError: it breaks."""
        if handshake.first_bytes:
            self.send(handshake.first_bytes)
        came = b""
        while not handshake.done:
            more = self.some(f"the answer to {what}", came[:16])
            came += more
            try:
                message = handshake.receive(more)
            except ProtocolError as error:
                raise ProbeError(f"{what}: {error}{_so_far(came[:16])}") from None
            if message:
                self.send(message)


def connect(address: Address, timeout: float, fwmark: int = 0, interface: str = "") -> socket.socket:
    """Connect as a worker would, with its mark and interface; a name is tried at each of its addresses. OSError."""
    error = OSError(0, f"{address[0]} has no address")
    for family, kind, _, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        opened = socket.socket(family, kind)
        try:
            opened.settimeout(timeout)
            mark(opened, fwmark, interface)
            opened.connect(where)
        except OSError as failed:
            error = failed
            opened.close()
        else:
            return opened
    raise error


def mark(opened: socket.socket, fwmark: int, interface: str) -> None:
    """Have a socket leave as the upstream sockets do."""
    if fwmark:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, fwmark)
    if interface:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")


def _so_far(data: bytes) -> str:
    return f" (so far {data.hex(' ')})" if data else ""
