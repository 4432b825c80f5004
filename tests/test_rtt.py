"""The retransmission timeout (RFC 6298)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.tcp.rtt import INITIAL_RTO, MAX_RTO, MIN_RTO, RttEstimator


def test_before_a_measurement():
    assert RttEstimator().rto == INITIAL_RTO == 1.0


def test_first_and_second_measurement():
    rtt = RttEstimator()
    rtt.sample(0.5)
    assert (rtt.srtt, rtt.rttvar, rtt.rto) == (0.5, 0.25, 1.5)
    rtt.sample(0.9)
    # RTTVAR first, with the old SRTT: 3/4 · 0.25 + 1/4 · 0.4; then SRTT: 7/8 · 0.5 + 1/8 · 0.9
    assert rtt.rttvar == pytest.approx(0.2875)
    assert rtt.srtt == pytest.approx(0.55)
    assert rtt.rto == pytest.approx(0.55 + 4 * 0.2875)


def test_back_off_doubles_and_a_measurement_ends_it():
    rtt = RttEstimator()
    rtt.sample(0.1)
    measured = rtt.rto
    for expected in (2, 4, 8):
        rtt.back_off()
        assert rtt.rto == pytest.approx(measured * expected)
    rtt.sample(0.1)
    assert rtt.rto < measured


@pytest.mark.parametrize("samples", [[], [0.4], [0.4, 0.1], [0.00001]])
def test_end_of_a_back_off_gives_what_the_measurements_gave(samples):
    rtt = RttEstimator()
    for sample in samples:
        rtt.sample(sample)
    measured = rtt.rto
    rtt.back_off()
    rtt.back_off()
    rtt.end_back_off()
    assert rtt.rto == measured


@given(st.lists(st.one_of(st.none(), st.floats(0.0001, 120)), max_size=50))
def test_always_between_minimum_and_maximum(steps):
    rtt = RttEstimator()
    for step in steps:
        if step is None:
            rtt.back_off()
        else:
            rtt.sample(step)
        assert MIN_RTO <= rtt.rto <= MAX_RTO
