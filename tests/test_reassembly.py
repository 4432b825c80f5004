"""Reassembly: any split, order, duplication and overlap gives the same stream, within bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import established, segment
from workers.tcp.reassembly import MAX_CHUNKS, Reassembly
from workers.tcp.receive import ReceiveSpace
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


def kept_by(pieces):
    """Return position → octet, and demand that runs neither touch nor overlap, and are counted right."""
    octets = {}
    edge = -1
    chunks = 0
    for start in pieces._starts:
        run = pieces._runs[start]
        assert run.start == start > edge
        text = b"".join(run.chunks)
        assert all(run.chunks)
        assert run.end == start + len(text)
        octets |= {start + i: octet for i, octet in enumerate(text)}
        edge = run.end
        chunks += len(run.chunks)
    assert len(pieces._runs) == len(pieces)
    assert chunks == pieces._chunks <= MAX_CHUNKS
    return octets


def check(rcv):
    """What is kept stands behind what was taken."""
    if rcv.pieces is not None:
        assert min(kept_by(rcv.pieces)) > rcv.taken


inserts = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=60)


@given(inserts, st.integers(0, 200))
def test_insert_keeps_exactly_what_came_and_says_what_came_twice(inserted, taken):
    pieces = Reassembly()
    model = {}
    for start, length in inserted:
        text = bytes((start + i) % 256 for i in range(length))
        again = pieces.insert(start, text)
        twice = [at for at in range(start, start + length) if at in model]
        if not twice:
            assert again is None
        else:
            assert again
            assert again[0] == twice[0]
            assert all(at in model for at in range(*again))
            assert again[1] == start + length or again[1] not in model
        model |= {start + i: octet for i, octet in enumerate(text)}
        first, *_ = pieces.newest(4)
        assert first[0] <= start
        assert first[1] >= start + length
    assert kept_by(pieces) == model
    end = taken
    while end in model:
        end += 1
    assert pieces.take(taken) == bytes(model[at] for at in range(taken, end))
    assert kept_by(pieces) == {at: octet for at, octet in model.items() if at > end}


def test_octets_that_are_kept_already_win():
    pieces = Reassembly()
    pieces.insert(10, b"first")
    assert pieces.insert(8, b"SECONDSECOND") == (10, 15)
    assert pieces.take(8) == b"SEfirstECOND"


def test_blocks_stand_in_the_order_in_which_they_were_touched():
    pieces = Reassembly()
    for start in (10, 30, 50, 70, 90):
        pieces.insert(start, b"text")
    assert pieces.newest(3) == [(90, 94), (70, 74), (50, 54)]
    pieces.insert(34, b"more")
    pieces.insert(8, b"xx")
    assert pieces.newest(9) == [(8, 14), (30, 38), (90, 94), (70, 74), (50, 54)]


@pytest.mark.parametrize("step", [2, -2])
def test_chunks_are_bounded(step):
    pieces = Reassembly()
    for i in range(MAX_CHUNKS + 100):
        pieces.insert(10_000 + step * i, b"x")
    assert (len(pieces), pieces.dropped) == (MAX_CHUNKS, 100)
    pieces.insert(9, bytes(20_000))
    assert len(kept_by(pieces)) >= MAX_CHUNKS
    assert pieces._chunks <= MAX_CHUNKS


def test_small_segments_behind_one_gap_do_not_use_up_the_chunks():
    pieces = Reassembly()
    for i in range(4 * MAX_CHUNKS):
        pieces.insert(10 + 100 * i, bytes(100))
    assert len(pieces.take(10)) == 400 * MAX_CHUNKS


def test_taking_advances_over_the_wrap():
    rcv = ReceiveSpace(2**32 - 3, 1000, 500)
    rcv.pieces = Reassembly()
    rcv.pieces.insert(2, b"cdef")
    rcv.taken, rcv.nxt = 3, 1
    assert rcv.take_ready() == b"def"
    assert (rcv.taken, rcv.nxt) == (6, 4)
    assert not rcv.pieces
