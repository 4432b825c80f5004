"""Counters: blocks by owner, read by anybody, surviving their writer, never torn."""

import os
import time

import pytest

from ipc.counters import Counters
from ipc.layout import COUNTER_SLOTS

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def test_blocks_are_separate_and_named():
    counters = Counters({"reader": ("frames", "short"), "worker/0": ("flows",)})
    counters.block("reader")[1] += 3
    counters.block("worker/0")[0] = 2**64 - 1
    assert counters.snapshot() == {"reader": {"frames": 0, "short": 3}, "worker/0": {"flows": 2**64 - 1}}


def test_all_words_of_all_blocks():
    names = tuple(f"n{i}" for i in range(COUNTER_SLOTS))
    counters = Counters({"a": names, "b": names})
    for owner, start in (("a", 1000), ("b", 5000)):
        block = counters.block(owner)
        for index in range(COUNTER_SLOTS):
            block[index] = start + index
    assert counters.snapshot() == {
        owner: {f"n{i}": start + i for i in range(COUNTER_SLOTS)} for owner, start in (("a", 1000), ("b", 5000))
    }


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match=f"a has {COUNTER_SLOTS + 1} counters, a block has {COUNTER_SLOTS}"):
        Counters({"a": ("x",) * (COUNTER_SLOTS + 1)})


def test_no_owner_at_all():
    assert Counters({}).snapshot() == {}


def test_a_child_counts_and_its_successor_counts_on():
    counters = Counters({"worker/0": ("flows",)})
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                counters.block("worker/0")[0] += 5
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    assert counters.snapshot() == {"worker/0": {"flows": 10}}


def test_a_word_is_never_seen_half_written():
    """A child stores only words whose halves are equal, as fast as it can; no other value is ever read."""
    counters = Counters({"a": ("word", "stop")})
    block = counters.block("a")
    pid = os.fork()
    if pid == 0:
        try:
            half = 0
            while not block[1]:
                half = half + 1 & 0xFFFFFFFF
                block[0] = half << 32 | half
        finally:
            os._exit(0)
    try:
        ends_at = time.monotonic() + 10.0
        torn = reads = 0
        while reads < 200_000 or not block[0]:  # until it runs
            word = block[0]
            torn += word >> 32 != word & 0xFFFFFFFF
            reads += 1
            assert time.monotonic() < ends_at
    finally:
        block[1] = 1
        os.waitpid(pid, 0)
    assert torn == 0
