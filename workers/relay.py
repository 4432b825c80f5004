"""Relay: one TCP flow ↔ one proxied connection, bytes and back-pressure, both ways.

    client ── segment_arrives ─► Connection ── text ─► _deliver ─► ProxySocket ─► proxy
    client ◄─ _output ◄──────── Connection ◄─ send ── _read ◄──── ProxySocket ◄─ proxy
                 └ Unacked

Up, text goes from the RX frame into the socket; what the socket does not take is copied and waits, and the receive
window shrinks by it. Down, the socket is read straight into a TX frame, only as much as the windows allow, so that
nothing waits unsent; the headers are written in front of the payload and the frame is held until it is acknowledged.
"""

from __future__ import annotations

import socket
from math import inf
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import TYPE_CHECKING, Final

from ipc.layout import HEADROOM
from workers import counts
from workers.port import BACKLOG
from workers.proxysocket import ProxySocket
from workers.tcp import pathmtu
from workers.tcp.connection import Connection
from workers.tcp.events import (
    ACKED,
    AT_END_OF_BATCH,
    AT_ONCE,
    DELAYED,
    ENDED,
    GAVE_UP,
    OPENED,
    REMOTE_CLOSED,
    RESET,
    RETRANSMITTED,
    TEXT,
    TIMED_OUT,
    UNACCEPTABLE_ACK,
)
from workers.tcp.segment import Segment
from workers.tcp.states import SYN_RECEIVED, TIME_WAIT
from workers.timewait import TimeWait
from workers.unacked import Unacked
from workers.wire.tcp import Headers

if TYPE_CHECKING:
    from workers.flows import TcpFlows

RARE: Final = ~(TEXT | ACKED)  #: events
COUNTED: Final = sum(bit for bit, _ in counts.TCP_EVENTS)
ENDING: Final = EPOLLRDHUP | EPOLLHUP | EPOLLERR
TO_READ: Final = EPOLLIN | ENDING


