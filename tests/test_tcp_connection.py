"""Connection: user calls, states, timers and windows; sequence numbers begin near the wrap."""

from copy import deepcopy
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import (
    NOW,
    arrive,
    close_wait,
    closing,
    established,
    fin_wait_1,
    fin_wait_2,
    last_ack,
    segment,
    sent,
    snapshot,
    syn_received,
    time_wait,
)
from workers import counts
from workers.tcp.arrival import _acceptable
from workers.tcp.connection import Connection
from workers.tcp.events import ACKED, AT_ONCE, DELAYED, ENDED, GAVE_UP, NOT_DUE, OPENED, REMOTE_CLOSED, RESET, TEXT
from workers.tcp.limits import FIRST_BUFFER, FIRST_FLIGHT, MAX_PACKET, MAX_RETRIES, SEND_BUFFER
from workers.tcp.policy import Policy
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.tcp.states import ALLOWED, CLOSED, ESTABLISHED, NAMES, SYN_RECEIVED, TIME_WAIT

ALL_STATES = [syn_received, established, fin_wait_1, fin_wait_2, closing, time_wait, close_wait, last_ack]


def test_a_new_connection_owes_a_syn_ack():
    syn = segment(0, None, SYN, wnd=5000)
    syn.mss = 1200
    conn = Connection(syn, 2**32 - 1, 1460)
    out = Segment()
    assert conn.segment_to_send(out, NOW)
    assert (out.flags, out.seq, out.mss, out.window_scale, out.wnd) == (SYN | ACK, 2**32 - 1, 1460, -1, 65535)
    assert conn.snd.nxt == 0
    assert not conn.segment_to_send(out, NOW)
    assert conn.deadline == NOW + 1


def test_handshake():
    conn = syn_received()
    assert arrive(conn, segment()) == OPENED | ACKED
    assert conn.state == ESTABLISHED
    assert sent(conn) == []
    assert conn.deadline == inf


@pytest.mark.parametrize("build", ALL_STATES)
def test_reset_ends_every_state(build):
    conn = build()
    before = conn.rcv.nxt
    events = arrive(conn, segment((before - (2**32 - 500)) & 0xFFFFFFFF, None, RST))
    assert events == RESET | ENDED
    assert (conn.state, conn.deadline, sent(conn)) == (CLOSED, inf, [])


@pytest.mark.parametrize("build", ALL_STATES)
def test_abort_in_every_state_sends_one_reset(build):
    conn = build()
    conn.abort()
    assert conn.take_events() == ENDED
    [(flags, seq, length, _)] = sent(conn)
    assert (flags, length) == (RST | ACK, 0)
    assert (seq + 2**32 - 1000) % 2**32 == conn.snd.nxt
    assert (conn.state, conn.deadline) == (CLOSED, inf)


@pytest.mark.parametrize("build", ALL_STATES)
@pytest.mark.parametrize("flags", [SYN | ACK, SYN])
def test_a_syn_changes_nothing_but_the_ack_that_is_due(build, flags):
    conn = build()
    conn.policy = None  # the counters
    before = snapshot(deepcopy(conn))
    conn.policy = policy = Policy()
    seq = 1 if build is not syn_received else 5
    assert arrive(conn, segment(seq, 1, flags)) == 0
    assert conn.ack_due == AT_ONCE
    assert policy.count[counts.TCP_CHALLENGES] == 1
    conn.ack_due, conn.challenged_at, conn.policy = NOT_DUE, -inf, None
    assert snapshot(conn) == before


@pytest.mark.parametrize("build", [fin_wait_1, fin_wait_2, closing, time_wait, close_wait, last_ack])
def test_the_states_of_the_end_close_twice_without_harm(build):
    conn = build()
    state = conn.state
    closed_before = conn.snd.fin
    conn.close()
    assert conn.snd.fin
    assert conn.state == state or not closed_before


@pytest.mark.parametrize("build", ALL_STATES)
def test_without_an_answer_every_state_ends_or_rests(build):
    conn = build()
    now = NOW
    for _ in range(MAX_RETRIES + 2):
        if conn.deadline == inf:
            break
        now = conn.deadline
        conn.timeout(now)
        sent(conn, now)
    assert conn.deadline == inf
    events = conn.take_events()
    assert bool(events & GAVE_UP) == (build in (syn_received, fin_wait_1, closing, last_ack))


