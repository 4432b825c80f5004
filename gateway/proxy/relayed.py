"""The way out through another server's UDP ASSOCIATE: SOCKS datagrams beside the tunnel, not in it."""

import socket
from typing import TYPE_CHECKING

from gateway.proxy.address import family_of
from gateway.proxy.datagrams import Client
from gateway.proxy.poll import READ
from gateway.proxy.stream import Layered, Owner
from gateway.proxy.udpsocket import MAX_DATAGRAM, MAX_READS, count_lost, datagram_socket
from workers.socks.wire import Host
from workers.udp.relayaddress import AUTO, relay_address

if TYPE_CHECKING:
    from gateway.proxy.server import Server


class RelayedOut(Owner):
    """A socket to the other server's relay, and the control connection on which the association hangs."""

    __slots__ = ("_control", "_is_closed", "_relay", "_server", "client")

    def __init__(self, server: "Server", control: Layered, bound: tuple[Host, int]) -> None:
        """Take the control connection over; raises OSError when the relay cannot be reached, and takes nothing."""
        peer = control.peer[0].partition("%")[0]
        host, port = relay_address(AUTO, bound, socket.inet_pton(family_of(peer), peer))
        family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
        relay = datagram_socket(family, server.open_socket)
        try:
            relay.connect((socket.inet_ntop(family, host), port))
        except OSError:
            relay.close()
            raise
        self._server = server
        self._control = control
        self._relay = relay
        self._is_closed = False
        self.client: Client | None = None
        control.owner = self
        server.add(relay, READ, self._answers_come)

    def pass_on(self, header: bytes, run: list[memoryview]) -> None:
        """Send payloads, each behind the header."""
        for payload in run:
            try:
                self._relay.sendmsg((header, payload))
            except OSError as error:
                count_lost(self._server.counters, error, 1)

    def close(self) -> None:
        """Close the socket and the control connection."""
        if not self._is_closed:
            self._is_closed = True
            self._server.close(self._relay)
            self._control.close()
            if self.client:
                self.client.close()

    def received(self, data: bytes) -> None:
        """Ignore what is said on the control connection."""

    def ended(self) -> None:
        self.close()

    def lost(self, number: int) -> None:
        self.close()

    def _answers_come(self, _: int) -> None:
        """Read answers back to back; equal lengths go to the client in one call."""
        client = self.client
        if not client:
            return
        view = self._server.batch_view
        last = len(view) - MAX_DATAGRAM
        start = at = length = 0
        for _ in range(MAX_READS):
            try:
                count = self._relay.recv_into(view[at:])
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error that an earlier send brought about
            if not count:
                continue
            if count != length:
                if at > start:
                    client.answer(view[start:at], length)
                start = at
                length = count
            at += count
            if at > last:
                break
        if at > start:
            client.answer(view[start:at], length)
