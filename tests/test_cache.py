"""The shared cache: what one process puts, each one gets, until it dies or is pushed out; never anything else."""

import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.cache import MAX_VALUE, SharedCache

SMALLEST = 1 << 18


@pytest.fixture
def cache():
    made = SharedCache(SMALLEST)
    yield made
    made.close()


def test_what_was_put_is_got_until_its_end(cache):
    cache.put(b"key", b"value", 10.0, 20.0)
    assert cache.get(b"key", 19.9) == (b"value", 10.0, 20.0)
    assert cache.get(b"key", 20.0) is None
    assert cache.get(b"other", 11.0) is None


def test_a_new_value_replaces_the_old_one(cache):
    cache.put(b"key", b"old", 0.0, 100.0)
    cache.put(b"key", b"new", 1.0, 50.0)
    assert cache.get(b"key", 2.0) == (b"new", 1.0, 50.0)


def test_the_oldest_entries_go(cache):
    for i in range(1000):
        cache.put(b"key %d" % i, bytes(1000), 0.0, 100.0)
    kept = [i for i in range(1000) if cache.get(b"key %d" % i, 1.0)]
    assert kept == list(range(1000 - len(kept), 1000))
    assert 240 <= len(kept) <= 256


def test_a_full_cache_holds_what_fits(cache):
    """Few entries are lost to full buckets: at 128 octets each, half of the index is in use."""
    for i in range(SMALLEST // 128):
        cache.put(b"%09d" % i, bytes(80), 0.0, 100.0)
    kept = sum(cache.get(b"%09d" % i, 1.0) is not None for i in range(SMALLEST // 128))
    assert kept > 0.9 * SMALLEST / 128


def test_the_first_entry_gives_way_to_nobody_while_there_is_room(cache):
    """A free word of the index is older than the very first entry."""
    cache.put(b"first", b"1", 0.0, 100.0)
    bucket = hash(b"first") % cache._buckets
    others = [key for key in (b"%d" % i for i in range(100_000)) if hash(key) % cache._buckets == bucket][:3]
    for key in others:
        cache.put(key, key, 0.0, 100.0)
    assert cache.get(b"first", 1.0) is not None
    assert [cache.get(key, 1.0).value for key in others] == others


def test_values_and_keys_of_every_length_up_to_the_greatest(cache):
    cache.put(b"", b"", 0.0, 1.0)
    assert cache.get(b"", 0.5).value == b""
    cache.put(b"k", bytes(MAX_VALUE), 0.0, 1.0)
    assert cache.get(b"k", 0.5).value == bytes(MAX_VALUE)
    with pytest.raises(ValueError, match="65536 octets, 65535 are allowed"):
        cache.put(b"k", bytes(MAX_VALUE + 1), 0.0, 1.0)


@pytest.mark.parametrize("octets", [SMALLEST + 1, 1 << 16])
def test_a_size_that_is_none(octets):
    with pytest.raises(ValueError, match="power of two"):
        SharedCache(octets)


@given(st.lists(st.tuples(st.binary(max_size=3), st.binary(max_size=2000), st.integers(1, 9)), max_size=60))
@settings(max_examples=60)
def test_it_never_says_what_was_not_put(puts):
    """Compared with a dictionary: a key has its last value or, pushed out or dead, none."""
    cache = SharedCache(SMALLEST)
    model = {}
    for now, (key, value, seconds) in enumerate(puts):
        cache.put(key, value, float(now), float(now + seconds))
        model[key] = (value, float(now), float(now + seconds))
        for known, entry in model.items():
            assert cache.get(known, now + 0.5) in ((entry,) if entry[2] > now + 0.5 else (None,))
    cache.close()


def test_another_process_sees_it_and_its_death_holds_nothing_up(cache):
    """A child that dies with the lock in its hands, in the middle of an entry, neither blocks nor leaves garbage."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            cache.put(b"from the child", b"seen", 0.0, 100.0)
            import ipc.cache

            def die(body):
                os.write(tell, b"x")
                signal.pause()

            ipc.cache.fcntl.lockf(cache._fd, ipc.cache.fcntl.LOCK_EX)
            cache._head[0] += 4096
            die(None)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(tell)
    assert cache.get(b"from the child", 1.0).value == b"seen"
    cache.put(b"after", b"it", 0.0, 100.0)
    assert cache.get(b"after", 1.0).value == b"it"


def test_readers_beside_a_writer_see_whole_values_only(cache):
    """The writer laps the log again and again; each value is made of its key."""
    pid = os.fork()
    if not pid:
        try:
            for turn in range(40_000):
                key = b"%d" % (turn % 50)
                cache.put(key, key * 300, 0.0, 1e9)
        finally:
            os._exit(0)
    seen = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        for i in range(50):
            key = b"%d" % i
            entry = cache.get(key, 1.0)
            if entry is not None:
                assert entry.value == key * 300
                seen += 1
    assert seen