def test_timeout_before_its_time_does_nothing():
    conn = established()
    conn.send(1000)
    sent(conn)
    before = snapshot(deepcopy(conn))
    conn.timeout(conn.deadline - 0.001)
    assert snapshot(conn) == before


def test_every_transition_that_is_not_in_the_table_is_an_error():
    for state in ALLOWED:
        for following in range(len(NAMES)):
            conn = established()
            conn.state = state
            if following in ALLOWED[state]:
                conn.enter(following)
                assert conn.state == following
            else:
                with pytest.raises(AssertionError, match="is no transition"):
                    conn.enter(following)


def test_text_and_its_ack():
    conn = established()
    assert arrive(conn, segment(1, length=100)) == TEXT
    assert sent(conn) == [(ACK, 1, 0, 101)]
    assert (conn.rcv.taken, conn.rcv.unacked) == (100, 0)


def test_the_relay_sends_over_the_wrap():
    conn = established()
    conn.send(2000)
    assert sent(conn) == [(ACK | PSH, 1, 2000, 1)]
    assert arrive(conn, segment(ack=1500)) == ACKED
    assert arrive(conn, segment(ack=2001)) == ACKED
    assert conn.snd.una == conn.snd.nxt == conn.snd.end == 1001
    assert conn.deadline == inf


def test_fin_of_the_peer_and_ours():
    conn = close_wait()
    conn.send(10)
    conn.close()
    assert sent(conn) == [(FIN | ACK | PSH, 1, 10, 2)]
    assert arrive(conn, segment(2, 12)) == ENDED | ACKED
    assert conn.state == CLOSED


@pytest.mark.parametrize("length", [1, 999, 1000])
def test_fin_is_taken_once(length):
    conn = established()
    assert arrive(conn, segment(1, flags=FIN, length=length)) == TEXT | REMOTE_CLOSED
    again = arrive(conn, segment(1, flags=FIN, length=length))
    assert again == 0
    assert sent(conn) == [(ACK, 1, 0, length + 2)]


class TestRoom:
    def test_the_congestion_window_bounds_it(self):
        conn = established(mss=1000)
        assert conn.room(NOW) == 10_000

    def test_the_window_of_the_client_bounds_it(self):
        conn = established(mss=1000)
        arrive(conn, segment(wnd=3500))
        assert conn.room(NOW) == 3000

    def test_less_than_a_segment_only_if_nothing_is_in_flight(self):
        conn = established(mss=1000)
        arrive(conn, segment(wnd=500))
        assert conn.room(NOW) == 500
        conn.send(100)
        sent(conn)
        assert conn.room(NOW) == 0

    def test_one_packet_and_the_buffer_bound_it(self):
        conn = established(scale=10, mss=1000)
        conn.congestion.cwnd = 100 << 20
        arrive(conn, segment(wnd=65535))
        assert conn.room(NOW) == MAX_PACKET - MAX_PACKET % 1000
        total = 0
        while room := conn.room(NOW):
            conn.send(room)
            total += room
            sent(conn)
        assert SEND_BUFFER - 1000 < total <= SEND_BUFFER

    def test_what_all_flows_have_in_flight_is_bounded_too_and_comes_back(self):
        conn = established(scale=10, mss=1000)
        policy = conn.policy
        policy.flights = 300_000
        conn.congestion.cwnd = 100 << 20
        arrive(conn, segment(wnd=65535))
        total = 0
        while room := conn.room(NOW):
            conn.send(room)
            total += room
            sent(conn)
        assert FIRST_FLIGHT + 299_000 < total <= FIRST_FLIGHT + 300_000
        assert policy.flights == 0
        arrive(conn, segment(ack=total + 1, wnd=65535))
        assert conn.room(NOW) > 0
        assert policy.flights == 0
        assert conn.room(NOW + 1.0) > 0  # idle for longer than the RTO
        assert policy.flights == 300_000
        conn.snd.limit += 1000
        policy.flights -= 1000
        conn.abort()
        assert policy.flights == 300_000

    @pytest.mark.parametrize("build", [fin_wait_1, fin_wait_2, time_wait, last_ack, closing])
    def test_it_is_never_negative(self, build):
        assert build().room(NOW) >= 0

    def test_what_room_gives_can_be_sent_at_once(self):
        conn = established(mss=536)
        for wnd in (1, 535, 536, 5000, 60_000):
            arrive(conn, segment(wnd=wnd, ack=(conn.snd.nxt - (2**32 - 1000)) & 0xFFFFFFFF))
            room = conn.room(NOW)
            conn.send(room)
            assert sum(length for _, _, length, _ in sent(conn)) == room


