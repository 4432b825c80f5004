"""Connection: one TCP connection towards the device (RFC 9293).

    segment_arrives(seg, memory, now)   from the device
    send · close · abort                from the relay: the RFC's user calls
    timeout(now)                        from the clock, when `deadline` has come
    segment_to_send(out, now)           fills `out`, until there is nothing left to send
    take_events()                       what the relay must know

The connection holds numbers, no payload: the octets that it sends stay with the relay, which knows them by their
sequence numbers, and text that arrives in order is named in the segment itself (`seg.text_at`, `seg.len`). Only text
out of order is copied, into the reassembly queue. No I/O, no clock, no randomness, no callbacks.
"""

from math import inf
from mmap import mmap
from typing import Final, Self

from workers.tcp import arrival, opening, output
from workers.tcp.events import (
    ACKED,
    AT_END_OF_BATCH,
    AT_ONCE,
    DELAYED,
    ENDED,
    GAVE_UP,
    NOT_DUE,
    TEXT,
)
from workers.tcp.limits import (
    FIRST_FLIGHT,
    MAX_PACKET,
    MAX_RETRIES,
    MAX_SYN_RETRIES,
    SEND_BUFFER,
)
from workers.tcp.policy import Policy
from workers.tcp.receive import ReceiveSpace
from workers.tcp.recovery import Recovery
from workers.tcp.rtt import EPSILON, RttEstimator
from workers.tcp.segment import ACK, FIN, RST, SYN, Segment
from workers.tcp.send import SendSpace
from workers.tcp.sequence import HALF, MASK
from workers.tcp.states import (
    ALLOWED,
    CLOSE_WAIT,
    CLOSED,
    ESTABLISHED,
    FIN_WAIT_1,
    LAST_ACK,
    NAMES,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
)

CONTROL: Final = FIN | SYN | RST | ACK