class Relay:
    """A flow whose client is answered; the proxy is connected, or being dialled (`early-accept`)."""

    __slots__ = (
        "_hup",
        "_in_acks",
        "_in_delayed",
        "_in_queue",
        "_port",
        "_proxy",
        "_readable",
        "_unacked",
        "_wake_at",
        "active_at",
        "conn",
        "flows",
        "headers",
        "key",
    )

    def __init__(
        self, flows: TcpFlows, key: bytes, conn: Connection, headers: Headers, proxy: ProxySocket, now: float
    ) -> None:
        """Nothing is sent before begin()."""
        self.flows = flows
        self.key = key
        self.conn = conn
        self.headers = headers
        self.active_at = now  #: when a segment last arrived or the proxy last sent
        self._port = flows.port
        self._proxy = proxy
        self._unacked = Unacked(flows.port)  #: what the client has not acknowledged
        self._readable = False  #: the socket may have something to read
        self._hup = False  #: it will say end of file, or an error, some day
        self._in_acks = False
        self._in_delayed = False
        self._in_queue = False  #: of those that read again: ready or starved
        self._wake_at = inf

    @property
    def half_closed(self) -> bool:
        """Whether one side has sent its FIN."""
        return self._proxy.finished or self._proxy.at_end

    def gives_way(self, syn: Segment) -> bool:
        """No: it is synchronized, and RFC 9293 says what becomes of a SYN then."""
        return False

    # ── from the device ─────────────────────────────────────────────────────────────────────────────────────────

    def segment_arrives(self, seg: Segment, now: float) -> None:
        """Take one segment of this flow."""
        conn = self.conn
        port = self._port
        self.active_at = now
        conn.segment_arrives(seg, port.rx, now)
        joined = conn.take_reassembled() if conn.rcv.pieces is not None else None
        events = conn.events
        conn.events = 0
        if events & TEXT:
            self._deliver(port.rx_view[seg.text_at : seg.text_at + seg.len], now)
            if joined:
                for text in joined:
                    self._deliver(text, now)
        if events & ACKED:
            self._unacked.release(conn.snd.una)
        if events & RARE and self._handle(events, seg, now):
            return
        if self._readable:
            self._read(now)
        again = conn.retransmit_due
        if conn.ack_due == AT_ONCE or again or conn.snd.nxt != conn.snd.end or conn.syn_due:
            self._output(now)
            if again and self._readable:
                self._read(now)  # the rest of the window, behind what was sent again
        due = conn.ack_due  # unless text has just carried it
        if due == AT_END_OF_BATCH and not self._in_acks:
            self._in_acks = True
            self.flows.acks.append(self)
        elif due == DELAYED and not self._in_delayed:
            self._in_delayed = True
            self.flows.delayed.append((conn.rcv.ack_at, self))
        if conn.deadline < self._wake_at:
            self._arm()

    def _handle(self, events: int, seg: Segment, now: float) -> bool:
        """Handle what is rare; True: the flow has ended."""
        if events & UNACCEPTABLE_ACK:
            self.flows.reset_stranger(self.key, seg)
        if events & TIMED_OUT:
            self._unacked.copy_held()
        if events & COUNTED:
            for bit, counter in counts.TCP_EVENTS:
                if events & bit:
                    self.flows.count[counter] += 1
        if events & OPENED:
            self.flows.count[counts.TCP_OPENED] += 1
        if events & REMOTE_CLOSED:
            self._proxy.finish()
        if events & (RESET | GAVE_UP):
            self.flows.count[counts.TCP_RESET_BY_CLIENT if events & RESET else counts.TCP_RETRANSMIT_TIMEOUTS] += 1
            self._proxy.reset()
        if not events & ENDED:
            return False
        self._output(now)
        self._end(now)
        return True

    def _deliver(self, text: memoryview | bytes, now: float) -> None:
        """Give text to the proxy; a copy of what it does not take waits."""
        proxy = self._proxy
        if proxy.send is not None:
            try:
                taken = proxy.send(text)
            except BlockingIOError:
                taken = 0
            except OSError:
                self._sending_failed(now)
                return
            if taken == len(text):
                return
            text = text[taken:]
        self.conn.rcv.pending += proxy.wait(text)

    def ack_at_end_of_batch(self, now: float) -> None:
        """Send the one pure ACK for all segments of the batch, unless data has carried it."""
        self._in_acks = False
        out = self.flows.out
        if self.conn.ack_to_send(out, now):
            self.flows.transmit(self.headers, out)

    def delayed_ack_due(self, now: float) -> None:
        """Send the ACK that no data has carried."""
        self._in_delayed = False
        conn = self.conn
        if conn.ack_due == DELAYED:
            due_at = conn.rcv.ack_at
            if due_at > now:  # it is another one, younger than the entry; the queue would be out of order
                self._in_delayed = True
                self.flows.timers.call_at(due_at, self.delayed_ack_due)
                return
            conn.delayed_ack_timeout()
            self.ack_at_end_of_batch(now)

    def lower_mss(self, mss: int, now: float) -> bool:
        """Put no more than `mss` octets behind the TCP header, from what is in flight on; False: it was no more."""
        if not pathmtu.lower(self.conn, mss):
            return False
        self.headers.cut_at(self.conn.smss)
        self._output(now)
        return True

    # ── from the proxy ──────────────────────────────────────────────────────────────────────────────────────────

    def socket_ready(self, mask: int, now: float) -> None:
        """Take an edge-triggered event of the socket."""
        proxy = self._proxy
        if mask & EPOLLOUT and proxy.backlog:
            self._send_backlog(now)
        if proxy.at_end:
            if mask & EPOLLERR and proxy.is_open:
                self._proxy_failed(now)
        elif mask & TO_READ:
            if mask & ENDING:
                self._hup = True
            self._readable = True
            self._read(now)

    def read_again(self, now: float) -> None:
        """Go on with a socket that had more than one frame took, or for which there was none."""
        self._in_queue = False
        if self._readable:
            self._read(now)

    def begin(self, now: float) -> None:
        """Send the SYN-ACK."""
        self._output(now)

    def proxy_connected(self, opened: socket.socket, surplus: bytes, now: float) -> None:
        """Take over the socket; what the proxy sent behind its reply is the first text."""
        proxy = self._proxy
        proxy.connected(opened)
        if surplus:
            self._unacked.keep_copy(self.conn.snd.end, surplus)
            self.conn.send(len(surplus))
        if proxy.backlog or proxy.finished:
            self._send_backlog(now)
        self._output(now)

    def _read(self, now: float) -> None:
        """Read the socket into one frame, as much as may be sent at once, and send it."""
        conn = self.conn
        recv_into = self._proxy.recv_into
        if recv_into is None or conn.state == SYN_RECEIVED:
            return
        room = conn.room(now)
        port = self._port
        if not room or port.backlog >= BACKLOG or not port.large.free:
            self._wait_to_read(room, now)
            return
        frame = port.large.take()
        payload = frame + HEADROOM
        view = port.tx_view
        try:
            length = recv_into(view[payload : payload + room])
        except BlockingIOError:
            port.large.give(frame)
            self._readable = False
            return
        except OSError:
            port.large.give(frame)
            self._proxy_failed(now)
            return
        if not length:
            port.large.give(frame)
            self._end_of_file(now)
            return
        if length == room or self._hup:
            self._read_on(length < room)
        else:
            self._readable = False
        self.active_at = now
        out = self.flows.out
        seq = conn.snd.end
        if conn.text_at_once(out, length, now):
            # Its headers stand in front of it: one piece, for the one time that nobody else reads the frame.
            self._unacked.keep(seq, frame, length)
            written = self.headers.write(view, payload, out)
            port.transmit(payload - written, written + length)
            if conn.deadline < self._wake_at:
                self._arm()
        else:  # something else goes first
            self._unacked.keep_copy(seq, port.tx[payload : payload + length])
            port.large.give(frame)
            conn.send(length)
            self._output(now)

    def _wait_to_read(self, room: int, now: float) -> None:
        """Come back when the client's window opens, or when there are frames again."""
        if not room:
            self.conn.want_room(now)
            if self.conn.deadline < self._wake_at:
                self._arm()
        elif not self._in_queue:
            self._in_queue = True
            self.flows.starved.append(self)

    def _read_on(self, all_was_read: bool) -> None:
        """Read again soon; see at once whether the end of file follows: the FIN rides on the last text."""
        if self._hup and all_was_read and self._proxy.nothing_more():
            self._close()
        elif not self._in_queue:
            self._in_queue = True
            self.flows.ready.append(self)

    def _end_of_file(self, now: float) -> None:
        """The proxy will send nothing more: its FIN is ours, unless its connection is broken."""
        if self._proxy.broken:
            self._proxy_failed(now)
            return
        self._close()
        self._output(now)

    def _close(self) -> None:
        self._readable = False
        self._proxy.read_to_end()
        self.conn.close()

    def _send_backlog(self, now: float) -> None:
        """Give the proxy what waited for it, and open the window again."""
        conn = self.conn
        try:
            sent = self._proxy.send_backlog()
        except OSError:
            self._sending_failed(now)
            if self._readable:
                self._read(now)
            return
        if sent:
            self.active_at = now
            conn.rcv.pending -= sent
            conn.taken_by_proxy()
            if conn.ack_due == AT_ONCE:
                self._output(now)

    # ── to the device ───────────────────────────────────────────────────────────────────────────────────────────

    def _output(self, now: float) -> None:
        """Send every segment that is due."""
        out = self.flows.out
        conn = self.conn
        while conn.segment_to_send(out, now):
            if conn.events & RETRANSMITTED:
                conn.events &= ~RETRANSMITTED
                self.flows.count[counts.TCP_RETRANSMITTED] += 1
            if not out.len:
                self.flows.transmit(self.headers, out)
            elif not self._unacked.transmit(self.headers, out):
                self.flows.count[counts.NO_FRAMES] += 1
        if conn.deadline < self._wake_at:
            self._arm()

    # ── the clock ───────────────────────────────────────────────────────────────────────────────────────────────

    def _arm(self) -> None:
        self._wake_at = self.conn.deadline
        self.flows.timers.call_at(self._wake_at, self.wake)

    def keepalive(self, now: float) -> None:
        """See whether the client must be asked if it is there."""
        conn = self.conn
        conn.keepalive(self.active_at, now)
        events = conn.take_events()
        if not (events and self._handle(events, self.flows.out, now)):
            self._output(now)

    def wake(self, now: float) -> None:
        """Run the connection's timers."""
        if now < self._wake_at:
            return  # an entry that was overtaken by an earlier one
        self._wake_at = inf
        conn = self.conn
        if conn.deadline <= now:
            conn.timeout(now)
            events = conn.take_events()
            if events and self._handle(events, self.flows.out, now):
                return
            self._output(now)
            if self._readable:
                self._read(now)
        elif conn.deadline < inf:
            self._arm()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def abort(self, now: float) -> None:
        """End the flow with RST both ways."""
        self._proxy.reset()
        self.conn.abort()
        self._output(now)
        self._end(now)

    def _sending_failed(self, now: float) -> None:
        """The proxy takes no more; what it sent before that still goes to the client, then its RST becomes ours."""
        proxy = self._proxy
        self.conn.rcv.pending -= len(proxy.backlog)
        proxy.fail()
        if proxy.at_end:
            self._proxy_failed(now)
        else:
            self._readable = self._hup = True

    def _proxy_failed(self, now: float) -> None:
        """The proxy's connection broke: never a clean end of stream."""
        self.flows.count[counts.TCP_RESET_BY_PROXY] += 1
        self.abort(now)

    def _end(self, now: float) -> None:
        """Leave the flow table; the client's last words may still need an answer from TIME-WAIT."""
        self._proxy.outlive(now)
        self._unacked.release_all()
        self._readable = False
        self._wake_at = inf
        if self.conn.state == TIME_WAIT:
            self.flows.wait(TimeWait(self.flows, self.key, self.conn, self.headers, now))
        else:
            self.flows.remove(self.key, self)
