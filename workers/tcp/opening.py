"""Opening: what the peer's SYN says, and the answers to our own (RFC 9293, 3.10.7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers import counts
from workers.tcp.events import AT_ONCE, OPENED, RESET, UNACCEPTABLE_ACK
from workers.tcp.limits import DEFAULT_MSS, FIRST_BUFFER, MAX_PACKET
from workers.tcp.receive import ReceiveSpace
from workers.tcp.segment import ACK, RST, SYN, Segment
from workers.tcp.sequence import MASK
from workers.tcp.states import ESTABLISHED, SYN_RECEIVED

if TYPE_CHECKING:
    from workers.tcp.connection import Connection


def take_syn(conn: Connection, syn: Segment, now: float) -> None:
    """Take numbers and options of the peer's SYN or SYN-ACK; an option holds when both sides have sent it."""
    policy, snd, mss = conn.policy, conn.snd, conn.announced_mss
    conn.rcv = rcv = ReceiveSpace(syn.seq, min(FIRST_BUFFER, policy.receive_buffer), mss)
    conn.timestamps = syn.ts_present
    conn.ts_recent = syn.ts_val if syn.ts_present else 0
    conn.ts_recent_at = now
    conn.sack = conn.rtt.probes = syn.sack_permitted
    if syn.window_scale >= 0:
        snd.scale = syn.window_scale
        rcv.scale = policy.scale
        rcv.tuning.limit = policy.receive_buffer
    else:
        rcv.buffer = rcv.tuning.limit = min(rcv.buffer, 65535)
    rcv.step = min(rcv.buffer // 2, 2 * mss)
    snd.wnd = snd.max_wnd = syn.wnd  # the window of a SYN is never scaled (RFC 7323, 2.2)
    snd.wl1 = syn.seq
    snd.wl2 = syn.ack if syn.flags & ACK else snd.wl2
    # Eff.snd.MSS (RFC 9293, 3.7.1): what the peer takes, less our options
    conn.smss = max(min(syn.mss or DEFAULT_MSS, mss, MAX_PACKET) - (12 if syn.ts_present else 0), 32)
    conn.congestion = policy.congestion(conn.smss)


def answer_arrives(conn: Connection, seg: Segment, now: float) -> bool:
    """Process a segment in SYN-SENT; True: the connection is established, and text or FIN of `seg` come next."""
    snd = conn.snd
    # First, check the ACK bit; SND.UNA is ISS.
    if seg.flags & ACK and not 0 < (seg.ack - snd.una) & MASK <= (snd.nxt - snd.una) & MASK:
        if not seg.flags & RST:
            conn.events |= UNACCEPTABLE_ACK
        return False
    # Second, check the RST bit: refused; without an ACK that fits it may come from anybody. (Third is security.)
    if seg.flags & RST:
        if seg.flags & ACK:
            conn.end(RESET)
        return False
    # Fourth, check the SYN bit. Fifth, without one the segment is dropped.
    if not seg.flags & SYN:
        conn.policy.count[counts.TCP_DROPPED_OUTSIDE] += 1
        return False
    take_syn(conn, seg, now)
    if conn.retries:
        conn.congestion.cwnd = conn.smss  # RFC 5681, 3.1: the initial window after a SYN that was lost
    if not seg.flags & ACK:  # both sides open at once; text in it comes again
        conn.enter(SYN_RECEIVED)
        conn.syn_due = True
        return False
    conn.enter(ESTABLISHED)
    conn.events |= OPENED
    conn.acknowledged(seg, now)
    conn.ack_due = AT_ONCE
    return True
