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
from gateway.proxy.poll import FAILED, READ
from gateway.proxy.relay import relay
from gateway.proxy.reply import refusal, write_reply
from workers.socks.wire import SUCCEEDED, TTL_EXPIRED, Host

if TYPE_CHECKING:
    from gateway.proxy.server import Server


class Expected:
    """The listening socket of one BIND, and the client that waits for it."""

    __slots__ = ("_client", "_early", "_interest", "_listener", "_peer_host", "_server")

    def __init__(self, server: "Server", client: socket.socket, early: bytes, peer_host: str) -> None:
        """Listen, and say so to the client. Raises OSError before anything is taken over."""
        listener = socket.create_server(
            _listening_address(client, peer_host),
            family=family_of(_listening_address(client, peer_host)[0]),
            backlog=1,
        )
        listener.setblocking(False)
        self._server = server
        self._client = client
        self._early = early
        self._interest = READ
        self._listener = listener
        self._peer_host = peer_host  #: who may connect; "" for anybody
        server.add(listener, READ, self._accept)
        server.poller.handlers[client.fileno()] = self._client_ready
        try:
            client.send(write_reply(SUCCEEDED, listener.getsockname()))
        except OSError:
            pass  # it is gone, and the poller will say so

    def expire(self) -> None:
        """Tell the client that nobody came."""
        self._server.counters["bind-timeout"] += 1
        try:
            self._client.send(refusal(TTL_EXPIRED))
        except OSError:
            pass
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
        self._server.add(peer, READ, _nothing)
        try:
            self._client.send(write_reply(SUCCEEDED, address))
        except OSError:
            self._server.close(peer)
            self._server.close(self._client)
            return
        self._server.counters["bound"] += 1
        relay(self._server, self._client, peer, self._early, self._interest)

    def _client_ready(self, events: int) -> None:
        """End with the client; what it sends too early stays in the kernel."""
        try:
            gone = bool(events & FAILED) or not self._client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._close()
        else:
            self._interest = 0
            self._server.poller.change(self._client.fileno(), 0)

    def _close(self) -> None:
        self._server.settle(self)
        self._server.close(self._listener)
        self._server.close(self._client)


def _nothing(_: int) -> None:
    """Stand in for a handler that follows at once."""


def bind(server: "Server", client: socket.socket, early: bytes, host: Host) -> None:
    """Grant a BIND; `host` is who the client expects, zeros or a name for anybody. Raises OSError if it cannot be."""
    if isinstance(host, str) or not any(host):
        peer_host = ""
    else:
        peer_host = socket.inet_ntop(socket.AF_INET if len(host) == 4 else socket.AF_INET6, host)
    server.expect(Expected(server, client, early, peer_host), server.bind_timeout)


def _listening_address(client: socket.socket, peer_host: str) -> SocketAddress:
    """Choose the local address that the expected peer would see; without a peer, the one the client is connected to."""
    if peer_host:
        try:
            with socket.socket(family_of(peer_host), socket.SOCK_DGRAM) as probe:
                probe.connect((peer_host, 9))  # sends nothing: asks the routing table
                return with_port(probe.getsockname(), 0)
        except OSError:
            pass
    return with_port(unmapped(client.getsockname()), 0)
