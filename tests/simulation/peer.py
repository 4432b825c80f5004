"""The model peer: a client's TCP, written for the test alone, with as many faces as clients have.

Its sender is in peer_sender.py. Here: the handshake, what it receives, and what it answers. It asserts whatever a
correct gateway cannot do: octets that were never queued, a FIN that moves, an ACK of what was never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tests.simulation.peer_sender import Sender
from tests.simulation.world import MASK, Link, Packet, World
from workers.tcp.segment import ACK, FIN, RST, SYN

HALF = 1 << 31


@dataclass(frozen=True, slots=True)
class PeerTraits:
    """What kind of client it is; seconds and octets."""

    mss: int = 1460  #: of its option; 0 = none is sent
    scale: int = 7  #: -1 = no window scaling
    timestamps: bool = True
    sack: bool = True
    buffer: int = 4 << 20
    reader_period: float = 0.0  #: between two looks of its program for text
    keeps: bool = True  #: text out of order
    reneges: float = 0.0  #: probability that it throws away what it kept (RFC 2018, 8)
    shrinks: float = 0.0  #: probability that it takes window back
    tells_gaps: bool = True  #: a duplicate ACK for each segment out of order
    acks_every: int = 2  #: segments; more are stretch ACKs
    ack_timeout: float = 0.04
    window: int = 20  #: segments in flight, its own limit
    merges: int = 1  #: segments of text in one packet, as TSO and GRO make them
    rto: float = 0.3
    trusting: bool = False  #: it never sends again what was SACKed: the gateway must not renege
    bsd_probes: bool = False  #: window probes with an octet; else as Linux does it
    lone_fin: bool = False  #: FIN never stands on text
    lingers: float = 0.0  #: between its last text and its FIN
    abort_after: float = inf
    vanishes_after: float = inf  #: it loses its power


class Peer(Sender):
    """Its receiving half, and the handshake."""

    def __init__(self, world: World, link: Link, traits: PeerTraits, total: int, their_total: int) -> None:
        super().__init__(world, link, traits, total)
        self.their_total = their_total
        self.received = 0
        self.peer_isn = 0
        self.rcv_nxt = 0
        self.ts_recent = 0
        self.their_scale = 0
        self.fin_at = -1  #: position of their FIN
        self.remote_closed = False
        self.reset = False
        self.pieces: list[tuple[int, int]] = []  #: kept out of order: sorted, without overlaps
        self.retransmissions = 0  #: segments that brought only what was here already
        self._sack = traits.sack
        self._last_piece = 0
        self._dsack: tuple[int, int] | None = None
        self._buffer = max(traits.buffer, 1 << max(traits.scale, 0))  # a window that the scale rounds to 0 never opens
        self._unread = 0
        self._reading = False
        self._edge = 0  #: of the window, as a position
        self._unacked = 0  #: segments since our last ACK
        self._ack_timer = False
        self._passive = False  #: their FIN came first
        self._syns = 0

    def begin(self) -> None:
        """Send the first SYN."""
        self._syn(None)
        traits = self.traits
        if traits.abort_after < inf:
            self.world.at(self.world.now + traits.abort_after, self._abort)
        if traits.vanishes_after < inf:
            self.world.at(self.world.now + traits.vanishes_after, self._vanish)

    def _syn(self, _: object) -> None:
        if self.established or self.done:
            return
        self._syns += 1
        assert self._syns < 60
        traits = self.traits
        ts = (self.clock, 0) if traits.timestamps else None
        window = min(self._buffer, 65535)
        self._edge = window
        self.link.send(
            Packet(SYN, self.iss, 0, window, 0, 0, ts, (), traits.mss, traits.scale, sack_permitted=traits.sack)
        )
        self.world.at(self.world.now + 1, self._syn)

    def _abort(self, _: object) -> None:
        if not self.done:
            if self.established:
                self.send(RST | ACK, self.max_sent)
                # A RST that is lost or not exact is followed by others: whoever still speaks is a stranger.
            self.reset = self.done = True

    def _vanish(self, _: object) -> None:
        self.done = self.vanished = True

    # ── segments in ─────────────────────────────────────────────────────────────────────────────────────────────

    def arrives(self, packet: Packet) -> None:
        """Take one packet."""
        flags = packet.flags
        if self.done:
            self._late(packet)
            return
        if not self.established:
            if flags & RST:
                if flags & ACK and packet.ack == (self.iss + 1) & MASK:
                    self.reset = self.done = True
            elif flags & (SYN | ACK) == SYN | ACK:
                if packet.ack == (self.iss + 1) & MASK:
                    self._established(packet)
                else:
                    self.link.send(Packet(RST, packet.ack, 0, 0))  # that was for the connection before
            return
        assert (packet.ts is not None) == self.timestamps or flags & RST, "timestamps come and go"
        if flags & RST:
            if packet.seq == self.rcv_nxt:
                self.reset = self.done = True
            else:
                self._acknowledge()
            return
        ts = packet.ts
        if ts is not None:
            if (ts[0] - self.ts_recent) & MASK >= HALF:
                self._acknowledge()  # PAWS
                return
            if (self.rcv_nxt - packet.seq) & MASK < HALF:
                self.ts_recent = ts[0]
        if flags & SYN:
            self._acknowledge()
            return
        fresh = self.ack_arrives(packet)
        if self.done:
            return
        if packet.len or flags & FIN:
            self._text_arrives(packet)
        elif (packet.seq - self.rcv_nxt) & MASK >= HALF:
            self._acknowledge()  # a probe
        if fresh:
            self.push()
        if self.remote_closed and self.acked > self.total:
            self.done = True

    def _late(self, packet: Packet) -> None:
        if self.vanished or packet.flags & RST:
            return
        if self.reset or self._passive:
            if packet.flags & ACK:
                self.link.send(Packet(RST, packet.ack, 0, 0))  # CLOSED
        elif packet.len or packet.flags & FIN:
            self._acknowledge()  # TIME-WAIT

    def _established(self, packet: Packet) -> None:
        traits = self.traits
        self.established = True
        self.peer_isn = packet.seq
        self.rcv_nxt = (packet.seq + 1) & MASK
        assert (packet.scale >= 0) == (traits.scale >= 0)
        assert (packet.ts is not None) == traits.timestamps
        assert traits.sack or not packet.sack_permitted
        self._sack = self.sacks = packet.sack_permitted
        self.their_scale = max(packet.scale, 0) if traits.scale >= 0 else 0
        self.their_mss = max(min(packet.mss, traits.mss or 536) - (12 if traits.timestamps else 0), 32)
        self.wnd = packet.wnd
        if packet.ts:
            self.ts_recent = packet.ts[0]
        self._acknowledge()
        self.push()

    def _text_arrives(self, packet: Packet) -> None:
        traits = self.traits
        start, length = packet.start, packet.len
        end = start + length
        if (packet.seq - self.peer_isn - 1) & MASK != start:
            assert (self.rcv_nxt - packet.seq) & MASK < HALF, "text of the connection before in the window of this one"
            self._acknowledge()
            return
        assert end <= self.their_total, "octets from nowhere"
        if packet.flags & FIN:
            assert end == self.their_total and self.fin_at in (-1, end), "the FIN moved"
            self.fin_at = end
        received = self.received
        at_once = True
        if end > self._edge:  # behind the window nothing is taken
            assert traits.shrinks, f"octets up to {end}, and the window was never open beyond {self._edge}"
            end = max(start, self._edge)
        if start <= received:
            if end > received:
                self._receive(end)
                at_once = bool(self.pieces) or start < received
                if start < received and self._sack:
                    self._dsack = start, received
            elif length and start + length <= received:
                self.retransmissions += 1
                if self._sack:
                    self._dsack = start, start + length
            if self.pieces:
                self._join()
        elif traits.keeps and length and end > start:
            self._keep(start, end)
            if traits.reneges and self.world.dice.random() < traits.reneges:
                self.pieces.clear()
        fin = self.fin_at == self.received and not self.remote_closed
        if fin:
            self.remote_closed = True
            self._passive = not self.fin_sent
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK
        if at_once and not fin and start > self.received and not traits.tells_gaps:
            return
        self._unacked += (length + self.their_mss - 1) // self.their_mss
        if at_once or fin or self._unacked >= traits.acks_every or not traits.ack_timeout:
            self._acknowledge()
        elif not self._ack_timer:
            self._ack_timer = True
            self.world.at(self.world.now + traits.ack_timeout, self._ack_late)

    def _ack_late(self, _: object) -> None:
        self._ack_timer = False
        if self._unacked and not self.done:
            self._acknowledge()

    def _receive(self, end: int) -> None:
        fresh = end - self.received
        self.received = end
        self.rcv_nxt = (self.rcv_nxt + fresh) & MASK
        if self.traits.reader_period:
            self._unread += fresh
            if not self._reading:
                self._reading = True
                self.world.at(self.world.now + self.traits.reader_period, self._read)

    def _join(self) -> None:
        """Receive what was kept and is in order now."""
        pieces = self.pieces
        while pieces and pieces[0][0] <= self.received:
            _, end = pieces.pop(0)
            if end > self.received:
                self._receive(end)

    def _keep(self, start: int, end: int) -> None:
        self._last_piece = start
        pieces = self.pieces
        joined = []
        for a, b in pieces:
            if a <= start and end <= b and self._sack:
                self._dsack = start, end
            if b < start or end < a:
                joined.append((a, b))
            else:
                start, end = min(a, start), max(b, end)
        joined.append((start, end))
        joined.sort()
        self.pieces = joined

    def _read(self, _: object) -> None:
        self._reading = False
        if not self.done:
            self._unread = 0
            self._acknowledge()

    # ── segments out ────────────────────────────────────────────────────────────────────────────────────────────

    def _acknowledge(self) -> None:
        self.send(ACK, self.next_position)

    def window(self) -> int:
        """Return the field for the header, and note the right edge that it tells.

        What the scale rounds away is taken all the same if it was promised before (RFC 7323, 2.4).
        """
        traits = self.traits
        edge = self.received + self._buffer - self._unread
        takes_back = edge < self._edge and traits.shrinks > 0 and self.world.dice.random() < traits.shrinks
        if edge < self._edge and not takes_back:
            edge = self._edge
        shift = traits.scale if traits.scale > 0 else 0
        window = min(max(edge - self.received, 0) >> shift, 65535)
        told = self.received + (window << shift)
        if takes_back or told > self._edge:
            self._edge = told
        if traits.shrinks:
            dice = self.world.dice
            if dice.random() < traits.shrinks:
                self._buffer = max(dice.choice((traits.buffer, traits.buffer // 2, traits.buffer // 10)), 1 << shift)
        return window

    def sack_blocks(self) -> tuple[tuple[int, int], ...]:
        """Return the option of an ACK: the DSACK first, then the block that was extended last, then others."""
        base = self.peer_isn + 1
        blocks = []
        if self._dsack is not None:
            blocks.append(self._dsack)
            self._dsack = None
        pieces = self.pieces
        if pieces:
            last = self._last_piece
            first = next((piece for piece in pieces if piece[0] <= last < piece[1]), pieces[0])
            blocks.append(first)
            if len(pieces) > 1:
                blocks += [piece for piece in pieces if piece is not first]
        return tuple(((a + base) & MASK, (b + base) & MASK) for a, b in blocks[: 3 if self.timestamps else 4])
