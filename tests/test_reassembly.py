"""Reassembly: any split, order, duplication and overlap gives the same stream, within bounds."""

from hypothesis import given
from hypothesis import strategies as st

from tests.builders import established, segment
from workers.tcp.receive import MAX_PIECES, ReceiveSpace
from workers.tcp.segment import FIN

STREAM = bytes(i * 31 % 251 for i in range(3000))

pieces = st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(1, 700)), max_size=40)


@given(pieces, st.randoms(use_true_random=False), st.booleans(), st.integers(50, 900))
def test_any_pieces_in_any_order_give_the_stream(extra, dice, with_fin, size):
    segments = [(at, min(size, len(STREAM) - at)) for at in range(0, len(STREAM), size)]
    segments += [(at, min(length, len(STREAM) - at)) for at, length in extra]
    dice.shuffle(segments)
    conn = established()
    got = b""
    for at, length in [*segments, (0, len(STREAM))]:
        fin = FIN if with_fin and at + length == len(STREAM) else 0
        seg = segment(1 + at, flags=fin, length=length)
        memory = b"front" + STREAM[at : at + length] + b"behind"
        seg.text_at = 5
        conn.segment_arrives(seg, memory, 1.0)
        joined = conn.take_reassembled() if conn.rcv.pieces is not None else []
        got += memory[seg.text_at : seg.text_at + seg.len] + b"".join(joined)
        assert got == STREAM[: len(got)]
        assert conn.rcv.taken == len(got)
        check(conn.rcv)
    assert got == STREAM
    assert conn.rcv.pieces is None
    assert bool(conn.take_events() & 8) == with_fin


def check(rcv):
    """The pieces kept are sorted, do not overlap, and stand behind what was taken."""
    edge = rcv.taken
    for position, text in rcv.pieces or []:
        assert text
        assert position > rcv.taken
        assert position >= edge
        edge = position + len(text)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=60))
def test_insert_keeps_exactly_what_came(inserted):
    rcv = ReceiveSpace(2**32 - 100, 1000)
    model = {}
    for position, length in inserted:
        text = bytes((position + i) % 256 for i in range(length))
        assert rcv.insert(position + 1, text)
        for i, octet in enumerate(text):
            model.setdefault(position + 1 + i, octet)
    kept = {at + i: octet for at, text in rcv.pieces or [] for i, octet in enumerate(text)}
    assert kept == model
    check(rcv)


def test_octets_that_are_kept_already_win():
    rcv = ReceiveSpace(0, 1000)
    rcv.insert(10, b"first")
    rcv.insert(8, b"SECONDSECOND")
    assert rcv.pieces == [(8, b"SE"), (10, b"first"), (15, b"ECOND"[:5])]


def test_pieces_are_bounded():
    rcv = ReceiveSpace(0, 1 << 20)
    for i in range(MAX_PIECES + 100):
        rcv.insert(10 + 2 * i, b"x")
    assert len(rcv.pieces) == MAX_PIECES
    rcv.insert(9, bytes(4 * MAX_PIECES))
    assert len(rcv.pieces) <= MAX_PIECES


def test_taking_advances_over_the_wrap():
    rcv = ReceiveSpace(2**32 - 3, 1000)
    rcv.insert(2, b"cdef")
    rcv.taken, rcv.nxt = 3, 1
    assert rcv.take_ready() == [b"def"]
    assert (rcv.taken, rcv.nxt, rcv.pieces) == (6, 4, None)
