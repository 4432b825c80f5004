"""Dial: a SYN that waits until the proxy has connected.

    SYN ─► connect ─► handshake ─► Relay, which sends the SYN-ACK
                 └───────────┴─────────► refused: RST or ICMP, as a host or router would have sent (`REFUSALS`)

Until then nothing is answered: a SYN-ACK would tell health checks and happy eyeballs that every port of the world is
open. Its state is small: a forged SYN costs a socket, not a connection's buffers. With `early-accept` the Relay comes
first, and what the client sends waits in it, EARLY_WINDOW octets at the most; then a refusal can only be RST.
"""

from __future__ import annotations

import errno
import socket
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import TYPE_CHECKING, Final

from workers import counts, icmp
from workers.proxysocket import RESET_ON_CLOSE, ProxySocket
from workers.relay import Relay
from workers.socks.handshake import Handshake
from workers.socks.wire import CONNECT, ProtocolError
from workers.tcp.connection import Connection
from workers.tcp.limits import DEFAULT_MSS
from workers.tcp.segment import RST, Segment
from workers.tcp.sequence import HALF, MASK
from workers.wire.tcp import Headers, reply_addresses

if TYPE_CHECKING:
    from workers.flows import TcpFlows
    from workers.warm import Taken

EVERYTHING: Final = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
ANSWER: Final = 512  #: octets; most answers are shorter, and what a server says first may be right behind them
RESET: Final = -1  #: a refusal that is an RST

EARLY_WINDOW: Final = 65535  #: octets that wait for a proxy that is not connected; what any SYN-ACK can offer

#: REP code (RFC 1928, 6) → what the client is told; others (1 failure, 5 refused, 7 no CONNECT): RST
REFUSALS: Final = {2: icmp.ADMIN, 3: icmp.NET, 4: icmp.HOST, 6: icmp.HOST, 8: icmp.NET}
#: the same by errno: for direct:// what the target's end said, else what became of the way to the proxy; others: RST
REFUSED_ERRNO: Final = {
    errno.ENETUNREACH: icmp.NET,
    errno.ENETDOWN: icmp.NET,
    errno.EAFNOSUPPORT: icmp.NET,
    errno.EADDRNOTAVAIL: icmp.NET,  # no address of this IP version to connect from
    errno.EHOSTUNREACH: icmp.HOST,
    errno.EHOSTDOWN: icmp.HOST,
    errno.ENONET: icmp.HOST,
    errno.EACCES: icmp.ADMIN,
    errno.EPERM: icmp.ADMIN,
}


