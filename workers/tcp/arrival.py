"""SEGMENT ARRIVES, step by step (RFC 9293, 3.10.7.4); the fast path in front of it is Connection.segment_arrives."""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

from workers import counts
from workers.tcp.events import (
    AT_END_OF_BATCH,
    AT_ONCE,
    DELAYED,
    NOT_DUE,
    OPENED,
    REMOTE_CLOSED,
    RESET,
    UNACCEPTABLE_ACK,
)
from workers.tcp.limits import CHALLENGE_INTERVAL, DELAYED_ACK, PAWS_IDLE, QUICK_ACKS
from workers.tcp.opening import answer_arrives
from workers.tcp.reassembly import Reassembly
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.tcp.sequence import HALF, MASK
from workers.tcp.states import (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
)

if TYPE_CHECKING:
    from workers.tcp.connection import Connection

RECEIVING = (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2)  #: states in which text and FIN are taken


def steps(conn: Connection, seg: Segment, memory: mmap | bytes, now: float) -> None:
    """Process one segment; on return `seg.len` is the length of its text that is in order, 0 if none is."""
    rcv = conn.rcv
    count = conn.policy.count
    seg_len = seg.len
    seg.len = 0
    if conn.state == CLOSED:
        return
    if conn.state == SYN_SENT:
        if answer_arrives(conn, seg, now) and (seg_len or seg.flags & FIN):
            seg.seq = (seg.seq + 1) & MASK
            _text_and_fin(conn, seg, seg_len, 0, memory, now)
        return
    if conn.state == SYN_RECEIVED and seg.flags & SYN and seg.seq == rcv.irs:
        if not seg.flags & ACK:
            if _may_answer(conn, now):
                conn.syn_due = True  # the SYN again: so is the SYN-ACK
            return
        if seg.ack == conn.snd.nxt:  # both sides have opened at once (RFC 9293, figure 8)
            seg.flags ^= SYN
            seg.seq = rcv.nxt
            conn.ack_due = AT_ONCE

    # First, check sequence number; before it PAWS (RFC 7323, 5.3, R1).
    if conn.timestamps and not seg.flags & RST:
        if not seg.ts_present:
            count[counts.TCP_DROPPED_NO_TIMESTAMP] += 1  # RFC 7323, 3.2: once negotiated, each segment has the option
            return
        if (seg.ts_val - conn.ts_recent) & MASK >= HALF and now - conn.ts_recent_at <= PAWS_IDLE:
            count[counts.TCP_DROPPED_OLD] += 1
            _acknowledge_again(conn, seg.flags, seg_len, now)
            return
    offset = (seg.seq - rcv.nxt) & MASK
    occupied = seg_len + bool(seg.flags & FIN) + bool(seg.flags & SYN)
    acceptable = _acceptable(rcv.wnd, offset, occupied)
    if not acceptable:
        count[counts.TCP_DROPPED_OUTSIDE] += 1
        if seg.flags & RST:
            return
        if conn.timestamps and (offset + occupied) & MASK == 0:
            conn.ts_recent = seg.ts_val  # our ACK of it was lost: echo this copy, or the peer measures a timeout
            conn.ts_recent_at = now
        _acknowledge_again(conn, seg.flags, seg_len, now)
        if seg_len and offset >= HALF:
            _came_again(conn, seg.seq, min(-offset & MASK, seg_len))
        if rcv.wnd or offset:
            return  # else the window is closed: the ACK of a probe is taken all the same, its text and FIN are not
    if conn.timestamps and seg.ts_present and (rcv.nxt - rcv.unacked - seg.seq) & MASK < HALF:
        conn.ts_recent = seg.ts_val  # R3: the segment covers the last ACK sent
        conn.ts_recent_at = now
        rcv.ts_ecr = seg.ts_ecr

    # Second, check the RST bit; only the exact number resets (RFC 5961, 3.2).
    if seg.flags & RST:
        if offset == 0:
            conn.end(RESET)
        else:
            _challenge(conn, now)
        return

    # Fourth, check the SYN bit: a challenge ACK (RFC 5961, 4.2). (Third is security, RFC 9293 keeps the number.)
    if seg.flags & SYN:
        _challenge(conn, now)
        return

    # Fifth, check the ACK field.
    if not seg.flags & ACK:
        count[counts.TCP_DROPPED_NO_ACK] += 1
        return
    if not _ack_arrives(conn, seg, seg_len, now) or not acceptable:
        return

    # Sixth, the URG bit: ignored, urgent text is text (RFC 9293, 3.8.5).
    _text_and_fin(conn, seg, seg_len, offset, memory, now)


