"""Channels: messages keep their borders and order; the end of a process is an exception, not a message."""

import os

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.channel import MAX_MESSAGE, Channel, ChannelClosed

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=50) | st.binary(max_size=50)
messages = st.dictionaries(st.text(max_size=10), scalars | st.lists(scalars, max_size=5), max_size=5)


@pytest.fixture
def pair():
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


@settings(deadline=None)
@given(st.lists(messages, max_size=8))
def test_what_is_sent_arrives_in_order_with_its_borders(sent):
    left, right = Channel.pair()
    for message in sent:
        left.send(message)
    left.close()
    received = []
    with pytest.raises(ChannelClosed):
        while True:
            received.append(right.receive())
    right.close()
    assert received == sent


def test_none_while_there_is_nothing(pair):
    assert pair[0].receive() is None


def test_both_directions(pair):
    left, right = pair
    left.send({"do": "stop"})
    right.send({"done": "stop"})
    assert right.receive() == {"do": "stop"}
    assert left.receive() == {"done": "stop"}


def test_sending_to_nobody(pair):
    left, right = pair
    right.close()
    with pytest.raises(ChannelClosed):
        left.send({"do": "stop"})


def test_sending_to_somebody_who_does_not_read_is_told(pair):
    left, _right = pair
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            left.send({"do": "stop"})


def test_a_message_that_is_too_large_is_a_bug(pair):
    left, right = pair
    largest = MAX_MESSAGE - len(msgpack.packb({"x": b"a" * 40_000})) + 40_000
    left.send({"x": b"a" * largest})
    assert right.receive() == {"x": b"a" * largest}
    with pytest.raises(ValueError, match=f"control message of {MAX_MESSAGE + 1} octets, the limit is {MAX_MESSAGE}"):
        left.send({"x": b"a" * (largest + 1)})


def test_the_death_of_the_other_process_is_an_end_of_file():
    left, right = Channel.pair()
    pid = os.fork()
    if pid == 0:
        try:
            left.close()
            right.send({"event": "ready"})
        finally:
            os._exit(0)
    right.close()
    os.waitpid(pid, 0)
    assert left.receive() == {"event": "ready"}
    with pytest.raises(ChannelClosed):
        left.receive()
    left.close()
