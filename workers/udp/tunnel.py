"""Tunnel: an association whose datagrams travel inside the TCP connection to the proxy, for proxies without UDP.

    send(SOCKS header and payload) ─► framing.frame ─► ProxyConnection ─► proxy
    Answers.from_relay ◄─ receive ◄── framing.receive ◄── received ◄───── proxy

To the rest it is an Association: `send` and `receive` stand for those of a socket. What the connection does not take
waits, up to MAX_UNSENT octets and whole frames only; beyond that datagrams are dropped, as by a queue on a link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from errno import EMSGSIZE, EXFULL
from select import EPOLLIN
from typing import Final

from workers import counts, proxyconnection
from workers.proxyconnection import ProxyConnection
from workers.socks import modes
from workers.socks.wire import IPV4, Host, ProtocolError, Readable
from workers.udp.association import READY, Association

MAX_UNSENT: Final = 64 * 1024  #: octets of frames that wait behind the kernel's own buffer
STALLED: Final = EXFULL  #: errno of a datagram that the tunnel has no room for


class Tunnel(Association):
    """One client socket, and a connection to the proxy with its datagrams."""

    __slots__ = ("_arrived", "_framing", "_mode")

    def associate(self) -> None:
        """Ask the proxy for the dialect that it is known to have. OSError when that cannot even begin."""
        udp = self._udp
        worker = udp.worker
        self._mode = udp.availability.mode
        command, name, framing = modes.REQUESTS[self._mode]
        self._framing = framing()
        self._arrived: deque[bytes] = deque()  # datagrams that Answers has not taken yet
        self._control = ProxyConnection(worker, self, command, name or b"", 0)
        self._wake(self._started_at + worker.settings.connect_timeout)

    def connected(self, bound: tuple[Host, int], now: float) -> None:
        """Send what waits; BND means nothing here."""
        self.receive = self._receive  # type: ignore[assignment]
        self.send = self._send_whole  # type: ignore[assignment]
        self.sendmsg = self._send_pieces  # type: ignore[assignment]
        self.state = READY
        self._count(counts.UDP_OPENED, 1)
        self._begin(now)

    def refused(self, reply: int, now: float) -> None:
        """The proxy does not have this dialect; gost has two."""
        if not self._try_other():
            super().refused(reply, now)

    def lost(self, why: int, now: float) -> None:
        """The connection ended; a gost of the other version closes instead of answering."""
        if why != proxyconnection.CLOSED_AT_REQUEST or not self._try_other():
            super().lost(why, now)

    def _try_other(self) -> bool:
        if not self._udp.availability.other_gost(self._mode):
            return False
        try:
            self.associate()
        except OSError:
            return False
        return True

    # ── datagrams ───────────────────────────────────────────────────────────────────────────────────────────────

    def received(self, data: bytes, now: float) -> None:
        """Take bytes of the stream, and let Answers have the datagrams in them."""
        arrived = self._arrived
        arrived.extend(self._framing.receive(data))
        while arrived:
            self._receiver(self, EPOLLIN, now)
        if self._framing.error is not None:
            self._count(counts.UDP_DROPPED_BAD_HEADER, 1)
            self._end(now)

    def _receive(self, into: memoryview, size: int = 0, flags: int = 0) -> int:
        """Return the length of the next datagram, whose beginning is in `into` then, as recv with MSG_TRUNC does."""
        if not self._arrived:
            raise BlockingIOError
        datagram = self._arrived.popleft()
        room = min(len(into), len(datagram))
        into[:room] = datagram[:room]
        return len(datagram)

    def _send_whole(self, datagram: Readable) -> int:
        """Send a datagram behind its SOCKS header; OSError: it is too big, or the tunnel is full."""
        cut = 10 if datagram[3] == IPV4 else 22  # clients name addresses, nothing else
        try:
            frame = self._framing.frame(bytes(datagram[:cut]), datagram[cut:])
        except ProtocolError as error:
            raise OSError(EMSGSIZE, str(error)) from None
        control = self._control
        if control is None or control.unsent > MAX_UNSENT or not control.send(frame):
            raise OSError(STALLED, "the tunnel is full")
        return len(datagram)

    def _send_pieces(self, pieces: Sequence[Readable], *_: object) -> int:
        """Send a datagram in pieces."""
        return self._send_whole(b"".join(pieces))
