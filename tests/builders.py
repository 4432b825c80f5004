"""Connections in a given state, near the wrap of the sequence numbers, and segments for them."""

from workers.tcp.connection import Connection
from workers.tcp.segment import ACK, FIN, SYN, Segment
from workers.tcp.states import CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, LAST_ACK, TIME_WAIT

MASK = 0xFFFFFFFF
ISS = 2**32 - 1000
IRS = 2**32 - 500
NOW = 1000.0
THEIR_CLOCK = 2**32 - 50


def segment(
    seq: int = 1,
    ack: int | None = 1,
    flags: int = 0,
    length: int = 0,
    wnd: int = 60_000,
    ts: tuple[int, int] | None = None,
) -> Segment:
    """Make a segment; seq and ack are relative to the initial numbers, an ack that is None leaves the flag out."""
    seg = Segment()
    seg.seq = (IRS + seq) & MASK
    seg.flags = flags
    if ack is not None:
        seg.flags |= ACK
        seg.ack = (ISS + ack) & MASK
    seg.len = length
    seg.wnd = wnd
    if ts is not None:
        seg.ts_present = True
        seg.ts_val, seg.ts_ecr = ts
    return seg


def sent(conn: Connection, now: float = NOW) -> list[tuple[int, int, int, int]]:
    """Return (flags, relative seq, length, relative ack) of all that is due, the ACK of the batch last."""
    out = Segment()
    result = []
    while conn.segment_to_send(out, now) or conn.ack_to_send(out, now):
        result.append((out.flags, (out.seq - ISS) & MASK, out.len, (out.ack - IRS) & MASK))
    return result


def arrive(conn: Connection, seg: Segment, now: float = NOW) -> int:
    """Let a segment arrive as the relay does, and return the events."""
    conn.segment_arrives(seg, bytes(seg.len), now)
    if conn.rcv.pieces is not None:
        conn.take_reassembled()
    return conn.take_events()


def syn_received(timestamps: bool = False, scale: int = -1, mss: int = 1000, sack: bool = False) -> Connection:
    """A connection whose SYN-ACK is on its way."""
    syn = segment(0, None, SYN, wnd=60_000, ts=(THEIR_CLOCK, 0) if timestamps else None)
    syn.mss = mss + 12 * timestamps
    syn.window_scale = scale
    syn.sack_permitted = sack
    conn = Connection(syn, ISS, 1460)
    sent(conn)
    return conn


def established(timestamps: bool = False, scale: int = -1, mss: int = 1000, sack: bool = False) -> Connection:
    conn = syn_received(timestamps, scale, mss, sack)
    ts = (THEIR_CLOCK, int(NOW * 1000)) if timestamps else None
    arrive(conn, segment(ts=ts, wnd=60_000 >> max(scale, 0)))
    assert conn.state == ESTABLISHED
    return conn


def fin_wait_1() -> Connection:
    conn = established()
    conn.close()
    assert sent(conn)
    assert conn.state == FIN_WAIT_1
    return conn


def fin_wait_2() -> Connection:
    conn = fin_wait_1()
    arrive(conn, segment(ack=2))
    assert conn.state == FIN_WAIT_2
    return conn


def closing() -> Connection:
    conn = fin_wait_1()
    arrive(conn, segment(flags=FIN))
    sent(conn)
    assert conn.state == CLOSING
    return conn


def time_wait() -> Connection:
    conn = fin_wait_2()
    arrive(conn, segment(ack=2, flags=FIN))
    sent(conn)
    assert conn.state == TIME_WAIT
    return conn


def close_wait() -> Connection:
    conn = established()
    arrive(conn, segment(flags=FIN))
    sent(conn)
    assert conn.state == CLOSE_WAIT
    return conn


def last_ack() -> Connection:
    conn = close_wait()
    conn.close()
    assert sent(conn)
    assert conn.state == LAST_ACK
    return conn


def snapshot(item: object) -> object:
    """Return all that an object with __slots__ holds, so that whole objects can be compared."""
    if hasattr(item, "__slots__"):
        names = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
        return {name: snapshot(getattr(item, name)) for name in names if hasattr(item, name)}
    if isinstance(item, dict):
        return [(key, snapshot(value)) for key, value in item.items()]  # their order matters
    return [snapshot(one) for one in item] if isinstance(item, list) else item
