"""Association: one client socket and the upstream socket that all its datagrams leave through.

With udp-mapping address-port it is one destination of a client socket.

    SETTING_UP ── connected ──► READY ── idle, control connection ends, least recently used ──► CLOSED
         └──────── refused, lost, too late ──────────────────────────────────────────────────────┘

While SETTING_UP, datagrams wait as copies, few of them. For direct:// there is nothing to set up.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from errno import EMFILE, ENFILE
from functools import partial
from math import inf
from select import EPOLLIN
from typing import TYPE_CHECKING, Final

from workers import counts, proxyconnection
from workers.proxyconnection import ProxyConnection, proxy_unreachable
from workers.settings import ADDRESS, ENDPOINT_INDEPENDENT
from workers.socks.wire import UDP_ASSOCIATE, Host
from workers.udp.relayaddress import AUTO, relay_address
from workers.wire.udp import IPV4_OVERHEAD, IPV6_OVERHEAD, DatagramHeaders, split_key

if TYPE_CHECKING:
    from workers.udp.datagrams import Udp
    from workers.udp.flow import Flow

SETTING_UP: Final = 0
READY: Final = 1
CLOSED: Final = 2

WAITING_DATAGRAMS: Final = 64  #: that wait while an association is set up: a super-frame has so many
WAITING_OCTETS: Final = 64 * 1024
MAX_PERMITTED: Final = 1024  #: destinations of one client socket that udp-filtering remembers
RECEIVE_BUFFER: Final = 1 << 20  #: octets asked of SO_RCVBUF; the kernel gives up to twice net.core.rmem_max

# The path MTU that a connected socket knows; Python has no names for these (linux/in.h, linux/in6.h).
_IP_MTU: Final = 14
_IPV6_MTU: Final = 24
_UDP_GRO: Final = 104  # linux/udp.h
#: octets of a segment for UDP_SEGMENT where the path is not known (direct://): an Ethernet's
_ETHERNET: Final = 1500
_SHORT_LIFE: Final = 1.0  # seconds; an association that the proxy ends so soon is not asked for again at once


Receiver = Callable[["Association", int, float], None]  #: (association, event mask, now): answers wait
Undelivered = Callable[["Flow", bytes, int, float], None]  #: (flow, payload, code, now): it found no association


class Association:
    """One client socket: its upstream socket, its timers, and what Answers remembers of it."""

    __slots__ = (
        "_control",
        "_receiver",
        "_socket",
        "_started_at",
        "_udp",
        "_undelivered",
        "_waiting",
        "_waiting_octets",
        "_wake_at",
        "active_at",
        "alone",
        "busy",
        "client",
        "flow_keys",
        "is_connected",
        "key",
        "only_dns",
        "permitted",
        "queued_at",
        "quiet",
        "quiet_next",
        "receive",
        "receive_from",
        "receive_message",
        "segment_limit",
        "send",
        "sendmsg",
        "sendto",
        "socks_header",
        "sources",
        "state",
        "trains",
        "waiting_most",
    )

    def __init__(
        self,
        udp: Udp,
        key: bytes,
        client: bytes,
        now: float,
        receiver: Receiver | None = None,
        undelivered: Undelivered | None = None,
    ) -> None:
        """Make one for the client socket `client`: packed address, then the port's two octets.

        `key` is its place in the table: the client, or (udp-mapping address-port) the key of its only flow.
        """
        self._udp = udp
        self._receiver: Receiver = receiver or (
            udp.answers.from_anyone if udp.worker.upstream.direct else udp.answers.from_relay
        )
        self._undelivered: Undelivered = undelivered or udp.flow_undelivered
        self.key = key
        self.client = client
        self.is_connected = True  #: the socket has one peer: the proxy's relay, or the only destination
        #: destinations that may answer, the oldest first; None: anybody may
        self.permitted: dict[bytes, None] | None = None if udp.filtering == ENDPOINT_INDEPENDENT else {}
        self.state: int = SETTING_UP
        self.active_at = now  #: when a datagram last went either way
        self.queued_at = now  #: when it last took its place in the table, which is in order of use nearly
        self.only_dns = True  #: all its destinations have port 53: then dns_timeout is enough
        self.flow_keys: list[bytes] = []  #: of its flows in the table of flows
        self.socks_header = 10 if len(client) == 6 else 22  #: octets in front of an answer of the client's IP version
        #: headers towards the client, by the SOCKS header of the answer (or, for direct://, by its source)
        self.sources: dict[object, DatagramHeaders] = {}
        self.segment_limit = 0  #: octets that a segment of UDP_SEGMENT may have; 0: not to be used
        self.alone = 0  #: answers in a row that UDP_GRO did not join with others; -1: it cannot be had
        self.trains = 0  #: events with many answers since joining was tried last
        self.busy = False  #: the last event brought more than one answer
        self.quiet = 0  #: events with one answer that are not worth a second look
        self.quiet_next = 1
        self._started_at = now
        self._control: ProxyConnection | None = None
        self._socket: socket.socket | None = None
        self._waiting: list[tuple[Flow, bytes]] = []
        self._waiting_octets = 0
        self.waiting_most = WAITING_DATAGRAMS
        self._wake_at = inf  # when the timer is due that counts; others of ours may still fire, and are ignored

    # ── setting up ──────────────────────────────────────────────────────────────────────────────────────────────

    def associate(self) -> None:
        """Ask the proxy for UDP ASSOCIATE. OSError when that cannot even begin."""
        worker = self._udp.worker
        # Zeros as address and port: we do not know what the proxy will see, and servers enforce what they are told.
        self._control = ProxyConnection(worker, self, UDP_ASSOCIATE, b"", 0)
        self._wake(self._started_at + worker.settings.connect_timeout)

    def adopt(
        self, key: bytes, client: bytes, now: float, receiver: Receiver | None, undelivered: Undelivered | None
    ) -> None:
        """Become the association of a client socket, having stood ready without one."""
        self.key = key
        self.client = client
        self.active_at = self.queued_at = now
        self.only_dns = True
        self.socks_header = 10 if len(client) == 6 else 22
        self._undelivered = undelivered or self._udp.flow_undelivered
        if receiver is not None:
            self._receiver = receiver
            if self._socket is not None:
                self._listen(self._socket, receiver)
        self._wake(now + self._idle_timeout())

    def open_direct(self, now: float) -> None:
        """Open an unconnected socket, which takes answers from anyone. OSError when there is no descriptor.

        With udp-mapping address-port it is connected to the one destination, and OSError may say that none leads there.
        """
        udp = self._udp
        family = socket.AF_INET if len(self.client) == 6 else socket.AF_INET6
        opened = udp.worker.upstream.open(family, socket.SOCK_DGRAM)
        if self.key == self.client:
            self.is_connected = False
            overhead = IPV4_OVERHEAD if family == socket.AF_INET else IPV6_OVERHEAD
            self._use(opened, _ETHERNET - overhead)
            self.receive_from = opened.recvfrom_into
            udp.worker.watch(opened.fileno(), EPOLLIN, partial(self._receiver, self))
        else:
            source, source_port, host, port = split_key(self.key)
            limit = self._connected_to(opened, family, socket.inet_ntop(family, host), port)
            self._use(opened, limit)
            # No SOCKS header stands in front of answers, and all have one source.
            self.socks_header = 0
            mtu = udp.worker.settings.mtu
            self.sources[b""] = DatagramHeaders(host, port, source, source_port, mtu, b"")
            udp.worker.watch(opened.fileno(), EPOLLIN, partial(udp.answers.from_relay, self))
        self._wake(now + self._idle_timeout())

    def connected(self, bound: tuple[Host, int], now: float) -> None:
        """Take the relay's address, and send what waits."""
        udp = self._udp
        worker = udp.worker
        assert self._control is not None
        address, port = relay_address(worker.settings.udp_address, bound, self._control.peer)
        if not port:
            self._fail(udp.availability.no_udp(now), now)
            return
        try:
            try:
                self._connect(address, port)
            except OSError:
                if address == self._control.peer or worker.settings.udp_address != AUTO:
                    raise
                self._connect(self._control.peer, port)  # no way to where the proxy says: where it is, there is one
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                self._count(counts.UDP_DROPPED_DESCRIPTORS, len(self._waiting))
                self._end(now)
            else:
                proxy_unreachable(worker, f"its UDP relay: {error.strerror}")
                self._fail(udp.availability.is_down(now), now)
            return
        self._begin(now)

    def _begin(self, now: float) -> None:
        """Send what waits: the way stands."""
        udp = self._udp
        self._started_at = now
        self.active_at = now
        self._wake(now + self._idle_timeout())
        udp.availability.has_udp()
        waiting, self._waiting = self._waiting, []
        self._waiting_octets = 0
        for flow, payload in waiting:
            udp.send_copy(flow, payload, now)
        udp.associations.fill(now)

    def _connect(self, address: bytes, port: int) -> None:
        """Open the socket for datagrams, connected: the kernel then refuses what does not come from the relay."""
        worker = self._udp.worker
        assert self._control is not None
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        name = self._control.peer_name if address == self._control.peer else socket.inet_ntop(family, address)
        opened = worker.upstream.open(family, socket.SOCK_DGRAM)
        self._use(opened, self._connected_to(opened, family, name, port))
        worker.watch(opened.fileno(), EPOLLIN, partial(self._receiver, self))

    def _connected_to(self, opened: socket.socket, family: int, name: str, port: int) -> int:
        """Connect a socket, and return how many octets of payload the path's MTU has room for."""
        try:
            opened.connect((name, port))
            if family == socket.AF_INET:
                return opened.getsockopt(socket.IPPROTO_IP, _IP_MTU) - IPV4_OVERHEAD
            return opened.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU) - IPV6_OVERHEAD
        except OSError:
            opened.close()
            raise

    def _use(self, opened: socket.socket, segment_limit: int) -> None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket = opened
        self.segment_limit = segment_limit
        # Bound methods, so that the hot path has one look-up for each system call. They keep the socket object after
        # close(), and whoever calls them then gets EBADF, an OSError.
        self.receive = opened.recv_into
        self.receive_message = opened.recvmsg_into
        self.send = opened.send
        self.sendto = opened.sendto
        self.sendmsg = opened.sendmsg
        self.state = READY
        self._count(counts.UDP_OPENED, 1)

    @property
    def may_coalesce(self) -> bool:
        """Whether the kernel may be asked to join answers: there is a socket, and it has not refused."""
        return self._socket is not None and self.alone >= 0

    def coalesce(self, on: bool, receiver: Receiver) -> None:
        """Have the kernel join answers of one length, or not any more, and `receiver` take them."""
        assert self._socket is not None
        self.alone = self.trains = 0
        try:
            self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, on)
        except OSError:
            self.alone = -1  # a kernel before 5.0
        else:
            self._listen(self._socket, receiver)

    def _listen(self, opened: socket.socket, receiver: Receiver) -> None:
        worker = self._udp.worker
        worker.unwatch(opened.fileno())
        worker.watch(opened.fileno(), EPOLLIN, partial(receiver, self))

    def permit(self, host: bytes, port: int) -> None:
        """Let a destination answer from now on, if not all may."""
        permitted = self.permitted
        if permitted is not None:
            if len(permitted) >= MAX_PERMITTED:
                del permitted[next(iter(permitted))]
            permitted[self._name(host, port)] = None

    def permits(self, host: bytes, port: int) -> bool:
        """Say whether an answer may come from there."""
        return self.permitted is None or self._name(host, port) in self.permitted

    def _name(self, host: bytes, port: int) -> bytes:
        return host if self._udp.filtering == ADDRESS else host + port.to_bytes(2, "big")

    def wait(self, flow: Flow, payload: bytes) -> None:
        """Keep a copy of a datagram until the association is ready; what is too much is dropped and counted."""
        if len(self._waiting) >= self.waiting_most or self._waiting_octets + len(payload) > WAITING_OCTETS:
            self._count(counts.UDP_DROPPED_WAITING, 1)
            return
        self._waiting.append((flow, payload))
        self._waiting_octets += len(payload)

    # ── the control connection ──────────────────────────────────────────────────────────────────────────────────

    def refused(self, reply: int, now: float) -> None:
        """The proxy has no UDP, or not for us."""
        self._fail(self._udp.availability.refusal(reply, now), now)

    def lost(self, why: int, now: float) -> None:
        """The control connection ended, and with it the association (RFC 1928, 7)."""
        udp = self._udp
        if why == proxyconnection.CLOSED:
            if now - self._started_at < _SHORT_LIFE:
                udp.availability.is_down(now)
            self._end(now)
        elif why == proxyconnection.CLOSED_AT_REQUEST:
            self._fail(udp.availability.no_udp(now), now)
        else:
            self._fail(udp.availability.is_down(now), now)

    def received(self, data: bytes, now: float) -> None:
        """Take bytes on the control connection: RFC 1928 has none there, gost 1 has all datagrams."""
        if self._udp.availability.is_gost1(data):
            self._end(now)

    def _fail(self, code: int, now: float) -> None:
        """Close, and have what waits answered as a host or router would."""
        waiting, self._waiting = self._waiting, []
        self._end(now)
        for flow, payload in waiting:
            self._undelivered(flow, payload, code, now)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _idle_timeout(self) -> float:
        settings = self._udp.worker.settings
        return min(settings.dns_timeout, settings.udp_timeout) if self.only_dns else settings.udp_timeout

    def _wake(self, when: float) -> None:
        """Have _timeout called at `when`, unless it is called earlier anyway and will look again."""
        if when < self._wake_at:
            self._wake_at = when
            self._udp.worker.timers.call_at(when, self._timeout)

    def _timeout(self, now: float) -> None:
        """Look whether it is time to give up; packets only note the time, and move no timer."""
        if now < self._wake_at:
            return
        worker = self._udp.worker
        if self.state == SETTING_UP:
            due_at = self._started_at + worker.settings.connect_timeout
            if now >= due_at:
                proxy_unreachable(worker, "no answer within the connect timeout")
                self._fail(self._udp.availability.is_down(now), now)
                return
        elif self.state == READY:
            due_at = self.active_at + self._idle_timeout()
            if now >= due_at:
                self._count(counts.UDP_IDLE_TIMEOUTS, 1)
                self._end(now)
                return
        else:
            return
        self._wake_at = inf
        self._wake(due_at)

    def _end(self, now: float) -> None:
        self._udp.remove(self, now)
        self.close()

    def close(self) -> None:
        """Close both sockets; the proxy sees the end of the control connection and ends its part."""
        self.state = CLOSED
        self._waiting.clear()
        if self._control is not None:
            self._control.close()
        if self._socket is not None:
            self._udp.worker.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self.sources.clear()

    def _count(self, index: int, by: int) -> None:
        self._udp.worker.count[index] += by
