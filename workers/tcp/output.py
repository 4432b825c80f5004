"""Segments to send: which is due next, and what stands in its header; methods of Connection."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from workers.tcp.events import AT_END_OF_BATCH, AT_ONCE, NOT_DUE, RETRANSMITTED
from workers.tcp.limits import DELAYED_ACK, MAX_PACKET
from workers.tcp.recovery import NEW_TEXT
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.tcp.sequence import HALF, MASK
from workers.tcp.states import CLOSED, SYN_RECEIVED, SYN_SENT

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
        _fill(conn, out, RST | ACK, snd.nxt, 0, now)
        return True
    if state == CLOSED:
        return False
    if state <= SYN_RECEIVED:
        if conn.syn_due:
            return _syn_to_send(conn, out, now)
        return conn.ack_due == AT_ONCE and ack_to_send(conn, out, now)
    recovery = conn.recovery
    more = snd.nxt != (snd.end + snd.fin) & MASK
    if conn.retransmit_due and recovery is not None:
        if more and recovery.frto == NEW_TEXT and _text_to_send(conn, out, now):
            return True
        if again := recovery.range_to_send(conn, now):
            _again_to_send(conn, out, *again, now)
            return True
        conn.retransmit_due = False
    if more and _text_to_send(conn, out, now):
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
    if snd.nxt == snd.iss:
        _sent(conn, 1, now)
    else:
        snd.sent.clear()  # whose ACK comes cannot be known any more (Karn's algorithm)
    first = conn.state == SYN_SENT
    _fill(conn, out, SYN if first else SYN | ACK, snd.iss, 0, now)
    if first:
        out.ack = 0
    out.wnd = min(conn.rcv.buffer, 65535)  # never scaled in a SYN (RFC 7323, 2.2)
    out.mss = conn.announced_mss
    out.window_scale = conn.policy.scale if first else conn.rcv.scale or -1
    out.sack_permitted = conn.sack
    return True


def _again_to_send(conn: Connection, out: Segment, seq: int, octets: int, now: float) -> None:
    """Fill `out` with what is sent again: text, and the FIN if it stands at the end."""
    conn.events |= RETRANSMITTED
    length = min((conn.snd.end - seq) & MASK, octets)
    _fill(conn, out, FIN | ACK if length < octets else ACK, seq, length, now)


def _text_to_send(conn: Connection, out: Segment, now: float) -> bool:
    """Fill `out` with the next text, and the FIN behind it, as far as both windows allow."""
    snd = conn.snd
    queued = (snd.end - snd.nxt) & MASK
    in_flight = (snd.nxt - snd.una) & MASK
    if conn.disorder and conn.recovery is not None:
        room = conn.recovery.room(conn)
    else:
        room = conn.congestion.cwnd - in_flight
    length = min(queued, snd.wnd - in_flight, room, MAX_PACKET)
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
    _sent(conn, length + (flags & FIN), now)
    return True


def _sent(conn: Connection, octets: int, now: float) -> None:
    """Advance SND.NXT over what was sent for the first time, a FIN included."""
    snd = conn.snd
    snd.nxt = nxt = (snd.nxt + octets) & MASK
    if conn.disorder and conn.recovery is not None:
        snd.sent.append((nxt, conn.recovery.sent_at(now)))
        conn.recovery.text_sent(conn, octets)
        if conn.rto_at == inf:
            conn.rto_at = now + conn.rtt.rto
        return
    snd.sent.append((nxt, now))
    if conn.rto_at == inf:
        conn.rto_at = now + (conn.rtt.pto if octets > conn.smss else conn.rtt.rto)
    elif conn.rto_at > now + conn.rtt.pto:
        conn.rto_at = now + conn.rtt.pto  # now that there is more than one segment a probe comes first (RFC 8985, 7.2)


def text_at_once(conn: Connection, out: Segment, octets: int, now: float) -> bool:
    """Queue octets just read, as many as room() allowed, and fill `out` with all of them: send() and the rest in one.

    The fast path of segment_to_send. After close() they are the last ones, and the FIN, if it has not gone, rides on
    them. False: something else is due first; nothing was queued.
    """
    snd = conn.snd
    seq = snd.nxt
    if seq != snd.end or conn.probe_due or (conn.retransmit_due and conn.room(now) < octets):
        return False
    if now - conn.rcv.text_at < DELAYED_ACK:
        conn.pingpong = True
    _fill(conn, out, ACK | PSH | FIN if snd.fin else ACK | PSH, seq, octets, now)
    snd.end = (seq + octets) & MASK
    _sent(conn, octets + snd.fin, now)
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
    out.sack = ()
    if not rcv.blocks_due:  # else a pure ACK follows: SACK blocks would make text too long for its packet
        conn.ack_due = NOT_DUE
    rcv.unacked = 0