def _text_and_fin(conn: Connection, seg: Segment, seg_len: int, offset: int, memory: mmap | bytes, now: float) -> None:
    """Steps seven and eight; offset is SEG.SEQ - RCV.NXT modulo 2**32."""
    rcv = conn.rcv
    fin = bool(seg.flags & FIN)
    # Seventh, process the segment text.
    if conn.state in RECEIVING:
        if fin and rcv.fin_at < 0:
            position = seg_len - (-offset & MASK) if offset >= HALF else offset + seg_len
            if 0 <= position <= rcv.wnd:
                rcv.fin_at = rcv.taken + position
        if seg_len:
            _text_arrives(conn, seg, seg_len, offset, memory, now)
    elif seg_len:
        conn.policy.count[counts.TCP_DROPPED_AFTER_FIN] += 1

    # Eighth, check the FIN bit: done when the text before it is in order, by the relay after take_reassembled().
    if fin:
        conn.ack_due = AT_ONCE
    if rcv.pieces is None:
        check_fin(conn)


def _acceptable(wnd: int, offset: int, occupied: int) -> bool:
    """The four cases of RFC 9293, table 6; offset is SEG.SEQ - RCV.NXT modulo 2**32, occupied is SEG.LEN.

    A segment that begins before the window and ends behind it, which the table forgets, holds acceptable text too.
    """
    if occupied == 0:
        return offset <= wnd  # at the right edge too: there a peer acknowledges that has filled the window
    if wnd == 0:
        return False
    return offset < wnd or (offset >= HALF and -offset & MASK < occupied)


def _ack_arrives(conn: Connection, seg: Segment, seg_len: int, now: float) -> bool:
    """Step five; False: the segment is done with."""
    snd = conn.snd
    advance = (seg.ack - snd.una) & MASK
    sent = (snd.nxt - snd.una) & MASK
    if conn.state == SYN_RECEIVED:
        if not 0 < advance <= sent:
            conn.events |= UNACCEPTABLE_ACK
            return False
        conn.enter(ESTABLISHED)
        conn.events |= OPENED
        conn.acknowledged(seg, now)
        conn.update_window(seg)
        if snd.fin:
            conn.enter(FIN_WAIT_1)
        return True
    if advance > sent:
        # Older than SND.UNA: ignored if it may be a late duplicate, else challenged, as is one for what was never
        # sent (RFC 5961, 5.2).
        behind = (snd.una - seg.ack) & MASK
        if behind >= HALF or behind > snd.max_wnd:
            conn.policy.count[counts.TCP_DROPPED_BAD_ACK] += 1
            _challenge(conn, now)
            return False
        return True
    if advance:
        conn.acknowledged(seg, now)
    elif (seg.sack and conn.sack) or (not seg_len and not seg.flags & FIN and sent and seg.wnd << snd.scale == snd.wnd):
        conn.duplicate_ack(seg, now)
    conn.update_window(seg)

    if snd.fin and snd.una == (snd.end + 1) & MASK:
        if conn.state == FIN_WAIT_1:
            conn.enter(FIN_WAIT_2)
        elif conn.state == CLOSING:
            conn.enter(TIME_WAIT)
        elif conn.state == LAST_ACK:
            conn.end(0)
            return False
    return True


def _text_arrives(conn: Connection, seg: Segment, seg_len: int, offset: int, memory: mmap | bytes, now: float) -> None:
    """Step seven: trim to the window, leave in `seg` what is in order, keep a copy of what is not."""
    rcv = conn.rcv
    at = seg.text_at
    if offset >= HALF:  # it begins before RCV.NXT
        skip = -offset & MASK
        _ack_at_once(conn)
        _came_again(conn, seg.seq, min(skip, seg_len))
        if skip >= seg_len:
            return
        at += skip
        seg_len -= skip
        offset = 0
    seg_len = min(seg_len, rcv.wnd - offset)  # it may end behind the window
    if offset:
        _ack_at_once(conn)  # RFC 5681, 4.2: a duplicate ACK tells of the gap
        if rcv.pieces is None:
            rcv.pieces = Reassembly()
        dropped = rcv.pieces.dropped
        again = rcv.pieces.insert(rcv.taken + offset, memory[at : at + seg_len])
        conn.policy.count[counts.TCP_DROPPED_REASSEMBLY] += rcv.pieces.dropped - dropped
        if conn.sack:
            rcv.blocks_due = True
            rcv.again = again
        return
    if rcv.pieces is not None:
        _ack_at_once(conn)  # RFC 5681, 4.2: so does one that fills (a part of) it
        if conn.sack:
            rcv.blocks_due = True
            rcv.again = rcv.again or rcv.pieces.first_kept(rcv.taken + seg_len)
    seg.text_at = at
    seg.len = seg_len
    conn.text_in_order(seg, now)


