"""The active side against the passive one, both ours, whatever is lost, doubled or late on the way."""

from hypothesis import given
from hypothesis import strategies as st

from tests.builders import IRS, ISS, NOW
from workers.tcp.connection import Connection
from workers.tcp.events import OPENED
from workers.tcp.segment import SYN, Segment
from workers.tcp.states import CLOSED, ESTABLISHED, SYN_SENT


def copy(out: Segment) -> Segment:
    made = Segment()
    for name in Segment.__slots__:
        setattr(made, name, getattr(out, name))
    return made


def sent_by(conn: Connection, now: float) -> list[Segment]:
    out = Segment()
    made = []
    while conn.segment_to_send(out, now) or conn.ack_to_send(out, now):
        made.append(copy(out))
    return made


def deliver(seg: Segment, conn: Connection, now: float) -> int:
    """Let a segment arrive that is delivered once more, perhaps, later."""
    conn.segment_arrives(copy(seg), bytes(seg.len), now)
    if conn.rcv.pieces is not None:
        conn.take_reassembled()
    return conn.take_events()


fates = st.lists(st.sampled_from(("arrives", "arrives", "arrives", "lost", "twice")), min_size=40, max_size=40)


@given(st.booleans(), fates, st.integers(0, 5000))
def test_both_sides_agree(simultaneous, fates, octets):
    active = Connection.connect(ISS, 1460)
    other: Connection | None = Connection.connect(IRS, 1400) if simultaneous else None
    ends = [active, other]
    events = [0, 0]
    now = NOW
    active.send(octets)
    fates = iter(fates)
    for _ in range(200):
        quiet = True
        for i, conn in enumerate(ends):
            if conn is None:
                continue
            for seg in sent_by(conn, now):
                quiet = False
                fate = next(fates, "arrives")
                for _ in range({"arrives": 1, "lost": 0, "twice": 2}[fate]):
                    peer = ends[1 - i]
                    if peer is None:
                        assert seg.flags == SYN
                        ends[1] = Connection(copy(seg), IRS, 1400)
                    else:
                        events[1 - i] |= deliver(seg, peer, now)
        if quiet:
            deadline = min(conn.deadline for conn in ends if conn is not None)
            if deadline == float("inf"):
                break
            now = max(now, deadline)
            for conn in ends:
                if conn is not None:
                    conn.timeout(now)
    passive = ends[1]
    assert passive is not None
    if active.state == CLOSED or passive.state == CLOSED:  # everything was lost for a minute
        return
    assert active.state == passive.state == ESTABLISHED
    assert events[0] & events[1] & OPENED
    assert passive.rcv.taken == octets
    assert (active.sack, active.timestamps) == (passive.sack, passive.timestamps) == (True, True)
    assert active.snd.scale == passive.rcv.scale == 7
    assert active.smss == passive.smss == 1388


segments = st.tuples(
    st.integers(0, 63), st.sampled_from((-2, -1, 0, 1, 2)), st.sampled_from((-1, 0, 1, 2, 1 << 31)), st.integers(0, 50)
)


@given(st.lists(segments, max_size=10))
def test_nothing_but_an_answer_opens(arriving):
    conn = Connection.connect(ISS, 1460)
    sent_by(conn, NOW)
    for flags, seq, ack, length in arriving:
        seg = Segment()
        seg.flags, seg.seq, seg.len = flags, (IRS + seq) & 0xFFFFFFFF, length
        seg.ack = (ISS + ack) & 0xFFFFFFFF if flags & 16 else 0
        before = conn.state
        deliver(seg, conn, NOW)
        sent_by(conn, NOW)
        if before == SYN_SENT and conn.state == ESTABLISHED:
            assert flags & SYN
            assert ack == 1
