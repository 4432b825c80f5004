"""The gateway's end: the real Connection, with what worker, flows and relay do around it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tests.simulation.world import MASK, STREAM, Link, Packet, World
from workers.tcp import pathmtu
from workers.tcp.connection import Connection
from workers.tcp.events import (
    ACKED,
    AT_END_OF_BATCH,
    AT_ONCE,
    DELAYED,
    ENDED,
    GAVE_UP,
    REMOTE_CLOSED,
    RESET,
    TEXT,
    UNACCEPTABLE_ACK,
)
from workers.tcp.limits import RECEIVE_BUFFER
from workers.tcp.policy import Policy
from workers.tcp.segment import ACK, FIN, RST, SYN, Segment
from workers.tcp.states import CLOSED, NAMES, SYN_RECEIVED


@dataclass(frozen=True, slots=True)
class GatewayTraits:
    """What surrounds the connection."""

    mss: int = 1460
    slow_proxy: bool = False  #: it takes text late
    cuts: bool = True  #: super-segments are cut on the way, as TSO does; else the peer is the local kernel
    reads: tuple[int, ...] = (65_000,)  #: how much one read of the target's socket brings
    pause: float = 0.0  #: seconds between two reads that bring something
    lingers: float = 0.0  #: seconds between the last text and the FIN
    abort_after: float = inf  #: seconds
    receive_buffer: int = RECEIVE_BUFFER  #: to which it may grow
    surplus: int = 0  #: octets that are there before the handshake, and more than the window takes


class Gateway:
    """The real Connection, a source of text, and a proxy that takes text."""

    def __init__(self, world: World, link: Link, traits: GatewayTraits, total: int) -> None:
        self.world = world
        self.link = link
        self.traits = traits
        self.conn: Connection | None = None
        self.policy = Policy(traits.receive_buffer)
        self._budgets = self.policy.growth, self.policy.flights
        self.total = total  #: octets to send before the FIN
        self.sent = 0
        self.received = 0
        self.remote_closed = False
        self.reset = False
        self.gave_up = False
        self.ended = False
        self.backlog = 0  #: octets that the proxy has not taken yet
        self.iss = MASK - world.dice.randrange(3000)
        self._seg = Segment()
        self._out = Segment()
        self._wake_at = inf
        self._delayed_at = inf
        self._batch = False
        self._source_open = True
        self._paused = False
        self._lingers = traits.lingers
        self._edge = 0  #: of the receive window, as a position

    @property
    def established(self) -> bool:
        """Whether the handshake is done."""
        return self.conn is not None and self.conn.state > SYN_RECEIVED

    # ── from the device ─────────────────────────────────────────────────────────────────────────────────────────

    def arrives(self, packet: Packet, memory: bytes = STREAM) -> None:
        """Take a packet as worker, flows and relay do together."""
        world = self.world
        conn = self.conn
        if conn is None:
            if packet.flags & (SYN | ACK | RST | FIN) == SYN:
                self._begin(packet)
            return
        if self.ended and conn.state == CLOSED:
            self._stranger(packet)
            return
        seg = self._seg
        self._fill(seg, packet)
        now = world.now
        conn.segment_arrives(seg, memory, now)
        joined = conn.take_reassembled() if conn.rcv.pieces is not None else None
        events = conn.events
        if events:
            conn.events = 0
            if events & TEXT:
                assert not self.ended, "text after the end"
                if seg.len:
                    assert memory is STREAM and seg.text_at == self.received, f"wrong octets at {self.received}"
                    assert seg.text_at + seg.len <= packet.start + packet.len
                    self._deliver(seg.len)
                for text in joined or ():
                    at = self.received
                    assert text == STREAM[at : at + len(text)], f"wrong octets at {at}"
                    self._deliver(len(text))
            if events & ~(TEXT | ACKED):
                self._note(events, packet)
        else:
            assert not joined
        self.output()
        due = conn.ack_due
        if due == AT_END_OF_BATCH:
            if not self._batch:
                self._batch = True
                world.at(now, self._end_of_batch)
        elif due == DELAYED and self._delayed_at == inf and not self.ended:
            self._delayed_at = conn.rcv.ack_at
            world.at(self._delayed_at, self._delayed)

    def too_big(self, packet: Packet, mtu: int) -> None:
        """A router says that it could not forward a packet of ours (Relay.lower_mss)."""
        conn = self.conn
        assert conn is not None
        if not self.ended and pathmtu.is_in_flight(conn, packet.seq) and pathmtu.lower(conn, mtu - 40):
            self.output()

    @staticmethod
    def _fill(seg: Segment, packet: Packet) -> None:
        seg.seq = packet.seq
        seg.ack = packet.ack
        seg.flags = packet.flags
        seg.wnd = packet.wnd
        seg.len = packet.len
        seg.text_at = packet.start
        seg.mss = packet.mss
        seg.window_scale = packet.scale
        seg.sack_permitted = packet.sack_permitted
        seg.sack = packet.sack
        ts = packet.ts
        if ts is None:
            seg.ts_present = False
        else:
            seg.ts_present = True
            seg.ts_val, seg.ts_ecr = ts

    def _begin(self, packet: Packet) -> None:
        """A SYN; the proxy is connected at once."""
        syn = Segment()
        self._fill(syn, packet)
        self.conn = Connection(syn, self.iss, self.traits.mss, self.policy)
        self._begun()

    def _begun(self) -> None:
        assert self.conn is not None
        if self.traits.surplus:
            self.sent = min(self.traits.surplus, self.total)
            self.conn.send(self.sent)
            if self.sent == self.total and self.conn.state == SYN_RECEIVED:
                self.conn.close()
                self._source_open = False
        if self.traits.abort_after < inf:
            self.world.at(self.world.now + self.traits.abort_after, self._abort)
        self.output()

    def connect(self, _: object = None) -> None:
        """Be the active side, unless the other's SYN has come already."""
        if self.conn is None:
            self.conn = Connection.connect(self.iss, self.traits.mss, self.policy)
            self._begun()

    def _stranger(self, packet: Packet) -> None:
        """A segment of no connection."""
        if not packet.flags & RST:
            if packet.flags & ACK:
                self.link.send(Packet(RST, packet.ack, 0, 0))
            else:
                length = packet.len + bool(packet.flags & SYN) + bool(packet.flags & FIN)
                self.link.send(Packet(RST | ACK, 0, (packet.seq + length) & MASK, 0))

    def _deliver(self, length: int) -> None:
        self.received += length
        if self.traits.slow_proxy:
            assert self.conn is not None
            self.conn.rcv.pending += length
            if not self.backlog:
                self.world.at(self.world.now + self.world.dice.random(), self._take)
            self.backlog += length

    def _take(self, _: object) -> None:
        """The proxy takes some of what waits."""
        conn = self.conn
        assert conn is not None
        taken = min(self.backlog, max(self.world.dice.choice((1, 100, 5000, 100_000)), 1000))
        self.backlog -= taken
        conn.rcv.pending -= taken
        assert conn.rcv.pending == self.backlog
        conn.taken_by_proxy()
        if not self.ended:
            self.output()
        if self.backlog:
            self.world.at(self.world.now + self.world.dice.random() * 0.5, self._take)

    def _note(self, events: int, packet: Packet | None = None) -> None:
        if events & UNACCEPTABLE_ACK and packet is not None:
            self._stranger(packet)
        if events & REMOTE_CLOSED:
            assert not self.remote_closed, "two ends of one stream"
            self.remote_closed = True
        if not self.ended:
            self.reset |= bool(events & RESET)
            self.gave_up |= bool(events & GAVE_UP)
        if events & ENDED:
            self.ended = True

    # ── to the device ───────────────────────────────────────────────────────────────────────────────────────────

    def output(self, _: object = None) -> None:
        """Send what is due, and read more from the target as the windows allow."""
        conn = self.conn
        assert conn is not None
        now = self.world.now
        out = self._out
        while True:
            while conn.segment_to_send(out, now):
                self._transmit()
            if not self._source_open or self.ended or conn.state <= SYN_RECEIVED or self._paused:
                break
            if self.sent == self.total:
                if not self._linger():
                    self._source_open = False
                    conn.close()
                    continue
                break
            room = conn.room(now)
            if not room:
                conn.want_room(now)
                break
            traits = self.traits
            reads = traits.reads
            if traits.pause:
                self._pause(traits.pause)
            room = min(room, self.total - self.sent, reads[0] if len(reads) == 1 else self.world.dice.choice(reads))
            self.sent += room
            if conn.text_at_once(out, room, now):
                self._transmit()
            else:
                conn.send(room)
        assert conn.ack_due != AT_ONCE or conn.state == CLOSED, "what is due at once was not sent"
        if conn.deadline < self._wake_at:
            self._wake_at = conn.deadline
            self.world.at(self._wake_at, self._wake)

    def _linger(self) -> bool:
        """Say whether the target stays silent before its FIN."""
        if not self._lingers:
            return False
        self._pause(self._lingers)
        self._lingers = 0.0
        return True

    def _pause(self, seconds: float) -> None:
        self._paused = True
        self.world.at(self.world.now + seconds, self._resume)

    def _resume(self, _: object) -> None:
        self._paused = False
        if not self.ended:
            self.output()

    def _wake(self, _: object) -> None:
        conn = self.conn
        assert conn is not None
        now = self.world.now
        if now < self._wake_at:
            return
        self._wake_at = inf
        if conn.deadline <= now:
            conn.timeout(now)
            self._note(conn.take_events())
        self.output()

    def _delayed(self, _: object) -> None:
        conn = self.conn
        assert conn is not None
        self._delayed_at = inf
        if conn.ack_due == DELAYED and conn.state != CLOSED:
            if conn.rcv.ack_at > self.world.now:  # it is another one
                self._delayed_at = conn.rcv.ack_at
                self.world.at(self._delayed_at, self._delayed)
                return
            conn.delayed_ack_timeout()
            self._end_of_batch(None)

    def _end_of_batch(self, _: object) -> None:
        conn = self.conn
        assert conn is not None
        self._batch = False
        if conn.ack_to_send(self._out, self.world.now):
            self._transmit()

    def _abort(self, _: object) -> None:
        conn = self.conn
        assert conn is not None
        if not self.ended:
            conn.abort()
            self._note(conn.take_events())
            self.output()

    def _transmit(self) -> None:
        """Put one segment on the link, cut as the device does."""
        conn = self.conn
        assert conn is not None
        out = self._out
        snd = conn.snd
        length = out.len
        flags = out.flags
        ts = (out.ts_val, out.ts_ecr) if out.ts_present else None
        if not flags & (RST | SYN):  # the window of a SYN is not scaled
            edge = conn.rcv.taken + self.remote_closed + (out.wnd << conn.rcv.scale)
            assert edge > self._edge - (1 << conn.rcv.scale), "the window shrank"
            self._edge = max(edge, self._edge)
        if flags & SYN:
            self.link.send(
                Packet(
                    *(flags, out.seq, out.ack, out.wnd, 0, 0, ts),
                    mss=out.mss,
                    scale=out.window_scale,
                    sack_permitted=out.sack_permitted,
                )
            )
            return
        if out.sack:
            self._check_sack(length)
        start = (out.seq - self.iss - 1) & MASK
        if length:
            assert (out.seq + length - snd.una) & MASK <= (snd.nxt - snd.una) & MASK, "what is sent is not in flight"
            assert start + length <= self.sent, "what is sent was never queued"
        if length <= conn.smss or not self.traits.cuts:
            self.link.send(Packet(flags, out.seq, out.ack, out.wnd, start, length, ts, out.sack))
            return
        smss = conn.smss
        for at in range(0, length, smss):
            n = min(smss, length - at)
            # FIN and PSH stand on the last piece.
            bits = flags if at + n == length else flags & ~(FIN | 8)
            self.link.send(Packet(bits, (out.seq + at) & MASK, out.ack, out.wnd, start + at, n, ts))

    def _check_sack(self, length: int) -> None:
        """Demand that the blocks name what is kept, or, the first one, what came twice."""
        conn = self.conn
        assert conn is not None and conn.sack and not length
        rcv = conn.rcv
        first = rcv.irs + 1  # the sequence number of position 0
        kept = rcv.pieces.newest(1 << 30) if rcv.pieces is not None else []
        for i, block in enumerate(self._out.sack):
            left, right = (block[0] - first) & MASK, (block[1] - first) & MASK
            assert left < right
            twice = i == 0 and (right <= rcv.taken or any(a <= left and right <= b for a, b in kept))
            assert twice or (left, right) in kept, f"the SACK block {left}:{right} is none of {kept}"

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def check_end(self) -> None:
        """Demand that nothing is left."""
        conn = self.conn
        if conn is None:
            return
        assert self.ended, NAMES[conn.state]
        assert conn.deadline == inf, "a timer is left"
        assert (self.policy.growth, self.policy.flights) == self._budgets, "a part of a budget was not given back"
        assert conn.rcv.pieces is None or self.reset or self.gave_up or conn.state == CLOSED, "text is left"
