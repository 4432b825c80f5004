"""Outbound: what becomes of a granted request. Direct is one of the two; the other forwards (forward.py)."""

import socket
from typing import TYPE_CHECKING, Protocol

from gateway.proxy.address import write_socket_address
from gateway.proxy.bind import Expected
from gateway.proxy.dial import Dial
from gateway.proxy.egress import Egress
from gateway.proxy.reply import reply_for
from gateway.proxy.stream import Owner, Stream
from workers.socks.wire import Host

if TYPE_CHECKING:
    from gateway.proxy.server import Server
    from gateway.proxy.session import Session


class Attempt(Protocol):
    """What is being done about a request."""

    def cancel(self) -> None:
        """Stop; the session hears nothing more."""


class Outbound(Protocol):
    """Where requests go. Each call ends in one of the session's: connected, associated, take, refuse."""

    def connect(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Do a CONNECT."""

    def bind(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Do a BIND; `host` is who the client expects, zeros or a name for anybody."""

    def associate(self, server: "Server", session: "Session") -> Attempt | None:
        """Find a way out for datagrams."""


class Direct:
    """Sockets of this machine."""

    def connect(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Connect to the target."""
        dial = Dial(server, host, port, _Target(server, session))
        dial.start()
        return dial

    def bind(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Listen for the one connection."""
        try:
            Expected.begin(server, session, host)
        except OSError as error:
            session.refuse(reply_for(error.errno), "socket-refused")
        return None

    def associate(self, server: "Server", session: "Session") -> Attempt | None:
        """Give the client UDP sockets."""
        session.associated(Egress(server))
        return None


class _Target(Owner):
    """Who dials for a session."""

    __slots__ = ("_server", "_session")

    def __init__(self, server: "Server", session: "Session") -> None:
        self._server = server
        self._session = session

    def connected(self, sock: socket.socket) -> None:
        try:
            bound = write_socket_address(sock.getsockname())
        except OSError as error:
            self._server.close(sock)
            self._session.refuse(reply_for(error.errno), "connect-lost")
            return
        self._session.connected(Stream(self._server, sock, self), bound)

    def not_connected(self, reply: int, reason: str) -> None:
        self._session.refuse(reply, reason)
