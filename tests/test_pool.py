"""Frames are conserved: each is free or in use, never both, never twice, whatever the order."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipc.layout import FRAME_SIZE, SMALL_SIZE, TX_SMALL, TX_SMALL_BASE
from ipc.pool import FramePool

BASE, SIZE, COUNT = 3 * FRAME_SIZE, FRAME_SIZE, 8


class FramesAreConserved(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = FramePool(BASE, SIZE, COUNT)
        self.used: list[int] = []

    @precondition(lambda self: self.pool.free)
    @rule()
    def take(self) -> None:
        address = self.pool.take()
        assert address not in self.used
        self.used.append(address)

    @precondition(lambda self: not self.pool.free)
    @rule()
    def take_of_nothing(self) -> None:
        try:
            self.pool.take()
        except IndexError:
            return
        raise AssertionError("a frame came out of an empty pool")

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def give(self, data) -> None:
        address = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.pool.give(address)
        assert self.pool.free[-1] == address, "the last one given is the next one taken"

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.used.clear()

    @invariant()
    def every_frame_is_somewhere_once(self) -> None:
        assert sorted(self.pool.free + self.used) == [BASE + number * SIZE for number in range(COUNT)]
        assert self.pool.taken == len(self.used)


FramesAreConserved.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestFramesAreConserved = FramesAreConserved.TestCase


@given(number=st.integers(0, TX_SMALL - 1), offset=st.integers(0, SMALL_SIZE - 1))
def test_every_address_inside_a_frame_leads_back_to_it(number, offset):
    pool = FramePool(TX_SMALL_BASE, SMALL_SIZE, TX_SMALL)
    start = TX_SMALL_BASE + number * SMALL_SIZE
    assert pool.frame_of(start + offset) == start
    assert pool.index_of(start + offset) == number


def test_the_lowest_address_is_taken_first():
    pool = FramePool(0, SIZE, 3)
    assert [pool.take() for _ in range(3)] == [0, SIZE, 2 * SIZE]