class Connection:
    """The state of one connection: in SYN_RECEIVED at first, when the SYN-ACK may go, or in SYN_SENT: connect()."""

    __slots__ = (
        "ack_due",
        "announced_mss",
        "challenged_at",
        "congestion",
        "disorder",
        "events",
        "idle_at",
        "keepalives",
        "persist_at",
        "pingpong",
        "policy",
        "probe_due",
        "probed_at",
        "rcv",
        "recovery",
        "reset_due",
        "retransmit_due",
        "retries",
        "rto_at",
        "rtt",
        "sack",
        "smss",
        "snd",
        "state",
        "syn_due",
        "timestamps",
        "ts_recent",
        "ts_recent_at",
    )

    def __init__(self, syn: Segment | None, iss: int, mss: int, policy: Policy | None = None) -> None:
        """Take the peer's SYN; `iss` as RFC 6528 says, `mss` what the device's MTU leaves for text (octets).

        Without a SYN it is the active side, see connect().
        """
        self.policy = policy = policy or Policy()
        self.state = SYN_SENT if syn is None else SYN_RECEIVED
        self.events = 0
        self.snd = SendSpace(iss)
        self.rcv = ReceiveSpace(0, policy.receive_buffer, mss)
        self.rtt = RttEstimator()
        self.announced_mss = mss  #: the MSS option of our SYN
        self.timestamps = True  #: RFC 7323: each segment carries the option
        self.ts_recent = 0  #: TS.Recent
        self.ts_recent_at = inf  #: when it was set
        self.sack = True  #: RFC 2018: both sides permit SACK
        self.smss = mss  #: Eff.snd.MSS (RFC 9293, 3.7.1)
        self.congestion = policy.congestion(mss)
        if syn is not None:
            opening.take_syn(self, syn, inf)
        self.ack_due = NOT_DUE
        self.challenged_at = -inf  #: when a segment that may be forged was last answered
        self.pingpong = False  #: our data answers theirs soon: ACKs may ride on it
        self.retries = 0  #: of the oldest segment in flight
        self.disorder = False  #: something in flight is SACKed, lost or sent again: ACKs are recovery's business
        self.recovery: Recovery | None = None  #: from the first disorder on
        self.rto_at = inf  #: when the retransmission timer fires, or what comes before it: Recovery.timer
        self.idle_at = inf  #: when the last octet in flight was acknowledged
        self.persist_at = inf  #: when the next window probe goes out
        self.syn_due = True
        self.reset_due = False
        self.retransmit_due = False
        self.probe_due = False
        self.keepalives = 0  #: probes in a row that nothing has answered
        self.probed_at = 0.0  #: when the last of them went out

    @classmethod
    def connect(cls, iss: int, mss: int, policy: Policy | None = None) -> Self:
        """Open actively: a SYN is due, which offers every option; what was sent before the answer comes waits."""
        return cls(None, iss, mss, policy)

    # ── user calls ──────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, octets: int) -> None:
        """Queue octets that the relay holds, behind all queued before."""
        self.snd.end = (self.snd.end + octets) & MASK

    def close(self) -> None:
        """Queue a FIN behind what was queued; the peer may go on sending."""
        self.snd.fin = True
        if self.state == ESTABLISHED:
            self.enter(FIN_WAIT_1)
        elif self.state == CLOSE_WAIT:
            self.enter(LAST_ACK)
        elif self.state == SYN_SENT:
            self.enter(CLOSED)

    def abort(self) -> None:
        """Send RST, if the peer can know of us, and be done."""
        self.reset_due = self.state != SYN_SENT
        self.ack_due = NOT_DUE
        self.rcv.blocks_due = False
        self.enter(CLOSED)

    def room(self, now: float) -> int:
        """Return how many octets the relay may read and send at once; 0 while that would be a silly little."""
        snd = self.snd
        in_flight = (snd.end - snd.una) & MASK
        if not in_flight and now - self.idle_at > self.rtt.rto:
            self.idle_at = inf
            self.congestion.restart()
            self._give_back_flight()
        window = snd.wnd
        cwnd = self.congestion.cwnd
        if self.disorder and self.recovery is not None:
            cwnd = self.recovery.room(self) + ((snd.nxt - snd.una) & MASK)
        usable = (cwnd if cwnd < window else window) - in_flight
        if usable >= self.smss:
            if usable > MAX_PACKET:
                usable = MAX_PACKET
            if usable > snd.limit - in_flight:
                usable = min(usable, self._more_in_flight() - in_flight)
            return max(usable - usable % self.smss, 0)
        return usable if usable > 0 and not in_flight else 0

    def _more_in_flight(self) -> int:
        """Let more be in flight, if the worker has some to give; return how much may be now (octets)."""
        snd = self.snd
        policy = self.policy
        more = min(snd.limit, SEND_BUFFER - snd.limit, policy.flights)
        policy.flights -= more
        snd.limit += more
        return snd.limit

    def _give_back_flight(self) -> None:
        """Give the worker back what _more_in_flight() took."""
        self.policy.flights += self.snd.limit - FIRST_FLIGHT
        self.snd.limit = FIRST_FLIGHT

    def want_room(self, now: float) -> None:
        """Say that data waits for the window: with nothing in flight only a probe finds out when it opens."""
        if self.persist_at == inf and self.snd.una == self.snd.nxt:
            self.persist_at = now + self.rtt.rto

    def taken_by_proxy(self) -> None:
        """See whether what the proxy took (`rcv.pending` fell) opens the window by enough to say so."""
        rcv = self.rcv
        edge = (rcv.nxt + rcv.buffer - rcv.pending) & MASK
        if (edge - rcv.adv + HALF) & MASK >= HALF + rcv.step:
            self.ack_due = AT_ONCE

    def take_events(self) -> int:
        """Return the events since the last call."""
        events, self.events = self.events, 0
        return events

    def take_reassembled(self) -> list[bytes]:
        """Return the text that the segment just arrived has put in order, behind its own; then a FIN may be next.

        To be called after each segment while `rcv.pieces` is not None, before take_events().
        """
        ready = self.rcv.take_ready()
        arrival.check_fin(self)
        return [ready] if ready else []

    # ── segments in ─────────────────────────────────────────────────────────────────────────────────────────────

    def segment_arrives(self, seg: Segment, memory: mmap | bytes, now: float) -> None:
        """Process one segment; text out of order is copied from `memory`, text in order is left in `seg`."""
        rcv = self.rcv
        snd = self.snd
        if (
            self.state == ESTABLISHED
            and seg.flags & CONTROL == ACK
            and seg.seq == rcv.nxt
            and rcv.pieces is None
            and seg.len <= (rcv.adv - rcv.nxt) & MASK
            and (seg.ack - snd.una) & MASK <= (snd.nxt - snd.una) & MASK
            and (seg.ts_present and (seg.ts_val - self.ts_recent) & MASK < HALF) == self.timestamps
            and (seg.len or seg.ack != snd.una)
            and rcv.fin_at < 0
        ):
            # The fast path: the next segment in order. Same result as the steps (tests/test_tcp_fast_path.py).
            if self.timestamps and not rcv.unacked:  # RFC 7323, 4.3: a delayed ACK echoes its first segment
                self.ts_recent = seg.ts_val
                self.ts_recent_at = now
                rcv.ts_ecr = seg.ts_ecr
            if seg.ack != snd.una:
                self.acknowledged(seg, now)
            elif seg.sack and self.sack:
                self.duplicate_ack(seg, now)
            self.update_window(seg)
            if seg.len:
                self.text_in_order(seg, now)
            return
        arrival.steps(self, seg, memory, now)

    def acknowledged(self, seg: Segment, now: float) -> None:
        """SND.UNA < SEG.ACK =< SND.NXT: advance, measure, grow, restart the timer."""
        if self.disorder or (seg.sack and self.sack):
            self.needs_recovery().ack_arrives(self, seg, now)
            return
        snd = self.snd
        nxt = snd.nxt
        before = snd.una
        snd.una = una = seg.ack
        rtt = self.rtt
        self.events |= ACKED
        self.retries = 0
        sent = snd.sent
        if sent and (una - sent[0][0]) & MASK < HALF:
            at = sent.popleft()[1]
            while sent and (una - sent[0][0]) & MASK < HALF:
                at = sent.popleft()[1]
            rtt.sample(now - at or EPSILON)
        self.congestion.acknowledged((una - before) & MASK, (nxt - before) & MASK, rtt.srtt, now)
        if una == nxt:
            self.rto_at = inf
            self.idle_at = now
        else:
            self.rto_at = now + (rtt.pto if (nxt - una) & MASK > self.smss else rtt.rto)

    def duplicate_ack(self, seg: Segment, now: float) -> None:
        """SND.UNA = SEG.ACK: a duplicate ACK (RFC 5681, 2), or any segment with SACK blocks (RFC 6675, 2)."""
        if seg.sack or not self.sack:
            self.needs_recovery().ack_arrives(self, seg, now)

    def needs_recovery(self) -> Recovery:
        """Return the loss recovery, which is made when it is needed first."""
        if self.recovery is None:
            self.recovery = Recovery()
        return self.recovery

    def update_window(self, seg: Segment) -> None:
        """Take SEG.WND unless the segment is older than the one that set it (SND.WL1, SND.WL2).

        RFC 9293 compares SEG.SEQ first, but that goes back when the peer sends something again, and its acknowledgement
        number never does: the window with a new SEG.ACK is the younger one, whatever stands in SEG.SEQ (as in Linux).
        """
        snd = self.snd
        newer = (seg.ack - snd.wl2) & MASK
        if 0 < newer < HALF or (newer == 0 and (seg.seq - snd.wl1) & MASK < HALF):
            snd.wnd = wnd = seg.wnd << snd.scale
            snd.wl1 = seg.seq
            snd.wl2 = seg.ack
            if wnd > snd.max_wnd:
                snd.max_wnd = wnd
            elif not wnd:
                self.retries = 0  # a window that was shut on text in flight: the peer is there
            if self.persist_at != inf:
                self.retries = 0  # the peer answers: it may keep its window shut as long as it likes
                if wnd:
                    self.persist_at = inf
                    self.rtt.end_back_off()

    def text_in_order(self, seg: Segment, now: float) -> None:
        """Advance RCV.NXT over the whole text of seg, and see when the ACK is due."""
        rcv = self.rcv
        length = seg.len
        rcv.nxt = (rcv.nxt + length) & MASK
        rcv.taken += length
        rcv.unacked = unacked = rcv.unacked + length
        self.events |= TEXT
        if self.ack_due < AT_END_OF_BATCH:
            if unacked > rcv.mss:  # every second full segment at least (RFC 9293, 3.8.6.3)
                self.ack_due = AT_END_OF_BATCH
                if rcv.mss < length and rcv.mss < self.announced_mss:
                    rcv.mss = min(length, self.announced_mss)
            else:
                arrival.little_text(self, seg, now)
        rcv.text_at = now

    def enter(self, state: int) -> None:
        """Change the state: the one door, which knows what RFC 9293 allows."""
        if state not in ALLOWED[self.state]:
            raise AssertionError(f"{NAMES[self.state]} to {NAMES[state]} is no transition of RFC 9293")
        self.state = state
        if state in (CLOSED, TIME_WAIT):
            self.rto_at = self.persist_at = inf
            self.events |= ENDED
            self.rcv.tuning.give_back(self.policy)
            self._give_back_flight()

    def end(self, event: int) -> None:
        """Enter CLOSED and say why."""
        self.enter(CLOSED)
        self.ack_due = NOT_DUE
        self.events |= event

    # ── the clock ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def deadline(self) -> float:
        """When timeout() wants to be called; inf: never."""
        return self.rto_at if self.rto_at < self.persist_at else self.persist_at

    def timeout(self, now: float) -> None:
        """Do what is due: retransmit (RFC 6298, 5.4–5.7) or probe a closed window (RFC 9293, 3.8.6.1)."""
        if now < self.deadline:
            return
        if now >= self.rto_at and self.state > SYN_RECEIVED and self.needs_recovery().timer(self, now):
            return
        self.retries += 1
        if self.retries > (MAX_SYN_RETRIES if self.state <= SYN_RECEIVED else MAX_RETRIES):
            self.reset_due = self.state != SYN_SENT
            self.end(GAVE_UP)
            return
        if now >= self.persist_at:
            self.probe_due = True
            self.rtt.back_off()
            self.persist_at = now + self.rtt.rto
            return
        if self.state <= SYN_RECEIVED:
            self.rtt.back_off()
            self.rto_at = now + self.rtt.rto
            self.congestion.cwnd = self.smss  # RFC 5681, 3.1: the initial window after a SYN that was lost
            self.syn_due = True
        else:
            self.needs_recovery().timed_out(self, now)

    def keepalive(self, heard_at: float, now: float) -> None:
        """Probe a peer of which nothing was heard since `heard_at`, and give up one that does not answer.

        To be called now and then; it does nothing before its time, nor while something is in flight: retransmissions
        and window probes find out as well (RFC 9293, 3.8.4).
        """
        policy = self.policy
        if now - heard_at < policy.keepalive or self.snd.una != self.snd.nxt or self.deadline != inf:
            return
        if self.probed_at < heard_at:
            self.keepalives = 0
        elif self.keepalives and now - self.probed_at < policy.keepalive_interval:
            return
        if self.keepalives >= policy.keepalive_count:
            self.reset_due = True
            self.end(GAVE_UP)
            return
        self.keepalives += 1
        self.probed_at = now
        self.probe_due = True

    def delayed_ack_timeout(self) -> None:
        """Send the ACK that waited in vain for data to ride on; the next one does not wait."""
        if self.ack_due == DELAYED:
            self.ack_due = AT_END_OF_BATCH
            self.pingpong = False

    # ── segments out ────────────────────────────────────────────────────────────────────────────────────────────

    segment_to_send = output.segment_to_send
    ack_to_send = output.ack_to_send
    text_at_once = output.text_at_once