class TestReceiveWindow:
    def test_it_opens_by_steps(self):
        conn = established(scale=0)
        mss = conn.announced_mss
        conn.rcv.pending = FIRST_BUFFER
        arrive(conn, segment(1, length=60_000))
        sent(conn)
        edge = conn.rcv.adv
        conn.rcv.pending = conn.rcv.buffer - conn.rcv.wnd - 2 * mss + 1
        conn.taken_by_proxy()
        assert conn.ack_due == NOT_DUE
        conn.rcv.pending -= 1
        conn.taken_by_proxy()
        assert conn.ack_due == AT_ONCE
        sent(conn)
        assert conn.rcv.adv == (edge + 2 * mss) & 0xFFFFFFFF

    def test_it_never_goes_back(self):
        conn = established(scale=0)
        edge = conn.rcv.adv
        conn.rcv.pending = conn.rcv.buffer
        arrive(conn, segment(1, length=100))
        sent(conn)
        assert conn.rcv.adv == edge


class TestDelayedAck:
    def conversation(self) -> Connection:
        conn = established()
        arrive(conn, segment(1, length=10))
        sent(conn)
        conn.send(10)
        sent(conn)
        arrive(conn, segment(11, 11, length=10), NOW + 0.01)
        return conn

    def test_it_waits_in_a_conversation(self):
        conn = self.conversation()
        assert conn.ack_due == DELAYED
        assert sent(conn) == []

    def test_it_rides_on_text(self):
        conn = self.conversation()
        conn.send(5)
        assert sent(conn, NOW + 0.02) == [(ACK | PSH, 11, 5, 21)]
        assert conn.ack_due == NOT_DUE

    def test_its_timeout_sends_it_and_ends_the_waiting(self):
        conn = self.conversation()
        conn.delayed_ack_timeout()
        assert sent(conn) == [(ACK, 11, 0, 21)]
        arrive(conn, segment(21, 11, length=10), NOW + 0.1)
        assert sent(conn) == [(ACK, 11, 0, 31)]

    def test_two_segments_of_text_do_not_wait(self):
        conn = self.conversation()
        arrive(conn, segment(21, 11, length=3000), NOW + 0.01)
        assert sent(conn) == [(ACK, 11, 0, 3021)]


def test_go_back_after_a_timeout_sends_everything_again():
    conn = established(mss=1000)
    conn.send(5000)
    sent(conn)
    now = conn.deadline
    conn.timeout(now)
    assert sent(conn, now) == [(ACK, 1, 1000, 1)]
    arrive(conn, segment(ack=1001), now)
    assert sent(conn, now) == [(ACK, 1001, 2000, 1)]
    arrive(conn, segment(ack=5001), now)
    assert sent(conn, now) == []
    assert conn.deadline == inf


def test_time_wait_acknowledges_what_comes_again():
    conn = time_wait()
    assert arrive(conn, segment(1, 2, FIN)) == 0
    assert sent(conn) == [(ACK, 2, 0, 2)]
    assert conn.state == TIME_WAIT


def test_a_syn_again_in_syn_received():
    conn = syn_received()
    assert arrive(conn, segment(0, None, SYN)) == 0
    assert sent(conn) == [(SYN | ACK, 0, 0, 1)]
    assert conn.state == SYN_RECEIVED


def test_closed_is_silent():
    conn = established()
    conn.abort()
    sent(conn)
    conn.take_events()
    before = snapshot(deepcopy(conn))
    assert arrive(conn, segment(1, length=10, flags=FIN)) == 0
    assert sent(conn) == []
    assert snapshot(conn) == before


def test_nothing_but_the_reset_follows_an_abort():
    conn = established(sack=True)
    conn.segment_arrives(segment(101, length=100), bytes(100), NOW)
    conn.abort()
    assert [flags for flags, *_ in sent(conn)] == [RST | ACK]


@given(st.integers(0, 50), st.integers(-60, 60), st.integers(0, 120))
def test_a_segment_is_acceptable_when_an_octet_of_it_is_in_the_window(wnd, offset, occupied):
    if occupied:
        expected = any(0 <= at < wnd for at in range(offset, offset + occupied))
    else:
        expected = 0 <= offset <= wnd
    assert _acceptable(wnd, offset & 0xFFFFFFFF, occupied) == expected