def _may_answer(conn: Connection, now: float) -> bool:
    """Limit the answers to what may be forged, or come from a peer that answers the answer, for ever."""
    if now - conn.challenged_at < CHALLENGE_INTERVAL:
        conn.policy.count[counts.TCP_CHALLENGES_LIMITED] += 1
        return False
    conn.challenged_at = now
    return True


def _challenge(conn: Connection, now: float) -> None:
    """Send a challenge ACK, unless this connection or this worker sent too many (RFC 5961, 7)."""
    if not _may_answer(conn, now):
        return
    if not conn.policy.may_challenge(now):
        conn.policy.count[counts.TCP_CHALLENGES_LIMITED] += 1
        return
    conn.policy.count[counts.TCP_CHALLENGES] += 1
    conn.ack_due = AT_ONCE


def _acknowledge_again(conn: Connection, flags: int, seg_len: int, now: float) -> None:
    """Answer a segment that is not acceptable; text and FIN always, they are in no loop of ACKs (as Linux)."""
    if flags & SYN:
        _challenge(conn, now)
    elif seg_len or flags & FIN or _may_answer(conn, now):
        conn.ack_due = AT_ONCE


def _ack_at_once(conn: Connection) -> None:
    """Acknowledge text that tells of a loss; what follows does not wait either, the sender's window is small now."""
    conn.ack_due = AT_ONCE
    conn.rcv.quick = QUICK_ACKS
    conn.pingpong = False


def little_text(conn: Connection, seg: Segment, now: float) -> None:
    """See when the ACK is due for text in order that is less than two full segments (RFC 9293, 3.8.6.3).

    It waits while our text may soon carry it. Where no text of ours goes, it waits only for a second segment: not at
    first, when the peer's window is small, not after a pause, and not at the end of what the peer pushed (as Linux).
    """
    rcv = conn.rcv
    if not conn.pingpong:
        if now - rcv.text_at > conn.rtt.rto:
            rcv.quick = QUICK_ACKS
        if rcv.quick or (seg.flags & PSH and seg.len < rcv.mss):
            conn.ack_due = AT_END_OF_BATCH
            return
    if conn.ack_due == NOT_DUE:
        conn.ack_due = DELAYED
        rcv.ack_at = now + DELAYED_ACK


def _came_again(conn: Connection, seq: int, octets: int) -> None:
    """Tell the sender of text before RCV.NXT that came a second time: D-SACK (RFC 2883, 4)."""
    rcv = conn.rcv
    start = (seq - rcv.irs - 1) & MASK
    if conn.sack and (rcv.taken - start) & MASK <= rcv.taken:  # else it is a stranger's: nothing ever came from there
        rcv.again = start, start + octets
        rcv.blocks_due = True


def check_fin(conn: Connection) -> None:
    """Step eight: take the peer's FIN if all text before it was taken."""
    rcv = conn.rcv
    if rcv.fin_at != rcv.taken or conn.state not in RECEIVING:
        if rcv.fin_at < rcv.taken:
            rcv.fin_at = -1  # text has passed it: it was none
        return
    rcv.fin_at = -1
    rcv.nxt = (rcv.nxt + 1) & MASK
    if rcv.wnd >= HALF:
        rcv.adv = rcv.nxt  # the text filled the window, and the FIN stood behind it
    conn.ack_due = AT_ONCE
    conn.events |= REMOTE_CLOSED
    if conn.state == ESTABLISHED:
        conn.enter(CLOSE_WAIT)
    elif conn.state == FIN_WAIT_1:
        conn.enter(CLOSING)
    else:
        conn.enter(TIME_WAIT)
