"""TcpFlows: the flow table of one worker, and what happens to segments before and after they have a flow.

packet4 · packet6 ─► parse ─► table ─► Relay | Dial | TimeWait .segment_arrives
                               └─ none: a SYN waits for the end of the batch, all else gets RST
end_of_batch: new flows (bounded), then one pure ACK for each flow that owes one
"""

from __future__ import annotations

import os
from collections import deque
from hashlib import blake2b
from math import inf
from secrets import randbelow
from typing import TYPE_CHECKING, Final, Protocol

from ipc.layout import HEADROOM
from workers import counts, icmp
from workers.dial import Dial
from workers.icmperrors import IcmpErrors
from workers.port import BACKLOG
from workers.public import is_public
from workers.relay import Relay
from workers.socks.wire import ProtocolError
from workers.tcp.cubic import CONTROLS
from workers.tcp.limits import CHALLENGES
from workers.tcp.policy import Policy
from workers.tcp.segment import ACK, FIN, RST, SYN, Segment
from workers.tcp.sequence import MASK
from workers.timewait import TimeWait
from workers.warm import WarmConnections
from workers.wire.checksum import pseudo_sum, verify
from workers.wire.tcp import HEADER, USUAL_TIMESTAMPS, Headers, reply_addresses
from workers.wire.vnet import TRUSTED

if TYPE_CHECKING:
    from workers.worker import Worker

CONTROL: Final = SYN | ACK | RST | FIN
SYNS_A_BREATH: Final = 64  #: new flows of one batch; flows that run come first, a SYN beyond comes again after 1 s
MAX_TIME_WAIT: Final = 8192  #: connections in TIME-WAIT of one worker; the oldest goes first
SWEEP_SECONDS: Final = 15.0  #: between two looks at all flows for idle ones
RETRY_SECONDS: Final = 0.01  #: between two looks for a frame that an acknowledgement has freed
MIN_MSS: Final = 88  #: octets; Linux TCP_MIN_MSS: a smaller offer is an attack
DEFAULT_MSS6: Final = 1220  #: octets; RFC 9293, 3.7.1: 1280 - 60


class Flow(Protocol):
    """What stands in the flow table."""

    def segment_arrives(self, seg: Segment, now: float) -> None:
        """Take one segment."""

    def abort(self, now: float) -> None:
        """End with RST: the worker stops, or something in it broke."""

    def gives_way(self, syn: Segment) -> bool:
        """Say whether a SYN begins a new connection in its place."""


