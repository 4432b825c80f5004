"""The sending half of the model peer: a window of a few segments, go-back-N after a timeout, holes after a SACK."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from tests.simulation.world import MASK, Link, Packet, World
from workers.tcp.segment import ACK, FIN, RST

if TYPE_CHECKING:
    from tests.simulation.peer import PeerTraits

HALF = 1 << 31
MAX_TRIES = 60  #: a gateway that does not answer so many times is broken, whatever the link does


class Sender:
    """Positions count octets of the stream; the FIN occupies position `total`."""

    # Of the receiving half.
    ts_recent: int
    rcv_nxt: int
    peer_isn: int
    received: int
    their_scale: int

    def __init__(self, world: World, link: Link, traits: PeerTraits, total: int) -> None:
        self.world = world
        self.link = link
        self.traits = traits
        self.total = total
        self.iss = MASK - world.dice.randrange(3000)
        self.timestamps = traits.timestamps
        self.established = False
        self.done = False
        self.vanished = False
        self.sacks = False  #: SACK was agreed on
        self.acked = 0  #: all before is acknowledged; total + 1 with the FIN
        self.nxt = 0  #: what is sent next
        self.max_sent = 0  #: the highest that nxt has been
        self.fin_sent = False
        self.wnd = 0  #: theirs
        self.their_mss = 536
        self.tries = 0
        self._clock_base = 4_000_000_000
        self._duplicates = 0
        self._sacked: list[tuple[int, int]] = []  #: sorted, without overlaps
        self._recover = -1  #: in recovery until this is acknowledged
        self._resent = 0  #: holes before this were filled in this recovery
        self._rto_at = inf
        self._wake_at = inf
        self._lingers = traits.lingers
        self._lingering = False

    @property
    def clock(self) -> int:
        """The timestamp clock: milliseconds; it wraps soon."""
        return (int(self.world.now * 1000) + self._clock_base) & MASK

    @property
    def next_position(self) -> int:
        """SND.NXT, for what carries no text."""
        return self.max_sent if self.max_sent > self.acked else self.acked

    def window(self) -> int:
        """The receiving half knows."""
        raise NotImplementedError

    def sack_blocks(self) -> tuple[tuple[int, int], ...]:
        """So with this."""
        raise NotImplementedError

    def send(self, flags: int, position: int, length: int = 0) -> None:
        """Send a segment."""
        ts = (self.clock, self.ts_recent) if self.timestamps else None
        sack = self.sack_blocks() if self.sacks and not flags & RST else ()
        seq = (self.iss + 1 + position) & MASK
        self._unacked = 0
        self.link.send(Packet(flags, seq, self.rcv_nxt, self.window(), position, length, ts, sack))

    # ── what comes ──────────────────────────────────────────────────────────────────────────────────────────────

    def ack_arrives(self, packet: Packet) -> bool:
        """Take the ACK field, the window and the SACK blocks; True: push() may have something to send."""
        una = (self.iss + 1 + self.acked) & MASK
        advance = (packet.ack - una) & MASK
        if advance >= HALF:
            return False  # old
        assert advance <= self.max_sent - self.acked, "an ACK of what was never sent"
        if self.sacks and packet.sack:
            self._sack_arrives(packet)
        if advance:
            self.acked += advance
            self.tries = 0
            self._duplicates = 0
            if self.nxt < self.acked:
                self.nxt = self.acked
            if self._sacked:
                self._sacked = [(max(a, self.acked), b) for a, b in self._sacked if b > self.acked]
            self._rto_at = inf if self.acked == self.max_sent else self.world.now + self.traits.rto
        wnd = packet.wnd << self.their_scale
        opened = wnd != self.wnd
        self.wnd = wnd
        if advance:
            if self.acked >= self._recover:
                self._recover = -1
            else:
                self._resend()
        elif not opened and not packet.len and self.acked < self.max_sent:
            self._duplicates += 1
            if self._recover < 0 and self._duplicates >= 3 and self.acked <= self.total:
                self._recover = self.max_sent
                self._resent = self.acked
                self._resend()
            elif self._recover >= 0 and self._sacked:
                self._resend()
        return True

    def _sack_arrives(self, packet: Packet) -> None:
        """Check and note the blocks: what was SACKed must have been sent."""
        una = (self.iss + 1) & MASK
        ack = (packet.ack - una) & MASK
        assert len(packet.sack) <= (3 if self.timestamps else 4)
        for i, (left, right) in enumerate(packet.sack):
            a, b = (left - una) & MASK, (right - una) & MASK
            assert a < b <= self.max_sent, f"a SACK block {a}:{b} of what was never sent"
            if b <= ack or (i == 0 and len(packet.sack) > 1 and self._inside(a, b, packet.sack[1], una)):
                assert i == 0, "a DSACK block that is not the first one (RFC 2883, 4)"
                continue
            assert a > ack, f"a SACK block {a}:{b} touches the ACK {ack}"
            joined = []
            for c, d in self._sacked:
                if d < a or b < c:
                    joined.append((c, d))
                else:
                    a, b = min(a, c), max(b, d)
            joined.append((a, b))
            joined.sort()
            self._sacked = joined

    @staticmethod
    def _inside(a: int, b: int, block: tuple[int, int], una: int) -> bool:
        return (block[0] - una) & MASK <= a and b <= (block[1] - una) & MASK

    # ── what goes ───────────────────────────────────────────────────────────────────────────────────────────────

    def push(self) -> None:
        """Send what both windows take."""
        if self.done or self.acked > self.total:
            return
        traits = self.traits
        size = self.their_mss * traits.merges
        limit = min(self.acked + min(self.wnd, traits.window * self.their_mss), self.total)
        while self.nxt < limit:
            length = min(size, limit - self.nxt)
            if length < self.their_mss and self.nxt + length < self.total and self.nxt > self.acked:
                break  # silly
            skipped = self._skip(self.nxt, length) if self._sacked and traits.trusting else length
            if skipped <= 0:
                self.nxt -= skipped
                continue
            self._text(self.nxt, skipped)
            self.nxt += skipped
            if self.nxt > self.max_sent:
                self.max_sent = self.nxt
        if self.nxt == self.total and self._may_close() and self.max_sent >= self.total:
            # The FIN by itself; on text it went with _text().
            if self.max_sent == self.total:
                self.send(ACK | FIN, self.total)
            self._fin_is_sent()
        if self._rto_at == inf and (self.acked < self.max_sent or self.nxt < self.total):
            self._rto_at = self.world.now + traits.rto
        self._arm()

    def _skip(self, at: int, length: int) -> int:
        """Return how much of a stretch was not SACKed; if its beginning was: how much, as a negative number."""
        for a, b in self._sacked:
            if a <= at < b:
                return at - b
            if at < a < at + length:
                return a - at
        return length

    def _may_close(self) -> bool:
        if self._lingers and not self._lingering:
            self._lingering = True
            self.world.at(self.world.now + self._lingers, self._linger_ends)
        return not self._lingers

    def _linger_ends(self, _: object) -> None:
        self._lingers = 0.0
        if self.established:
            self.push()

    def _fin_is_sent(self) -> None:
        self.fin_sent = True
        self.nxt = self.max_sent = self.total + 1

    def _text(self, at: int, length: int) -> None:
        fin = at + length == self.total and not self.traits.lone_fin and self._may_close()
        self.send(ACK | FIN if fin else ACK, at, length)
        if fin:
            self.fin_sent = True
            self.max_sent = self.total + 1

    def _resend(self) -> None:
        """Fill the next hole."""
        if not self._sacked:
            self._again(self.acked)
            return
        at = max(self.acked, self._resent)
        for a, b in self._sacked:
            if at < a:
                length = min(a - at, self.their_mss)
                if self.wnd and at + length <= self.acked + self.wnd:
                    self.send(ACK, at, length)
                    self._resent = at + length
                return
            at = max(at, b)

    def _again(self, at: int) -> None:
        """Send one segment again, or the FIN."""
        if at >= self.total:
            if self.fin_sent:
                self.send(ACK | FIN, self.total)
            return
        length = min(self.their_mss, self.max_sent - at, self.total - at, self.wnd)
        if length > 0:
            self._text(at, length)

    # ── the clock ───────────────────────────────────────────────────────────────────────────────────────────────

    def _arm(self) -> None:
        if self._rto_at < self._wake_at:
            self._wake_at = self._rto_at
            self.world.at(self._wake_at, self._wake)

    def _wake(self, _: object) -> None:
        now = self.world.now
        if now < self._wake_at:
            return
        self._wake_at = inf
        if self.done:
            return
        if now >= self._rto_at:
            self._timeout()
        self._arm()

    def _timeout(self) -> None:
        self.tries += 1
        assert self.tries < MAX_TRIES, "the gateway does not answer"
        self._rto_at = self.world.now + self.traits.rto * 2 ** min(self.tries, 6)
        if self.acked > self.total:
            self._rto_at = inf
            return
        if not self.wnd and self.acked < self.total:
            self._probe()
            return
        self._recover = -1
        self._duplicates = 0
        if not self.traits.trusting:
            self._sacked.clear()
        self.nxt = self.acked
        if self.acked == self.total:
            if self.fin_sent:
                self.send(ACK | FIN, self.total)
            return
        # One segment; the ACK of it brings the rest.
        length = min(self.their_mss, self.total - self.nxt, self.wnd)
        self._text(self.nxt, length)
        self.nxt += length
        self.max_sent = max(self.max_sent, self.nxt)

    def _probe(self) -> None:
        if self.traits.bsd_probes:
            self._text(self.acked, 1)
            self.max_sent = max(self.max_sent, self.acked + 1)
        else:
            self.send(ACK, self.acked - 1)
