"""Rings: a ring behaves as a queue does, whatever the order of calls, round the end of its slots, and across a fork."""

import os
from collections import deque
from mmap import mmap

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipc.layout import RING_SLOTS, ring_bytes
from ipc.ring import Consumer, Producer, RingMemory

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
NAME = "rx"
SLOTS = RING_SLOTS[NAME]
U64 = st.integers(min_value=0, max_value=2**64 - 1)


def ring(name: str = NAME) -> RingMemory:
    return RingMemory(name, mmap(-1, ring_bytes(name)), 0)


class RingIsAQueue(RuleBasedStateMachine):
    """A ring beside three deques: what was pushed, what was submitted, and what has been taken."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = ring()
        self.producer = Producer(self.memory)
        self.consumer = Consumer(self.memory)
        self.pushed: deque[int] = deque()
        self.submitted: deque[int] = deque()

    def teardown(self) -> None:
        os.close(self.memory.eventfd)

    @rule(descriptors=st.lists(U64, max_size=SLOTS))
    def push(self, descriptors: list[int]) -> None:
        room = SLOTS - len(self.pushed) - len(self.submitted)
        for descriptor in descriptors[:room]:
            self.producer.push(descriptor)
            self.pushed.append(descriptor)

    @rule()
    def submit(self) -> None:
        self.producer.submit()
        self.submitted += self.pushed
        self.pushed.clear()

    @rule()
    def take(self) -> None:
        assert self.consumer.take() == list(self.submitted)
        self.submitted.clear()

    @rule(count=st.integers(1, SLOTS), first=U64)
    def fill_to_the_last_slot_and_empty(self, count: int, first: int) -> None:
        self.submit()
        self.take()
        self.push([(first + i) % 2**64 for i in range(count)])
        self.submit()
        self.take()

    @precondition(lambda self: self.pushed or self.submitted)
    @rule()
    def one_end_dies_and_all_begin_anew(self) -> None:
        self.memory.reset()
        self.producer.reset()
        self.consumer.reset()
        self.memory.reset()
        self.pushed.clear()
        self.submitted.clear()

    @invariant()
    def in_flight_is_what_was_not_released(self) -> None:
        assert self.producer.in_flight == len(self.pushed) + len(self.submitted)


RingIsAQueue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingIsAQueue = RingIsAQueue.TestCase


def test_nothing_is_seen_before_submit():
    memory = ring()
    producer, consumer = Producer(memory), Consumer(memory)
    producer.push(7)
    assert consumer.take() == []
    producer.submit()
    assert consumer.take() == [7]
    assert consumer.take() == []


def test_submitting_nothing_wakes_nobody():
    memory = ring()
    producer = Producer(memory)
    producer.submit()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(memory.eventfd)


def test_rings_in_one_mapping_do_not_touch_each_other():
    names = ("rx", "fill", "tx", "completion")
    mapping = mmap(-1, sum(map(ring_bytes, names)))
    offset = 0
    rings = []
    for name in names:
        rings.append(RingMemory(name, mapping, offset))
        offset += ring_bytes(name)
    ends = [(Producer(memory), Consumer(memory)) for memory in rings]
    for number, (producer, _consumer) in enumerate(ends):
        for slot in range(rings[number].mask + 1):
            producer.push(number << 32 | slot)
        producer.submit()
    for number, (_producer, consumer) in enumerate(ends):
        assert consumer.take() == [number << 32 | slot for slot in range(rings[number].mask + 1)]
    for memory in rings:
        os.close(memory.eventfd)


def test_a_count_that_is_no_power_of_two_is_refused(monkeypatch):
    monkeypatch.setitem(RING_SLOTS, "odd", 100)
    with pytest.raises(ValueError, match="a ring of 100 slots is not a power of two"):
        RingMemory("odd", mmap(-1, 4096), 0)


def test_between_two_processes_every_descriptor_arrives_once_in_order():
    """A child sends 20,000 descriptors in batches of uneven size; the fill ring is its way back, as in the gateway."""
    there, back = ring(), ring("fill")
    count = 20_000
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = _send_all(Producer(there), Consumer(back), count)
        finally:
            os._exit(status)
    consumer, producer = Consumer(there), Producer(back)
    expected = 0
    try:
        while expected < count:
            assert _readable(consumer.fileno()), f"nothing after {expected}"
            taken = consumer.take()
            assert taken == [_value(expected + i) for i in range(len(taken))]
            expected += len(taken)
            for descriptor in taken:
                producer.push(descriptor)
            producer.submit()
    finally:
        _, status = os.waitpid(pid, 0)
    assert status == 0
    os.close(there.eventfd)
    os.close(back.eventfd)


def _value(number: int) -> int:
    return number * 0x9E3779B97F4A7C15 % 2**64


def _readable(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(10_000))


def _send_all(producer: Producer, back: Consumer, count: int) -> int:
    sent = returned = 0
    batch = 1
    while returned < count:
        while sent < count and sent - returned < SLOTS:
            producer.push(_value(sent))
            sent += 1
            if sent % batch == 0:
                producer.submit()
                batch = batch % 61 + 1
        producer.submit()
        if not _readable(back.fileno()):
            return 2
        home = back.take()
        if home != [_value(returned + i) for i in range(len(home))]:
            return 3
        returned += len(home)
    return 0
