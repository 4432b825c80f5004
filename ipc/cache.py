"""SharedCache: octets by key, with an end of life; every process of the tree reads and writes the same one.

    head   index: buckets of four words            log: entries, the oldest overwritten first
    ┌────┐ ┌────┬────┬────┬────┬────               ┌─────────┬──────────────┬───────┬──
    │u64 │ │tag │    │    │    │ …                 │ entry   │ entry        │ …     │
    └────┘ │pos │    │    │    │                   └─────────┴──────────────┴───────┴──
           └────┴────┴────┴────┴────               checksum, lengths, times, key, value

| word       | written by                 | when                                                            |
| ---------- | -------------------------- | --------------------------------------------------------------- |
| head       | who holds the lock         | before it writes an entry: what head has passed is no more      |
| log        | who holds the lock         | between head and index                                          |
| index word | who holds the lock         | last, as one u64: from then on the entry is there               |

Readers take no lock: they copy the entry out, and believe it if its checksum is right and head has not passed it. Who
dies while writing leaves octets that no word points to, and the kernel gives its lock back. Positions count octets of
the log since it was made, so they never wrap.
"""

import fcntl
import os
from mmap import mmap
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

_ENTRY: Final = Struct("=IHHdd")  # checksum of all that follows, octets of key and value, stored at, expires at
_ALIGNMENT: Final = 8  #: octets; positions are kept in this unit
_WAYS: Final = 4  #: entries whose keys fall into one bucket; the oldest of them gives way
_POSITION_BITS: Final = 48
_POSITION: Final = (1 << _POSITION_BITS) - 1
_INDEX_AT: Final = 64  #: octets; head has a cache line of its own
_OCTETS_A_SLOT: Final = 64  #: of the log for each word of the index: half of what a small answer takes
MAX_VALUE: Final = 65535


class Entry(NamedTuple):
    """What a key has; times in seconds of the monotonic clock."""

    value: bytes
    stored_at: float
    expires_at: float


class SharedCache:
    """At most `octets` of entries; made before the first fork, and inherited."""

    def __init__(self, octets: int) -> None:
        """`octets` is a power of two; what is not used yet costs no memory. OSError: no descriptor is left."""
        if octets & (octets - 1) or octets < 2 * MAX_VALUE:
            raise ValueError(f"a cache of {octets} octets is not a power of two of at least {2 * (MAX_VALUE + 1)}")
        self.octets = octets
        slots = octets // _OCTETS_A_SLOT
        self._buckets = slots // _WAYS
        self._log_at = _INDEX_AT + 8 * slots
        # A memfd for the lock; the kernel releases it when its holder dies, and forks do not share it.
        self._fd = os.memfd_create("ringway-cache", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self._log_at + octets)
        self._memory = mmap(self._fd, self._log_at + octets)
        words = memoryview(self._memory).cast("Q")
        self._head = words[:1]
        self._head[0] = _ALIGNMENT  # no entry has position 0, which a free word of the index has
        self._index = words[_INDEX_AT // 8 : _INDEX_AT // 8 + slots]

    def get(self, key: bytes, now: float) -> Entry | None:
        """Return what the key has, None if there is nothing that is still alive."""
        hashed = hash(key)
        tag = _tag(hashed)
        bucket = hashed % self._buckets * _WAYS
        for word in self._index[bucket : bucket + _WAYS].tolist():
            if word >> _POSITION_BITS == tag:
                entry = self._read(key, (word & _POSITION) * _ALIGNMENT)
                if entry is not None and entry.expires_at > now:
                    return entry
        return None

    def put(self, key: bytes, value: bytes, now: float, expires_at: float) -> None:
        """Keep a value; the oldest entries go. ValueError: it has more than MAX_VALUE octets."""
        if len(value) > MAX_VALUE or len(key) > MAX_VALUE:
            raise ValueError(f"a key of {len(key)} and a value of {len(value)} octets, {MAX_VALUE} are allowed")
        body = _ENTRY.pack(0, len(key), len(value), now, expires_at)[4:] + key + value
        packed = crc32(body).to_bytes(4, "little") + body
        hashed = hash(key)
        tag = _tag(hashed)
        bucket = hashed % self._buckets * _WAYS
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            position = self._head[0]
            left = self.octets - position % self.octets
            if len(packed) > left:
                position += left
            end = position + len(packed)
            self._head[0] = end + -end % _ALIGNMENT
            at = self._log_at + position % self.octets
            self._memory[at : at + len(packed)] = packed
            self._index[bucket + self._way(bucket, tag, key)] = tag << _POSITION_BITS | position // _ALIGNMENT
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _way(self, bucket: int, tag: int, key: bytes) -> int:
        """Return which word of the bucket a key takes: its own, or that of the oldest entry (a free one is oldest)."""
        words = self._index[bucket : bucket + _WAYS].tolist()
        for way, word in enumerate(words):
            if word >> _POSITION_BITS == tag and self._read(key, (word & _POSITION) * _ALIGNMENT) is not None:
                return way
        return min(range(_WAYS), key=lambda way: words[way] & _POSITION)

    def _read(self, key: bytes, position: int) -> Entry | None:
        """Copy an entry out; None if it is another key's, was overwritten, or is not whole."""
        head = self._head
        octets = self.octets
        if head[0] - position > octets:
            return None
        at = self._log_at + position % octets
        memory = self._memory
        checksum, key_length, value_length, stored_at, expires_at = _ENTRY.unpack_from(memory, at)
        end = at + _ENTRY.size + key_length + value_length
        if key_length != len(key) or end > self._log_at + octets:
            return None
        body = memory[at + 4 : end]
        value_at = _ENTRY.size - 4 + key_length
        if body[_ENTRY.size - 4 : value_at] != key or crc32(body) != checksum or head[0] - position > octets:
            return None
        return Entry(body[value_at:], stored_at, expires_at)

    def close(self) -> None:
        """Give the memory back; only where no process uses it any more."""
        self._head.release()
        self._index.release()
        os.close(self._fd)


def _tag(hashed: int) -> int:
    """Return 16 bits of a hash that do not choose the bucket; never 0, which a free word has."""
    return hashed >> 44 & 0xFFFF or 1
