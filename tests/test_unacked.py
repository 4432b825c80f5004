"""Unacked: what is kept of text in flight, where, and that no flow takes the frames of the others."""

from contextlib import ExitStack

import pytest

from ipc.layout import HEADROOM, TX_LARGE
from tests.loopback import ALL_OPTIONS, connected, received
from tests.one_worker import Answer, OneWorker, RecordingPort
from workers import counts
from workers.tcp.segment import ACK, Segment
from workers.unacked import COPY_LIMIT, FEW_FRAMES, MAX_HELD, Unacked


@pytest.fixture
def one():
    made = OneWorker()
    yield made
    made.close()


@pytest.fixture
def port():
    made = RecordingPort()
    yield made
    made.close()


def keep(unacked, port, seq, text):
    """Read text into a frame and keep it, as a relay does; the frame goes out and comes home."""
    frame = port.large.take()
    port.tx[frame + HEADROOM : frame + HEADROOM + len(text)] = text
    unacked.keep(seq, frame, len(text))
    port.transmit(frame + HEADROOM, len(text))
    port.complete()


def test_one_flow_holds_half_of_the_frames_at_most(port):
    unacked = Unacked(port)
    for number in range(3 * TX_LARGE):
        keep(unacked, port, number * 5000, bytes([number % 251]) * 5000)
    assert len(port._held) == MAX_HELD == TX_LARGE // 2
    assert len(port.large.free) == TX_LARGE - MAX_HELD
    unacked.release(5000 * 10)
    assert len(port._held) == MAX_HELD - 10
    keep(unacked, port, 5000 * 3 * TX_LARGE, bytes(5000))
    assert len(port._held) == MAX_HELD - 9
    unacked.copy_held()
    assert not port._held
    keep(unacked, port, 5000 * (3 * TX_LARGE + 1), bytes(5000))
    assert len(port._held) == 1
    unacked.release_all()
    assert len(port.large.free) == TX_LARGE


def test_many_flows_leave_some_frames_to_the_next(port):
    flows = [Unacked(port) for _ in range(TX_LARGE)]
    for flow in flows:
        for number in range(4):
            keep(flow, port, number * 5000, bytes(5000))
    assert len(port.large.free) >= FEW_FRAMES - 1
    for flow in flows:
        flow.release_all()


def test_many_small_chunks_are_few_copies(port):
    """A server that writes octet by octet: what is in flight costs its octets, not an object for each."""
    unacked = Unacked(port)
    text = bytes(i % 251 for i in range(10_000))
    for at in range(len(text)):
        keep(unacked, port, at, text[at : at + 1])
    assert len(unacked._chunks) == -(-len(text) // COPY_LIMIT)
    assert b"".join(chunk[3] for chunk in unacked._chunks) == text

    class Plain:
        """Headers of no octets."""

        def write(self, memory, end, out):
            return 0

    out = Segment()
    for at, length in ((0, 1), (4000, 200), (COPY_LIMIT - 1, 2), (9000, 1000)):
        out.seq, out.len = at, length
        assert unacked.transmit(Plain(), out)
        assert port.sent[-1] == text[at : at + length]
    port.complete()
    unacked.release(COPY_LIMIT - 1)
    assert unacked._chunks[0][0] == 0
    unacked.release(COPY_LIMIT)
    assert unacked._chunks[0][0] == COPY_LIMIT
    unacked.release_all()


def test_stalled_flows_do_not_stop_one_that_runs(one):
    """More clients than there are frames take nothing and acknowledge nothing; one does."""
    with ExitStack() as targets:
        running, source = connected(one, ALL_OPTIONS)
        targets.enter_context(source)
        stalled = [connected(one, ALL_OPTIONS, port=41000 + number)[1] for number in range(TX_LARGE + 20)]
        for target in stalled:
            targets.enter_context(target)
            target.sendall(bytes(10_000))
        total = 10_000 * len(stalled)
        one.run_until(lambda: sum(len(Answer(frame).text) for frame in one.port.sent) >= total)
        one.take_sent()
        assert TX_LARGE - len(one.port._held) >= FEW_FRAMES - 1
        text = bytes(i % 251 for i in range(300_000))
        view = memoryview(text)

        def feed():
            nonlocal view
            try:
                view = view[source.send(view) :]
            except BlockingIOError:
                pass
            sent = one.take_sent()
            one.port.sent += [frame for frame in sent if Answer(frame).destination_port == 40000]
            running.unread()
            if running.acked != running.rcv_nxt:
                running.send(ACK)
            return len(running.received) == len(text)

        one.run_until(feed, 20)
        assert running.received == text
        assert one.counted(counts.NO_FRAMES) == 0
        running.push(b"and up")
        assert received(one, source, 6) == b"and up"
        assert max(flow._unacked._held for flow in one.table.values()) <= MAX_HELD
        one.skip(1.0)  # the stalled are sent again, and what they held is copied
        assert not one.port._held
