"""The scoreboard: ranges of octets against a plain set, and what SACK blocks and timeouts make of it."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from workers.tcp.scoreboard import MAX_RANGES, Ranges, Scoreboard, duplicate_block

ISS = 2**32 - 1000

spans = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def octets(ranges):
    return {octet for start, end in ranges for octet in range(start, end)}


@given(st.lists(st.tuples(st.sampled_from(("add", "add", "discard")), spans), max_size=30), spans)
def test_ranges_are_a_set(steps, asked):
    ranges, model = Ranges(), set()
    for name, (start, end) in steps:
        if name == "add":
            fresh = ranges.add(start, end)
            assert octets(fresh) == octets([(start, end)]) - model
            model |= octets([(start, end)])
        else:
            ranges.discard(start, end)
            model -= octets([(start, end)])
        pairs = list(zip(ranges.starts, ranges.ends, strict=True))
        assert octets(pairs) == model
        assert ranges.total == len(model)
        assert bool(ranges) == bool(model)
        assert all(a < b for a, b in pairs)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(pairs)), "they touch"
        assert octets(ranges.missing(*asked)) == octets([asked]) - model
        assert ranges.common(*asked) == len(octets([asked]) & model)


def board(in_flight=10_000):
    board = Scoreboard()
    board.begin(in_flight)
    return board


def test_what_is_sacked_has_left_the_network():
    score = board()
    assert score.pipe == 10_000
    assert score.sack(2000, 3000) == [(2000, 3000)]
    assert score.sack(1500, 3500) == [(1500, 2000), (3000, 3500)]
    assert score.sack(1500, 3500) == []
    assert score.pipe == 8000
    assert score.judge(2000) == 1500
    assert score.pipe == 6500
    assert score.acknowledge(2500) == [(0, 1500)]
    assert (score.pipe, bool(score.lost)) == (6500, False)


def test_a_range_sent_again_is_in_the_network_again_until_it_is_delivered():
    score = board()
    score.sack(5000, 10_000)
    score.judge(5000)
    score.sent_lost(0, 3000, 7.0)
    assert score.pipe == 3000
    assert list(zip(score.lost.starts, score.lost.ends, strict=True)) == [(3000, 5000)]
    assert score.delivered_again(1000, 2000) == [(7.0, 2000)]
    assert list(score.resent) == [(7.0, 0, 1000), (7.0, 2000, 3000)]
    assert not score.is_clean


def test_what_was_sent_again_already_is_not_judged_by_its_first_transmission():
    score = board()
    score.resent.append((7.0, 9000, 10_000))  # a tail loss probe
    assert score.judge(10_000) == 10_000
    assert (score.lost.starts, score.lost.ends) == ([0], [9000])


def test_a_timeout_loses_everything_but_what_is_sacked():
    score = board()
    score.sack(2000, 3000)
    score.sent_lost(0, 1000, 7.0)
    score.everything_lost()
    assert score.pipe == 0
    assert (score.lost.starts, score.lost.ends) == ([0, 3000], [2000, 10_000])
    assert not score.resent


def test_a_peer_that_drops_what_it_had_sacked_gets_it_again():
    score = board()
    score.sack(2000, 3000)
    score.acknowledge(2000)
    score.everything_lost()
    assert (score.lost.starts, score.lost.ends) == ([2000], [10_000])


def test_blocks_that_do_not_speak_of_octets_in_flight_are_of_no_use():
    score = board()
    una = ISS
    for left, right in ((-1000, 0), (-1000, 500), (9000, 10_001), (20_000, 21_000), (500, 500), (900, 100)):
        blocks = (((una + left) % 2**32, (una + right) % 2**32),)
        assert score.positions(blocks, una) == []
    right = (una + 10_000) % 2**32
    assert score.positions(((right - 1000, right),), una) == [(9000, 10_000)]


def test_the_number_of_ranges_is_bounded():
    score = board(10 * MAX_RANGES)
    for number in range(2 * MAX_RANGES):
        score.sack(4 * number + 1, 4 * number + 2)
    assert len(score.sacked.starts) == MAX_RANGES


def test_duplicate_blocks():
    assert duplicate_block(((100, 200),), 300, 1000) == 100  # before SEG.ACK
    assert duplicate_block(((100, 200),), 200, 1000) == 100
    assert duplicate_block(((100, 201),), 200, 1000) == 0  # behind it
    assert duplicate_block(((2**32 - 50, 50),), 60, 1000) == 100
    assert duplicate_block(((500, 600), (400, 900)), 300, 1000) == 100  # within the second
    assert duplicate_block(((500, 600), (700, 900)), 300, 1000) == 0
    assert duplicate_block(((100, 200),), 5000, 1000) == 0  # too old
    assert duplicate_block(((200, 100),), 300, 1000) == 0
