"""NewReno: slow start, congestion avoidance, fast recovery."""

from hypothesis import given
from hypothesis import strategies as st

from workers.tcp.congestion import UNLIMITED, NewReno

SMSS = 1000


def state(congestion):
    return congestion.cwnd, congestion.ssthresh, congestion.recovering


def test_initial_window():
    assert state(NewReno(SMSS)) == (10 * SMSS, UNLIMITED, False)


def test_slow_start_grows_by_what_is_acknowledged():
    congestion = NewReno(SMSS)
    congestion.acknowledged(10_000, 10_000)
    assert state(congestion) == (20_000, UNLIMITED, False)


def test_a_window_that_is_not_used_does_not_grow():
    congestion = NewReno(SMSS)
    congestion.acknowledged(4000, 4999)
    assert congestion.cwnd == 10_000


def test_congestion_avoidance_grows_by_one_segment_a_round_trip():
    congestion = NewReno(SMSS)
    congestion.ssthresh = 5000
    congestion.cwnd = 20_000
    for _ in range(20):
        congestion.acknowledged(1000, 20_000)
    assert 20_900 <= congestion.cwnd <= 21_000


def test_fast_recovery():
    congestion = NewReno(SMSS)
    congestion.cwnd = 20_000
    congestion.lost(20_000)
    assert state(congestion) == (13_000, 10_000, True)
    congestion.duplicate()
    assert congestion.cwnd == 14_000
    congestion.partial(3000)
    assert state(congestion) == (12_000, 10_000, True)
    congestion.recovered()
    assert state(congestion) == (10_000, 10_000, False)


def test_a_partial_ack_leaves_one_segment_at_least():
    congestion = NewReno(SMSS)
    congestion.lost(2000)
    congestion.partial(50_000)
    assert congestion.cwnd == SMSS


def test_timeout():
    congestion = NewReno(SMSS)
    congestion.lost(20_000)
    congestion.timed_out(20_000)
    assert state(congestion) == (SMSS, 10_000, False)


steps = st.one_of(
    st.tuples(st.just("acknowledged"), st.integers(1, 100_000), st.integers(1, 100_000)),
    st.tuples(st.just("lost"), st.integers(1, 100_000)),
    st.tuples(st.just("duplicate")),
    st.tuples(st.just("partial"), st.integers(1, 100_000)),
    st.tuples(st.just("recovered")),
    st.tuples(st.just("timed_out"), st.integers(1, 100_000)),
)


@given(st.lists(steps, max_size=60))
def test_at_least_one_segment_may_always_go(history):
    congestion = NewReno(SMSS)
    for name, *arguments in history:
        getattr(congestion, name)(*arguments)
        assert congestion.cwnd >= SMSS
        assert congestion.ssthresh >= 2 * SMSS