class Dial:
    """A flow whose connection to the proxy does not stand yet."""

    __slots__ = (
        "_buffer",
        "_handshake",
        "_heard",
        "_is_warm",
        "_iss",
        "_relay",
        "_socket",
        "flows",
        "key",
        "packet",
        "pending",
        "syn",
    )

    def __init__(self, flows: TcpFlows, key: bytes, syn: Segment, packet: bytes, iss: int) -> None:
        """Keep the SYN (the object becomes the dial's), its packet, which an ICMP error would quote, and our ISS."""
        self.flows = flows
        self.key = key
        self.packet = packet
        self.syn = syn
        self._iss = iss
        self.pending = False  #: it counts among the flows' pending ones
        self._handshake: Handshake | None = None
        self._socket: socket.socket | None = None
        self._is_warm = False  # the connection was there before the flow
        self._heard = False  # the proxy has said something that makes sense
        self._relay: Relay | None = None  # with early-accept it is there from the start
        self._buffer = 0  # what its receive buffer would be

    # ── the client ──────────────────────────────────────────────────────────────────────────────────────────────

    def segment_arrives(self, seg: Segment, now: float) -> None:
        """Ignore the SYN that comes again; the client's RST cancels."""
        if seg.flags & RST and seg.seq in (self.syn.seq, self.syn.seq + 1 & MASK):
            self.flows.count[counts.TCP_RESET_BY_CLIENT] += 1
            self.cancel()

    def gives_way(self, syn: Segment) -> bool:
        """Say whether a SYN is another, newer one: the client has begun anew, and nothing was answered yet."""
        return 0 < (syn.seq - self.syn.seq) & MASK < HALF

    def begin_anew(self, syn: Segment, packet: bytes) -> None:
        """Take the newer SYN in the place of the old one; the way to the proxy is the same."""
        self.syn = syn
        self.packet = packet

    # ── the proxy ───────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, now: float) -> None:
        """Open the socket and begin to connect. OSError: no descriptor, or no place in epoll; cancel() cleans up."""
        flows = self.flows
        upstream = flows.upstream
        family, host, port = self._destination()
        if upstream.direct:
            target = (socket.inet_ntop(family, host), port)
        else:
            self._handshake = handshake = upstream.handshake(CONNECT, host, port)
            if upstream.proxy is None or handshake.done:  # nobody to ask, or nothing that it could be asked for
                self.refuse(REFUSALS.get(handshake.reply, RESET), now)
                return
            warm = flows.warm.take(now)
            if warm is not None:
                self._use_warm(warm, host, port, now)
                return
            target = upstream.proxy
            family = upstream.proxy_family
        try:
            self._socket = opened = upstream.open(family, socket.SOCK_STREAM)
        except OSError as failure:
            if failure.errno != errno.EAFNOSUPPORT:
                raise
            self._failed(errno.EAFNOSUPPORT, now)
            return
        if self._connect(opened, target, now):
            self._begin(now)

    def _use_warm(self, warm: Taken, host: bytes, port: int, now: float) -> None:
        """Ask on a connection that has waited for this."""
        self._socket, handshake = warm
        self._is_warm = True
        if handshake is not None:
            handshake.ask(CONNECT, host, port)
            self._handshake = handshake
        assert self._handshake is not None
        self.flows.handlers[self._socket.fileno()] = self.answered
        self._begin(now)
        self._send(self._handshake.first_bytes, now)

    def _destination(self) -> tuple[int, bytes, int]:
        """Return family, packed address and port."""
        key = self.key
        if len(key) == 12:
            return socket.AF_INET, key[4:8], key[10] << 8 | key[11]
        return socket.AF_INET6, key[16:32], key[34] << 8 | key[35]

    def _connect(self, opened: socket.socket, target: tuple[str, int], now: float) -> bool:
        """Begin to connect; False: it has failed at once."""
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = opened.connect_ex(target)
        if error and error != errno.EINPROGRESS:
            self._failed(error, now)
            return False
        self.flows.watch(opened.fileno(), EVERYTHING, self.connected)
        return True

    def _ask_again(self, now: float) -> bool:
        """Ask on a new connection, if the warm one was dead; step by step, if the proxy did not take all at once."""
        upstream = self.flows.upstream
        old = self._socket
        if self._heard or not (self._is_warm or upstream.pipelined) or upstream.proxy is None or old is None:
            return False
        if self._is_warm:
            self._is_warm = False
        else:
            upstream.pipelining_failed()
        try:
            self._socket = opened = upstream.open(upstream.proxy_family, socket.SOCK_STREAM)
        except OSError:
            return False
        self.flows.forget_descriptor(old.fileno())
        old.close()
        _, host, port = self._destination()
        self._handshake = upstream.handshake(CONNECT, host, port)
        self._connect(opened, upstream.proxy, now)
        return True

    def _begin(self, now: float) -> None:
        """Enter the flow table: the dial itself, or the relay that answers at once."""
        flows = self.flows
        self.pending = True
        flows.pending += 1
        if flows.early_accept:
            relay = self._relay = self._accept(now)
            self._buffer = relay.conn.rcv.buffer
            relay.conn.rcv.buffer = min(self._buffer, EARLY_WINDOW)
            relay.begin(now)
        else:
            flows.table[self.key] = self

    def _accept(self, now: float) -> Relay:
        """Make the connection, and put its relay into the table."""
        flows = self.flows
        key = self.key
        version, client, mss = (4, key[:4], flows.mss4) if len(key) == 12 else (6, key[:16], flows.mss6)
        syn = self.syn
        syn.mss = min(syn.mss or DEFAULT_MSS, flows.icmp_errors.mss_towards(client, now))
        conn = Connection(syn, self._iss, mss, flows.policy)
        headers = Headers(version, reply_addresses(key), conn.smss, conn.timestamps)
        flows.table[key] = relay = Relay(flows, key, conn, headers, ProxySocket(flows, self), now)
        return relay

    def connected(self, mask: int, now: float) -> None:
        """The first event of the socket: it is connected, or has failed."""
        opened = self._socket
        if opened is None:
            return
        if mask & (EPOLLERR | EPOLLHUP):
            self._failed(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET, now)
            return
        if not mask & EPOLLOUT:
            return
        handshake = self._handshake
        if handshake is None:
            self._open(b"", mask, now)
            return
        if not self.flows.upstream.fast_open:
            self.flows.upstream.answered()
        self.flows.handlers[opened.fileno()] = self.answered
        self._send(handshake.first_bytes, now)
        if mask & EPOLLIN:
            self.answered(mask, now)

    def answered(self, mask: int, now: float) -> None:
        """Bytes of the proxy's answer."""
        opened = self._socket
        handshake = self._handshake
        if opened is None or handshake is None or not mask & ~EPOLLOUT:
            return
        while True:
            try:
                data = opened.recv(ANSWER)
            except BlockingIOError:
                return
            except OSError as failure:
                if self.flows.upstream.fast_open and not self._heard and failure.errno:
                    self._failed(failure.errno, now)  # the connection never stood
                    return
                data = b""
            if not data:
                if not self._ask_again(now):
                    self.flows.count[counts.PROXY_PROTOCOL_ERRORS] += 1
                    self.refuse(RESET, now)
                return
            try:
                message = handshake.receive(data)
            except ProtocolError as error:
                if not self._ask_again(now):
                    self.flows.protocol_error(error)
                    self.refuse(RESET, now)
                return
            if not self._heard:
                self._heard = True
                self.flows.upstream.answered()
            if message:
                self._send(message, now)
            if handshake.done:
                if handshake.reply:
                    self.refuse(REFUSALS.get(handshake.reply, RESET), now)
                elif self._socket is not None:
                    # A full buffer: there may be more, and the edge that told of it is spent.
                    self._open(handshake.surplus, mask | EPOLLIN if len(data) == ANSWER else mask & ~EPOLLIN, now)
                return
            if len(data) < ANSWER and not mask & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
                return

    def _send(self, data: bytes, now: float) -> None:
        """Send a handshake message; a fresh socket takes it whole."""
        assert self._socket is not None
        try:
            whole = self._socket.send(data) == len(data)
        except OSError:
            whole = False
        if not whole and not self._ask_again(now):
            self.flows.count[counts.PROXY_UNREACHABLE] += 1
            self.refuse(RESET, now)

    def _open(self, surplus: bytes, mask: int, now: float) -> None:
        """Become a relay, or give the one that waits its socket."""
        flows = self.flows
        opened = self._socket
        assert opened is not None
        self._socket = None
        self._end()
        relay = self._relay
        if relay is None:
            relay = self._accept(now)
        else:
            relay.conn.rcv.buffer = self._buffer
        flows.handlers[opened.fileno()] = relay.socket_ready
        relay.proxy_connected(opened, surplus, now)
        if mask & ~EPOLLOUT:
            relay.socket_ready(mask & ~EPOLLOUT, now)

    def _end(self) -> None:
        """Be no longer pending."""
        if self.pending:
            self.pending = False
            self.flows.pending -= 1

    def _failed(self, error: int, now: float) -> None:
        """The connect failed: the target's fault for direct://, else the proxy's."""
        flows = self.flows
        if flows.upstream.direct:
            if error == errno.ETIMEDOUT:
                flows.count[counts.TCP_CONNECT_TIMEOUTS] += 1
            self.refuse(REFUSED_ERRNO.get(error, RESET), now)
            return
        flows.count[counts.PROXY_UNREACHABLE] += 1
        flows.upstream.failed(errno_text(error))
        self.refuse(REFUSED_ERRNO.get(error, RESET), now)

    def timed_out(self, now: float) -> None:
        """Give up after the connect timeout: silence so far, now RST."""
        flows = self.flows
        flows.count[counts.TCP_CONNECT_TIMEOUTS] += 1
        if self._handshake is None or self._socket is None:
            pass
        elif flows.handlers.get(self._socket.fileno()) == self.connected:
            flows.upstream.failed("no answer to the connection request")
        elif not self._heard and not self._is_warm:
            flows.upstream.pipelining_failed()  # how servers look that lost the request
        self.refuse(RESET, now)

    def refuse(self, how: int, now: float) -> None:
        """Tell the client what a host or router would have told it, and forget the flow."""
        self.flows.count[counts.TCP_REFUSED] += 1
        if self._relay is not None:
            self._relay.abort(now)
        elif how == RESET:
            self.flows.reset_stranger(self.key, self.syn)
        else:
            self.flows.icmp.unreachable(self.packet, how)
        self.cancel()

    def abort(self, now: float) -> None:
        """Refuse with RST: the worker stops."""
        self.refuse(RESET, now)

    def cancel(self) -> None:
        """Close the socket, and forget the flow if there is no relay, without a word to the client."""
        self._end()
        if self._socket is not None:
            self.flows.forget_descriptor(self._socket.fileno())
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self._socket.close()
            self._socket = None
        if self._relay is None:
            self.flows.remove(self.key, self)


def errno_text(error: int) -> str:
    """Return the system's words for an errno."""
    return OSError(error, "").strerror or errno.errorcode.get(error, str(error))
