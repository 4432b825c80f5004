"""Segments to send: which is due next, and what stands in its header; methods of Connection."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from workers.tcp.events import AT_END_OF_BATCH, AT_ONCE, NOT_DUE
from workers.tcp.limits import DELAYED_ACK, MAX_PACKET
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.tcp.sequence import HALF, MASK
from workers.tcp.states import CLOSED, SYN_RECEIVED

if TYPE_CHECKING:
    from workers.tcp.connection import Connection


def segment_to_send(conn: Connection, out: Segment, now: float) -> bool:
    """Fill `out` with the next segment that is due; False: there is none.

    `out.len` octets of text from sequence number `out.seq` on belong behind the headers; the relay has them.
    A pure ACK is due here only when it is so at once: see `ack_to_send`.
    """
    snd = conn.snd
    state = conn.state
    if conn.reset_due:
        conn.reset_due = False
        _fill(conn, out, RST | ACK, snd.max, 0, now)
        return True
    if state == CLOSED:
        return False
    if state == SYN_RECEIVED:
        if conn.syn_due:
            return _syn_to_send(conn, out, now)
        return conn.ack_due == AT_ONCE and ack_to_send(conn, out, now)
    if conn.retransmit_due:
        conn.retransmit_due = False
        if snd.una != snd.max:
            conn.timed_at = -1.0  # whose ACK comes cannot be known any more (Karn's algorithm)
            sent = (snd.max - snd.una) & MASK
            queued = (snd.end - snd.una) & MASK
            length = min(queued, sent, conn.smss)
            fin = length == queued < sent
            _fill(conn, out, FIN | ACK if fin else ACK, snd.una, length, now)
            if snd.nxt == snd.una:
                snd.nxt = (snd.una + length + fin) & MASK
            return True
    if snd.nxt != (snd.end + snd.fin) & MASK and _text_to_send(conn, out, now):
        return True
    if conn.probe_due:
        # A segment just before the window, without text: whoever gets it must answer (RFC 9293, 3.10.7.4, first).
        conn.probe_due = False
        _fill(conn, out, ACK, (snd.una - 1) & MASK, 0, now)
        return True
    return conn.ack_due == AT_ONCE and ack_to_send(conn, out, now)


def ack_to_send(conn: Connection, out: Segment, now: float) -> bool:
    """Fill `out` with the pure ACK that is due at the end of the batch or at once; False: none is."""
    if conn.ack_due < AT_END_OF_BATCH:
        return False
    _fill(conn, out, ACK, conn.snd.nxt, 0, now)
    if conn.rcv.quick:
        conn.rcv.quick -= 1
    if conn.rcv.blocks_due:
        conn.rcv.blocks_due = False
        conn.ack_due = NOT_DUE
        out.sack = conn.rcv.sack_blocks(3 if out.ts_present else 4)
    return True


def _syn_to_send(conn: Connection, out: Segment, now: float) -> bool:
    snd = conn.snd
    conn.syn_due = False
    snd.nxt = snd.max = conn.timed_seq = (snd.iss + 1) & MASK
    if conn.rto_at == inf:
        conn.rto_at = now + conn.rtt.rto
        conn.timed_at = now
    else:
        conn.timed_at = -1.0
    _fill(conn, out, SYN | ACK, snd.iss, 0, now)
    out.wnd = min(conn.rcv.buffer, 65535)  # never scaled in a SYN (RFC 7323, 2.2)
    out.mss = conn.announced_mss
    out.window_scale = conn.rcv.scale or -1
    out.sack_permitted = conn.sack
    return True


def _text_to_send(conn: Connection, out: Segment, now: float) -> bool:
    """Fill `out` with the next text, and the FIN behind it, as far as both windows allow."""
    snd = conn.snd
    queued = (snd.end - snd.nxt) & MASK
    in_flight = (snd.nxt - snd.una) & MASK
    window = min(snd.wnd, conn.congestion.cwnd)
    length = min(queued, window - in_flight, MAX_PACKET)
    if length < queued:
        if length >= conn.smss:
            length -= length % conn.smss
        elif length <= 0 or in_flight:  # silly window avoidance (RFC 9293, 3.8.6.2.1)
            if not in_flight and conn.persist_at == inf:
                conn.persist_at = now + conn.rtt.rto
            return False
    flags = ACK
    if length == queued:
        flags = ACK | FIN | PSH if snd.fin else ACK | PSH
    if length and now - conn.rcv.text_at < DELAYED_ACK:
        conn.pingpong = True
    _fill(conn, out, flags, snd.nxt, length, now)
    snd.nxt = nxt = (snd.nxt + length + (flags & FIN)) & MASK
    if (nxt - snd.max) & MASK < HALF:
        snd.max = nxt
    if conn.rto_at == inf:
        conn.rto_at = now + conn.rtt.rto
    return True


def text_at_once(conn: Connection, out: Segment, octets: int, now: float) -> bool:
    """Queue octets just read, as many as room() allowed, and fill `out` with all of them: send() and the rest in one.

    The fast path of segment_to_send. After close() they are the last ones, and the FIN, if it has not gone, rides on
    them. False: something else is due first; nothing was queued.
    """
    snd = conn.snd
    seq = snd.nxt
    if seq != snd.end or conn.retransmit_due or conn.probe_due:
        return False
    if now - conn.rcv.text_at < DELAYED_ACK:
        conn.pingpong = True
    _fill(conn, out, ACK | PSH | FIN if snd.fin else ACK | PSH, seq, octets, now)
    snd.end = (seq + octets) & MASK
    snd.nxt = snd.max = (snd.end + snd.fin) & MASK
    if conn.rto_at == inf:
        conn.rto_at = now + conn.rtt.rto
    return True


def _fill(conn: Connection, out: Segment, flags: int, seq: int, length: int, now: float) -> None:
    rcv = conn.rcv
    if now >= rcv.tuning.ends_at:
        rcv.tuning.round_ends(conn, now)
    out.flags = flags
    out.seq = seq
    out.len = length
    out.ack = rcv.nxt
    # The right edge moves only by steps that are worth an ACK (RFC 9293, 3.8.6.2.2), and never back.
    ahead = (rcv.nxt + rcv.buffer - rcv.pending - rcv.adv) & MASK
    if rcv.step <= ahead < HALF:
        rcv.adv = (rcv.adv + ahead) & MASK
    wnd = ((rcv.adv - rcv.nxt) & MASK) >> rcv.scale
    out.wnd = wnd if wnd < 65536 else 65535
    if conn.timestamps:
        out.ts_present = True
        out.ts_val = int(now * 1000) & MASK
        out.ts_ecr = conn.ts_recent
    else:
        out.ts_present = False
        if length and conn.timed_at < 0 and seq == conn.snd.max:
            conn.timed_at = now
            conn.timed_seq = (seq + length) & MASK
    out.sack = ()
    if not rcv.blocks_due:  # else a pure ACK follows: SACK blocks would make text too long for its packet
        conn.ack_due = NOT_DUE
    rcv.unacked = 0
