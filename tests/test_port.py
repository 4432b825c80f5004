"""The worker's port: frames are conserved, whatever is transmitted, held, completed or lost with its writer."""

import select

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipc.layout import ADDRESS_MASK, FRAME_SIZE, HEADROOM, RX_FRAMES, SMALL_SIZE, TX_LARGE, TX_SMALL, TX_SMALL_BASE
from ipc.memory import SharedMemory
from ipc.ring import Consumer, Producer
from workers.port import BACKLOG, RingPort

MEMORY = SharedMemory(1, {})  # one for all runs: each begins with empty rings


class Frames(RuleBasedStateMachine):
    """The port against a model: each frame is free, in flight (so often) or held."""

    def __init__(self):
        super().__init__()
        MEMORY.reset(0, "rx", "fill", "tx", "completion")
        self.port = RingPort(MEMORY, 0)
        self.writer = Consumer(MEMORY.rings[0]["tx"])
        self.completion = Producer(MEMORY.rings[0]["completion"])
        self.in_flight = {}  # frame → descriptors that the writer has not completed
        self.held = set()
        self.at_writer = []
        self.there = True

    def complete(self, descriptor):
        """Let the writer complete a descriptor: from now on the port may free its frame whenever it looks."""
        at = descriptor & ADDRESS_MASK
        frame = (self.port.large if at < TX_SMALL_BASE else self.port.small).frame_of(at)
        self.in_flight[frame] -= 1
        if not self.in_flight[frame]:
            del self.in_flight[frame]
        self.completion.push(descriptor)

    def transmit(self, at, length, frame, more=False):
        if self.there:
            self.in_flight[frame] = self.in_flight.get(frame, 0) + 1
        self.port.transmit(at, length, more)

    @precondition(lambda self: bool(self.port.large.free))
    @rule(hold=st.booleans(), length=st.integers(1, 65_000))
    def send_large(self, hold, length):
        frame = self.port.large.take()
        assert frame not in self.in_flight
        assert frame not in self.held
        if hold:
            self.port.hold(frame)
            self.held.add(frame)
        self.transmit(frame + HEADROOM - 62, length, frame)

    @precondition(lambda self: bool(self.port.small.free))
    @rule(offset=st.integers(0, 100), length=st.integers(1, 1900))
    def send_small(self, offset, length):
        frame = self.port.small.take()
        assert frame not in self.in_flight
        self.transmit(frame + offset, length, frame)

    @precondition(lambda self: bool(self.held and self.port.small.free))
    @rule(data=st.data())
    def send_again(self, data):
        frame = data.draw(st.sampled_from(sorted(self.held)))
        headers = self.port.small.take()
        self.transmit(headers + 66, 62, headers, more=True)
        self.transmit(frame + HEADROOM + 1460, 1460, frame)

    @precondition(lambda self: bool(self.held))
    @rule(data=st.data())
    def unhold(self, data):
        frame = data.draw(st.sampled_from(sorted(self.held)))
        self.held.discard(frame)
        self.port.unhold(frame)

    @rule()
    def flush(self):
        self.port.flush()

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def writer_works(self, data):
        self.at_writer += self.writer.take()
        done = data.draw(st.integers(0, len(self.at_writer)))
        for descriptor in self.at_writer[:done]:
            self.complete(descriptor)
        del self.at_writer[:done]
        self.completion.submit()

    @rule()
    def all_comes_home(self):
        """Everything is flushed, written and completed."""
        self.port.flush()
        if self.there:
            for descriptor in self.at_writer + self.writer.take():
                self.complete(descriptor)
            self.completion.submit()
            self.at_writer.clear()
        self.port.complete()
        assert not self.in_flight
        assert len(self.port.small.free) == TX_SMALL
        assert len(self.port.large.free) == TX_LARGE - len(self.held)

    @precondition(lambda self: self.there)
    @rule()
    def writer_dies(self):
        self.port.drop_writer()
        MEMORY.reset(0, "tx", "completion")
        self.there = False
        self.at_writer.clear()
        self.in_flight.clear()
        assert len(self.port.small.free) == TX_SMALL
        assert len(self.port.large.free) == TX_LARGE - len(self.held)

    @precondition(lambda self: not self.there)
    @rule()
    def writer_is_back(self):
        self.writer = Consumer(MEMORY.rings[0]["tx"])
        self.completion = Producer(MEMORY.rings[0]["completion"])
        self.port.add_writer()
        self.there = True

    @invariant()
    def frames_are_conserved(self):
        for pool in (self.port.large, self.port.small):
            free = pool.free
            assert len(set(free)) == len(free) <= pool.count
            assert not (self.held | self.in_flight.keys()) & set(free)


Frames.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFrames = Frames.TestCase


@pytest.fixture
def port():
    MEMORY.reset(0, "rx", "fill", "tx", "completion")
    return RingPort(MEMORY, 0)


def test_frames_of_the_reader_come_and_go(port):
    reader = Producer(MEMORY.rings[0]["rx"])
    fill = Consumer(MEMORY.rings[0]["fill"])
    assert port.frames() == []
    sent = [number * FRAME_SIZE | 100 << 32 for number in range(RX_FRAMES)]
    for descriptor in sent:
        reader.push(descriptor)
    reader.submit()
    taken = port.frames()
    assert taken == sent
    home = []
    for i in range(0, RX_FRAMES, 10):
        port.release(taken[i : i + 10])
        home += fill.take()
        assert len(taken[: i + 10]) - len(home) < RX_FRAMES // 4  # few wait for company
    assert home == taken[: len(home)]


def test_a_dead_reader_is_forgotten(port):
    port.release([1, 2, 3])
    port.drop_reader()
    MEMORY.reset(0, "rx", "fill")
    reader = Producer(MEMORY.rings[0]["rx"])
    reader.push(7)
    reader.submit()
    assert port.frames() == [7]
    port.release([7] * RX_FRAMES)
    assert Consumer(MEMORY.rings[0]["fill"]).take() == [7] * RX_FRAMES


def test_without_a_writer_packets_are_lost_and_frames_stay(port):
    port.drop_writer()
    for _ in range(TX_LARGE + 5):
        frame = port.large.take()
        port.transmit(frame, 100)
    for _ in range(TX_SMALL + 5):
        frame = port.small.take()
        port.transmit(frame + 60, SMALL_SIZE - 60)
    port.flush()
    assert (len(port.large.free), len(port.small.free)) == (TX_LARGE, TX_SMALL)


def test_packets_and_octets_are_counted_by_packet(port):
    headers, frame = port.small.take(), port.large.take()
    port.transmit(headers, 62, more=True)
    port.transmit(frame, 1460)
    assert (port.packets, port.octets) == (1, 1522)


def test_a_port_is_full_until_the_writer_has_written():
    shared = SharedMemory(1, {})
    port = RingPort(shared, 0)
    written = Consumer(shared.rings[0]["tx"])
    completed = Producer(shared.rings[0]["completion"])
    frames = 0
    while port.backlog < BACKLOG:
        port.transmit(port.large.take(), 60_000)
        frames += 1
    assert BACKLOG <= frames * 60_000 < BACKLOG + 60_000
    port.flush()
    for descriptor in written.take():
        completed.push(descriptor)
    completed.submit()
    assert select.select([port.completion_fd], [], [], 0)[0]
    port.complete()
    assert port.backlog < BACKLOG
    assert port.large.taken == 0
