"""Loss detection and recovery: what happens to acknowledgements while anything in flight is out of the ordinary.

    OPEN ──────── something is lost ───────► RECOVERY ── `recover` is acknowledged ──► OPEN
      └── the retransmission timer fires ──► LOSS ────── the same, or it was spurious ──► OPEN

With SACK losses are found by time (RACK, RFC 8985), the end of a flight is probed before the timeout (TLP, the same),
and a timeout that was too early is undone (F-RTO, RFC 5682). Without SACK it is duplicate ACKs that are counted
(NewReno, RFC 6582). Either way lost octets are sent again as `pipe` leaves room below the congestion window
(RFC 6675), which proportional rate reduction moves meanwhile (RFC 9937); limited transmit (RFC 3042) is the same rule
before anything is deemed lost. D-SACKs undo what was no loss, and widen RACK's reordering window.

A connection has one Recovery from its first exception on; `Connection.disorder` says whether one is going on, that is,
whether its acknowledgements come here at all.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from workers.tcp.events import ACKED, PROBED, RECOVERING, SPURIOUS, TIMED_OUT
from workers.tcp.limits import MAX_PACKET, MAX_RTT
from workers.tcp.rack import DUPLICATE_ACKS, Rack
from workers.tcp.rtt import EPSILON, GRANULARITY
from workers.tcp.scoreboard import Scoreboard, duplicate_block
from workers.tcp.sequence import HALF, MASK

if TYPE_CHECKING:
    from workers.tcp.connection import Connection
    from workers.tcp.segment import Segment

TICK: Final = 1e-7  #: seconds between two transmissions of one breath

OPEN: Final = 0
RECOVERY: Final = 1
LOSS: Final = 2


# F-RTO (RFC 5682, 2.1 and 3.1): where we are in it.
NO_FRTO: Final = 0
AFTER_TIMEOUT: Final = 1  #: the first segment was sent again; the ACK of it is awaited
NEW_TEXT: Final = 2  #: it came: new text shall go instead of more retransmissions, if there is some
AFTER_NEW_TEXT: Final = 3  #: it went, and its ACK decides


class Recovery:
    """The state of loss detection and recovery of one connection; positions as in its scoreboard."""

    __slots__ = (
        "_prr_delivered",
        "_prr_flight",
        "_sent_at",
        "_undo",
        "board",
        "duplicates",
        "frto",
        "probe",
        "probe_end",
        "prr_out",
        "rack",
        "recover",
        "reordering_timer",
        "state",
    )

    def __init__(self) -> None:
        self.board = Scoreboard()
        self.rack = Rack()
        self.state = OPEN
        self.recover = 0  #: SND.NXT when recovery began; what stands before it is repaired
        self.duplicates = 0  #: without SACK: octets that duplicate ACKs say have left the network
        self.frto = NO_FRTO
        self.reordering_timer = False  #: it is RACK's reordering timer that runs, not the RTO
        self.probe = False  #: a tail loss probe is due
        self.probe_end = -1  #: TLP.end_seq: the position behind the probe, -1 = none is out
        self.prr_out = 0  #: octets sent in this recovery
        self._prr_delivered = 0  #: octets delivered in it
        self._prr_flight = 1  #: RecoverFS, octets in flight when it began
        self._sent_at = -inf  #: when something was last sent, see sent_at()
        self._undo = -1  #: octets sent again and not reported twice by D-SACK; at 0 nothing was lost; -1 = do not undo

    # ── acknowledgements ────────────────────────────────────────────────────────────────────────────────────────

    def ack_arrives(self, conn: Connection, seg: Segment, now: float) -> None:
        """Take an ACK, SND.UNA =< SEG.ACK =< SND.NXT, that is a duplicate, has SACK blocks or comes in a disorder."""
        snd = conn.snd
        board = self.board
        if not conn.disorder:
            self.begin(conn)
        advance = (seg.ack - snd.una) & MASK
        blocks, twice = [], 0
        if conn.sack and seg.sack:
            blocks = board.positions(seg.sack, snd.una)
            twice = duplicate_block(seg.sack, seg.ack, snd.max_wnd)
        pipe = self.pipe
        timer_was_short = self.reordering_timer

        # What was delivered, and when had it been sent?
        rack = self.rack
        before = board.una
        pieces = board.acknowledge(advance) if advance else []
        spans = [(before, board.una)] if advance else []
        for start, end in blocks:
            if end > board.una:
                news = board.sack(max(start, board.una), end)
                if news:
                    pieces += news
                    spans.append((start, end))
        for start, end in spans:
            for at, b in board.delivered_again(start, end):
                rack.delivered_again(at, b, board.una, seg, conn.rtt, now)
        delivered = 0
        once = 0  # octets that were sent only once, before the recovery point
        again = False
        newest = -1.0  # when what was never sent again had been sent, the latest
        fack = rack.fack
        for start, end in pieces:
            delivered += end - start
            repeated = board.sent_again.common(start, end)
            again |= repeated > 0
            if repeated < end - start:
                at = snd.sent_at(end - before)
                if start < self.recover:
                    once += end - start - repeated
                if start < fack and not repeated:
                    rack.reordered = True
                if not repeated and at > newest:
                    newest = at
                rack.delivered(at, end, now)
            if end > rack.fack:
                rack.fack = end
        if advance:
            self._advance(conn, seg)
        if newest >= 0:
            conn.rtt.sample(max(now - newest, EPSILON))
        elif again and advance and seg.ts_present and seg.ts_ecr:
            elapsed = (int(now * 1000) - seg.ts_ecr) & MASK
            if elapsed < MAX_RTT:
                conn.rtt.sample(elapsed / 1000 or GRANULARITY / 2)
        if not conn.sack:
            if advance:
                self.duplicates = max(self.duplicates - max(advance - conn.smss, 0), 0)
            elif self.state != LOSS:
                self.duplicates = min(self.duplicates + conn.smss, max(board.pipe - conn.smss, 0))
                delivered = conn.smss

        if self.probe_end >= 0:
            self._probe_answered(conn, twice > 0)
        elif twice:
            self._twice(conn, twice)
        if self.frto:
            self._frto(conn, once if conn.sack or not again else 0, bool(advance), bool(pieces or not advance))
        lost = self._detect(conn, bool(advance), now)
        self._proceed(conn, advance, delivered, pipe, lost, now)
        conn.retransmit_due = bool(board.lost) and self.frto != AFTER_NEW_TEXT
        self._rearm(conn, advance > 0 or timer_was_short, now)

    def begin(self, conn: Connection) -> None:
        """Begin a disorder: nothing is known yet of what is in flight."""
        conn.disorder = True
        snd = conn.snd
        self.board.begin((snd.nxt - snd.una) & MASK)
        self.state = OPEN
        self.recover = self.duplicates = 0
        self.frto = NO_FRTO
        self.probe_end = -1
        self.rack.begin()
        self._sent_at = snd.sent[-1][1] if snd.sent else -inf
        self.reordering_timer = self.probe = False

    @property
    def pipe(self) -> int:
        """Octets in the network."""
        return max(self.board.pipe - self.duplicates, 0)

    def _advance(self, conn: Connection, seg: Segment) -> None:
        """Move SND.UNA to SEG.ACK."""
        snd = conn.snd
        snd.una = una = seg.ack
        sent = snd.sent
        while sent and (una - sent[0][0]) & MASK < HALF:
            sent.popleft()
        conn.events |= ACKED
        conn.retries = 0
        self.board.sent_again.discard(0, self.board.una)

    def _detect(self, conn: Connection, advanced: bool, now: float) -> bool:
        """Find what is lost (step 5); return whether something was found."""
        board = self.board
        self.reordering_timer = False
        if not conn.sack:
            hole = min(board.una + conn.smss, board.nxt)
            if self.state == OPEN:
                due = self.duplicates >= DUPLICATE_ACKS * conn.smss
            else:
                due = self.state == RECOVERY and advanced and board.una < self.recover  # a partial ACK
            return due and board.lost_below < hole and board.judge(hole) > 0
        window = self.rack.window(board, conn.rtt, conn.smss, self.state != OPEN)
        found, again_at = self.rack.detect(board, conn.snd, window, now)
        if again_at != inf:
            self.reordering_timer = True
            conn.rto_at = again_at
        return found > 0

    def _twice(self, conn: Connection, octets: int) -> None:
        """Octets arrived twice: perhaps nothing was lost, and the reordering window is too narrow."""
        self.rack.twice(self.board)
        if self._undo > 0:
            self._undo -= octets
            if self._undo <= 0:
                self.rack.reordered = True
                self._nothing_was_lost(conn)

    # ── the congestion window ───────────────────────────────────────────────────────────────────────────────────

    def _proceed(self, conn: Connection, advance: int, delivered: int, pipe: int, lost: bool, now: float) -> None:
        """Leave and enter recovery, and move the congestion window."""
        board = self.board
        congestion = conn.congestion
        if self.state != OPEN and (
            board.una == board.nxt or (board.una >= self.recover if conn.sack else board.una > self.recover)
        ):
            self._leave(conn)
            advance = 0  # the window grows from the next ACK on
        if self.state == OPEN:
            if board.lost:
                self._enter(conn, pipe)
            elif advance:
                congestion.acknowledged(advance, pipe, conn.rtt.srtt, now)
        elif self.state == LOSS and delivered:
            congestion.acknowledged(delivered, congestion.cwnd, conn.rtt.srtt, now)
        if self.state == RECOVERY and delivered:
            self._reduce(conn, delivered, advance > 0 and not lost)
        if self.state == OPEN and self.probe_end < 0 and not self.duplicates and board.is_clean:
            conn.disorder = False

    def _enter(self, conn: Connection, pipe: int) -> None:
        """Begin a recovery."""
        board = self.board
        conn.congestion.lost(board.nxt - board.una)
        conn.events |= RECOVERING
        self.state = RECOVERY
        self.recover = board.nxt
        self.prr_out = self._prr_delivered = 0
        self._prr_flight = max(pipe, conn.smss)
        self._undo = 0
        self.probe_end = -1

    def _leave(self, conn: Connection) -> None:
        """End a recovery: everything that was in flight when it began is acknowledged."""
        if self.state == RECOVERY:
            conn.congestion.cwnd = conn.congestion.ssthresh
        self.state = OPEN
        self.frto = NO_FRTO
        self.duplicates = 0
        self.rack.recovered()

    def _reduce(self, conn: Connection, delivered: int, safe: bool) -> None:
        """Let the window sink to ssthresh in proportion to what is delivered (PRR, RFC 9937, 6)."""
        congestion = conn.congestion
        self._prr_delivered += delivered
        pipe = self.pipe
        if pipe > congestion.ssthresh:
            octets = -(-self._prr_delivered * congestion.ssthresh // self._prr_flight) - self.prr_out
        else:
            octets = max(self._prr_delivered - self.prr_out, delivered) + (conn.smss if safe else 0)
            octets = min(octets, congestion.ssthresh - pipe)
        if octets < conn.smss and (not self.prr_out or (self.board.lost and not conn.sack)):
            octets = conn.smss  # the fast retransmission itself, or that after a partial ACK (RFC 6582, 3.2, step 3)
        congestion.cwnd = max(pipe + max(octets, 0), conn.smss)

    def _nothing_was_lost(self, conn: Connection) -> None:
        """Undo a recovery that was none."""
        conn.congestion.undo()
        conn.events |= SPURIOUS
        self._undo = -1
        board = self.board
        board.lost.clear()
        board.lost_below = board.una
        self.rack.forget_times()
        self.state = OPEN
        self.frto = NO_FRTO

    # ── timers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _rearm(self, conn: Connection, restart: bool, now: float) -> None:
        """Stop or restart the timer after an ACK (RFC 6298, 5.2 and 5.3)."""
        snd = conn.snd
        if snd.una == snd.nxt:
            conn.rto_at = inf
            conn.idle_at = now
        elif restart and not self.reordering_timer:
            no_probe = conn.disorder or (snd.nxt - snd.una) & MASK <= conn.smss
            conn.rto_at = now + (conn.rtt.rto if no_probe else conn.rtt.pto)

    def timer(self, conn: Connection, now: float) -> bool:
        """Take the timer's expiry, unless it is the retransmission timeout; False: it is."""
        snd = conn.snd
        board = self.board
        if not conn.disorder:
            in_flight = (snd.nxt - snd.una) & MASK
            if not conn.sack or not conn.rtt.srtt or conn.retries or (in_flight <= conn.smss and len(snd.sent) < 2):
                return False
            self.begin(conn)
            self.probe = conn.retransmit_due = True
            self.probe_end = in_flight
            conn.events |= PROBED
            conn.rto_at = now + conn.rtt.rto
            return True
        if not self.reordering_timer:
            return False
        pipe = self.pipe
        conn.rto_at = now + conn.rtt.rto
        if self._detect(conn, False, now) and self.state == OPEN:
            self._enter(conn, pipe)
            self._reduce(conn, 0, False)
        conn.retransmit_due = bool(board.lost)
        return True

    def timed_out(self, conn: Connection, now: float) -> None:
        """The retransmission timeout: everything in flight is lost (RFC 6298, 5.4–5.6; RFC 8985, 6.3)."""
        first = conn.retries == 1
        was = self.state if conn.disorder else OPEN
        self.send_all_again(conn)
        if first:
            if was == OPEN:
                self.frto = AFTER_TIMEOUT
            if was != LOSS:
                conn.congestion.lost(self.board.nxt - self.board.una)
                self._undo = 0
        conn.congestion.cwnd = conn.smss
        conn.congestion.began_at = -1.0
        conn.events |= TIMED_OUT
        conn.rtt.back_off()
        conn.rto_at = now + conn.rtt.rto

    def send_all_again(self, conn: Connection) -> None:
        """Send everything in flight again that is not SACKed, as far as the congestion window lets it."""
        if not conn.disorder:
            self.begin(conn)
        board = self.board
        board.everything_lost()
        self.state = LOSS
        self.recover = board.nxt
        self.duplicates = 0
        self.frto = NO_FRTO
        self.reordering_timer = self.probe = False
        self.probe_end = -1
        conn.retransmit_due = True

    def _probe_answered(self, conn: Connection, dsack: bool) -> None:
        """See what the ACK says of the tail loss probe (RFC 8985, 7.4)."""
        board = self.board
        if self.state != OPEN:
            self.probe_end = -1
        elif dsack and board.una >= self.probe_end:
            self.probe_end = -1  # both arrived: nothing was lost
        elif board.una > self.probe_end:
            # It has repaired a loss, which nobody else will notice. (When it went out, positions began at 0.)
            conn.congestion.lost(self.probe_end)
            conn.congestion.cwnd = min(conn.congestion.cwnd, conn.congestion.ssthresh)
            self.probe_end = -1

    def _frto(self, conn: Connection, once: int, advanced: bool, news: bool) -> None:
        """Decide whether a timeout was spurious (RFC 5682, 2.1 and 3.1)."""
        if once:
            self._nothing_was_lost(conn)
        elif self.frto == AFTER_TIMEOUT and advanced and self.board.una < self.recover:
            self.frto = NEW_TEXT
        elif news:
            self.frto = NO_FRTO

    # ── what is sent ───────────────────────────────────────────────────────────────────────────────────────────

    def room(self, conn: Connection) -> int:
        """Return how many octets of new text the congestion window lets out; it may be negative."""
        if self.board.lost or self.probe:
            return 2 * conn.smss if self.frto == NEW_TEXT else 0
        return conn.congestion.cwnd - self.pipe

    def sent_at(self, now: float) -> float:
        """Return the time to note for what is sent now.

        The worker reads its clock once a breath, but what was sent first must be told from what was sent then.
        """
        self._sent_at = at = now if now > self._sent_at else self._sent_at + TICK
        return at

    def text_sent(self, conn: Connection, octets: int) -> None:
        """Note that new text (a FIN counts) was sent."""
        self.board.nxt += octets
        self.prr_out += octets
        if self.frto == NEW_TEXT:
            self.frto = AFTER_NEW_TEXT
            conn.retransmit_due = False

    def range_to_send(self, conn: Connection, now: float) -> tuple[int, int] | None:
        """Return the next range to send again: its first sequence number, and how many it takes; None: none may go."""
        snd = conn.snd
        board = self.board
        smss = conn.smss
        if self.probe:
            self.probe = False
            before = snd.sent[-2][0] if len(snd.sent) > 1 else snd.una
            last = (snd.nxt - before - 1) & MASK
            start = max(board.nxt - (last % smss + 1), board.una)
            board.sent_again.add(start, board.nxt)
            board.resent.append((self.sent_at(now), start, board.nxt))
            return (snd.una + start - board.una) & MASK, board.nxt - start
        if self.frto == NEW_TEXT:
            self.frto = NO_FRTO  # there was none
        if not board.lost or self.frto == AFTER_NEW_TEXT:
            return None
        start, end = board.lost.starts[0], board.lost.ends[0]
        length = end - start
        room = conn.congestion.cwnd - self.pipe
        if room < min(length, smss):
            return None
        ahead = start - board.una
        window = snd.wnd - ahead if ahead else max(snd.wnd, smss)  # the first goes whatever the window has become
        if window < min(length, smss):
            return None
        if length > smss:
            length = min(length, room - room % smss, window - window % smss, MAX_PACKET - MAX_PACKET % smss)
        board.sent_lost(start, start + length, self.sent_at(now))
        self.prr_out += length
        if self._undo >= 0:
            self._undo += length
        if not ahead and not self.reordering_timer:
            conn.rto_at = now + conn.rtt.rto
        return (snd.una + ahead) & MASK, length
