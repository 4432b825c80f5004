"""Loss recovery against whatever a peer may say: the scoreboard stays consistent; an honest peer gets everything."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from tests.builders import ISS, NOW, established, segment
from workers.tcp.recovery import OPEN
from workers.tcp.segment import Segment
from workers.tcp.states import ESTABLISHED

MASK = 0xFFFFFFFF
SMSS = 1000

#: (what, how far behind SND.UNA in thousandths of what is in flight, SACK blocks in the same measure, milliseconds)
spots = st.integers(-100, 1100)
hostile = st.tuples(
    st.sampled_from((0, 0, 0, 200, 1000)), st.lists(st.tuples(spots, spots), max_size=3), st.integers(0, 30)
)
steps = st.one_of(
    st.tuples(st.just("ack"), hostile),
    st.tuples(st.just("ack"), hostile),
    st.tuples(st.just("send"), st.integers(1, 20_000)),
    st.tuples(st.just("timer"), st.none()),
)


def in_flight(conn):
    return (conn.snd.nxt - conn.snd.una) & MASK


def check(conn):
    """Demand what must always hold."""
    if in_flight(conn):
        assert conn.deadline < inf, "it would wait for ever"
    assert conn.congestion.cwnd >= SMSS
    if not conn.disorder:
        assert not conn.retransmit_due
        return
    board = conn.recovery.board
    assert board.nxt - board.una == in_flight(conn)
    assert 0 <= board.pipe <= in_flight(conn)
    for ranges in (board.sacked, board.lost):
        assert all(board.una <= start < end <= board.nxt for start, end in zip(ranges.starts, ranges.ends, strict=True))
    assert not any(board.sacked.common(a, b) for a, b in zip(board.lost.starts, board.lost.ends, strict=True))
    assert all(board.una <= start < end <= board.nxt for _, start, end in board.resent)
    assert all(not board.sacked.common(start, end) for _, start, end in board.resent)
    assert board.una <= board.lost_below <= board.nxt
    assert conn.retransmit_due or not board.lost or conn.recovery.frto or conn.recovery.room(conn) <= SMSS
    ends = [(end - conn.snd.una) & MASK for end, _ in conn.snd.sent]
    assert ends == sorted(ends)
    assert ends == [] or 0 < ends[0] <= ends[-1] == in_flight(conn)


def send_all(conn, now):
    """Return the ranges that are sent now, as distances from ISS."""
    out = Segment()
    ranges = []
    while conn.segment_to_send(out, now):
        start = (out.seq - ISS) & MASK
        assert (out.seq - conn.snd.una) & MASK < in_flight(conn) or not out.len
        ranges.append((start, start + out.len))
    return ranges


@given(st.booleans(), st.booleans(), st.lists(steps, max_size=40))
def test_whatever_a_peer_says_everything_arrives_in_the_end(sack, timestamps, history):
    conn = established(timestamps, scale=4, mss=SMSS, sack=sack)
    conn.snd.wnd = conn.snd.max_wnd = 1 << 20
    now = NOW
    end = 1
    for what, argument in history:
        if what == "send":
            octets = min(argument, conn.room(now))
            conn.send(octets)
            end += octets
        elif what == "timer":
            if conn.deadline < inf:
                now = max(now, conn.deadline)
                conn.timeout(now)
        else:
            share, blocks, wait = argument
            now += wait / 1000
            flight, una = in_flight(conn), conn.snd.una
            seg = segment(1, 0, wnd=1 << 16, ts=(2**32 - 49, int(now * 1000) - 5) if timestamps else None)
            seg.ack = (una + flight * share // 1000) & MASK
            edges = [(flight * a // 1000, flight * b // 1000) for a, b in blocks]
            seg.sack = tuple(((una + a) & MASK, (una + b) & MASK) for a, b in edges)
            conn.segment_arrives(seg, b"", now)
        if conn.state != ESTABLISHED:
            return  # it has given up
        check(conn)
        send_all(conn, now)
        check(conn)
        conn.take_events()
    # From now on the peer is honest, and nothing is lost. What it once SACKed and does not have it has thrown away.
    have = (conn.snd.una - ISS) & MASK
    held = set()
    for _ in range(400):
        if not in_flight(conn):
            break
        now = max(now, conn.deadline)
        conn.timeout(now)
        assert conn.state == ESTABLISHED
        for start, stop in send_all(conn, now):
            held.update(range(start, stop))
            before = have
            while have in held:
                have += 1
            now += 0.001
            seg = segment(1, 0, wnd=1 << 16, ts=(2**32 - 49, int(now * 1000) - 1) if timestamps else None)
            seg.ack = (ISS + have) & MASK
            if have != before or not timestamps:
                conn.segment_arrives(seg, b"", now)
            check(conn)
    assert have == end
    assert conn.deadline == inf
    assert not conn.disorder or conn.recovery.state == OPEN
