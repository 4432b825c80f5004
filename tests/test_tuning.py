"""Tuning: the receive buffer follows the rate, within the flow's limit and the worker's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import IRS, ISS, NOW, arrive, segment, sent
from workers.tcp.connection import Connection
from workers.tcp.limits import FIRST_BUFFER
from workers.tcp.policy import Policy
from workers.tcp.segment import FIN, SYN
from workers.tcp.states import TIME_WAIT

MASK = 0xFFFFFFFF


def opened(policy, scale=7, now=NOW, rtt=0.1):
    syn = segment(0, None, SYN)
    syn.mss, syn.window_scale = 1000, scale
    conn = Connection(syn, ISS, 1460, policy)
    sent(conn, now)
    arrive(conn, segment(), now + rtt)
    return conn


def send_rounds(conn, sizes, now=NOW, rtt=0.1):
    """Let the client send so many octets in each round trip."""
    for size in sizes:
        now += rtt
        seg = segment()
        seg.seq = conn.rcv.nxt
        seg.len = min(size, conn.rcv.wnd)
        arrive(conn, seg, now)
        sent(conn, now)


def doubling(rounds):
    return [10_000 << i for i in range(rounds)]


@pytest.mark.parametrize("rtt", [0.001, 0.005, 0.1, 0.3])
def test_a_client_in_slow_start_is_never_held_by_the_window(rtt):
    conn = opened(Policy(), rtt=rtt)
    now = NOW
    for size in [*doubling(8), 2_000_000, 2_000_000]:
        assert conn.rcv.wnd >= size
        now += rtt
        send_rounds(conn, [size], now, rtt)
    assert conn.rcv.buffer == 4 << 20


def test_limits_of_the_flow_and_of_the_worker():
    policy = Policy(300_000)
    conn = opened(policy)
    send_rounds(conn, doubling(9))
    assert conn.rcv.buffer == 300_000
    policy.growth = 1000
    other = opened(policy)
    send_rounds(other, doubling(9))
    assert other.rcv.buffer == FIRST_BUFFER + 1000
    assert policy.growth == 0
    conn.abort()
    assert policy.growth == 300_000 - FIRST_BUFFER


def test_time_wait_acknowledges_and_grows_no_more():
    policy = Policy()
    whole = policy.growth
    conn = opened(policy)
    conn.close()
    sent(conn)
    conn.rcv.tuning.copied = 1000  # what comes is more than ever before
    fin = segment(ack=2, flags=FIN)
    fin.len = 100_000
    arrive(conn, fin)
    assert conn.state == TIME_WAIT
    assert sent(conn, NOW + 5)
    assert (policy.growth, conn.rcv.tuning.grown) == (whole, 0)


def test_a_small_limit_is_the_buffer_from_the_first():
    conn = opened(Policy(50_000))
    send_rounds(conn, doubling(6))
    assert (conn.rcv.buffer, conn.rcv.tuning.grown) == (50_000, 0)


def test_without_window_scaling_nothing_grows():
    conn = opened(Policy(), scale=-1)
    send_rounds(conn, doubling(6))
    assert conn.rcv.buffer == 65535


def test_the_whole_limit_can_be_announced():
    for limit in (1 << 16, 8 << 20, 1 << 24, (1 << 30) - 1, 1 << 30):
        policy = Policy(limit)
        assert policy.scale <= 14
        assert 65535 << policy.scale >= limit - (1 << policy.scale)


@given(st.lists(st.tuples(st.integers(0, 300_000), st.floats(0, 2), st.integers(0, 300_000)), max_size=30))
def test_the_right_edge_never_goes_back_and_the_budget_is_kept(steps):
    policy = Policy(1 << 20)
    whole = policy.growth
    conn = opened(policy)
    rcv = conn.rcv
    now, edge = NOW, rcv.adv
    for size, pause, pending in steps:
        now += pause
        seg = segment()
        seg.seq, seg.len = rcv.nxt, min(size, rcv.wnd)
        arrive(conn, seg, now)
        rcv.pending = min(rcv.pending + seg.len, max(rcv.pending, pending))
        conn.taken_by_proxy()
        sent(conn, now)
        assert (rcv.adv - edge) & MASK < 1 << 31
        edge = rcv.adv
        assert rcv.wnd + rcv.pending <= max(rcv.buffer, FIRST_BUFFER) <= 1 << 20
        assert policy.growth + rcv.tuning.grown == whole
    conn.abort()
    assert policy.growth == whole
    assert rcv.irs == IRS
