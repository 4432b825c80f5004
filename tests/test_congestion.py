"""NewReno and CUBIC: slow start, congestion avoidance, what a loss and its undoing change."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.tcp.congestion import UNLIMITED, NewReno
from workers.tcp.cubic import BETA, CONTROLS, C, Cubic

SMSS = 1000
RTT = 0.05
both = pytest.mark.parametrize("control", [NewReno, Cubic])


def round_trip(congestion, now):
    """Let a whole window be acknowledged, segment by segment."""
    flight_size = congestion.cwnd
    for _ in range(flight_size // SMSS):
        congestion.acknowledged(SMSS, flight_size, RTT, now)


def test_names():
    assert {"cubic": Cubic, "newreno": NewReno} == CONTROLS


@both
def test_initial_window(control):
    congestion = control(SMSS)
    assert (congestion.cwnd, congestion.ssthresh) == (10 * SMSS, UNLIMITED)


@both
def test_slow_start_grows_by_what_is_acknowledged(control):
    congestion = control(SMSS)
    congestion.acknowledged(10_000, 10_000, RTT, 1.0)
    assert congestion.cwnd == 20_000


@both
def test_a_window_that_is_not_used_does_not_grow(control):
    congestion = control(SMSS)
    congestion.acknowledged(4000, 4999, RTT, 1.0)
    assert congestion.cwnd == 10_000


def test_newreno_grows_by_one_segment_a_round_trip():
    congestion = NewReno(SMSS)
    congestion.ssthresh = 5000
    congestion.cwnd = 20_000
    round_trip(congestion, 1.0)
    assert 20_900 <= congestion.cwnd <= 21_000


@pytest.mark.parametrize(("control", "left"), [(NewReno, 0.5), (Cubic, BETA)])
def test_a_loss_and_its_undoing(control, left):
    congestion = control(SMSS)
    congestion.cwnd = 20_000
    congestion.lost(18_000)
    assert congestion.ssthresh == left * 18_000
    congestion.cwnd = SMSS
    before = congestion.state()
    congestion.undo()
    assert congestion.state() != before
    assert (congestion.cwnd, congestion.ssthresh) == (20_000, UNLIMITED)
    congestion.cwnd = 5000
    congestion.undo()
    assert congestion.cwnd == 5000, "undone twice"


@both
def test_more_in_flight_than_the_window_does_not_count(control):
    congestion = control(SMSS)
    congestion.lost(100_000)
    assert congestion.ssthresh <= BETA * 10_000


@both
def test_restart(control):
    congestion = control(SMSS)
    congestion.cwnd = 4000
    congestion.restart()
    assert congestion.cwnd == 4000
    congestion.cwnd = 50_000
    congestion.restart()
    assert congestion.cwnd == 10_000


class TestCubic:
    def after_loss(self, window=1_000_000):
        congestion = Cubic(SMSS)
        congestion.cwnd = window
        congestion.lost(window)
        congestion.cwnd = congestion.ssthresh
        return congestion

    def test_it_is_back_at_the_old_window_after_k_seconds_slow_around_it_and_fast_beyond(self):
        congestion = self.after_loss()
        k = (300 / C) ** (1 / 3)  # segments that are missing; RFC 9438, 4.2
        windows = []
        now = 0.0
        while now < 2 * k:
            round_trip(congestion, now)
            windows.append((now, congestion.cwnd))
            now += RTT
        at_k = next(window for now, window in windows if now >= k)
        assert at_k == pytest.approx(1_000_000, rel=0.01)
        growth = [after[1] - before[1] for before, after in itertools.pairwise(windows)]
        assert max(growth[:20]) > 4 * SMSS
        near = [octets for (now, _), octets in zip(windows, growth, strict=False) if abs(now - k) < 0.5]
        assert max(near) < 2 * SMSS
        assert growth[-1] > 4 * SMSS
        assert all(octets >= 0 for octets in growth)

    def test_where_reno_would_be_faster_it_is_as_fast_as_reno(self):
        # A small window and a short round trip: 0.53 segments a round trip, 1 above the old window (RFC 9438, 4.3).
        congestion = self.after_loss(20_000)
        for i in range(20):
            flight_size = congestion.cwnd
            for _ in range(flight_size // SMSS):
                congestion.acknowledged(SMSS, flight_size, 0.001, i * 0.001)
        assert 27_000 <= congestion.cwnd <= 29_000

    def test_fast_convergence(self):
        congestion = self.after_loss()
        congestion.lost(800_000)
        congestion.cwnd = congestion.ssthresh
        assert congestion.ssthresh == pytest.approx(490_000, abs=1)  # 0.7 of what the window was
        assert congestion.state()[2] == 700_000 * (1 + BETA) / 2

    def test_idle_time_does_not_count(self):
        congestion = self.after_loss()
        round_trip(congestion, 0.0)
        before = congestion.cwnd
        congestion.acknowledged(SMSS, SMSS, RTT, 100.0)  # the window is not used any more
        congestion.acknowledged(SMSS, before, RTT, 100.0)
        assert congestion.cwnd < before + SMSS


steps = st.one_of(
    st.tuples(st.just("acknowledged"), st.integers(1, 100_000), st.integers(1, 1 << 22), st.floats(0, 10)),
    st.tuples(st.just("lost"), st.integers(1, 1 << 22)),
    st.tuples(st.just("undo")),
    st.tuples(st.just("restart")),
)


@both
@given(history=st.lists(steps, max_size=60))
def test_at_least_one_segment_may_always_go(control, history):
    congestion = control(SMSS)
    now = 0.0
    for name, *arguments in history:
        before = congestion.cwnd
        if name == "acknowledged":
            now += arguments[2]
            congestion.acknowledged(arguments[0], arguments[1], RTT, now)
            assert before <= congestion.cwnd <= before + max(arguments[0], before // 2 + 1)
        else:
            getattr(congestion, name)(*arguments)
        if name == "lost":
            congestion.cwnd = congestion.ssthresh
        assert congestion.cwnd >= SMSS
        assert congestion.ssthresh >= 2 * SMSS
