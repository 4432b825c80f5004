"""Shared memory: made before the fork, seen by all, untouched pages cost nothing, reset empties rings."""

import os

import pytest

from ipc.layout import FRAME_SIZE, RX_FRAMES, SMALL_SIZE, TX_LARGE, TX_SMALL, descriptor
from ipc.memory import SharedMemory
from ipc.ring import Consumer, Producer

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def shared():
    made = SharedMemory(2, {"reader": ("frames",), "worker/0": ("flows",), "worker/1": ("flows",)})
    yield made
    for rings in made.rings:
        for ring in rings.values():
            os.close(ring.eventfd)


def test_the_mappings_have_room_for_every_frame(shared):
    assert len(shared.rx_frames) == RX_FRAMES * FRAME_SIZE
    assert [len(frames) for frames in shared.tx_frames] == [TX_LARGE * FRAME_SIZE + TX_SMALL * SMALL_SIZE] * 2
    assert [sorted(rings) for rings in shared.rings] == [["completion", "fill", "rx", "tx"]] * 2


def test_a_frame_goes_to_another_process_and_comes_home(shared):
    """The parent is the reader, the child a worker that adds one to every octet and gives the frame back."""
    at, length = 5 * FRAME_SIZE, 1000
    shared.rx_frames[at : at + length] = bytes(range(250)) * 4
    rings = shared.rings[1]
    reader_rx, reader_fill = Producer(rings["rx"]), Consumer(rings["fill"])
    reader_rx.push(descriptor(at, length))
    reader_rx.submit()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            (got,) = Consumer(rings["rx"]).take()
            view = memoryview(shared.rx_frames)[at : at + length]
            view[:] = bytes(octet + 1 for octet in view)
            fill = Producer(rings["fill"])
            fill.push(got)
            fill.submit()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert reader_fill.take() == [descriptor(at, length)]
    assert shared.rx_frames[at : at + length] == bytes(range(1, 251)) * 4


def test_reset_empties_the_named_rings_of_one_shard_only(shared):
    ends = {}
    for shard in (0, 1):
        for name in ("rx", "fill", "tx", "completion"):
            ring = shared.rings[shard][name]
            ends[shard, name] = Producer(ring), Consumer(ring)
            ends[shard, name][0].push(shard)
            ends[shard, name][0].submit()
    shared.reset(0, "rx", "fill")
    taken = {key: consumer.take() for key, (_producer, consumer) in ends.items()}
    assert taken.pop((0, "rx")) == taken.pop((0, "fill")) == []
    assert all(descriptors == [shard] for (shard, _name), descriptors in taken.items())


def test_memory_that_nobody_touched_costs_nothing():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    shared = SharedMemory(64, {})
    grown = resident() - before
    mapped = len(shared.rx_frames) + sum(map(len, shared.tx_frames))
    assert mapped > 500 << 20
    assert grown < 8 << 20
    for rings in shared.rings:
        for ring in rings.values():
            os.close(ring.eventfd)