class TcpFlows:
    """All TCP flows of one worker."""

    def __init__(self, worker: Worker) -> None:
        settings = worker.settings
        self.port = worker.port
        self.count = worker.count
        self.timers = worker.timers
        self.upstream = worker.upstream
        self.warm = WarmConnections(worker)
        self.icmp = worker.icmp
        self.handlers = worker.handlers
        self.watch = worker.watch
        self.forget_descriptor = worker.forget
        self.early_accept = settings.early_accept
        self.mss4 = settings.mtu - 40
        self.mss6 = settings.mtu - 60
        self.policy = Policy(
            settings.tcp_receive_buffer,
            worker.count,
            lambda: CHALLENGES // 2 + randbelow(CHALLENGES),
            CONTROLS[settings.congestion],
        )
        self.policy.keepalive = settings.tcp_keepalive
        self.policy.keepalive_interval = settings.tcp_keepalive_interval
        self.policy.keepalive_count = settings.tcp_keepalive_count
        self.table: dict[bytes, Flow] = {}
        self.out = Segment()  #: filled by each connection in turn
        # Each takes one relay at a time: what breaks in one of them leaves the others in the queue.
        self.acks: deque[Relay] = deque()  #: flows that may owe a pure ACK at the end of the batch
        self.delayed: deque[tuple[float, Relay]] = deque()  #: delayed ACKs; all wait equally long, so in order
        self.ready: deque[Relay] = deque()  #: sockets that had more than one frame took
        self.starved: deque[Relay] = deque()  #: sockets that wait for the writer, or for a free frame
        self._settings = settings
        self._seg = Segment()
        self._syns: list[tuple[bytes, bytes, Segment]] = []  # flow, packet, SYN
        self.pending = 0  #: flows whose proxy is not connected; each dial keeps it true
        self._connecting: deque[tuple[float, Dial]] = deque()  #: by connect deadline, with those that are done
        #: by end, with those that were replaced or have begun anew
        self._time_wait: deque[tuple[float, TimeWait]] = deque()
        self._waiting = 0  #: flows of the table that are in TIME-WAIT
        self.icmp_errors = IcmpErrors(self)
        self._secret = os.urandom(16)
        self._sweep_at = inf
        self._retry_at = inf  #: when the starved look for a frame again, if no completion wakes them before

    # ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────

    def packet_arrives(self, at: int, transport: int, end: int, version: int, now: float) -> None:
        """Take a frame with a TCP packet: addresses of its virtio_net_hdr, of its TCP header, and of its end."""
        rx = self.port.rx
        seq, ack, bits, wnd, option, ts_val, ts_ecr = HEADER.unpack_from(rx, transport)
        text_at = transport + (bits >> 10 & 0x3C)
        if text_at > end or bits < 0x5000:
            self.count[counts.MALFORMED] += 1
            return
        if not rx[at] & TRUSTED and not self._verify(at, transport, end, version):
            self.count[counts.BAD_CHECKSUM] += 1
            return
        seg = self._seg
        seg.seq = seq
        seg.ack = ack
        seg.flags = bits & 0x3F
        seg.wnd = wnd
        seg.len = end - text_at
        seg.text_at = text_at
        if option == USUAL_TIMESTAMPS and bits & 0xF002 == 0x8000:  # 32 octets, no SYN: the usual segment
            seg.ts_present = True
            seg.ts_val = ts_val
            seg.ts_ecr = ts_ecr
            seg.sack = ()
        else:
            seg.parse_options(rx[transport + 20 : text_at])
        if version == 6:
            key = rx[at + 18 : at + 50] + rx[transport : transport + 4]
        elif transport == at + 30:
            key = rx[at + 22 : at + 34]  # addresses and ports stand side by side
        else:
            key = rx[at + 22 : at + 30] + rx[transport : transport + 4]
        flow = self.table.get(key)
        if seg.flags & CONTROL == SYN and (flow is None or flow.gives_way(seg)):
            self._syns.append((key, rx[at + 10 : text_at], seg))
            self._seg = Segment()
        elif flow is not None:
            try:
                flow.segment_arrives(seg, now)
            except Exception:
                self.end_broken(flow, now)
                raise
        else:
            self.count[counts.TCP_UNKNOWN_FLOW] += 1
            self.reset_stranger(key, seg)

    def _verify(self, at: int, transport: int, end: int, version: int) -> bool:
        """Check what nobody has checked: the frame came from a wire."""
        rx = self.port.rx
        addresses = rx[at + 22 : at + 30] if version == 4 else rx[at + 18 : at + 50]
        half = len(addresses) // 2
        return verify(rx[transport:end], pseudo_sum(addresses[:half], addresses[half:], 6, end - transport))

    def reset_stranger(self, key: bytes, seg: Segment) -> None:
        """Answer a segment of no connection (RFC 9293, 3.10.7.1): RST, unless it is one itself."""
        if seg.flags & RST:
            return
        out = self.out
        out.len = 0
        out.ts_present = False
        out.sack = ()
        if seg.flags & ACK:
            out.flags, out.seq, out.ack = RST, seg.ack, 0
        else:
            length = seg.len + bool(seg.flags & SYN) + bool(seg.flags & FIN)
            out.flags, out.seq, out.ack = RST | ACK, 0, (seg.seq + length) & MASK
        out.wnd = 0
        self.transmit(Headers(4 if len(key) == 12 else 6, reply_addresses(key), self.mss4, False), out)

    def transmit(self, headers: Headers, out: Segment) -> None:
        """Send a segment without text."""
        port = self.port
        try:
            end = port.small.take() + HEADROOM
        except IndexError:
            self.count[counts.NO_FRAMES] += 1  # lost, as on a link
            return
        written = headers.write(port.tx_view, end, out)
        port.transmit(end - written, written)

    # ── once a breath ───────────────────────────────────────────────────────────────────────────────────────────

    def end_of_batch(self, now: float) -> None:
        """Begin new flows, and send the one pure ACK of each flow that still owes it."""
        if self._syns:
            syns, self._syns = self._syns, []
            for key, packet, syn in syns[:SYNS_A_BREATH]:
                old = self.table.get(key)
                iss = self.initial_sequence_number(key, now)
                if isinstance(old, TimeWait):
                    iss = old.iss_behind(iss)
                    self.remove(key, old)
                elif old is not None:
                    if isinstance(old, Dial) and old.gives_way(syn):
                        old.begin_anew(syn, packet)
                    continue  # else the same SYN twice in one batch
                self._begin(key, packet, syn, iss, now)
            if len(syns) > SYNS_A_BREATH:
                self.count[counts.TCP_SYN_DROPPED_PENDING] += len(syns) - SYNS_A_BREATH
        acks = self.acks
        while acks:
            acks.popleft().ack_at_end_of_batch(now)

    def run(self, now: float) -> None:
        """Go on with sockets that had more to read, and run the queues of timers."""
        ready = self.ready
        for _ in range(len(ready)):
            ready.popleft().read_again(now)
        starved = self.starved
        if starved:
            port = self.port
            for _ in range(len(starved)):
                if port.backlog >= BACKLOG or not port.large.free:
                    break
                starved.popleft().read_again(now)
            self._retry_at = now + RETRY_SECONDS if starved else inf
        delayed = self.delayed
        while delayed and delayed[0][0] <= now:
            delayed.popleft()[1].delayed_ack_due(now)
        connecting = self._connecting
        while connecting and (connecting[0][0] <= now or not connecting[0][1].pending):
            dial = connecting.popleft()[1]
            if dial.pending:
                dial.timed_out(now)
        waiting = self._time_wait
        while waiting and (waiting[0][0] <= now or len(waiting) > MAX_TIME_WAIT):
            ends_at, old = waiting.popleft()
            if old.ends_at == ends_at and self.table.get(old.key) is old:
                self.count[counts.TCP_TIME_WAIT_OVERFLOW] += ends_at > now
                self.remove(old.key, old)
        if now >= self._sweep_at:
            self._sweep(now)

    def publish(self) -> None:
        """Write the gauges."""
        count = self.count
        count[counts.TCP_FLOWS] = len(self.table) - self._waiting
        count[counts.TCP_PENDING] = self.pending
        count[counts.TCP_TIME_WAIT] = self._waiting

    @property
    def next_at(self) -> float:
        """When run() has something to do; inf: not before the next frame or event."""
        if self.ready:
            return 0.0
        at = self._sweep_at if self._sweep_at < self._retry_at else self._retry_at
        if self.delayed and self.delayed[0][0] < at:
            at = self.delayed[0][0]
        if self._connecting and self._connecting[0][0] < at:
            at = self._connecting[0][0]
        if self._time_wait and self._time_wait[0][0] + 1.0 < at:  # late by a second: many end in one wakeup
            at = self._time_wait[0][0] + 1.0
        return at

    def _sweep(self, now: float) -> None:
        """Abort the flows that have been idle for too long, and ask clients that say nothing whether they are there."""
        settings = self._settings
        keepalive = self.policy.keepalive or inf
        for flow in list(self.table.values()):
            if isinstance(flow, Relay):
                limit = settings.tcp_half_closed_timeout if flow.half_closed else settings.tcp_timeout
                idle = now - flow.active_at
                if idle > limit:
                    self.count[counts.TCP_IDLE_TIMEOUTS] += 1
                    flow.abort(now)
                elif idle >= keepalive:
                    flow.keepalive(now)
        self._sweep_at = now + SWEEP_SECONDS if self.table else inf

    # ── flows begin and end ─────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, key: bytes, packet: bytes, syn: Segment, iss: int, now: float) -> None:
        """Dial for a SYN, unless it must be refused or dropped."""
        settings = self._settings
        if len(self.table) - self._waiting >= settings.max_flows:
            self.count[counts.TCP_SYN_DROPPED_FLOWS] += 1
            return
        if self.pending >= settings.max_pending:
            self.count[counts.TCP_SYN_DROPPED_PENDING] += 1
            return
        destination = key[4:8] if len(key) == 12 else key[16:32]
        if destination in (settings.own_address4, settings.own_address6):
            self.reset_stranger(key, syn)  # no service of our own listens
            return
        if settings.public_only and not is_public(destination):
            self.count[counts.NOT_PUBLIC] += 1
            self.icmp.unreachable(packet, icmp.ADMIN)
            return
        if syn.mss:
            syn.mss = max(syn.mss, MIN_MSS)
        elif len(key) == 36:
            syn.mss = DEFAULT_MSS6
        dial = Dial(self, key, syn, packet, iss)
        try:
            dial.start(now)
        except OSError:
            self.count[counts.TCP_SYN_DROPPED_DESCRIPTORS] += 1
            dial.cancel()
            return
        self._connecting.append((now + settings.connect_timeout, dial))
        if self._sweep_at == inf:
            self._sweep_at = now + SWEEP_SECONDS

    def protocol_error(self, error: ProtocolError) -> None:
        """Count what a proxy answered that is no answer, or that refuses us."""
        self.count[counts.PROXY_AUTH_FAILED if self.upstream.broken(error) else counts.PROXY_PROTOCOL_ERRORS] += 1

    def wait(self, waiting: TimeWait) -> None:
        """Put TIME-WAIT in the place of a flow that has ended, or begin its time anew."""
        if self.table.get(waiting.key) is not waiting:
            self.table[waiting.key] = waiting
            self._waiting += 1
        self._time_wait.append((waiting.ends_at, waiting))

    def remove(self, key: bytes, flow: Flow) -> None:
        """Take a flow out of the table, if it is (still) the one that stands there."""
        if self.table.get(key) is flow:
            del self.table[key]
            if isinstance(flow, TimeWait):
                self._waiting -= 1

    def end_broken(self, flow: Flow, now: float) -> None:
        """End a flow in which an exception of our own was raised, as well as its state allows."""
        try:
            flow.abort(now)
        except Exception:
            for key in [key for key, other in self.table.items() if other is flow]:
                self.remove(key, flow)

    def initial_sequence_number(self, key: bytes, now: float) -> int:
        """RFC 6528: a clock of 4 µs plus a keyed hash of the 5-tuple."""
        return (int.from_bytes(blake2b(key, digest_size=4, key=self._secret).digest()) + int(now * 250_000)) & MASK

    def stop(self, now: float) -> None:
        """End all flows; clients and proxies get RST."""
        self.warm.stop()
        for flow in list(self.table.values()):
            flow.abort(now)
