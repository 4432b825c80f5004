"""Timers: called in the order of their times, never early, re-armed from inside."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from workers.timers import Timers


def test_nothing_to_do():
    timers = Timers()
    assert timers.next_at == inf
    timers.run(1e9)


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 120), max_size=10))
def test_in_order_and_never_early(times, moments):
    timers = Timers()
    called = []
    for number, when in enumerate(times):

        def call(now, when=when, number=number):
            called.append((when, number, now))

        timers.call_at(when, call)
    for now in sorted(moments):
        before = len(called)
        timers.run(now)
        assert all(when <= now == at for when, _, at in called[before:])
        assert timers.next_at > now
    assert [entry[:2] for entry in called] == sorted(entry[:2] for entry in called)
    assert sorted(when for when, _, _ in called) == sorted(when for when in times if moments and when <= max(moments))


def test_a_callback_may_arm_again():
    timers = Timers()
    called = []

    def again(now):
        called.append(now)
        if len(called) < 3:
            timers.call_at(now + 1, again)

    timers.call_at(1.0, again)
    timers.run(1.5)
    assert (called, timers.next_at) == ([1.5], 2.5)
    timers.run(2.5)
    timers.run(3.5)
    assert called == [1.5, 2.5, 3.5]
    assert timers.next_at == inf


def test_a_callback_armed_for_now_runs_in_the_same_call():
    timers = Timers()
    called = []
    timers.call_at(1.0, lambda now: timers.call_at(now, called.append))
    timers.run(2.0)
    assert called == [2.0]
