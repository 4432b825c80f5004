"""A deterministic simulation: the real Connection against a model peer over a seeded link, in virtual time.

    Peer (a simple TCP of the test's own) ── Link: loss, delay, reordering, duplication ── Gateway (Connection + relay)

Every octet is a function of its position, so both sides check each one that they get. A run ends when both ends are
done and nothing is on the way; what is still armed or kept then is an error. `run(seed)` returns what happened.

    python -m tests.simulation FIRST LAST       more seeds than the test has
"""

import heapq
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from workers.tcp.connection import Connection
from workers.tcp.events import ACKED, AT_ONCE, DELAYED, ENDED, GAVE_UP, REMOTE_CLOSED, RESET, TEXT
from workers.tcp.limits import DELAYED_ACK
from workers.tcp.segment import ACK, FIN, RST, SYN, Segment
from workers.tcp.states import CLOSED, NAMES, TIME_WAIT

MASK = 0xFFFFFFFF
HALF = 1 << 31
MAX_SECONDS = 100_000.0  #: virtual; a run that lasts longer hangs (a back-off of 60 s for each loss may be right)
MAX_STEPS = 200_000


def text_of(start: int, length: int, salt: int) -> bytes:
    """Return a stretch of a stream; its pattern has no period that a window could hide."""
    period = 4093
    pattern = _PATTERNS.get(salt)
    if pattern is None:
        pattern = _PATTERNS[salt] = random.Random(salt).randbytes(period)
    start %= period
    return (pattern * (length // period + 2))[start : start + length]


_PATTERNS: dict[int, bytes] = {}
DOWN, UP = 1, 2  #: salts


@dataclass
class Packet:
    """One packet on the link."""

    flags: int
    seq: int
    ack: int
    wnd: int
    text: bytes = b""
    ts: tuple[int, int] | None = None
    mss: int = 0
    scale: int = -1


class Stillness(AssertionError):
    """Both ends wait, and nothing is on the way."""


class World:
    """Virtual time, a queue of what happens, and the link between the two ends."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.now = dice.choice((10.0, 4294960.0))  # the second: millisecond clocks wrap soon
        self.start = self.now
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.loss = dice.choice((0.0, 0.0, 0.01, 0.05, 0.2))
        self.duplicates = dice.choice((0.0, 0.0, 0.05))
        self.delay = dice.choice((0.0001, 0.01, 0.1))
        self.jitter = dice.choice((0.0, self.delay, 4 * self.delay))
        self.on_the_way = 0

    def at(self, when: float, call) -> None:
        self._number += 1
        heapq.heappush(self._queue, (when, self._number, call))

    def carry(self, packet: Packet, receiver) -> None:
        """Send a packet over the link."""
        dice = self.dice
        for _ in range(1 + (dice.random() < self.duplicates)):
            if dice.random() >= self.loss:
                self.on_the_way += 1
                self.at(self.now + self.delay + dice.random() * self.jitter, lambda: self._arrive(packet, receiver))

    def _arrive(self, packet: Packet, receiver) -> None:
        self.on_the_way -= 1
        receiver(packet)

    def run(self, done) -> None:
        """Let happen what happens until done() is true."""
        for _ in range(MAX_STEPS):
            if done():
                return
            if not self._queue:
                raise Stillness("nothing will ever happen again, and the run is not done")
            when, _, call = heapq.heappop(self._queue)
            self.now = max(self.now, when)
            assert self.now - self.start < MAX_SECONDS, "the run hangs"
            call()
        raise AssertionError("the run does not come to an end")


class Gateway:
    """The real Connection, with what a relay does around it."""

    def __init__(self, world: World, total: int, abort_after: float) -> None:
        dice = world.dice
        self.world = world
        self.peer: Peer
        self.conn: Connection | None = None
        self.total = total  #: octets to send before the FIN
        self.sent = 0
        self.received = 0
        self.remote_closed = False
        self.reset = False
        self.gave_up = False
        self.ended = False
        self.slow = dice.random() < 0.3  #: the proxy takes text late
        self.backlog = 0
        self.mss = dice.choice((1460, 1460, 536, 8960))
        self._iss = MASK - dice.randrange(3000)
        self._out = Segment()
        self._wake_at = inf
        self._delayed_at = inf
        self._abort_after = abort_after
        self._source_open = True

    def arrives(self, packet: Packet) -> None:
        """Take a packet as worker, flows and relay do together; its ACK at the end of the batch is sent at once."""
        world = self.world
        seg = Segment()
        seg.seq, seg.ack, seg.flags, seg.wnd = packet.seq, packet.ack, packet.flags, packet.wnd
        seg.len = len(packet.text)
        seg.mss, seg.window_scale = packet.mss, packet.scale
        if packet.ts:
            seg.ts_present = True
            seg.ts_val, seg.ts_ecr = packet.ts
        conn = self.conn
        if conn is None:
            if not packet.flags & SYN:
                return
            conn = self.conn = Connection(seg, self._iss, self.mss)
            if self._abort_after < inf:
                world.at(world.now + self._abort_after, self._abort)
            self.output()
            return
        if self.ended and conn.state == CLOSED:
            if not packet.flags & RST:  # a stranger's segment
                self._carry(
                    Packet(RST, packet.ack, 0, 0) if packet.flags & ACK else Packet(RST | ACK, 0, packet.seq, 0)
                )
            return
        conn.segment_arrives(seg, packet.text, world.now)
        joined = conn.take_reassembled() if conn.rcv.pieces is not None else []
        events = conn.take_events()
        if events & TEXT:
            assert not self.ended
            self._deliver(packet.text[seg.text_at : seg.text_at + seg.len])
            for text in joined:
                self._deliver(text)
        else:
            assert not joined
        assert events & ACKED or not events & ENDED or events & (RESET | REMOTE_CLOSED | GAVE_UP)
        self._note(events)
        self.output()
        if not self.ended and conn.ack_due == DELAYED and self._delayed_at == inf:
            self._delayed_at = world.now + DELAYED_ACK
            world.at(self._delayed_at, self._delayed)
        if conn.ack_to_send(self._out, world.now):
            self._transmit()

    def _deliver(self, text: bytes) -> None:
        assert text == text_of(self.received, len(text), UP), f"wrong octets at {self.received}"
        self.received += len(text)
        if self.slow and text:
            conn = self.conn
            assert conn is not None
            conn.rcv.pending += len(text)
            if not self.backlog:
                self.world.at(self.world.now + self.world.dice.random(), self._take)
            self.backlog += len(text)

    def _take(self) -> None:
        """The proxy takes some of what waits."""
        conn = self.conn
        assert conn is not None
        taken = min(self.backlog, self.world.dice.choice((1, 100, 5000, 100_000)))
        taken = max(taken, min(self.backlog, 1000))
        self.backlog -= taken
        conn.rcv.pending -= taken
        assert conn.rcv.pending == self.backlog
        conn.taken_by_proxy()
        if not self.ended:
            self.output()
        if self.backlog:
            self.world.at(self.world.now + self.world.dice.random() * 0.5, self._take)

    def _note(self, events: int) -> None:
        if events & REMOTE_CLOSED:
            assert not self.remote_closed
            self.remote_closed = True
        self.reset |= bool(events & RESET)
        self.gave_up |= bool(events & GAVE_UP)
        if events & ENDED:
            self.ended = True

    def output(self) -> None:
        """Send what is due, and read more from the target as the windows allow."""
        conn = self.conn
        assert conn is not None
        now = self.world.now
        while True:
            while conn.segment_to_send(self._out, now):
                self._transmit()
            if self.ended or conn.state in (CLOSED, TIME_WAIT) or not self._source_open or conn.state == 2:
                break
            if self.sent == self.total:
                self._source_open = False
                conn.close()
                continue
            room = conn.room()
            if not room:
                conn.want_room(now)
                break
            room = min(room, self.total - self.sent, self.world.dice.choice((1, 700, 20_000, 65_000)))
            conn.send(room)
            self.sent += room
        assert conn.ack_due != AT_ONCE or conn.state == CLOSED
        self._arm()

    def _arm(self) -> None:
        conn = self.conn
        assert conn is not None
        if conn.deadline < self._wake_at:
            self._wake_at = conn.deadline
            self.world.at(self._wake_at, self._wake)

    def _wake(self) -> None:
        conn = self.conn
        assert conn is not None
        if self.world.now < self._wake_at:
            return
        self._wake_at = inf
        if conn.deadline <= self.world.now:
            conn.timeout(self.world.now)
            self._note(conn.take_events())
            self.output()
        else:
            self._arm()

    def _delayed(self) -> None:
        conn = self.conn
        assert conn is not None
        self._delayed_at = inf
        if conn.ack_due == DELAYED and conn.state != CLOSED:
            conn.delayed_ack_timeout()
            if conn.ack_to_send(self._out, self.world.now):
                self._transmit()

    def _abort(self) -> None:
        conn = self.conn
        assert conn is not None
        if not self.ended:
            conn.abort()
            self._note(conn.take_events())
            self.output()

    def _transmit(self) -> None:
        conn = self.conn
        assert conn is not None
        out = self._out
        snd = conn.snd
        assert (out.seq + out.len - snd.una) & MASK <= (snd.max - snd.una) & MASK or not out.len
        start = (out.seq - self._iss - 1) & MASK
        text = text_of(start, out.len, DOWN) if out.len else b""
        assert not text or start + len(text) <= self.sent, "what is sent was never queued"
        ts = (out.ts_val, out.ts_ecr) if out.ts_present else None
        if out.flags & SYN:
            self._carry(Packet(out.flags, out.seq, out.ack, out.wnd, ts=ts, mss=out.mss, scale=out.window_scale))
            return
        # The device cuts a super-segment; FIN stands on its last piece.
        pieces = [text[i : i + conn.smss] for i in range(0, len(text), conn.smss)] or [b""]
        seq = out.seq
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            flags = out.flags if last else out.flags & ~FIN
            self._carry(Packet(flags, seq, out.ack, out.wnd, piece, ts))
            seq = (seq + len(piece)) & MASK

    def _carry(self, packet: Packet) -> None:
        self.world.carry(packet, self.peer.arrives)

    def check_end(self) -> None:
        """Demand that nothing is left."""
        conn = self.conn
        if conn is None:
            return
        assert self.ended, NAMES[conn.state]
        assert conn.deadline == inf
        assert conn.rcv.pieces is None or self.reset or self.gave_up or conn.state == CLOSED


class Peer:
    """A client's TCP: go-back-N with a fixed window, any segment that is not in order is dropped; independent code."""

    RTO = 0.3

    def __init__(self, world: World, gateway: Gateway, total: int, abort_after: float) -> None:
        dice = world.dice
        self.world = world
        self.gateway = gateway
        self.total = total
        self.received = 0
        self.iss = MASK - dice.randrange(3000)
        self.una = self.iss
        self.peer_isn = 0
        self.rcv_nxt = 0
        self.established = False
        self.timestamps = dice.random() < 0.5
        self.ts_recent = 0
        self.scale = dice.choice((-1, 0, 2, 7))
        self.their_scale = 0
        self.mss = dice.choice((0, 100, 536, 1460))
        self.their_mss = 536
        self.wnd = 0  #: theirs
        #: of ours; a window that the scale rounds to nothing would never open
        self.buffer = max(dice.choice((1, 10, 1000, 5000, 60_000)), 1 << max(self.scale, 0))
        self.unread = 0
        self.reader_period = dice.choice((0.0, 0.0, 0.01, 1.0))
        self.fin_at = -1  #: position of their FIN
        self.remote_closed = False
        self.reset = False
        self.done = False
        self.keeps = dice.random() < 0.7  #: keeps text out of order
        self.pieces: dict[int, bytes] = {}
        self.fast = dice.random() < 0.5  #: sends duplicate ACKs for what is out of order
        self.max_sent = 0
        self.tries = 0
        self._timer = 0
        self._abort_after = abort_after
        self._closing_at = 0.0
        self._reading = False
        self._edge = 0

    def begin(self) -> None:
        self._syn()
        if self._abort_after < inf:
            self.world.at(self.world.now + self._abort_after, self._abort)

    @property
    def clock(self) -> int:
        return (int(self.world.now * 1000) + 4_000_000_000) & MASK

    def _send(self, flags: int, seq: int, text: bytes = b"", **fields) -> None:
        ts = (self.clock, self.ts_recent) if self.timestamps else None
        # The right edge never goes back.
        edge = max(self._edge, self.received + self.buffer - self.unread)
        window = edge - self.received
        if not flags & SYN and self.scale > 0 and self.their_scale:
            window >>= self.scale
            window = min(window, 65535)
            edge = self.received + (window << self.scale)
        else:
            window = min(window, 65535)
            edge = self.received + window
        self._edge = max(self._edge, edge)
        self.world.carry(Packet(flags, seq & MASK, self.rcv_nxt, window, text, ts, **fields), self.gateway.arrives)

    def _syn(self) -> None:
        if self.established or self.done:
            return
        self.tries += 1
        assert self.tries < 60
        self._send(SYN, self.iss, mss=self.mss, scale=self.scale)
        self.world.at(self.world.now + 1, self._syn)

    def _abort(self) -> None:
        if not self.done:
            if self.established:
                self._send(RST | ACK, self._sequence(self.max_sent))
                # A RST that is lost or not exact is followed by others: whoever still speaks is a stranger.
            self.reset = self.done = True

    def _sequence(self, position: int) -> int:
        return (self.iss + 1 + position) & MASK

    @property
    def acked(self) -> int:
        return (self.una - self.iss - 1) & MASK

    def arrives(self, packet: Packet) -> None:
        if self.done:
            if not packet.flags & RST:
                if self.reset:
                    self._send(RST, packet.ack)
                elif packet.text or packet.flags & FIN:
                    self._send(ACK, self._sequence(self.total + 1))  # TIME-WAIT
            return
        if not self.established:
            if packet.flags & RST:
                self.reset = self.done = True
                return
            if packet.flags & (SYN | ACK) != SYN | ACK:
                return
            assert packet.ack == (self.iss + 1) & MASK
            self.established = True
            self.peer_isn = packet.seq
            self.rcv_nxt = (packet.seq + 1) & MASK
            self.una = (self.iss + 1) & MASK
            self.their_scale = packet.scale if packet.scale >= 0 and self.scale >= 0 else 0
            assert (packet.scale >= 0) == (self.scale >= 0)
            assert bool(packet.ts) == self.timestamps
            self.their_mss = min(packet.mss, self.mss or 536) - (12 if self.timestamps else 0)
            self.wnd = packet.wnd
            if packet.ts:
                self.ts_recent = packet.ts[0]
            self._send(ACK, self._sequence(0))
            self.world.at(self.world.now, self._push)
            return
        assert bool(packet.ts) == self.timestamps or packet.flags & RST
        if packet.flags & RST:
            if packet.seq == self.rcv_nxt:
                self.reset = self.done = True
            else:
                self._send(ACK, self._sequence(self.max_sent))
            return
        if packet.ts and (packet.ts[0] - self.ts_recent) & MASK < HALF and (self.rcv_nxt - packet.seq) & MASK < HALF:
            self.ts_recent = packet.ts[0]
        if packet.flags & SYN:
            self._send(ACK, self._sequence(self.acked))
            return
        advance = (packet.ack - self.una) & MASK
        new = 0 < advance <= self.total + 1 - self.acked
        if new:
            self.una = packet.ack
            self.max_sent = max(self.max_sent, self.acked)
            self.tries = 0
        if new or not advance:
            self.wnd = packet.wnd << self.their_scale
        offset = (packet.seq - self.rcv_nxt) & MASK
        if packet.text or packet.flags & FIN or offset >= HALF:
            self._take(packet)
        self._push(from_ack=new)
        self._check_done()

    def _take(self, packet: Packet) -> None:
        start = (packet.seq - self.peer_isn - 1) & MASK
        if start >= HALF:
            start -= 1 << 32
        text = packet.text
        assert start + len(text) <= self.gateway.sent
        if text:
            assert text == text_of(start, len(text), DOWN), f"wrong octets at {start}"
        if packet.flags & FIN:
            assert self.fin_at in (-1, start + len(text)), "the FIN moved"
            self.fin_at = start + len(text)
        if start <= self.received < start + len(text):
            self._receive(start + len(text))
        elif self.keeps and start > self.received and text and start + len(text) <= self._edge:
            self.pieces[start] = text
        while True:
            ready = [s for s, kept in self.pieces.items() if s <= self.received]
            if not ready:
                break
            for s in ready:
                end = s + len(self.pieces.pop(s))
                if end > self.received:
                    self._receive(end)
        if self.fin_at == self.received and not self.remote_closed:
            self.remote_closed = True
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK
        if self.fast or start + len(text) <= self.received:
            self._send(ACK, self._sequence(self.max_sent if not self._silent_fin() else self.total + 1))

    def _silent_fin(self) -> bool:
        return self.acked > self.total

    def _receive(self, end: int) -> None:
        end = min(end, self._edge)  # behind the window nothing is taken
        fresh = end - self.received
        if fresh <= 0:
            return
        self.received = end
        self.rcv_nxt = (self.rcv_nxt + fresh) & MASK
        if self.reader_period:
            self.unread += fresh
            if not self._reading:
                self._reading = True
                self.world.at(self.world.now + self.reader_period, self._read)

    def _read(self) -> None:
        self._reading = False
        if self.done:
            return
        self.unread = 0
        self._send(ACK, self._sequence(self.acked if self.acked > self.total else self.max_sent))

    def _push(self, from_ack: bool = True) -> None:
        """Send what the window takes, from what is acknowledged on; timers are set by number, the last one counts."""
        if self.done or not from_ack:
            return
        position = min(self.acked, self.total)
        if self.acked > self.total:
            return
        # In a window of at most 20 segments.
        edge = min(self.total, position + min(self.wnd, 20 * self.their_mss))
        at = max(position, min(self.max_sent, edge)) if self.world.dice.random() < 0.9 else position
        self._burst(at, edge)
        self._set_timer()

    def _burst(self, at: int, edge: int) -> None:
        while at < edge:
            text = text_of(at, min(self.their_mss, edge - at), UP)
            at += len(text)
            fin = FIN if at == self.total else 0
            self._send(ACK | fin, self._sequence(at - len(text)), text)
            self.max_sent = max(self.max_sent, at + bool(fin))
        if self.total == self.acked == at and self.max_sent <= self.total:
            self._send(ACK | FIN, self._sequence(self.total))
            self.max_sent = self.total + 1

    def _set_timer(self) -> None:
        self._timer += 1
        number = self._timer
        self.world.at(self.world.now + self.RTO * 2 ** min(self.tries, 5), lambda: self._timeout(number))

    def _timeout(self, number: int) -> None:
        if self.done or number != self._timer or self.acked > self.total:
            return
        self.tries += 1
        assert self.tries < 60, "the gateway does not answer"
        position = self.acked
        if position == self.total:
            self._send(ACK | FIN, self._sequence(position))
            self.max_sent = self.total + 1
        elif not self.wnd:
            if self.world.dice.random() < 0.5:
                self._send(ACK, self._sequence(position) - 1)  # a probe as Linux sends it
            else:
                self._send(ACK, self._sequence(position), text_of(position, 1, UP))  # and as BSD does
                self.max_sent = max(self.max_sent, position + 1)
        else:
            edge = min(self.total, position + min(self.wnd, self.their_mss))
            self._burst(position, edge)
        self._set_timer()

    def _check_done(self) -> None:
        if self.remote_closed and self.acked > self.total:
            self.done = True


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    seed: int
    seconds: float
    up: int
    down: int
    reset: bool


def run(seed: int) -> Result:
    """Run one seed to its end; AssertionError when anything is wrong."""
    world = World(seed)
    dice = world.dice
    sizes = (0, 1, 1000, 30_000, 200_000)
    aborts = [dice.choice((0.0, 0.01, 0.2, 3.0)) if dice.random() < 0.1 else inf for _ in range(2)]
    gateway = Gateway(world, dice.choice(sizes), aborts[0])
    peer = gateway.peer = Peer(world, gateway, dice.choice(sizes), aborts[1])
    if peer.buffer < 1000:  # octet by octet: not too many of them
        gateway.total = min(gateway.total, 300)
    elif peer.reader_period == 1.0:
        gateway.total = min(gateway.total, 100 * peer.buffer)
    peer.begin()

    def over() -> bool:
        if world.on_the_way:
            return False
        if gateway.conn is None:
            return peer.done
        return peer.done and gateway.ended and not gateway.backlog

    try:
        world.run(over)
    except Stillness:
        # A RST was lost, and whoever should have got it has nothing to say: in life it is idle until it is given up.
        if min(aborts) == inf or not world.loss:
            raise
        return Result(seed, world.now - world.start, gateway.received, peer.received, True)
    gateway.check_end()
    # At 20 % ten retransmissions in a row are lost once in a long while.
    unlucky = world.loss == 0.2 and gateway.gave_up
    if min(aborts) == inf and not unlucky:
        assert not (gateway.reset or gateway.gave_up or peer.reset), (gateway.reset, gateway.gave_up, peer.reset)
        assert gateway.received == peer.total
        assert peer.received == gateway.total
        assert gateway.remote_closed
        assert peer.remote_closed
    return Result(seed, world.now - world.start, gateway.received, peer.received, gateway.reset or peer.reset)


def main(first: int, last: int) -> None:
    """Run a range of seeds and print those that fail."""
    failed = 0
    for seed in range(first, last):
        try:
            run(seed)
        except AssertionError as error:
            failed += 1
            print(f"seed {seed}: {error}")
    print(f"{last - first} seeds, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
