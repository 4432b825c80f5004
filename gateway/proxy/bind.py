"""BIND: listen for the one connection that a client was told to expect (active FTP), then relay it.

client: BIND of the address that will connect  ──►
        ◄── reply 1: where we listen
                                                   the peer connects
        ◄── reply 2: who has connected
        ◄─► bytes
"""

import socket
from typing import TYPE_CHECKING

from gateway.proxy.address import SocketAddress, family_of, unmapped, with_port
from gateway.proxy.join import join
from gateway.proxy.poll import READ
from gateway.proxy.reply import refusal, write_reply
from gateway.proxy.stream import Layered, Owner, Stream
from workers.socks.wire import SUCCEEDED, TTL_EXPIRED, Host

if TYPE_CHECKING:
    from gateway.proxy.server import Server
    from gateway.proxy.session import Session


class Expected(Owner):
    """The listening socket of one BIND, and the client that waits for it."""

    __slots__ = ("_client", "_early", "_listener", "_peer_host", "_server")

    @classmethod
    def begin(cls, server: "Server", session: "Session", host: Host) -> None:
        """Grant a BIND; `host` is who the client expects, zeros or a name for anybody. Raises OSError if it cannot."""
        if isinstance(host, str) or not any(host):
            peer_host = ""
        else:
            peer_host = socket.inet_ntop(socket.AF_INET if len(host) == 4 else socket.AF_INET6, host)
        address = _listening_address(session.client, peer_host)
        listener = socket.create_server(address, family=family_of(address[0]), backlog=1)
        listener.setblocking(False)
        client, early = session.take()
        cls(server, client, early, listener, peer_host)

    def __init__(
        self, server: "Server", client: Layered, early: bytes, listener: socket.socket, peer_host: str
    ) -> None:
        self._server = server
        self._client = client
        self._early = early
        self._listener = listener
        self._peer_host = peer_host  #: who may connect; "" for anybody
        client.owner = self
        server.add(listener, READ, self._accept)
        server.expect(self, server.bind_timeout)
        client.write(write_reply(SUCCEEDED, listener.getsockname()))

    def expire(self) -> None:
        """Tell the client that nobody came."""
        self._server.counters["bind-timeout"] += 1
        self._client.write(refusal(TTL_EXPIRED))
        self._close()

    def received(self, data: bytes) -> None:
        """Keep what the client sends too early; the rest stays in the kernel."""
        self._early += data
        self._client.hold()

    def ended(self) -> None:
        self._close()

    def lost(self, number: int) -> None:
        self._close()

    def _accept(self, _: int) -> None:
        try:
            peer, address = self._listener.accept()
        except OSError:
            return
        address = unmapped(address)
        if self._peer_host and address[0] != self._peer_host:
            self._server.counters["bind-stranger"] += 1
            peer.close()
            return
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.settle(self)
        self._server.close(self._listener)
        self._client.write(write_reply(SUCCEEDED, address))
        self._server.counters["bound"] += 1
        join(self._server, self._client, Stream(self._server, peer, self), self._early)

    def _close(self) -> None:
        self._server.settle(self)
        self._server.close(self._listener)
        self._client.close()


def _listening_address(client: Layered, peer_host: str) -> SocketAddress:
    """Choose the local address that the expected peer would see; without a peer, the one the client is connected to."""
    if peer_host:
        try:
            with socket.socket(family_of(peer_host), socket.SOCK_DGRAM) as probe:
                probe.connect((peer_host, 9))  # sends nothing: asks the routing table
                return with_port(probe.getsockname(), 0)
        except OSError:
            pass
    return with_port(client.local, 0)
