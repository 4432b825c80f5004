"""The fast paths of Connection give what the long ways give: same state, same output, same events.

segment_arrives: the steps of RFC 9293 alone. text_at_once: send() and segment_to_send().
"""

from copy import deepcopy

from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.builders import NOW, THEIR_CLOCK, established, segment, snapshot
from tests.test_simulation import SEEDS
from workers.tcp import arrival
from workers.tcp.segment import FIN, PSH, RST, SYN, URG, Segment
from workers.tcp.states import CLOSED

MASK = 0xFFFFFFFF

flags = st.sampled_from((0, 0, 0, 0, PSH, PSH, URG, FIN, SYN, RST))
#: distances from where the next segment in order stands
near = st.sampled_from((0, 0, 0, 0, 1, -1, 100, -100, 1000, 70_000, -70_000, 1 << 20, 1 << 31))
lengths = st.sampled_from((0, 0, 1, 100, 1000, 60_000))
#: SACK blocks: (distance behind SND.UNA, octets)
blocks = st.one_of(
    st.just(()), st.lists(st.tuples(st.integers(-3000, 12_000), st.integers(1, 5000)), max_size=3).map(tuple)
)
arrivals = st.tuples(
    st.just("segment"),
    flags,
    near,
    near,
    lengths,
    st.sampled_from((0, 1, 500, 60_000)),
    st.integers(-2, 5),
    blocks,
    st.sampled_from((-1, 0, 5, 50, 3000)),  # how old the echoed timestamp is
)
calls = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 30_000)),
    st.tuples(st.just("close")),
    st.tuples(st.just("pending"), st.integers(0, 60_000)),
    st.tuples(st.just("pass"), st.sampled_from((0.001, 0.05, 0.3, 3.0))),
    st.tuples(st.just("timer")),
    st.tuples(st.just("want_room")),
    st.tuples(st.just("keepalive"), st.sampled_from((0.0, 30.0, 8000.0))),
)


def make(conn, step, clock, now):
    """Make the segment of an arrival, relative to what the connection expects."""
    _, bits, seq, ack, length, wnd, tick, sacked, age = step
    ts = (clock + tick & MASK, int(now * 1000) - age) if conn.timestamps else None
    seg = segment(0, 0, bits, length, wnd, ts=ts)
    seg.seq = (conn.rcv.nxt + seq) & MASK
    # Half of the ACKs are near SND.UNA, the others near SND.NXT.
    seg.ack = ((conn.snd.una if tick % 2 else conn.snd.nxt) + ack) & MASK
    seg.sack = tuple(((conn.snd.una + at) & MASK, (conn.snd.una + at + octets) & MASK) for at, octets in sacked)
    return seg


def everything_sent(conn, now):
    out = Segment()
    result = []
    while conn.segment_to_send(out, now):
        result.append(snapshot(out))
    if conn.ack_to_send(out, now):
        result.append(snapshot(out))
    return result


def text_just_read(conn, octets, now):
    """Send text by the fast path, and demand what the long way would have done."""
    other = deepcopy(conn)
    out, same = Segment(), Segment()
    before = snapshot(conn)
    if not conn.text_at_once(out, octets, now):
        assert snapshot(conn) == before
        return False
    other.send(octets)
    assert other.segment_to_send(same, now)
    assert snapshot(out) == snapshot(same)
    assert snapshot(conn) == snapshot(other)
    return True


@settings(max_examples=SEEDS // 10)
@given(
    st.booleans(),
    st.sampled_from((-1, 0, 7)),
    st.booleans(),
    st.lists(st.one_of(arrivals, arrivals, calls), max_size=12),
    arrivals,
)
def test_fast_path_is_equivalent_to_the_steps(timestamps, scale, sack, history, last):
    conn = established(timestamps, scale, sack=sack)
    now, clock = NOW, THEIR_CLOCK
    memory = bytes(60_000)
    for step in [*history, last]:
        if conn.state == CLOSED:
            return
        if step[0] == "segment":
            clock += 1
            seg, same = make(conn, step, clock, now), make(conn, step, clock, now)
            other = deepcopy(conn)
            conn.segment_arrives(seg, memory, now)
            arrival.steps(other, same, memory, now)
            assert snapshot(conn) == snapshot(other)
            assert (seg.len, seg.text_at) == (same.len, same.text_at)
            if conn.rcv.pieces is not None:
                assert conn.take_reassembled() == other.take_reassembled()
            assert conn.take_events() == other.take_events()
            assert everything_sent(conn, now) == everything_sent(other, now)
            assert snapshot(conn) == snapshot(other)
        elif step[0] == "send":
            room = conn.room(now)
            octets = min(step[1], room or 1)
            if not (room and text_just_read(conn, octets, now)) and not conn.snd.fin:
                conn.send(octets)
        elif step[0] == "close":
            conn.close()
        elif step[0] == "pending":
            conn.rcv.pending = min(step[1], conn.rcv.taken)
            conn.taken_by_proxy()
        elif step[0] == "want_room":
            conn.want_room(now)
        elif step[0] == "keepalive":
            conn.keepalive(now - step[1], now)
        else:
            passed = step[1] if step[0] == "pass" else min(max(conn.deadline - now, 0.0), 60.0)
            now += passed
            clock += int(passed * 1000)
            conn.timeout(now)
            conn.delayed_ack_timeout()
            conn.take_events()
        everything_sent(conn, now)
        snd, rcv = conn.snd, conn.rcv
        assert (snd.nxt - snd.una) & MASK <= (snd.end + snd.fin - snd.una) & MASK
        assert rcv.wnd <= max(rcv.buffer, 65535)
    event(f"state {conn.state}{', disorder' if conn.disorder else ''}")
